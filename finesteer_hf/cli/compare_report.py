"""The comparison's tables and its report."""

from __future__ import annotations

from functools import partial
from importlib.metadata import version

import numpy as np

from finesteer_hf.evaluation.behaviour import Outcome
from finesteer_hf.evaluation.comparison import ALPHA, HOLM_NOTE, ComparisonRow, p_text
from finesteer_hf.evaluation.measures.ranks import ranks_with_intervals
from finesteer_hf.evaluation.measures.statistics import Mean, Proportion, holm
from finesteer_hf.evaluation.method_comparison import HIT, MethodComparison, MethodTrial
from finesteer_hf.method_api import DosePoint
from finesteer_hf.views.plots import (
    layer_figures,
    plot_dose_response,
    plot_effect_and_cost,
    plot_layer_screening,
    plot_shares,
)
from finesteer_hf.views.report import Answer, Exchange, Headline, Mark, Plot, Report, Section, Table


EFFECT_COLUMNS = ("method", "MC1", "p", "MC2", "p", HIT, "p")
DUEL_COLUMNS = ("first", "second", "MC1: first only / second only", "p", "MC2, second minus first", "p")
COST_COLUMNS = ("method", "general answers unchanged", "gate fires on rows", "on general", "fit", "size")
SHOWN = 6


def effect_rows(result: MethodComparison) -> list[tuple[str, ...]]:
    """MC1, MC2 and hits of the base and of each method, with their paired p."""
    base = result.own
    rows: list[tuple[str, ...]] = [("unsteered", *_pair(base, "MC1"), *_pair(base, "MC2"), base.share.brief, "")]
    holds = effects_that_hold(result)
    for trial in result.trials:
        cells: list[str] = []
        for metric, row in _effects_of(result, trial).items():
            assert row.steered is not None and row.p_value is not None
            cells += [row.steered.brief, p_text(row.p_value, holds[trial.name, metric])]
        rows.append((trial.name, *cells))
    return rows


def effects_that_hold(result: MethodComparison) -> dict[tuple[str, str], bool]:
    """For each method and figure, whether its difference from unsteered is significant after Holm's correction."""
    figures = {
        (trial.name, metric): row for trial in result.trials for metric, row in _effects_of(result, trial).items()
    }
    corrected = holm([1.0 if row.p_value is None else row.p_value for row in figures.values()])
    return {key: bool(p < ALPHA) for key, p in zip(figures, corrected, strict=True)}


def _effects_of(result: MethodComparison, trial: MethodTrial) -> dict[str, ComparisonRow]:
    figures = {row.metric: row for row in trial.against_base(result)[:3]}
    return {metric: figures[metric] for metric in ("MC1", "MC2", HIT)}


def rank_note(result: MethodComparison) -> str:
    """The methods from the best mean MC2 down, with rank intervals."""
    scores = {trial.name: trial.own.choices.mc2 for trial in result.trials if trial.own.choices is not None}
    ranks = sorted(ranks_with_intervals(scores).items(), key=lambda found: found[1].value)
    shown = "; ".join(f"{name} {rank}" for name, rank in ranks)
    return f"Ranks by MC2 [95%, bootstrap over prompts]: {shown}."


def _pair(outcome: Outcome, metric: str) -> tuple[str, str]:
    assert outcome.choices is not None
    return (outcome.choices.mc1_share.brief if metric == "MC1" else outcome.choices.mc2_mean.brief), ""


def duel_rows(result: MethodComparison) -> list[tuple[str, ...]]:
    """One row for each pair of methods."""
    duels = result.duels()
    mc1, mc2 = np.split(holm([*(duel.mc1.p_value for duel in duels), *(duel.mc2_p for duel in duels)]) < ALPHA, 2)
    return [
        (
            duel.first,
            duel.second,
            f"{duel.mc1.only_first} / {duel.mc1.only_second}",
            p_text(duel.mc1.p_value, mc1[number]),
            f"{duel.mc2.value:+.3f} [{duel.mc2.low:+.3f}, {duel.mc2.high:+.3f}]",
            p_text(duel.mc2_p, mc2[number]),
        )
        for number, duel in enumerate(duels)
    ]


def cost_rows(result: MethodComparison) -> list[tuple[str, ...]]:
    """What each method changes on general prompts, and what it costs."""
    return [
        (
            trial.name,
            trial.general.identical_to(result.general).brief,
            _fires(trial.own),
            _fires(trial.general),
            f"{trial.seconds:.0f} s",
            f"{trial.size:,} bytes",
        )
        for trial in result.trials
    ]


def _fires(outcome: Outcome) -> str:
    fires = outcome.fires()
    return "no gate" if fires is None else fires.brief


def mark(result: MethodComparison, trial: MethodTrial) -> Mark:
    """Whether a method's MC2 is above the base model's (`good`), below (`bad`), or not different after Holm."""
    if not effects_that_hold(result)[trial.name, "MC2"]:
        return ""
    return "good" if result.mc2_change(trial).value > 0 else "bad"


