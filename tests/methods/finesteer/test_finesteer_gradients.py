"""FineSteer on gradients, at one block or several, and trained on, against whole texts steered with plain hooks."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kept_data import kept_data
from planted import PlantedData, states
from teacher_forcing import log_probs, of_answer
from torch.nn.functional import logsigmoid, relu

from finesteer_hf import SteeredModelForCausalLM, SteeringAdapter
from finesteer_hf.errors import AdapterFileError
from finesteer_hf.fitting.data.encoding import Passage
from finesteer_hf.method_api import FitResult, Part
from finesteer_hf.methods._shared.screening import SCREEN_DOSE
from finesteer_hf.methods._shared.strength import median_norm
from finesteer_hf.methods.finesteer import FineSteer, FineSteerConfig, refine
from finesteer_hf.methods.finesteer.candidates import CandidateFit, CandidateFits, of_rank
from finesteer_hf.processors import Positions
from finesteer_hf.sites import Site
from finesteer_hf.testing import toy_model
from finesteer_hf.testing.conformance import fit_on_toy


SEVERAL = ["resid_post[0]", "resid_post[1]", "resid_post[2]"]
SITES = tuple(map(Site.parse, SEVERAL))


def fit(data: Any, **settings: Any) -> FitResult:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        defaults = {"target": "gradient", "refine": 0, "positions": "generated", "gate_score": "ser", "strength": 1.0}
        return FineSteer.fit(data, FineSteerConfig(**{**defaults, **settings}))


# -- the target, on a world that is known -----------------------------------------------------------------------------


def mean_gradient(data: PlantedData, site: Site) -> np.ndarray:
    parts: tuple[Part, ...] = ("fit", "calibration")
    rows = [data.chosen(site, part, "gradient") - data.rejected(site, part, "gradient") for part in parts]
    return np.concatenate(rows).astype(np.float64).mean(axis=0)


@pytest.mark.parametrize("names", [["resid_post[1]"], ["resid_post[1]", "resid_pre[3]", "resid_post[3]"]])
def test_gradients_say_in_which_direction_and_the_states_how_far(names: list[str]) -> None:
    data, sites = PlantedData(), [Site.parse(name) for name in names]
    result = fit(data, layer=1, write_site=names, experts="reduced_rank", residual_rank=0)
    vectors = result.tensors["residual.bias"].numpy().reshape(len(sites), 24)
    for site, vector in zip(sites, vectors, strict=True):
        mean = mean_gradient(data, site)
        length = SCREEN_DOSE / np.sqrt(len(sites)) * median_norm(data.query(site, "fit"))
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean) * length, rtol=1e-4, atol=1e-5)
    report = result.report["vector"]
    assert report["vector_norm"] / report["state_norm"] == pytest.approx(SCREEN_DOSE, rel=1e-4)


def test_the_gradients_of_a_data_set_raise_its_held_out_preference() -> None:
    data = PlantedData()
    result = fit(data, layer="auto", strength="auto", experts="auto")
    assert result.config.target == "gradient" and result.config.unfitted() == []
    curve = {point["strength"]: point for point in result.report["dose_response"]}
    base, taken = curve[0.0], curve[result.config.strength]
    assert taken["preference"] > base["preference"] + 0.05 and taken["bottleneck"] > base["bottleneck"] + 0.05
    assert taken["kl"] <= 0.1 and result.report["strength"].startswith("best within the limits")
    assert {row["place"].split(",")[0] for row in result.report["layers_tried"]} == {"gradient"}
    several = [row["place"] for row in result.report["layers_tried"] if "blocks" in row["place"]]
    assert len(several) == 1 and all(row["r2"] is None and row["gain"] > 0 for row in result.report["layers"])


def test_the_part_of_a_gradient_that_the_query_predicts_is_used() -> None:
    data, site = PlantedData(), Site("resid_post", 2)
    result = fit(data, layer=2, experts="auto", gate="always")
    assert result.config.residual_rank > 0 and result.report["vector"]["r2"] > 0.3
    new = data.query(site, "validation")
    vectors = FineSteer(result.config, result.tensors).decide(states(site, new)).vectors[site].numpy()
    gradients = data.chosen(site, "validation", "gradient")
    constant = np.broadcast_to(mean_gradient(data, site), gradients.shape)

    def cosine(rows: np.ndarray) -> float:
        return float(
            ((rows * gradients).sum(1) / np.linalg.norm(rows, axis=1) / np.linalg.norm(gradients, axis=1)).mean()
        )

    assert cosine(vectors) > cosine(constant) + 0.1


def test_differences_of_several_sites_lie_side_by_side() -> None:
    data, names = PlantedData(), ["resid_post[1]", "resid_post[3]"]
    result = fit(data, target="difference", layer=1, write_site=names, experts="reduced_rank", residual_rank=2)
    assert result.tensors["residual.bias"].shape == (48,) and result.tensors["residual.up"].shape == (2, 48)
    means = [data.shifts(Site.parse(name), "fit", "calibration").mean(0) for name in names]
    np.testing.assert_allclose(result.tensors["residual.bias"].numpy(), np.concatenate(means), atol=1e-5)
    assert "several_write_sites" in result.config.requires and result.config.read_site == names[0]


def test_only_blocks_with_enough_gain_are_steered_together() -> None:
    data = PlantedData(clarity=(1.0, 1.0, 1.0, 1.0, 1.0, 1.0))
    # The third block's states are so short that nothing is gained there at a share of their norm.
    data._query[2] *= 0.01
    data._general[2] *= 0.01
    result = fit(data, layer="auto", gate="always", experts="reduced_rank", residual_rank=0)
    gains = {row["layer"]: row["gain"] for row in result.report["layers"]}
    worth = [layer for layer, gain in gains.items() if gain >= max(gains.values()) / 2]
    assert 2 not in worth and len(worth) > 1
    places = [row["place"] for row in result.report["layers_tried"]]
    best = max(gains, key=gains.__getitem__)
    assert places == [f"gradient, block {best}", f"gradient, blocks {', '.join(map(str, worth))}"]


# -- a real model -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def several() -> SteeringAdapter:
    config = FineSteerConfig(layer=0, write_site=SEVERAL, target="gradient", refine=0, gate_epsilon=0.2)
    return fit_on_toy(config)[2]


def decided(adapter: SteeringAdapter, prompt: tuple[int, ...]) -> tuple[float, dict[Site, torch.Tensor]]:
    """Gate and vectors by the file's tensors, from the prompt's last state in the plain model."""
    seen: list[torch.Tensor] = []
    model = toy_model()
    layer = model.model.layers[Site.parse(adapter.config.read_site).layer]
    layer.register_forward_hook(lambda module, args, output: seen.append(output[0, -1]))
    with torch.no_grad():
        model(torch.tensor([prompt]))
    h, t, read = seen[0], adapter.tensors, Site.parse(adapter.config.read_site)
    decision, writes = adapter.build().decide(states(read, h[None].numpy())), adapter.config.write_sites
    gate = 1.0 if decision.gate is None else float(decision.gate)
    if adapter.config.experts != "reduced_rank":
        return gate, {site: rows[0] for site, rows in decision.vectors.items()}
    vector = t["residual.bias"] + (h - t["residual.mean"]) @ t["residual.down"] @ t["residual.up"]
    return gate, dict(zip(writes, vector.chunk(len(writes)), strict=True))


def hooked(adapter: SteeringAdapter, passage: Passage) -> torch.Tensor:
    """`log_probs` of a text with the vectors added by hooks."""
    gate, vectors = decided(adapter, passage.ids[: passage.answer_start])

    def move(vector: torch.Tensor) -> Any:
        first = 0 if adapter.config.positions == "all" else int(passage.answer_start or 0) - 1

        def by_hook(hidden: torch.Tensor) -> torch.Tensor:
            hidden = hidden.clone()
            hidden[:, first:] += adapter.config.strength * gate * vector
            return hidden

        return by_hook

    with torch.no_grad():
        return log_probs(toy_model(), passage, {site: move(vector) for site, vector in vectors.items()})


@pytest.mark.parametrize("positions", ["generated", "all"])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_several_sites_are_steered_as_plain_hooks_at_each_of_them(
    several: SteeringAdapter, positions: Positions, scale: float
) -> None:
    settings = {"positions": positions, "strength": scale * several.config.strength}
    adapter = SteeringAdapter(dataclasses.replace(several.config, **settings), several.tensors)
    model = SteeredModelForCausalLM.from_model(toy_model(), steering={"a": adapter})
    data, differs = kept_data(*SEVERAL), 0
    for prompt in [*data.tokens("prompt", "validation")[:4], *data.tokens("general", "validation")[:2]]:
        ids = prompt.tolist()
        for _ in range(5):
            passage = Passage(tuple(ids), len(prompt))
            ids.append(int(hooked(adapter, passage)[-1].argmax()))
        passage = Passage(tuple(ids), len(prompt))
        generated = model.generate(torch.tensor([prompt.tolist()]), max_new_tokens=5, do_sample=False)
        assert generated[0].tolist() == ids
        with torch.no_grad():
            logits = model(torch.tensor([ids]), prompt_lengths=torch.tensor([len(prompt)])).logits[0]
            plain = log_probs(toy_model(), passage)
        torch.testing.assert_close(logits.log_softmax(-1), hooked(adapter, passage), rtol=1e-4, atol=1e-4)
        differs += int(not torch.allclose(logits.log_softmax(-1), plain, atol=1e-2))
    assert differs >= 3


def preferences(adapter: SteeringAdapter | None) -> np.ndarray:
    """Of the held-out rows by whole texts: sigmoid of the margin a token."""
    data, found = kept_data(*SEVERAL), []
    for row, prompt in enumerate(data.tokens("prompt", "validation")):
        rate = []
        for side in ("chosen", "rejected"):
            passage = Passage((*prompt.tolist(), *data.tokens(side, "validation")[row].tolist()), len(prompt))
            scores = log_probs(toy_model(), passage).detach() if adapter is None else hooked(adapter, passage)
            rate.append(float(of_answer(scores, passage).mean()))
        found.append(1 / (1 + np.exp(rate[1] - rate[0])))
    return np.array(found)


def test_the_preference_of_a_real_models_held_out_rows_rises_as_the_report_says(several: SteeringAdapter) -> None:
    report = several.config.fit["report"]
    points = {point["strength"]: point for point in report["dose_response"]}
    plain, steered = preferences(None), preferences(several)
    assert points[0.0]["preference"] == pytest.approx(plain.mean(), rel=1e-3)
    assert points[several.config.strength]["preference"] == pytest.approx(steered.mean(), rel=1e-3)
    opened = steered != plain
    assert steered.mean() > plain.mean() + 0.02 and (steered > plain)[opened].mean() > 0.6
    constant, random = (report["baselines"][name]["preference"] for name in ("constant", "random direction"))
    assert constant > random


def test_several_sites_are_saved_and_loaded_and_refused_by_older_readers(
    several: SteeringAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    several.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "steering_config.json").read_text())
    assert content["write_site"] == SEVERAL and "several_write_sites" in content["requires"]
    again = SteeringAdapter.from_pretrained(tmp_path)
    assert again.config == several.config and again.config.write_sites == SITES
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in several.tensors.items())
    assert again.tensors["residual.bias"].shape == (96,)
    method = again.build()
    assert method.writes == SITES and method.reads == SITES[:1]
    queries = states(SITES[0], kept_data(*SEVERAL).query(SITES[0], "validation"))
    decisions = (built.decide(queries).vectors for built in (method, several.build()))
    torch.testing.assert_close(*map(dict, decisions), rtol=0, atol=0)
    single = fit(PlantedData(), layer=1, residual_rank=0, experts="reduced_rank")
    assert "several_write_sites" not in single.config.requires and single.config.write_site == "resid_post[1]"
    older = FineSteerConfig.understands - {"several_write_sites"}
    monkeypatch.setattr(FineSteerConfig, "understands", older)
    with pytest.raises(AdapterFileError, match=r"does not understand: \['several_write_sites'\]"):
        SteeringAdapter.from_pretrained(tmp_path)


def test_tensors_of_another_number_of_sites_are_refused(several: SteeringAdapter) -> None:
    fewer = dataclasses.replace(several.config, write_site=SEVERAL[:2])
    with pytest.raises(AdapterFileError, match="96"):
        SteeringAdapter(fewer, several.tensors).check_tensors()


# -- training on ------------------------------------------------------------------------------------------------------


def begun(*names: str, rank: int = 0) -> tuple[CandidateFits, CandidateFit]:
    layer = Site.parse(names[0]).layer
    config = FineSteerConfig(layer=layer, write_site=list(names), target="gradient", gate="always", strength=1.0)
    fits = CandidateFits(kept_data(*SEVERAL), config, FineSteer)
    start = fits.fit(fits.place([layer], "gradient"), of_rank(config, rank), "generated")
    return fits, dataclasses.replace(start, place=fits.place([layer], "gradient"))


def objective(fits: CandidateFits, fit: CandidateFit, factor: float, dose: float) -> float:
    """The module's loss of the `fit` rows, written out on whole texts: a mean."""
    data, sites, losses = fits.data, fit.place.writes, []
    vectors = {site: torch.from_numpy(rows * factor) for site, rows in fits.vectors(fit, "fit").items()}
    norms = {site: median_norm(data.query(site, "fit")) for site in sites}

    def run(passage: Passage, own: Mapping[Site, torch.Tensor]) -> torch.Tensor:
        def move(vector: torch.Tensor) -> Any:
            columns = torch.arange(len(passage.ids))[:, None]
            return lambda hidden: hidden + vector * (columns >= int(passage.answer_start or 0) - 1)

        return log_probs(toy_model(), passage, {site: move(vector) for site, vector in own.items()}).detach().double()

    for row, prompt in enumerate(data.tokens("prompt", "fit")):
        own = {site: vector[row] for site, vector in vectors.items()}
        rate, drift = {}, []
        for side in ("chosen", "rejected"):
            passage = Passage((*prompt.tolist(), *data.tokens(side, "fit")[row].tolist()), len(prompt))
            steered, base = run(passage, own), run(passage, {})
            rate[side] = of_answer(steered, passage).mean()
            steered, base = (scores[len(prompt) - 1 : -1] for scores in (steered, base))
            drift.append((steered.exp() * (steered - base)).sum(-1).mean())
        size = sum(float(own[site].norm() / norms[site]) ** 2 for site in sites) ** 0.5
        loss = -refine.SCALE * logsigmoid(refine.BETA * (rate["chosen"] - rate["rejected"]))
        loss = loss - refine.ANCHOR * rate["chosen"] + refine.DRIFT * sum(drift) / 2
        losses.append(float(loss + refine.NORM * relu(torch.tensor(size / dose - 1)) ** 2))
    return float(np.mean(losses))


