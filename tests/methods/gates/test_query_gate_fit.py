"""The gate's fit: calibrated for unseen kinds, and not misled by form."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from planted import PlantedData

from finesteer_hf import playground
from finesteer_hf.errors import DatasetError
from finesteer_hf.estimators import GATE_FUNCTIONS, SCORE_FUNCTIONS, AutoScore, StateScore, cross_fitted_scores
from finesteer_hf.estimators.gating.conformal import kinds_rank
from finesteer_hf.method_api import Part
from finesteer_hf.methods._shared.rows import general_rows, json_ready, query_kinds, query_rows, query_texts
from finesteer_hf.methods.query_gate import GateFit, QueryGateConfig, choose_read_site, fit_gate, separability
from finesteer_hf.methods.query_gate.tensors import GATE_TENSORS, SCORE_TENSORS, from_file
from finesteer_hf.sites import Site


SITE = Site("resid_post", 2)
BOTH: tuple[Part, ...] = ("fit", "calibration")


def fires(gate: GateFit, states: np.ndarray) -> np.ndarray:
    score = SCORE_FUNCTIONS[gate.score](torch.from_numpy(states), **from_file(SCORE_TENSORS[gate.score], gate.tensors))
    return GATE_FUNCTIONS["conformal"](score, **from_file(GATE_TENSORS["conformal"], gate.tensors)).numpy() >= 1


def test_each_kind_is_scored_by_a_fit_without_it() -> None:
    data = PlantedData(kinds=True, clusters=6, repeats=2)
    config = QueryGateConfig(gate_score="state", gate_epsilon=0.1)
    gate = fit_gate(config, data, SITE)
    ir, general, kinds = query_rows(data, SITE, BOTH), general_rows(data, SITE, BOTH), query_kinds(data, SITE, BOTH)
    assert kinds is not None and len(kinds) == len(ir) == 96
    final = StateScore(seed=data.seed).fit(ir, general)
    np.testing.assert_array_equal(gate.tensors["gate.weight"].numpy(), final.weight_)
    scores = gate.tensors["gate.calibration"].numpy()
    # General prompts are left out in folds of their own; the scores of kinds hold for any of them.
    found = np.full(len(ir), np.nan)
    from finesteer_hf.estimators import make_folds

    others = make_folds(len(general), 6, None, data.seed)
    for (train, test), (seen, _) in zip(make_folds(len(ir), 6, kinds, data.seed), others, strict=True):
        assert len(set(kinds[test])) == 1 and not set(kinds[test]) & set(kinds[train])
        found[test] = StateScore(final.C_).fit(ir[train], general[seen]).score_samples(ir[test])
    np.testing.assert_allclose(scores, np.sort(found), rtol=1e-4, atol=1e-4)
    rank, missed = kinds_rank(found, kinds, 0.1)
    assert gate.tensors["gate.threshold"].item() == pytest.approx(np.sort(found)[rank - 1], rel=1e-4)
    assert gate.report["misses_of_left_out_kinds"] == pytest.approx(missed)


def test_the_report_has_the_calibration_and_its_guarantee() -> None:
    data = PlantedData(kinds=True, clusters=6)
    by_kind = fit_gate(QueryGateConfig(gate_score="state"), data, SITE).report
    by_row = fit_gate(QueryGateConfig(gate_score="state", gate_calibration="rows"), data, SITE).report
    assert (by_kind["calibration"], by_row["calibration"]) == ("kinds", "rows")
    assert by_kind["kinds"] == 6 and by_kind["worst_kind"].startswith("kind ")
    assert by_kind["misses_of_worst_kind"]["value"] >= by_kind["misses_of_left_out_kinds"]
    assert "approximate" in by_kind["guarantee"] and "6 kinds" in by_kind["guarantee"]
    assert by_kind["miss_bound"] > by_row["miss_bound"]
    assert "other kinds" in by_row["not_guaranteed"] and "final score" in by_kind["not_guaranteed"]
    json.dumps(json_ready(by_kind), allow_nan=False)


@pytest.mark.parametrize(
    ("settings", "world", "expected"),
    [
        ({}, {"kinds": True, "clusters": 6}, "kinds"),
        ({}, {"kinds": True, "clusters": 3}, "rows"),
        ({}, {"clusters": 6}, "rows"),
        ({"gate_guarantee": "pac"}, {"kinds": True, "clusters": 6}, "rows"),
        ({"gate_calibration": "kinds"}, {"kinds": True, "clusters": 3}, "kinds"),
        ({}, {"kinds": True, "clusters": 6, "general": 3}, "rows"),
        ({"gate_score": "ser"}, {"kinds": True, "clusters": 6, "general": 0}, "kinds"),
    ],
)
def test_auto_uses_kinds_if_there_are_enough(settings: dict[str, Any], world: dict[str, Any], expected: str) -> None:
    gate = fit_gate(QueryGateConfig(**{"gate_score": "state", **settings}), PlantedData(**world), SITE)
    assert gate.report["calibration"] == expected


def test_kinds_are_refused_if_they_cannot_be_left_out() -> None:
    for settings in ({"gate": "quantile"}, {"gate_guarantee": "pac"}):
        with pytest.raises(ValueError, match="gate_calibration='kinds' needs gate='conformal'"):
            QueryGateConfig(gate_calibration="kinds", **settings)
    with pytest.raises(ValueError, match="gate_calibration"):
        QueryGateConfig(gate_calibration="groups")  # type: ignore[arg-type]
    for data in (PlantedData(), PlantedData(kinds=True, clusters=1)):
        with pytest.raises(DatasetError, match="leaves out one category at a time"):
            fit_gate(QueryGateConfig(gate_calibration="kinds"), data, SITE)


class Playground:
    """States and texts of the playground's questions, some kinds of which the fit does not see."""

    seed = 0

    def __init__(
        self, rows: Sequence[dict[str, Any]], states: np.ndarray, general: np.ndarray, others: list[str]
    ) -> None:
        self._rows, self._states, self._general, self._others = rows, states, general, others
        rng = np.random.default_rng(0)
        self._parts = dict(zip((*BOTH, "validation"), np.split(rng.permutation(len(rows)), 3), strict=True))
        self._general_parts = dict(
            zip((*BOTH, "validation"), np.array_split(rng.permutation(len(general)), 3), strict=True)
        )

    def query(self, site: Site, part: Part) -> np.ndarray:
        return self._states[self._parts[part]]

    def general(self, site: Site, part: Part) -> np.ndarray:
        return self._general[self._general_parts[part]]

    def prompts(self, part: Part) -> np.ndarray:
        return self._parts[part]

    def kinds(self, part: Part) -> np.ndarray:
        return np.array([self._rows[i]["category"] for i in self._parts[part]])

    def texts(self, text: str, part: Part) -> list[str]:
        if text == "general":
            return [self._others[i] for i in self._general_parts[part]]
        return [self._rows[i]["prompt"][0]["content"] for i in self._parts[part]]


