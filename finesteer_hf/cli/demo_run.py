"""The demo's experiment: fit on one half of the playground, save, load, and ask the other half."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from finesteer_hf import SteeredModelForCausalLM, playground
from finesteer_hf.adapter import SteeringAdapter
from finesteer_hf.config import SteeringConfig
from finesteer_hf.evaluation.behaviour import JudgedPrompt, Outcome, evaluate
from finesteer_hf.evaluation.gates import GateFigures, gate_figures
from finesteer_hf.evaluation.playground_eval import TASKS, Split, Task, general_prompts, target_prompts
from finesteer_hf.fitting import fit_steering
from finesteer_hf.methods.caa import CAAConfig
from finesteer_hf.methods.finesteer import FineSteerConfig
from finesteer_hf.methods.finesteer.config import Gate, GateScore


MAX_NEW_TOKENS = 24
# The default on the score that the data choose and on the paper's, the paper's three gates, and none.
COMPARED_GATES: tuple[tuple[Gate, GateScore], ...] = (
    ("conformal", "auto"),
    ("conformal", "ser"),
    ("quantile", "ser"),
    ("logistic", "ser"),
    ("ser", "ser"),
    ("always", "auto"),
)


@dataclass(frozen=True)
class DemoSettings:
    """How much the demo does.

    Attributes:
        out: folder of adapters and report.
        seed: of the halves and of the fits.
        splits: by question, by kind, or both.
        targets: at most so many held-out questions, and so many requests.
        general: at most so many held-out general prompts.
        caa_strengths: strengths at which CAA is tried.
    """

    out: Path
    seed: int = 0
    splits: tuple[Split, ...] = ("question", "kind")
    targets: int | None = None
    general: int | None = None
    caa_strengths: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


QUICK = {"splits": ("question",), "targets": 150, "general": 150, "caa_strengths": (1.0, 2.0, 4.0)}


@dataclass(frozen=True)
class Arm:
    """One method of a trial on both sets of prompts."""

    target: Outcome
    general: Outcome


@dataclass
class Trial:
    """One task under one split.

    Attributes:
        task: `truthful` or `safety`.
        split: what fit and test share nothing of.
        folder: where the FineSteer adapter was saved.
        base: the unsteered model.
        finesteer: the adapter as fitted, nothing chosen on the test half.
        caa: CAA at the strength that was best on the test half.
        caa_strength: that strength.
        sweep: CAA's share of hits at each strength.
        adapter: the FineSteer adapter as loaded.
        fit_seconds: time to fit it.
    """

    task: Task
    split: Split
    folder: Path
    base: Arm
    finesteer: Arm
    caa: Arm
    caa_strength: float
    sweep: list[tuple[float, Outcome]]
    adapter: SteeringAdapter
    fit_seconds: float


@dataclass(frozen=True)
class GateRow:
    """A gate's figures on the held-out prompts of a task."""

    task: Task
    gate: str
    score: str
    figures: GateFigures
    ir: Outcome
    general: Outcome


@dataclass
class DemoResult:
    """Everything that the tables and the report show."""

    settings: DemoSettings
    trials: list[Trial] = field(default_factory=list)
    gates: list[GateRow] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class _Fits:
    folder: Path
    caa_folder: Path
    seconds: float


def run_demo(settings: DemoSettings, say: Callable[[str], None]) -> DemoResult:
    """Run all trials and the gates.

    Args:
        settings: how much to do.
        say: shows a line of progress.
    """
    start = time.perf_counter()
    result = DemoResult(settings)
    model, tokenizer = playground.load()
    fits = {
        (task, split): _fit_both(model, tokenizer, task, split, settings, say)
        for split in settings.splits
        for task in TASKS
    }
    say("loading the saved adapters with SteeredModelForCausalLM.from_pretrained")
    folders = {_name(task, split): str(fit.folder) for (task, split), fit in fits.items()}
    steered = SteeredModelForCausalLM.from_pretrained(playground.model_path(), steering=folders)
    general = general_prompts(limit=settings.general, seed=settings.seed)
    base_general = evaluate(steered, tokenizer, general, max_new_tokens=MAX_NEW_TOKENS)
    for (task, split), fit in fits.items():
        say(f"asking held-out prompts: {task}, split by {split}")
        steered.load_steering(str(fit.caa_folder), "caa")
        result.trials.append(_run_trial(steered, tokenizer, task, split, fit, base_general, settings))
        steered.delete_steering("caa")
    for trial in result.trials:
        if trial.split == "question":
            say(f"comparing gates: {trial.task}")
            result.gates += _run_gates(model, steered, tokenizer, trial, settings)
    result.seconds = time.perf_counter() - start
    return result


