"""The demo's tables and report from small outcomes, and the quick demo itself."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_toys import half_plane_adapter
from typer.testing import CliRunner

from finesteer_hf import SteeredModelForCausalLM
from finesteer_hf.cli import app
from finesteer_hf.cli.demo.report import build_report
from finesteer_hf.cli.demo.run import Arm, ConstantDose, DemoResult, DemoSettings, DemoTrial, GateRow
from finesteer_hf.cli.demo.standing import standings
from finesteer_hf.cli.demo.tables import examples, gate_rows, gate_title, paired_note, trial_columns, trial_rows
from finesteer_hf.evaluation.behaviour import JudgedPrompt, evaluate
from finesteer_hf.evaluation.gates import gate_figures
from finesteer_hf.evaluation.measures.multiple_choice import ChoiceItem
from finesteer_hf.evaluation.measures.prompts import as_chat
from finesteer_hf.views.report import render_report


WORDS = ("cats", "dogs", "air", "water", "stone", "fire")


def judge(text: str) -> bool | None:
    return None if len(text) % 3 == 0 else len(text) % 3 == 1


@pytest.fixture
def result(model: Any, tokenizer: Any, half_plane: None, tmp_path: Path) -> DemoResult:
    targets = [
        JudgedPrompt(
            word, as_chat(f"tell me about {word}"), judge, word[0], ChoiceItem(as_chat(word), ("yes",), ("no",))
        )
        for word in WORDS
    ]
    general = [JudgedPrompt(word, as_chat(f"sing {word}"), judge, "song") for word in WORDS]
    adapter = half_plane_adapter(torch.randn(32, generator=torch.Generator().manual_seed(0)))
    adapter.config.fit["report"] = {
        "dose_response": [{"strength": 1.0, "bottleneck": 0.5, "bottleneck_se": 0.1, "kl": 0.0}]
    }
    steered = SteeredModelForCausalLM.from_model(model, steering={"finesteer": adapter, "caa": adapter})

    def arm(name: str | None, scale: float = 1.0) -> Arm:
        asked = [
            evaluate(steered, tokenizer, p, adapter=name, scale=scale, max_new_tokens=4) for p in (targets, general)
        ]
        return Arm(*asked)

    base, fine, caa = arm(None), arm("finesteer"), arm("caa", 3.0)
    scores = [outcome.recorded("score") for outcome in (fine.target, fine.general)]
    gates = [outcome.recorded("gate") for outcome in (fine.target, fine.general)]
    figures = gate_figures(*gates, score_ir=scores[0], score_general=scores[1])
    always = gate_figures(np.ones(6), np.ones(6))
    trial = DemoTrial(
        task="truthful",
        split="question",
        folder=tmp_path,
        base=base,
        finesteer=fine,
        caa=caa,
        sweep=[ConstantDose(2, 3.0, 0.1, caa.target.share)],
        adapter=adapter,
        fit_seconds=1.0,
        gates=[
            GateRow("truthful", "conformal", "state", figures, *scores),
            GateRow("truthful", "always", "-", always, None, None),
        ],
    )
    return DemoResult(DemoSettings(out=tmp_path), [trial], 2.0)


def test_tables_have_every_figure_with_its_n(result: DemoResult) -> None:
    trial = result.trials[0]
    rows = {row[0]: row[1:] for row in trial_rows(trial)}
    assert list(rows) == [
        "truthful answers",
        "neither true nor folklore",
        "MC1",
        "MC2",
        "gate fires on these",
        "gate fires on general",
        "general tasks correct",
        "general output unchanged",
    ]
    assert all(len(cells) == 4 and cells[0] == "6" for cells in rows.values())
    assert all(re.search(r"\d \[.*\d\]$|%", cell) for name in ("truthful answers", "MC2") for cell in rows[name][1:])
    assert f"{rows['truthful answers'][1]} n=6" == str(trial.base.target.share)
    fires = trial.finesteer.target.fires()
    assert fires is not None and rows["gate fires on these"][1:] == ("-", fires.brief, "always on")
    assert trial_columns(trial)[4] == "CAA at best (layer 2, 3)"
    assert "McNemar" in paired_note(trial)
    gates = gate_rows(result, "truthful")
    assert [row[0] for row in gates] == ["conformal", "always"] and gates[1][2].startswith("0.0%")
    assert "6 held-out targets, 6 general prompts" in gate_title(result, "truthful")


def test_losses_are_at_the_top_of_the_report(result: DemoResult) -> None:
    trial = result.trials[0]
    kind = replace(trial, split="kind", finesteer=trial.base, caa=trial.finesteer)
    better = replace(trial.base.target, verdicts=[True] * len(WORDS))
    worse = replace(trial.base.target, verdicts=[False] * len(WORDS))
    lost = replace(kind, finesteer=replace(trial.base, target=worse), caa=replace(trial.caa, target=better))
    found = standings(DemoResult(result.settings, [lost, trial], 1.0))
    assert [row.what for row in found] == [
        "truthful answers, questions unseen",
        "general output unchanged, truthful adapter, questions unseen",
        "truthful answers, whole kinds unseen",
        "general output unchanged, truthful adapter, whole kinds unseen",
    ]
    assert found[2].mark == "bad" and found[2].verdict == "behind: 0 gained, 6 lost (p = 0.03, not after Holm)"
    assert [row.holds for row in found] == [False] * 4 and replace(found[2], holds=True).verdict.endswith("(p = 0.03)")
    text = render_report(build_report(DemoResult(result.settings, [lost, trial], 1.0)))
    assert (
        text.index("0% → 0%") < text.index("Behind on: truthful answers, whole kinds unseen.") < text.index("<figure>")
    )
    assert '<div class="bad"><span>truthful answers, whole kinds unseen' in text and '<tr class="bad">' in text


def test_examples_are_spread_over_categories_and_not_chosen_by_outcome(result: DemoResult) -> None:
    trial = result.trials[0]
    chosen = examples(trial, 6)
    assert len(set(chosen)) == len(chosen)
    assert {trial.base.target.prompts[i].category for i in chosen} == {word[0] for word in WORDS}


def test_the_report_shows_tables_plots_and_answers(result: DemoResult) -> None:
    text = render_report(build_report(result))
    for expected in (
        "Truthful answers, split by question",
        "CAA at each layer and strength",
        "Gates",
        "tell me about cats",
        "McNemar",
    ):
        assert expected in text
    assert text.count(' src="data:image/png;base64,') == 4
    assert "say nothing about large models" in text and "Whole kinds unseen, the harder half, were not tried" in text


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_quick_demo_runs_from_nothing_to_a_report(tmp_path: Path) -> None:
    outcome = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["demo", "--quick", "--out", str(tmp_path)])
    assert outcome.exit_code == 0, outcome.output + repr(outcome.exception)
    assert "truthful answers" in outcome.output and "conformal" in outcome.output
    assert (tmp_path / "report.html").stat().st_size > 50_000
    folders = sorted(path.name for path in (tmp_path / "adapters").iterdir())
    assert folders == [
        "safety-by-question",
        "safety-by-question-caa",
        "truthful-by-question",
        "truthful-by-question-caa",
    ]
    assert all((tmp_path / "adapters" / name / "README.md").is_file() for name in folders)
