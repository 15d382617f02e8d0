"""One search for all methods: at which blocks, from which token on and how strongly, chosen on held-out rows.

A method says what it may be, a `Trial` for each way, and gets back which way it is, at which strength, and a report. Doses
are absolute: norms of what is added in units of the states that it is added to, so a vector's own length plays no part.
What a method's paper fixes is one way only, and nothing is left to search but its strength.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import numpy as np

from finesteer_hf.method_api import FitData
from finesteer_hf.methods._shared.objective import Objective
from finesteer_hf.methods._shared.strength import explore
from finesteer_hf.methods._shared.trials import RELATIVE_DOSES, SHORT_LIST, Trial, name_of, point_row, try_each
from finesteer_hf.processors import Positions


Key = TypeVar("Key")
OpenPositions = Positions | Literal["auto"]

# Multiples of the dose that was best at a place, from which the strength is then chosen.
CURVE = (0.5, 0.75, 1.0, 1.33)
# Many ways are first steered at two of the doses, a low and a middle one, on this share of the held-out prompts.
SCREENED, SCREEN_SHARE = (0, 2), 0.25
# A first look at a few takes this share of the held-out prompts, if that leaves so many.
FIRST_LOOK, ENOUGH_PROMPTS = 0.5, 40


@dataclass(frozen=True)
class Place:
    """Where steering acts: blocks, and the tokens that are steered there."""

    layers: tuple[int, ...]
    positions: Positions

    def __str__(self) -> str:
        blocks = ", ".join(map(str, self.layers))
        return f"{'block' if len(self.layers) == 1 else 'blocks'} {blocks}, {self.positions}"


@dataclass(frozen=True)
class Found(Generic[Key]):
    """What a search has chosen.

    Attributes:
        key: the way.
        strength: lambda.
        report: JSON-ready: what was tried, the norms, why the strength, and its curve.
    """

    key: Key
    strength: float
    report: dict[str, Any]


def search(
    data: FitData,
    rule: float | str,
    trials: Mapping[Key, Trial],
    *,
    what: str = "layer",
    doses: Sequence[float] = RELATIVE_DOSES,
) -> Found[Key]:
    """Choose one of several ways, then its strength.

    More than `SHORT_LIST` are first steered at two doses on a few of the prompts; the best are steered over all doses;
    around the dose that was best the strength is chosen (see `choose_strength`).

    Args:
        data: runs the model on its validation part.
        rule: the config's strength: a number, `auto`, `kl:<nats>` or `norm:<share>`.
        trials: what to steer with; where nothing is held out, the first is taken.
        what: what their keys are, for the report.
        doses: ascending, in units of the state's norm.
    """
    screened = None
    if len(trials) > SHORT_LIST:
        trials, screened = shortlist(data, rule, trials, what, doses)
    key, near, tried = _choose(data, rule, trials, what, doses)
    strength, report = settle(data, rule, trials[key], near, doses)
    return Found(key, strength, {f"{what}s_screened": screened, f"{what}s_tried": tried, **report})


def search_places(
    data: FitData,
    rule: float | str,
    layers: Sequence[int],
    trial_of: Callable[[Place], Trial],
    *,
    positions: OpenPositions,
    several: bool,
) -> Found[Place]:
    """Choose the blocks, the steered tokens and the strength.

    Single blocks are compared first. Where a method may steer several at once, the best of them together and all of them
    together are compared with them. Positions that are open are compared at the place that was best.

    Args:
        data: runs the model on its validation part.
        rule: the config's strength.
        layers: blocks that may be steered.
        trial_of: what to steer with at a place.
        positions: the config's; `auto` compares `generated` with `all`.
        several: whether more than one block may be steered at once.
    """
    first: Positions = "generated" if positions == "auto" else positions
    trials = {Place((layer,), first): trial_of(Place((layer,), first)) for layer in layers}
    screened = None
    if len(trials) > SHORT_LIST:
        trials, screened = shortlist(data, rule, trials, "place", RELATIVE_DOSES)
    if several and len(layers) > 1:
        best = tuple(sorted(place.layers[0] for place in trials))
        together = dict.fromkeys(Place(blocks, first) for blocks in (best, tuple(layers)))
        trials |= {place: trial_of(place) for place in together}
    place, near, tried = _choose(data, rule, trials, "place")
    trial, table = trials[place], None
    if positions == "auto" and near:
        other = trial_of(dataclasses.replace(place, positions="all"))
        chosen, near, table = compare_positions(data, trial, other, near)
        if chosen == "all":
            place, trial = dataclasses.replace(place, positions="all"), other
    strength, report = settle(data, rule, trial, near)
    tables = {"places_screened": screened, "places_tried": tried, "positions_tried": table}
    return Found(place, strength, {**tables, **report})


def search_layers(
    data: FitData, config: Any, layers: Sequence[int], trial_of: Callable[[Place], Trial]
) -> Found[Place]:
    """Choose for a method of several blocks: among `layers` where its config says `auto`, else all that it names.

    Args:
        data: runs the model on its validation part.
        config: with `layers`, `positions` and `strength`.
        layers: the blocks that it may steer, or does.
        trial_of: what to steer with at a place.
    """
    if config.layers == "auto":
        return search_places(data, config.strength, layers, trial_of, positions=config.positions, several=True)
    whole = Place(tuple(layers), config.positions)
    return search(data, config.strength, {whole: trial_of(whole)}, what="place")


def settle(
    data: FitData, rule: float | str, trial: Trial, near: float | None, doses: Sequence[float] = RELATIVE_DOSES
) -> tuple[float, dict[str, Any]]:
    """Choose the strength of one way, around a dose if one is known to be good.

    Args:
        data: runs the model on its validation part.
        rule: the config's strength.
        trial: the way.
        near: the dose; None looks over all of `doses`.
        doses: ascending, in units of the state's norm.

    Returns:
        The strength, and a report of the norms, of why it is taken, and of its curve.
    """
    over = [near * factor for factor in CURVE] if near and rule == "auto" else doses
    strength, curve, why = trial.choose_strength(rule, data, over)
    return strength, {
        "vector": {"vector_norm": trial.vector_norm, "state_norm": trial.state_norm},
        "strength": why,
        "objective": Objective.of(curve, data.limits).to_dict() if curve else None,
        "dose_response": [dataclasses.asdict(point) for point in curve],
    }


def shortlist(
    data: FitData, rule: float | str, trials: Mapping[Key, Trial], what: str, doses: Sequence[float]
) -> tuple[dict[Key, Trial], list[dict[str, Any]]]:
    """The `SHORT_LIST` best at a first look, best first, and the table of all."""
    curves, two = {}, [doses[min(at, len(doses) - 1)] for at in SCREENED]
    for key, trial in trials.items():
        data.note(f"a first look at {what} {key}")
        strengths = [float(rule)] if isinstance(rule, (int, float)) else list(map(trial.strength_of, two))
        curves[key] = data.dose_response(trial.build, [0.0, *strengths], SCREEN_SHARE)
    objective = Objective.of([point for curve in curves.values() for point in curve], data.limits)
    best = {key: max(curve[1:], key=objective.merit) for key, curve in curves.items()}
    order = sorted(best, key=lambda key: objective.merit(best[key]), reverse=True)
    table = [{what: name_of(key), **point_row(best[key], objective)} for key in trials]
    return {key: trials[key] for key in order[:SHORT_LIST]}, table


def compare_positions(
    data: FitData, generated: Trial, everywhere: Trial, dose: float
) -> tuple[Positions, float, list[dict[str, Any]]]:
    """`generated`, unless `all` is better by more than the standard error; level results need no second pass.

    Args:
        data: runs the model on its validation part.
        generated: steers from the query on.
        everywhere: the same vectors at all tokens.
        dose: at which the first is best, in units of the state's norm.

    Returns:
        The positions, the dose that was best with them, and the table.
    """
    trials: dict[Positions, Trial] = {"generated": generated, "all": everywhere}
    share = first_look(data)
    curves = {
        "generated": explore(data, generated.build, [generated.strength_of(dose)], share),
        # What is steered longer is steered at a lower dose.
        "all": explore(data, everywhere.build, [everywhere.strength_of(f * dose) for f in (0.75, 1.0)], share),
    }
    objective = Objective.of([point for curve in curves.values() for point in curve], data.limits)
    best = {name: max(curve[1:], key=objective.merit) for name, curve in curves.items()}
    table = [{"positions": name, **point_row(point, objective)} for name, point in best.items()]
    margin = best["all"].bottleneck_rise_se if objective.criterion == "sayable" else best["all"].preference_rise_se
    better = objective.value(best["all"]) - objective.value(best["generated"]) > margin
    name: Positions = "all" if better and not objective.broken(best["all"]) else "generated"
    return name, best[name].strength / trials[name].strength_of(1.0), table


def first_look(data: FitData) -> float:
    """Share of the held-out prompts that a comparison takes."""
    return FIRST_LOOK if len(np.unique(data.prompts("validation"))) * FIRST_LOOK >= ENOUGH_PROMPTS else 1.0


def compare(
    data: FitData, rule: float | str, trials: Mapping[Key, Trial], what: str, doses: Sequence[float] = RELATIVE_DOSES
) -> tuple[Key, float | None, list[dict[str, Any]] | None]:
    """Steer in each of several ways at a first look.

    Args:
        data: runs the model on its validation part.
        rule: the config's strength.
        trials: what to steer with; the most promising first.
        what: what their keys are, for the report.
        doses: ascending, in units of the state's norm.

    Returns:
        The best way, the dose at which it is, and the table; of the last two None if there are no held-out rows.
    """
    key, tried = try_each(data, trials, rule, what=what, doses=doses, share=first_look(data))
    if tried is None:
        return key, None, None
    strength: float = next(row["strength"] for row in tried if row[what] == name_of(key))
    return key, strength / trials[key].strength_of(1.0), tried


def _choose(
    data: FitData, rule: float | str, trials: Mapping[Key, Trial], what: str, doses: Sequence[float] = RELATIVE_DOSES
) -> tuple[Key, float | None, list[dict[str, Any]] | None]:
    """What `compare` gives; an only way is taken without a look."""
    if len(trials) == 1:
        return next(iter(trials)), None, None
    return compare(data, rule, trials, what, doses)