@pytest.mark.parametrize("names", [SEVERAL[1:2], SEVERAL], ids=["one site", "several"])
def test_training_begins_at_the_closed_form_and_lowers_its_loss(
    names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fits, start = begun(*names)
    dose = 0.15
    factor = fits.trial(start).strength_of(dose)
    before = objective(fits, start, factor, dose)
    with monkeypatch.context() as still:
        still.setattr(refine, "LEARNING_RATE", 0.0)
        unmoved = refine.refine(fits, start, 1, dose)
    path = unmoved.experts.report["training"]["path"]
    assert path[1]["fit"] == pytest.approx(before, rel=1e-3)
    for site, rows in fits.vectors(unmoved, "validation").items():
        np.testing.assert_allclose(rows, factor * fits.vectors(start, "validation")[site], rtol=1e-3, atol=1e-4)
    assert objective(fits, unmoved, 1.0, dose) == pytest.approx(before, rel=1e-4)

    monkeypatch.setattr(refine, "LEARNING_RATE", 0.05)
    trained = refine.refine(fits, start, 3, dose)
    after, path = objective(fits, trained, 1.0, dose), trained.experts.report["training"]["path"]
    assert after < before - 0.1 and path[3]["fit"] < path[1]["fit"]
    assert trained.refined == 3 and trained.experts.report["closed_form"] == start.experts.report
    tensors = trained.experts.tensors
    assert trained.experts.residual_rank == tensors["residual.down"].shape[1] > 0
    assert tensors["residual.up"].abs().max() > 0 and not torch.equal(
        tensors["residual.bias"], start.experts.tensors["residual.bias"]
    )
    assert all(not tensor.requires_grad and tensor.dtype == torch.float32 for tensor in tensors.values())
    config = trained.config(fits.data.info, 1.0)
    assert config.refine == 3 and set(tensors) == set(FineSteer.tensor_shapes(config))


def test_a_fit_trains_for_the_given_number_of_epochs() -> None:
    found = {}
    for epochs in (0, 2):
        settings = {"layer": 1, "target": "gradient", "gate": "always", "positions": "generated", "refine": epochs}
        found[epochs] = fit_on_toy(FineSteerConfig(strength=1.0, experts="reduced_rank", **settings))[2]
        assert found[epochs].config.refine == epochs and found[epochs].config.experts == "reduced_rank"
    one, two = (found[epochs].tensors for epochs in (0, 2))
    assert not torch.equal(one["residual.bias"], two["residual.bias"])
    path = found[2].config.fit["report"]["experts"]["training"]["path"]
    assert [row["epoch"] for row in path] == [0, 1, 2] and path[2]["fit"] < path[1]["fit"]
    assert preferences(found[2]).mean() > preferences(None).mean()


def test_everything_auto_is_filled_in_on_a_real_model() -> None:
    adapter = fit_on_toy(FineSteerConfig(refine="auto"))[2]
    config, report = adapter.config, adapter.config.fit["report"]
    assert config.unfitted() == [] and isinstance(config.refine, int)
    assert config.positions in ("all", "prompt", "generated")
    assert config.target in ("difference", "gradient") and isinstance(config.strength, float)
    assert {row["place"].split(",")[0] for row in report["layers_tried"]} == {"difference", "gradient"}
    tried = [row["positions"] for row in report["positions_tried"] or []]
    assert tried in ([], ["generated", "all"], ["prompt", "all"])
    assert [row["experts"] for row in report["trained_prompt_tried"]] == ["untrained", "trained"]
    # What steers the prompt may be trained already.
    trained_before = config.refine > 0 and config.positions != "generated" and report["refinement_tried"] is None
    assert (report["refinement_tried"] is None) == (config.target == "difference" or trained_before)
    # The same figures in whole texts, at the strength that was taken.
    point = next(p for p in report["dose_response"] if p["strength"] == config.strength)
    assert point["preference"] == pytest.approx(preferences(adapter).mean(), rel=1e-3)
