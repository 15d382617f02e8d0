"""The demo's experiment: fit on one half of the playground, save, load, and ask the other half."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from transformers.utils.logging import disable_progress_bar

from finesteer_hf import playground
from finesteer_hf.adapters.adapter import SteeringAdapter
from finesteer_hf.adapters.config import SteeringConfig
from finesteer_hf.evaluation.behaviour import JudgedPrompt, Outcome, evaluate
from finesteer_hf.evaluation.comparison import compare
from finesteer_hf.evaluation.data.playground_eval import TASKS, Split, Task, fit_rows, general_prompts, target_prompts
from finesteer_hf.evaluation.examples import examples_of
from finesteer_hf.evaluation.gates import GateFigures, gate_figures
from finesteer_hf.evaluation.measures.statistics import Proportion
from finesteer_hf.fitting import fit_steering
from finesteer_hf.methods._shared.trials import candidate_layers
from finesteer_hf.methods.caa import CAAConfig
from finesteer_hf.methods.finesteer import FineSteerConfig
from finesteer_hf.methods.finesteer.config import Gate, GateScore
from finesteer_hf.model.auto import SteeredModelForCausalLM


MAX_NEW_TOKENS = 24
ABOUT: dict[Task, str] = {
    "truthful": "True answers to questions that the model answers with folklore",
    "safety": "Refusals of harmful requests that come in a wrapper",
}
# The default with the score chosen on the data and with the paper's score, the paper's three gates, and no gate.
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
        seed: seed of the halves and the fits.
        splits: by question, by kind, or both.
        fit_rows: most questions, and most requests, to fit on.
        targets: most held-out target prompts.
        general: most held-out general prompts.
        caa_doses: norms of CAA's vector to try at each layer, in units of the states' median norm.
        caa_targets: number of held-out targets on which its best layer and strength are found.
    """

    out: Path
    seed: int = 0
    splits: tuple[Split, ...] = ("question", "kind")
    fit_rows: int | None = 600
    targets: int | None = 300
    general: int | None = 300
    caa_doses: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0)
    caa_targets: int = 80


QUICK = {"splits": ("question",), "targets": 150, "general": 150, "caa_doses": (0.4, 0.8)}


@dataclass(frozen=True)
class Arm:
    """One method of a trial on both sets of prompts."""

    target: Outcome
    general: Outcome


@dataclass(frozen=True)
class ConstantDose:
    """CAA at one layer and strength.

    Attributes:
        layer: decoder block whose output it is added to.
        strength: multiplies the vector.
        dose: its norm in units of the states' median norm.
        share: share of hits.
    """

    layer: int
    strength: float
    dose: float
    share: Proportion


@dataclass(frozen=True)
class GateRow:
    """A gate on a task's held-out prompts: its figures and the data behind them."""

    task: Task
    gate: str
    score: str
    figures: GateFigures
    scores_ir: np.ndarray | None
    scores_general: np.ndarray | None


@dataclass(frozen=True)
class DemoTrial:
    """One task under one split.

    Attributes:
        task: `truthful` or `safety`.
        split: what fit and test do not share: questions or kinds.
        folder: where the FineSteer adapter was saved.
        base: the unsteered model.
        finesteer: the adapter as fitted; nothing was chosen on the test half.
        caa: CAA at the layer and strength that were best on the test half.
        sweep: CAA at all layers and strengths, on a part of the test half.
        adapter: the FineSteer adapter, loaded.
        fit_seconds: time to fit it.
        gates: other gates on the same prompts, if they were compared.
        seconds: total time.
    """

    task: Task
    split: Split
    folder: Path
    base: Arm
    finesteer: Arm
    caa: Arm
    sweep: list[ConstantDose]
    adapter: SteeringAdapter
    fit_seconds: float
    gates: list[GateRow] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def best_constant(self) -> ConstantDose:
        """The best of CAA's layers and strengths; the smallest dose among equals."""
        return max(self.sweep, key=lambda found: (found.share.value, -found.dose))


@dataclass
class DemoResult:
    """Everything that the tables and the report show."""

    settings: DemoSettings
    trials: list[DemoTrial]
    seconds: float

    @property
    def gates(self) -> list[GateRow]:
        """The gates of all trials."""
        return [row for trial in self.trials for row in trial.gates]


def run_demo(settings: DemoSettings, say: Callable[[str], None]) -> DemoResult:
    """Run all trials, one a processor core.

    Args:
        settings: how much to do.
        say: shows a line of progress.
    """
    start = time.perf_counter()
    jobs = [(task, split) for split in settings.splits for task in TASKS]
    workers = min(len(jobs), os.cpu_count() or 1)
    say(f"fitting and asking: {len(jobs)} trials on {workers} core{'s' if workers > 1 else ''}")
    trials: dict[tuple[Task, Split], DemoTrial] = {}
    # A new process each: torch's threads do not survive a fork.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start) as pool:
        try:
            # Child processes inherit this: ctrl-C ends them without a traceback each.
            watched = signal.signal(signal.SIGINT, signal.SIG_IGN)
            futures = {pool.submit(run_trial, task, split, settings): (task, split) for task, split in jobs}
            signal.signal(signal.SIGINT, watched)
            for future in as_completed(futures):
                trial = trials[futures[future]] = future.result()
                took = f"{trial.seconds:.0f} s, {trial.fit_seconds:.0f} s of them to fit"
                say(f"done: {trial.task}, split by {trial.split} ({took})")
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    return DemoResult(settings, [trials[job] for job in jobs], time.perf_counter() - start)


def _start() -> None:
    # Each process has one core; more threads would wait for each other.
    torch.set_num_threads(1)
    threadpool_limits(1)
    disable_progress_bar()
    # The fit warns once; a dozen loads would repeat it.
    warnings.filterwarnings("ignore", category=UserWarning)


