"""The demo's report: one HTML file."""

from __future__ import annotations

import platform
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np

from finesteer_hf.cli.demo.run import Arm, DemoResult, DemoTrial, setting
from finesteer_hf.cli.demo.standing import STANDING_COLUMNS, standings
from finesteer_hf.cli.demo.tables import (
    CAA_NOTE,
    GATE_COLUMNS,
    GATE_NOTE,
    INTERVAL_NOTE,
    SPLIT_NAMES,
    TASK_NAMES,
    examples,
    gate_rows,
    gate_tasks,
    gate_title,
    hit_name,
    paired_note,
    trial_columns,
    trial_rows,
)
from finesteer_hf.evaluation.behaviour import Outcome
from finesteer_hf.evaluation.comparison import ALPHA
from finesteer_hf.evaluation.measures.statistics import Proportion
from finesteer_hf.method_api import DosePoint
from finesteer_hf.views.plots import (
    plot_dose_response,
    plot_expert_use,
    plot_gate_roc,
    plot_gate_scores,
    plot_shares,
)
from finesteer_hf.views.report import Answer, Exchange, Headline, Mark, Plot, Report, Section, Table


LEAD = (
    "A small language model that ships with the package repeats folklore and complies with requests in a jailbreak "
    "wrapper. Adapters were fitted on one half of its questions and requests, saved, loaded, and tried on the other half. "
    "The model exists to show and test the library: these figures say nothing about large models."
)


def build_report(result: DemoResult) -> Report:
    """The report of a demo run."""
    trials = sorted(result.trials, key=lambda trial: trial.task != "truthful")
    sections = [_standing_section(result), *(_trial_section(result, trial) for trial in trials), _gate_section(result)]
    return Report(
        title="FineSteer on the playground",
        lead=LEAD,
        headline=_headline(result),
        sections=sections,
        provenance={
            "finesteer_hf": version("finesteer-hf"),
            "torch": version("torch"),
            "transformers": version("transformers"),
            "python": platform.python_version(),
            "seed": str(result.settings.seed),
            "time": f"{result.seconds:.0f} s",
        },
    )


def _headline(result: DemoResult) -> list[Headline]:
    """Every comparison on the task, losses included, and the effect on general prompts."""
    items = []
    for standing in standings(result):
        after = f"{100 * standing.finesteer.value:.0f}%"
        value = after if standing.unsteered is None else f"{100 * standing.unsteered.value:.0f}% → {after}"
        word = standing.verdict.partition(":")[0]
        detail = f"n={standing.finesteer.n}; CAA at its best {100 * standing.caa.value:.0f}%: {word}"
        items.append(Headline(standing.what, value, detail, standing.mark))
    return items


def _standing_section(result: DemoResult) -> Section:
    found = standings(result)
    lost = [standing.what for standing in found if standing.mark == "bad"]
    untried = all(trial.split != "kind" for trial in result.trials)
    return Section(
        title="Won and lost",
        text=[
            "FineSteer beside a constant vector (CAA) at the layer and strength that are best on these same "
            f"prompts. Ahead or behind: McNemar's exact test, p < {ALPHA:g}, row by row, so that no correction "
            'hides a loss; "not after Holm" marks rows that are not significant after the correction.',
            f"Behind on: {'; '.join(lost)}." if lost else "Behind on none.",
            *(["Whole kinds unseen, the harder half, were not tried in this run (--quick)."] if untried else []),
        ],
        tables=[
            Table(
                STANDING_COLUMNS,
                [standing.cells() for standing in found],
                note=INTERVAL_NOTE,
                marks=[standing.mark for standing in found],
            )
        ],
    )


