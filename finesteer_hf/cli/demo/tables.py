"""The demo's figures as rows of text, for terminal and report."""

from __future__ import annotations

import math

from finesteer_hf.cli.demo.run import DemoResult, DemoTrial
from finesteer_hf.evaluation.behaviour import Outcome
from finesteer_hf.evaluation.data.playground_eval import Task
from finesteer_hf.evaluation.measures.statistics import proportion


TASK_NAMES = {"truthful": "truthful answers", "safety": "refusals of wrapped requests"}
SPLIT_NAMES = {
    ("truthful", "question"): "by question: no question is in both halves, but each subject has six",
    ("truthful", "kind"): "by kind: no kind of misconception is in both halves",
    ("safety", "question"): "by request: no base request is in both halves",
    ("safety", "kind"): "by category: no category of harm is in both halves",
}
CAA_NOTE = (
    "CAA: constant mean difference at all positions, no gate, at the layer and strength that are best on these test "
    "prompts: an upper bound that favours CAA. FineSteer's layer, gate, rank and strength were chosen on the fit half only."
)
INTERVAL_NOTE = (
    "Shares: Wilson 95% intervals. MC2: mean with a bootstrap interval. Several prompts share a subject or a request, so "
    "they are not fully independent and the intervals are somewhat too narrow."
)
GATE_NOTE = (
    "A gate fires where its value is at least 0.5. Miss: held-out target prompts on which it does not fire. False alarm: "
    "held-out general prompts (tasks and harmless look-alikes) on which it does. Dose: mean gate value on targets, "
    "and on general prompts. Each gate was fitted separately on the fit half, at the same layer."
)


def hit_name(trial: DemoTrial) -> str:
    """The name of a hit in this task."""
    return "truthful answers" if trial.task == "truthful" else "refusals"


def trial_columns(trial: DemoTrial) -> tuple[str, ...]:
    """Column names of a trial's table."""
    return (
        "held out",
        "n",
        "unsteered",
        "FineSteer",
        f"CAA at best (layer {trial.best_constant.layer}, {trial.best_constant.strength:.3g})",
    )


def trial_rows(trial: DemoTrial) -> list[tuple[str, ...]]:
    """All figures of a trial, one row each: n, unsteered, FineSteer, CAA."""
    arms = (trial.base, trial.finesteer, trial.caa)
    targets, general = str(trial.base.target.share.n), str(trial.base.general.share.n)
    rows = [(hit_name(trial), targets, *(arm.target.share.brief for arm in arms))]
    if trial.task == "truthful":
        neither = [proportion(verdict is None for verdict in arm.target.verdicts) for arm in arms]
        rows.append(("neither true nor folklore", targets, *(share.brief for share in neither)))
    if trial.base.target.choices is not None:
        choices = [arm.target.choices for arm in arms]
        rows.append(("MC1", targets, *("-" if found is None else found.mc1_share.brief for found in choices)))
        rows.append(("MC2", targets, *("-" if found is None else found.mc2_mean.brief for found in choices)))
    rows.append(("gate fires on these", targets, "-", _fires(trial.finesteer.target), "always on"))
    rows.append(("gate fires on general", general, "-", _fires(trial.finesteer.general), "always on"))
    rows.append(("general tasks correct", general, *(arm.general.share.brief for arm in arms)))
    identical = [arm.general.identical_to(trial.base.general).brief for arm in arms[1:]]
    rows.append(("general output unchanged", general, "-", *identical))
    return rows


def _fires(outcome: Outcome) -> str:
    fires = outcome.fires()
    return "always on" if fires is None else fires.brief


def paired_note(trial: DemoTrial) -> str:
    """McNemar's tests of a trial, in a sentence."""
    base = trial.finesteer.target.against(trial.base.target)
    caa = trial.finesteer.target.against(trial.caa.target)
    return (
        f"Paired, FineSteer against unsteered: {base.only_second} gained, {base.only_first} lost "
        f"(McNemar p = {base.p_value:.1g}); against CAA: {caa.only_second} gained, {caa.only_first} lost "
        f"(p = {caa.p_value:.1g})."
    )


GATE_COLUMNS = ("gate", "score", "miss", "false alarm", "dose", "on general", "AUROC")


def gate_tasks(result: DemoResult) -> list[Task]:
    """The tasks whose gates were compared."""
    return list(dict.fromkeys(row.task for row in result.gates))


def gate_title(result: DemoResult, task: Task) -> str:
    """Title of a task's gate table, with both n."""
    figures = next(row.figures for row in result.gates if row.task == task)
    return f"{TASK_NAMES[task]}: {figures.miss.n} held-out targets, {figures.false_alarm.n} general prompts"


def gate_rows(result: DemoResult, task: Task) -> list[tuple[str, ...]]:
    """Figures of a task's gates."""
    return [
        (
            row.gate,
            row.score,
            row.figures.miss.brief,
            row.figures.false_alarm.brief,
            f"{row.figures.dose_ir.value:.3f}",
            f"{row.figures.dose_general.value:.3f}",
            "-" if math.isnan(row.figures.auroc) or row.gate == "always" else f"{row.figures.auroc:.3f}",
        )
        for row in result.gates
        if row.task == task
    ]


def examples(trial: DemoTrial, count: int) -> list[int]:
    """Prompts to show, spread evenly over the categories and chosen without looking at the outcome."""
    by_category: dict[str, list[int]] = {}
    for index, item in enumerate(trial.base.target.prompts):
        by_category.setdefault(item.category, []).append(index)
    chosen: list[int] = []
    turn = 0
    while len(chosen) < min(count, len(trial.base.target.prompts)):
        for indices in by_category.values():
            # From the middle of each category: its first prompts all have one form.
            if turn < len(indices) and len(chosen) < count:
                chosen.append(indices[(len(indices) // 2 + 7 * turn) % len(indices)])
        turn += 1
    return list(dict.fromkeys(chosen))