def run_trial(task: Task, split: Split, settings: DemoSettings) -> DemoTrial:
    """Fit FineSteer and CAA on one half, save them, load them, and ask the other half."""
    start = time.perf_counter()
    model, tokenizer = playground.load()
    name = f"{task}-by-{split}"
    with tempfile.TemporaryDirectory() as store:
        # Later fits reuse the states that the first one captured.
        fit = partial(_fit, model, tokenizer, task, split, settings, store)
        adapter = fit(FineSteerConfig())
        fit_seconds = time.perf_counter() - start
        layer = setting(adapter, "layer")
        folder = adapter.save_pretrained(settings.out / "adapters" / name)
        layers = candidate_layers("auto", model.config.num_hidden_layers)
        constants = {at: fit(CAAConfig(layer=at, strength="norm:1", positions="all")) for at in layers}
        gates = []
        if split == "question":
            # The steering vector does not matter here, so this takes the cheapest.
            cheap = {"layer": layer, "strength": 1.0, "experts": "reduced_rank", "residual_rank": 1}
            gates = [
                (gate, fit(FineSteerConfig(gate=gate, gate_score=score, **cheap)))
                for gate, score in COMPARED_GATES
                if (gate, score) != ("conformal", setting(adapter, "gate_score"))
            ]
    steered = SteeredModelForCausalLM.from_pretrained(playground.model_path(), steering={"finesteer": str(folder)})
    targets = target_prompts(task, split=split, limit=settings.targets, seed=settings.seed)
    general = general_prompts(limit=settings.general, seed=settings.seed)
    # Scoring every choice takes longer than all answers, so it is done once a task.
    ask = partial(evaluate, steered, tokenizer, max_new_tokens=MAX_NEW_TOKENS, choices=split == "question")
    base = Arm(ask(targets), ask(general))
    finesteer = Arm(ask(targets, adapter="finesteer"), ask(general, adapter="finesteer"))
    figures = [
        *compare(f"playground {task}, held out by {split}", "wanted answers", base.target, finesteer.target),
        *compare("playground general prompts, held out", "right answers", base.general, finesteer.general),
    ]
    adapter.config.fit["evaluation"] = [figure.to_dict() for figure in figures]
    adapter.config.fit["about"] = ABOUT[task]
    adapter.config.fit["examples"] = examples_of(
        f"the {task} task, held out by {split}", base.target, finesteer.target
    )
    adapter.save_pretrained(folder)
    sweep = []
    for at, caa in constants.items():
        steered.load_steering(caa, "caa")
        for dose in settings.caa_doses:
            some = ask(targets[: settings.caa_targets], adapter="caa", scale=dose, choices=False)
            sweep.append(ConstantDose(at, dose * float(caa.config.strength), dose, some.share))
        steered.delete_steering("caa")
    trial = DemoTrial(
        task=task,
        split=split,
        folder=folder,
        base=base,
        finesteer=finesteer,
        caa=base,
        sweep=sweep,
        adapter=steered.steering_adapters["finesteer"],
        fit_seconds=fit_seconds,
        gates=[_gate_row(steered, tokenizer, task, gate, fitted, targets, general) for gate, fitted in gates],
    )
    best = trial.best_constant
    constants[best.layer].save_pretrained(settings.out / "adapters" / f"{name}-caa")
    steered.load_steering(constants[best.layer], "caa")
    asked = [ask(prompts, adapter="caa", scale=best.dose) for prompts in (targets, general)]
    return replace(trial, caa=Arm(*asked), seconds=time.perf_counter() - start)


def _fit(
    model: Any,
    tokenizer: Any,
    task: Task,
    split: Split,
    settings: DemoSettings,
    store: str,
    config: SteeringConfig,
) -> SteeringAdapter:
    rows = fit_rows(task, split=split, limit=settings.fit_rows, seed=settings.seed)
    return fit_steering(
        model,
        tokenizer,
        rows,
        config,
        split="group",
        general_dataset=playground.general_rows("fit", seed=settings.seed),
        seed=settings.seed,
        store_dir=store,
        progress=False,
    )


def _gate_row(
    steered: Any,
    tokenizer: Any,
    task: Task,
    gate: str,
    adapter: SteeringAdapter,
    targets: list[JudgedPrompt],
    general: list[JudgedPrompt],
) -> GateRow:
    """Read a gate on the held-out prompts, generating only one token."""
    steered.load_steering(adapter, "gate")
    ir, others = (
        evaluate(steered, tokenizer, prompts, adapter="gate", choices=False, max_new_tokens=1)
        for prompts in (targets, general)
    )
    steered.delete_steering("gate")
    scores = _scores(ir, others)
    figures = gate_figures(*_gates(ir, others), score_ir=scores[0], score_general=scores[1])
    return GateRow(task, gate, "-" if gate == "always" else setting(adapter, "gate_score"), figures, *scores)


def _gates(ir: Outcome, general: Outcome) -> list[np.ndarray]:
    """Gates of both sets; an ungated adapter has a gate of 1 everywhere."""
    recorded = [(outcome.recorded("gate"), len(outcome.prompts)) for outcome in (ir, general)]
    return [np.ones(count) if values is None else values for values, count in recorded]


def _scores(ir: Outcome, general: Outcome) -> list[np.ndarray | None]:
    """Scores of both sets, or None twice if the gate has none."""
    scores = [outcome.recorded("score") for outcome in (ir, general)]
    return scores if all(values is not None for values in scores) else [None, None]


def setting(adapter: SteeringAdapter, name: str) -> Any:
    """A setting of a method's own config."""
    return adapter.config.to_dict()[name]