def test_on_the_playground_the_gate_opens_on_kinds_that_it_has_not_seen() -> None:
    from finesteer_hf.fitting.capture.jobs import Job
    from finesteer_hf.fitting.capture.reader import StateReader
    from finesteer_hf.fitting.data.encoding import encode_prompts
    from finesteer_hf.fitting.data.rows import PromptRow
    from finesteer_hf.method_api import CaptureRequest

    model, tokenizer = playground.load()
    reader = StateReader(model, CaptureRequest((SITE,), ("query",)))

    def read(prompts: list[Any]) -> np.ndarray:
        passages = encode_prompts(tokenizer, [PromptRow(prompt) for prompt in prompts])
        found: dict[Any, np.ndarray] = {}
        for batch in reader.read([Job(passage) for passage in dict.fromkeys(passages)]):
            found |= dict(zip(batch.prompts, batch.states[SITE, "query"], strict=True))
        return np.stack([found[passage] for passage in passages])

    rows = playground.preference_rows("truthful", "all")[::2]
    general = playground.general_rows("all")[::2]
    states, others = read([row["prompt"] for row in rows]), read([row["prompt"] for row in general])
    unseen = np.isin([row["category"] for row in rows], ["animals", "luck"])
    kept = np.flatnonzero(~unseen)
    texts = [row["prompt"][0]["content"] for row in general]
    data = Playground([rows[i] for i in kept], states[kept], others, texts)
    shares = {}
    for calibration in ("rows", "kinds"):
        gate = fit_gate(QueryGateConfig(gate_score="state", gate_calibration=calibration), data, SITE)  # type: ignore[arg-type]
        shares[calibration] = fires(gate, states[unseen]).mean()
        assert gate.report["false_alarms"]["k"] == 0
    assert shares["kinds"] > 0.85 and shares["kinds"] > shares["rows"] + 0.1, shares


class OfForm(PlantedData):
    """A planted world whose prompts are commands, and whose general prompts are questions, or half of them are."""

    def __init__(self, commands: float, **world: Any) -> None:
        super().__init__(**world)
        self.commands = commands

    def texts(self, text: str, part: Part) -> list[str]:
        texts = super().texts(text, part)
        first = len(texts) if text == "prompt" else round(self.commands * len(texts))
        return [f"Do {words} now" if i < first else f"Is it {words}?" for i, words in enumerate(texts)]