def _name(task: Task, split: Split) -> str:
    return f"{task}-by-{split}"


def _fit_both(
    model: Any, tokenizer: Any, task: Task, split: Split, settings: DemoSettings, say: Callable[[str], None]
) -> _Fits:
    """Fit FineSteer and CAA on the same half and save both."""
    start = time.perf_counter()
    adapter = _fit(model, tokenizer, task, split, FineSteerConfig(), settings)
    seconds = time.perf_counter() - start
    folder = adapter.save_pretrained(settings.out / "adapters" / _name(task, split))
    caa = _fit(model, tokenizer, task, split, CAAConfig(layer=setting(adapter, "layer"), strength=1.0), settings)
    caa_folder = caa.save_pretrained(settings.out / "adapters" / f"{_name(task, split)}-caa")
    say(f"fitted {task}, split by {split}: layer {setting(adapter, 'layer')}, {seconds:.0f} s")
    return _Fits(folder, caa_folder, seconds)


def _fit(
    model: Any, tokenizer: Any, task: Task, split: Split, config: SteeringConfig, settings: DemoSettings
) -> SteeringAdapter:
    return fit_steering(
        model,
        tokenizer,
        playground.preference_rows(task, "fit", split=split, seed=settings.seed),
        config,
        general_dataset=playground.general_rows("fit", seed=settings.seed),
        seed=settings.seed,
        progress=False,
    )


def _run_trial(
    steered: Any, tokenizer: Any, task: Task, split: Split, fit: _Fits, base_general: Outcome, settings: DemoSettings
) -> Trial:
    prompts = target_prompts(task, split=split, limit=settings.targets, seed=settings.seed)

    def ask(of: list[JudgedPrompt], adapter: str | None, scale: float = 1.0, choices: bool = True) -> Outcome:
        return evaluate(
            steered, tokenizer, of, adapter=adapter, scale=scale, choices=choices, max_new_tokens=MAX_NEW_TOKENS
        )

    name = _name(task, split)
    sweep = [(strength, ask(prompts, "caa", strength, choices=False)) for strength in settings.caa_strengths]
    best = max(sweep, key=lambda entry: entry[1].share.value)[0]
    return Trial(
        task=task,
        split=split,
        folder=fit.folder,
        base=Arm(ask(prompts, None), base_general),
        finesteer=Arm(ask(prompts, name), ask(base_general.prompts, name)),
        caa=Arm(ask(prompts, "caa", best), ask(base_general.prompts, "caa", best)),
        caa_strength=best,
        sweep=sweep,
        adapter=steered.steering_adapters[name],
        fit_seconds=fit.seconds,
    )


def _run_gates(model: Any, steered: Any, tokenizer: Any, trial: Trial, settings: DemoSettings) -> list[GateRow]:
    """Fit each gate at the trial's layer and read it on the held-out prompts; nothing is generated but one token."""
    rows = []
    for gate, score in COMPARED_GATES:
        layer = setting(trial.adapter, "layer")
        config = FineSteerConfig(gate=gate, gate_score=score, layer=layer, strength=1.0)
        adapter = _fit(model, tokenizer, trial.task, trial.split, config, settings)
        steered.load_steering(adapter, "gate")
        ir, general = (
            evaluate(steered, tokenizer, prompts, adapter="gate", choices=False, max_new_tokens=1)
            for prompts in (trial.base.target.prompts, trial.base.general.prompts)
        )
        steered.delete_steering("gate")
        scores = _scores(ir, general)
        figures = gate_figures(*_gates(ir, general), score_ir=scores[0], score_general=scores[1])
        rows.append(GateRow(trial.task, gate, setting(adapter, "gate_score"), figures, ir, general))
    return rows


def _gates(ir: Outcome, general: Outcome) -> list[np.ndarray]:
    """Gates of both sets; an ungated adapter steers everything, which is a gate of 1."""
    recorded = [(outcome.recorded("gate"), len(outcome.prompts)) for outcome in (ir, general)]
    return [np.ones(count) if values is None else values for values, count in recorded]


def _scores(ir: Outcome, general: Outcome) -> list[np.ndarray | None]:
    """Scores of both sets, or None twice where the gate has none."""
    scores = [outcome.recorded("score") for outcome in (ir, general)]
    return scores if all(values is not None for values in scores) else [None, None]


def setting(adapter: SteeringAdapter, name: str) -> Any:
    """A setting of a method's own config."""
    return adapter.config.to_dict()[name]
