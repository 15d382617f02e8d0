"""`finesteer compare` on the playground: two cheap methods on a few rows, compared with each adapter alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from finesteer_hf import CAAConfig, SteeredModelForCausalLM, SteeringAdapter, playground
from finesteer_hf.cli.commands import app
from finesteer_hf.cli.compare import make_configs
from finesteer_hf.cli.compare_report import effect_rows, mark, rank_note
from finesteer_hf.errors import DatasetError
from finesteer_hf.evaluation.behaviour import Outcome, evaluate
from finesteer_hf.evaluation.data.playground_eval import fit_rows
from finesteer_hf.evaluation.measures.generation import Answers
from finesteer_hf.evaluation.measures.multiple_choice import ChoiceScores
from finesteer_hf.evaluation.measures.prompts import as_chat
from finesteer_hf.evaluation.measures.statistics import holm, mcnemar, paired_p_value
from finesteer_hf.evaluation.method_comparison import (
    HIT,
    MethodComparison,
    MethodTrial,
    compare_methods,
    nearer_to_chosen,
    part,
)
from finesteer_hf.fitting.data.rows import prompt_key


GENERAL = [
    {"prompt": f"Sort these words: {a}, {b}"} for a in ("oak", "sun", "ash") for b in ("elm", "sea", "fir", "ice")
]
CHEAP = ("--set", "caa.layer=2", "--set", "CAA.strength=2.0", "--set", "FINESTEER.layer=2")
FINE = ("strength=3.0", "experts=reduced_rank", "residual_rank=2", "gate_score=state", "target=difference", "refine=0")


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return fit_rows("truthful", split="question", limit=48, seed=0)


@pytest.fixture
def data(rows: list[dict[str, Any]], tmp_path: Path) -> tuple[str, str]:
    """Files of rows and of general prompts."""
    for name, content in (("rows", rows), ("general", GENERAL)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in content))
    return str(tmp_path / "rows.jsonl"), str(tmp_path / "general.jsonl")


def test_two_methods_are_compared_on_rows_that_no_fit_saw(data: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["compare", "playground", "--data", data[0], "--general", data[1], "--methods", "CAA,FINESTEER"]
    arguments += [*CHEAP, *(word for text in FINE for word in ("--set", f"FINESTEER.{text}"))]
    done = CliRunner(env={"COLUMNS": "160"}).invoke(app, [*arguments, "-o", str(out), "--max-new-tokens", "8"])
    assert done.exit_code == 0, done.output + repr(done.exception)
    for expected in (
        "p against unsteered",
        "one against another",
        "side effects and cost",
        "Holm's correction",
        "Ranks by MC2",
    ):
        assert expected in done.stdout
    report = (out / "report.html").read_text()
    assert report.count('src="data:image/png;base64,') >= 2 and "Held-out prompts, chosen without looking" in report
    content = json.loads((out / "figures.json").read_text())
    assert content["rows"] == {"fit": 38, "held_out": 10, "general_held_out": 2} and content["failed"] == {}

    # Every figure again, from the saved adapter alone.
    parts = part(*data, seed=0)
    folders = {name: str(out / "adapters" / name) for name in ("CAA", "FINESTEER")}
    model = SteeredModelForCausalLM.from_pretrained(playground.model_path(), steering=folders)
    tokenizer = playground.load()[1]
    base = evaluate(model, tokenizer, parts.own, max_new_tokens=8)
    for name in folders:
        alone = evaluate(model, tokenizer, parts.own, adapter=name, max_new_tokens=8)
        figures = {row["metric"]: row for row in content["figures"][name] if row["dataset"] == "held-out rows"}
        assert figures["MC1"]["steered"] == alone.choices.mc1_share.to_dict()
        assert figures["MC1"]["p_value"] == mcnemar(base.choices.mc1, alone.choices.mc1).p_value
        assert figures["MC2"]["steered"]["value"] == pytest.approx(alone.choices.mc2.mean(), abs=1e-5)
        assert figures["MC2"]["p_value"] == pytest.approx(paired_p_value(base.choices.mc2, alone.choices.mc2))
        assert figures[HIT]["steered"] == alone.share.to_dict()


def test_parts_share_no_prompt_and_whole_categories_can_be_held_out(rows: list[dict[str, Any]]) -> None:
    parts = part(rows, GENERAL, seed=1)
    fitted = {prompt_key(row["prompt"]) for row in parts.fit}
    assert fitted.isdisjoint(prompt_key(item.prompt) for item in parts.own) and len(fitted) + len(parts.own) == 48
    assert parts.general_fit is not None
    general = {prompt_key(row["prompt"]) for row in parts.general_fit}
    assert general.isdisjoint(prompt_key(item.prompt) for item in parts.general) and len(general) == 10
    assert all(isinstance(item.prompt, list) for item in parts.general)

    kinds = [row | {"category": f"kind {i % 6}"} for i, row in enumerate(rows)]
    parts = part(kinds, None, split="group", seed=1)
    assert {row["category"] for row in parts.fit}.isdisjoint(item.category for item in parts.own)
    assert parts.general_fit is None and len(parts.general) > 30


def test_answers_of_one_prompt_are_one_item() -> None:
    rows = [
        {"prompt": f"Is it {word}?", "chosen": chosen, "rejected": "No, never."}
        for word in ("a", "b", "c", "d", "e", "f", "g", "h")
        for chosen in ("Yes, it is.", "It is.")
    ]
    parts = part(rows, GENERAL)
    assert all(item.choices.correct == ("Yes, it is.", "It is.") for item in parts.own if item.choices)
    assert len(parts.own) == 2 and len(parts.fit) == 12
    assert nearer_to_chosen(("Yes, it is.", "It is."), ("No, never.",), "yes it is")
    assert not nearer_to_chosen(("Yes.",), ("No, never.",), "never")


def test_a_method_that_cannot_be_fitted_is_named_and_the_others_continue(rows: list[dict[str, Any]]) -> None:
    _, tokenizer = playground.load()
    model = SteeredModelForCausalLM.from_pretrained(playground.model_path())
    configs = {"WRONG": CAAConfig(layer=99, strength=1.0), "CAA": CAAConfig(layer=2, strength=2.0)}
    said: list[str] = []
    parts = part(rows[:20], GENERAL)
    result = compare_methods(model, tokenizer, parts, configs, max_new_tokens=4, note=said.append, progress=False)
    assert [trial.name for trial in result.trials] == ["CAA"] and "99" in result.failed["WRONG"]
    assert any("WRONG cannot be fitted" in line for line in said) and result.duels() == []
    assert model.active_steering == {} and model.steering_adapters == {}
    change = result.mc2_change(result.trials[0])
    before, after = result.own.choices, result.trials[0].own.choices
    assert before is not None and after is not None
    assert change.value == pytest.approx(float(np.mean(after.mc2 - before.mc2)))


def outcome(mc1: int, mc2: float, hits: int) -> Outcome:
    """Twenty prompts with so many of MC1 and hits, and one value of MC2."""
    choices = ChoiceScores(np.arange(20) < mc1, np.linspace(0.0, 0.1, 20) + mc2)
    return Outcome([], Answers(["a"] * 20, [[1]] * 20), [row < hits for row in range(20)], choices, None)


@pytest.mark.parametrize(("mc1", "mc2", "hits"), [(6, 0.0, 10), (6, 0.5, 0), (0, -0.5, 0), (5, 0.0, 5)])
def test_effects_are_starred_and_marked_if_significant_after_holm(mc1: int, mc2: float, hits: int) -> None:
    base, steered = outcome(0, 0.5, 0), outcome(mc1, 0.5 + mc2, hits)
    trial = MethodTrial("ONE", SteeringAdapter(CAAConfig(), {}), steered, base, 1.0)
    result = MethodComparison(base, base, [trial], {}, 20)
    figures = {row.metric: row.p_value for row in trial.against_base(result)[:3]}
    holds = (holm([figures[metric] for metric in ("MC1", "MC2", HIT)]) < 0.05).tolist()
    cells = effect_rows(result)[1]
    assert [cell.endswith("*") for cell in cells[2:7:2]] == holds
    assert mark(result, trial) == ({0.5: "good", -0.5: "bad"}[mc2] if holds[1] else "")
    assert rank_note(result).endswith(": ONE 1 [1, 1].")


def test_nothing_is_written_if_nothing_could_be_fitted(data: tuple[str, str], tmp_path: Path) -> None:
    arguments = ["compare", "playground", "--data", data[0], "--methods", "CAA", "--set", "CAA.layer=99"]
    done = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "out"), "--max-new-tokens", "2"])
    assert done.exit_code == 1 and "out of range" in done.stderr and "No method could" in done.stderr
    assert not (tmp_path / "out").exists()
    for command in (arguments, ["fit", "nowhere", data[0]]):
        done = CliRunner().invoke(app, [*command, "-o", data[0]])
        assert done.exit_code == 1 and "is a file; give a folder" in " ".join(done.stderr.split())


def test_what_cannot_be_compared_is_refused_before_any_work(rows: list[dict[str, Any]]) -> None:
    with pytest.raises(DatasetError, match="at least 6 different prompts"):
        part(rows[:4], GENERAL)
    with pytest.raises(DatasetError, match="at least 6 general prompts"):
        part(rows, GENERAL[:3])
    with pytest.raises(DatasetError, match="6 general prompts"):
        part([{"prompt": as_chat(g["prompt"]), "chosen": "a", "rejected": "b"} for g in GENERAL], GENERAL)
    for methods in ("", "CAA,caa"):
        with pytest.raises(ValueError, match="name each method once"):
            make_configs(methods, [])
    for setting in ("layer=2", "ITI.num_heads=3", "CAA"):
        with pytest.raises(ValueError, match=r"METHOD\.name=value"):
            make_configs("CAA,FINESTEER", [setting])
    assert make_configs("caa", ["CAA.layer=2"])["CAA"].layer == 2