def build_report(result: MethodComparison, model: str) -> Report:
    """The report of a comparison."""
    return Report(
        title="Steering methods compared",
        lead=f"Fitted on {result.fitted} rows for {model}, tested on {len(result.own.prompts)} held-out prompts "
        f"and {len(result.general.prompts)} general ones. No setting was chosen on these.",
        headline=[_headline(result, trial) for trial in result.trials],
        sections=[_effects(result), _costs(result), _answers(result)],
        provenance={name: version(name) for name in ("finesteer-hf", "torch", "transformers")},
    )


def _headline(result: MethodComparison, trial: MethodTrial) -> Headline:
    change = result.mc2_change(trial)
    same = trial.general.identical_to(result.general)
    words: dict[Mark, str] = {"good": "above unsteered", "bad": "below unsteered", "": "no significant difference"}
    where = mark(result, trial)
    detail = f"change of MC2: {words[where]}; {100 * same.value:.0f}% of general answers unchanged"
    return Headline(trial.name, f"{change.value:+.3f}", detail, where)


def _effects(result: MethodComparison) -> Section:
    failed = [f"{name} could not be fitted: {why}" for name, why in result.failed.items()]
    changes = {t.name: (result.mc2_change(t), t.general.identical_to(result.general)) for t in result.trials}
    section = Section(
        "Effect",
        [
            "MC1: the first chosen answer is likelier than every rejected one. MC2: the chosen answers' share of the "
            "probability. p: McNemar's exact test for shares, sign flips for MC2. "
            f"{HOLM_NOTE} Above and below unsteered: MC2, after the correction.",
            *([rank_note(result)] if len(result.trials) > 1 else []),
            *failed,
        ],
        tables=[
            Table(
                EFFECT_COLUMNS,
                effect_rows(result),
                "Against unsteered",
                marks=["", *(mark(result, trial) for trial in result.trials)],
            )
        ],
    )
    if result.trials:
        section.plots = [
            Plot(
                partial(plot_effect_and_cost, changes),
                "What each method gains, and how many general answers it changes.",
            ),
            Plot(partial(plot_shares, _shares(result)), "Held-out figures with 95% intervals, methods side by side."),
        ]
    if len(result.trials) > 1:
        section.tables.append(Table(DUEL_COLUMNS, duel_rows(result), "One against another"))
    return section


def _shares(result: MethodComparison) -> dict[str, dict[str, Proportion | Mean]]:
    shares: dict[str, dict[str, Proportion | Mean]] = {"MC1": {}, "MC2": {}, HIT: {}, "general answers unchanged": {}}
    for name, own in (("unsteered", result.own), *((t.name, t.own) for t in result.trials)):
        assert own.choices is not None
        shares["MC1"][name], shares["MC2"][name] = own.choices.mc1_share, own.choices.mc2_mean
        shares[HIT][name] = own.share
    for trial in result.trials:
        shares["general answers unchanged"][trial.name] = trial.general.identical_to(result.general)
    return shares


def _costs(result: MethodComparison) -> Section:
    section = Section("Side effects and cost", tables=[Table(COST_COLUMNS, cost_rows(result))], plots_title="Doses")
    for trial in result.trials:
        report = trial.adapter.config.fit.get("report", {})
        points = [DosePoint.from_report(point) for point in report.get("dose_response") or []]
        if len(points) > 1:
            leads = (report.get("objective") or {}).get("criterion", "sayable")
            strength = float(trial.adapter.config.strength)
            draw = partial(plot_dose_response, points, chosen=strength, leads=leads)
            section.plots.append(Plot(draw, f"{trial.name}: dose response on rows held out from its fit."))
        table = layer_figures(report)
        if len(table) > 1:
            steered = {site.layer for site in trial.adapter.build().writes}
            draw = partial(plot_layer_screening, table, chosen=steered)
            section.plots.append(Plot(draw, f"{trial.name}: figures of the layers that its fit chose from."))
    return section


def _answers(result: MethodComparison) -> Section:
    """Evenly spread held-out prompts, chosen without looking at the answers."""
    count = len(result.own.prompts)
    chosen = range(0, count, max(1, count // SHOWN))[:SHOWN]
    conditions = [("unsteered", result.own), *((trial.name, trial.own) for trial in result.trials)]
    return Section(
        "Answers",
        exchanges=[
            Exchange(result.own.prompts[row].text, [_answer(name, outcome, row) for name, outcome in conditions])
            for row in chosen
        ],
        exchanges_title="Held-out prompts, chosen without looking at the outcome",
    )


def _answer(condition: str, outcome: Outcome, row: int) -> Answer:
    gate = outcome.recorded("gate")
    verdict: Mark = "good" if outcome.verdicts[row] else "bad"
    return Answer(condition, outcome.answers.texts[row], verdict, "" if gate is None else f"gate {gate[row]:.2f}")