def test_form_that_separates_is_reported_with_the_gate() -> None:
    report = fit_gate(QueryGateConfig(gate_score="state"), OfForm(0.0), SITE).report
    assert report["form"]["auroc"] > 0.99 and report["form"]["decisions_auroc"] > 0.9
    assert "of the prompts" in report["form"]["tells"]
    assert report["false_alarms_same_form"]["n"] == 0 and report["auroc_same_form"] is None
    assert report["false_alarms"]["n"] == 24


def test_false_alarms_are_counted_on_the_same_form_too() -> None:
    report = fit_gate(QueryGateConfig(gate_score="state"), OfForm(0.5), SITE).report
    assert report["form"]["auroc"] < 0.9
    assert report["false_alarms_same_form"]["n"] == 12 and report["auroc_same_form"] > 0.9
    small = fit_gate(QueryGateConfig(gate_score="state"), OfForm(0.5, general=12), SITE).report
    assert small["form"] is None and small["false_alarms_same_form"]["n"] == small["false_alarms"]["n"]


def test_score_and_site_are_judged_on_the_prompts_that_count() -> None:
    rng = np.random.default_rng(0)
    queries, easy, hard = rng.normal(2, 1, (80, 8)), rng.normal(-8, 1, (40, 8)), rng.normal(1.2, 1, (40, 8))
    general, judged = np.concatenate([easy, hard]), np.repeat([False, True], 40)
    everything, counted = separability(queries, general), separability(queries, general, judged)
    assert everything is not None and counted is not None and counted < everything - 0.05
    all_rows, same = AutoScore().fit(queries, general), AutoScore().fit(queries, general, judged=judged)
    (one,), (other,) = ([row for row in auto.table_ if row["name"] == "state"] for auto in (all_rows, same))
    assert other["auroc"] < one["auroc"] - 0.05 and other["false_alarm_rate"] > one["false_alarm_rate"]
    site, table = choose_read_site(OfForm(0.5, clarity=(0.1, 1.0, 1.0)), QueryGateConfig())
    assert str(site) in table


def test_texts_follow_the_rows() -> None:
    data = PlantedData(repeats=3)
    assert len(query_texts(data, SITE, BOTH)) == len(query_rows(data, SITE, BOTH)) == 64


class Overlapping(PlantedData):
    """A planted world whose general prompts lie close to the others."""

    def general(self, site: Site, part: Part) -> np.ndarray:
        rows = super().general(site, part)
        apart = super().general(site, "fit").mean(axis=0) - self.query(site, "fit").mean(axis=0)
        return rows - 0.9 * apart


def unseen_scores(data: PlantedData) -> np.ndarray:
    """Of general prompts, each by a fit without it."""
    ir, general = query_rows(data, SITE, ("fit",)), general_rows(data, SITE, BOTH)
    scores = cross_fitted_scores(StateScore(seed=data.seed).fit(ir, general), ir, general, seed=data.seed)[1]
    assert scores is not None
    return scores


@pytest.mark.parametrize("allowed", [0.02, 0.3, 0.45, 1.0])
def test_the_gate_misses_more_queries_where_it_would_open_on_general_prompts(allowed: float) -> None:
    """The smallest epsilon, in steps of .01 up to a fifth, whose gate keeps to the share of false alarms."""
    data = Overlapping()
    general = unseen_scores(data)

    def fitted(**settings: Any) -> tuple[float, float]:
        gate = fit_gate(QueryGateConfig(gate_score="state", **settings), data, SITE)
        assert gate.report["epsilon_asked"] == settings.get("gate_epsilon", 0.05)
        return gate.report["epsilon"], float((general >= gate.tensors["gate.floor"].item()).mean())

    epsilon, opens = fitted(gate_false_alarms=allowed)
    assert opens <= allowed or epsilon == pytest.approx(0.2)
    assert (epsilon == 0.05) == (fitted(gate_false_alarms=1.0)[1] <= allowed)
    if epsilon > 0.05:
        assert fitted(gate_epsilon=epsilon - 0.01, gate_false_alarms=1.0)[1] > allowed


def test_a_pac_guarantee_is_kept_whatever_general_prompts_do() -> None:
    gates = [
        fit_gate(
            QueryGateConfig(gate_score="state", gate_guarantee="pac", gate_epsilon=0.1, gate_false_alarms=allowed),
            Overlapping(),
            SITE,
        )
        for allowed in (0.02, 1.0)
    ]
    assert torch.equal(gates[0].tensors["gate.threshold"], gates[1].tensors["gate.threshold"])
    with pytest.raises(ValueError, match="gate_false_alarms"):
        QueryGateConfig(gate_false_alarms=1.5)