def _trial_section(result: DemoResult, trial: DemoTrial) -> Section:
    name = TASK_NAMES[trial.task]
    split = SPLIT_NAMES[trial.task, trial.split]
    config = trial.adapter.config
    section = Section(
        title=f"{name[0].upper()}{name[1:]}, split {split.partition(':')[0]}",
        text=[
            f"Split {split}. Fitted in {trial.fit_seconds:.0f} s: layer {setting(trial.adapter, 'layer')}, strength "
            f"{config.strength:g}, {sum(t.numel() for t in trial.adapter.tensors.values()):,} parameters.",
            paired_note(trial),
        ],
        tables=[
            Table(trial_columns(trial), trial_rows(trial), note=f"{CAA_NOTE} {INTERVAL_NOTE}"),
            Table(
                ("layer", "CAA's strength", "norm of the vector / of the states", hit_name(trial)),
                [(str(at.layer), f"{at.strength:.3g}", f"{at.dose:g}", str(at.share)) for at in trial.sweep],
                title="CAA at each layer and strength",
            ),
        ],
        plots=[
            Plot(partial(plot_shares, _shares(trial)), "Shares with 95% Wilson intervals, conditions side by side.")
        ],
        exchanges_title="Held-out answers side by side (chosen without looking at the outcome)",
        exchanges=[
            Exchange(
                trial.base.target.prompts[index].text,
                [
                    _answer("unsteered", trial.base.target, index),
                    _answer("FineSteer", trial.finesteer.target, index),
                    _answer("CAA", trial.caa.target, index),
                ],
            )
            for index in examples(trial, 8)
        ],
    )
    curve = dose_points(trial.adapter.config.fit)
    if curve:
        caption = "Dose response on rows held out from the fit: the wanted answers, and how far general prompts shift."
        section.plots.append(Plot(partial(plot_dose_response, curve, chosen=float(config.strength)), caption))
    experts = trial.finesteer.target.recorded("experts")
    if experts is not None and experts.ndim == 2 and experts.shape[1] > 1:
        categories = [item.category for item in trial.finesteer.target.prompts]
        section.plots.append(
            Plot(partial(plot_expert_use, experts, categories), "Expert use: mean routing weight by kind of prompt.")
        )
    return section


def dose_points(fit: dict[str, Any]) -> list[DosePoint]:
    """The dose-response curve that a fit stored; empty if there is none."""
    return [DosePoint.from_report(point) for point in fit.get("report", {}).get("dose_response", [])]


def _shares(trial: DemoTrial) -> dict[str, dict[str, Proportion]]:
    conditions: dict[str, Arm] = {"unsteered": trial.base, "FineSteer": trial.finesteer, "CAA (best)": trial.caa}
    shares = {hit_name(trial): {name: arm.target.share for name, arm in conditions.items()}}
    if trial.base.target.choices is not None:
        shares["MC1"] = {
            name: arm.target.choices.mc1_share for name, arm in conditions.items() if arm.target.choices is not None
        }
    shares["general tasks correct"] = {name: arm.general.share for name, arm in conditions.items()}
    shares["general output identical"] = {
        name: arm.general.identical_to(trial.base.general) for name, arm in conditions.items() if arm is not trial.base
    }
    return shares


def _answer(condition: str, outcome: Outcome, index: int) -> Answer:
    verdict = outcome.verdicts[index]
    mark: Mark = "good" if verdict is True else "bad" if verdict is False else ""
    gate = outcome.recorded("gate")
    remark = f"gate {gate[index]:.2f}" if gate is not None else ""
    return Answer(condition, outcome.answers.texts[index], mark, remark)


def _gate_section(result: DemoResult) -> Section:
    section = Section(
        title="Gates",
        text=["When to steer: the calibrated default beside the paper's three gates, and no gate.", GATE_NOTE],
        tables=[Table(GATE_COLUMNS, gate_rows(result, task), gate_title(result, task)) for task in gate_tasks(result)],
    )
    for task in gate_tasks(result):
        scores: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for row in result.gates:
            if row.task == task and row.scores_ir is not None and row.scores_general is not None:
                scores.setdefault(row.score, (row.scores_ir, row.scores_general))
        if scores:
            section.plots.append(
                Plot(
                    partial(plot_gate_roc, scores),
                    f"{task}: target prompts caught against general prompts disturbed, held out.",
                )
            )
            name, (ir, general) = next(iter(scores.items()))
            section.plots.append(
                Plot(
                    partial(plot_gate_scores, ir, general, score=f"{name} score"),
                    f"{task}: scores of held-out prompts.",
                )
            )
    return section
