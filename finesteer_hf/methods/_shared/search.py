"""One search for all methods: blocks, first steered token and strength, chosen on held-out rows.

A method passes a `Trial` for each variant and gets back the chosen variant, its strength and a report. Doses are norms
of the added vectors in units of the states, so a vector's own length does not matter. If a method's paper fixes the
variant, only the strength is searched.
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
from finesteer_hf.methods._shared.trials import RELATIVE_DOSES, SHORT_LIST, Trial, evenly, name_of, point_row, try_each
from finesteer_hf.processors import Positions


Key = TypeVar("Key")
Name = TypeVar("Name", bound=str)
OpenPositions = Positions | Literal["auto"]

# Multiples of a place's best dose among which the strength is chosen.
CURVE = (0.5, 0.75, 1.0, 1.33)
# Many variants are first tried at two doses, a low and a middle one, on this share of the held-out prompts.
SCREENED, SCREEN_SHARE = (0, 2), 0.25
# The prompt's tokens are tried at so many blocks, evenly over the depth: these trials cannot use cached prompts.
PROMPT_BLOCKS = 7
# Steering all tokens needs a lower dose than steering some of them.
LESS = (0.75, 1.0)
# A first look at a few variants uses this share of the held-out prompts, if that is at least so many.
FIRST_LOOK, ENOUGH_PROMPTS = 0.5, 40


@dataclass(frozen=True)
class Place:
    """Where steering acts: blocks and steered tokens."""

    layers: tuple[int, ...]
    positions: Positions

    def __str__(self) -> str:
        blocks = ", ".join(map(str, self.layers))
        return f"{'block' if len(self.layers) == 1 else 'blocks'} {blocks}, {self.positions}"


@dataclass(frozen=True)
class Found(Generic[Key]):
    """The result of a search.

    Attributes:
        key: key of the variant.
        strength: lambda.
        report: JSON-ready: what was tried, the norms, the reason for the strength, and its curve.
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
    doses: Sequence[float] | None = None,
) -> Found[Key]:
    """Choose one of several variants, then its strength.

    More than `SHORT_LIST` are first tried at two doses on some of the prompts; the best are tried at all doses. The
    strength is chosen around the best dose (see `choose_strength`).

    Args:
        data: runs the model on its validation part.
        rule: the config's strength: a number, `auto`, `kl:<nats>` or `norm:<share>`.
        trials: the variants; if nothing is held out, the first is taken.
        what: what the keys are, for the report.
        doses: ascending, in units of the state's norm, where the paper fixes them; by default `RELATIVE_DOSES`.
    """
    screened = None
    if len(trials) > SHORT_LIST:
        trials, screened = shortlist(data, rule, trials, what, doses)
    steps = doses or RELATIVE_DOSES
    key, near, tried = _choose(data, rule, trials, what, steps)
    strength, report = settle(data, rule, trials[key], near, steps)
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

    Single blocks are compared first, with open positions from the query on, and some of them in the prompt. If a method may
    steer several at once, the best ones together and all together are compared with them. All tokens are compared at
    the best place.

    Args:
        data: runs the model on its validation part.
        rule: the config's strength.
        layers: blocks that may be steered.
        trial_of: returns the trial of a place.
        positions: the config's; `auto` compares `generated` with `all`, and with `prompt` if the strength is open too.
        several: whether more than one block may be steered at once.
    """
    first: Positions = "generated" if positions == "auto" else positions
    blocks: dict[Positions, Sequence[int]] = {first: layers}
    if positions == rule == "auto":
        blocks["prompt"] = evenly(sorted(layers), PROMPT_BLOCKS)
    trials = {
        place: trial_of(place) for place in (Place((at,), own) for own, all_at in blocks.items() for at in all_at)
    }
    screened = None
    if len(trials) > SHORT_LIST:
        trials, screened = shortlist(data, rule, trials, "place")
    if several and len(layers) > 1:
        best = tuple(sorted({place.layers[0] for place in trials}))
        together = dict.fromkeys(Place(several_of, own) for own in blocks for several_of in (best, tuple(layers)))
        trials |= {place: trial_of(place) for place in together}
    place, near, tried = _choose(data, rule, trials, "place")
    trial, table = trials[place], None
    if positions == "auto" and near:
        other = trial_of(dataclasses.replace(place, positions="all"))
        chosen, near, table = compare_with_all(data, place.positions, trial, other, near)
        if chosen == "all":
            place, trial = dataclasses.replace(place, positions="all"), other
    strength, report = settle(data, rule, trial, near)
    tables = {"places_screened": screened, "places_tried": tried, "positions_tried": table}
    return Found(place, strength, {**tables, **report})


def search_layers(
    data: FitData, config: Any, layers: Sequence[int], trial_of: Callable[[Place], Trial]
) -> Found[Place]:
    """Search for a method with several blocks: among `layers` if its config has `auto`, else all that it names.

    Args:
        data: runs the model on its validation part.
        config: config with `layers`, `positions` and `strength`.
        layers: the blocks that it may steer.
        trial_of: returns the trial of a place.
    """
    if config.layers == "auto":
        return search_places(data, config.strength, layers, trial_of, positions=config.positions, several=True)
    whole = Place(tuple(layers), config.positions)
    return search(data, config.strength, {whole: trial_of(whole)}, what="place")


def settle(
    data: FitData, rule: float | str, trial: Trial, near: float | None, doses: Sequence[float] = RELATIVE_DOSES
) -> tuple[float, dict[str, Any]]:
    """Choose the strength of one variant, around a dose if a good one is known.

    Args:
        data: runs the model on its validation part.
        rule: the config's strength.
        trial: the variant.
        near: the dose; None tries all of `doses`.
        doses: ascending, in units of the state's norm.

    Returns:
        The strength, and a report with the norms, the reason and the curve.
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
    data: FitData,
    rule: float | str,
    trials: Mapping[Key, Trial],
    what: str,
    doses: Sequence[float] | None = None,
) -> tuple[dict[Key, Trial], list[dict[str, Any]]]:
    """The `SHORT_LIST` best of a first look, best first, and the table of all.

    Args:
        data: runs the model on its validation part.
        rule: the config's strength.
        trials: the variants.
        what: what the keys are, for the report.
        doses: as for `search`; if they are not fixed, a lower one is tried where the lowest already does damage.
    """
    curves = {}
    steps = doses or RELATIVE_DOSES
    two = [steps[min(at, len(steps) - 1)] for at in SCREENED]
    for key, trial in trials.items():
        data.note(f"a first look at {what} {key}")
        strengths = [float(rule)] if isinstance(rule, (int, float)) else list(map(trial.strength_of, two))
        curves[key] = data.dose_response(trial.build, [0.0, *strengths], SCREEN_SHARE)
        if rule == "auto" and doses is None and not Objective.of(curves[key], data.limits).allowed(curves[key]):
            # Or the blocks where steering does least would win: there alone the low dose is within the limits.
            curves[key] += data.dose_response(trial.build, [strengths[0] / 2], SCREEN_SHARE)
    objective = Objective.of([point for curve in curves.values() for point in curve], data.limits)
    best = {key: max(curve[1:], key=objective.merit) for key, curve in curves.items()}
    order = sorted(best, key=lambda key: objective.merit(best[key]), reverse=True)
    table = [{what: name_of(key), **point_row(best[key], objective)} for key in trials]
    return {key: trials[key] for key in order[:SHORT_LIST]}, table


def compare_with_all(
    data: FitData, positions: Positions, chosen: Trial, everywhere: Trial, dose: float
) -> tuple[Positions, float, list[dict[str, Any]]]:
    """`compare_two` with the same vectors at all tokens, around the best dose of the chosen positions."""
    doses = {positions: (chosen, [dose]), "all": (everywhere, [share * dose for share in LESS])}
    return compare_two(data, doses, "positions")


def compare_two(
    data: FitData, trials: Mapping[Name, tuple[Trial, Sequence[float]]], what: str
) -> tuple[Name, float, list[dict[str, Any]]]:
    """The first of two variants, unless the other is better by more than the standard error.

    Args:
        data: runs the model on its validation part.
        trials: each variant's trial, and doses in units of the state's norm.
        what: what the keys are, for the report.

    Returns:
        The variant, its best dose, and the table.
    """
    share = first_look(data)
    curves = {
        name: explore(data, trial.build, [trial.strength_of(dose) for dose in doses], share)
        for name, (trial, doses) in trials.items()
    }
    objective = Objective.of([point for curve in curves.values() for point in curve], data.limits)
    best = {name: max(curve[1:], key=objective.merit) for name, curve in curves.items()}
    table = [{what: name, **point_row(point, objective)} for name, point in best.items()]
    first, other = trials
    gain = objective.value(best[other]) - objective.value(best[first])
    better = bool(objective.broken(best[first])) or gain > objective.rise_se(best[other])
    name = other if better and not objective.broken(best[other]) else first
    return name, best[name].strength / trials[name][0].strength_of(1.0), table


def first_look(data: FitData) -> float:
    """Share of the held-out prompts used in a comparison."""
    return FIRST_LOOK if len(np.unique(data.prompts("validation"))) * FIRST_LOOK >= ENOUGH_PROMPTS else 1.0


def compare(
    data: FitData, rule: float | str, trials: Mapping[Key, Trial], what: str, doses: Sequence[float] = RELATIVE_DOSES
) -> tuple[Key, float | None, list[dict[str, Any]] | None]:
    """Compare several variants in a first look.

    Args:
        data: runs the model on its validation part.
        rule: the config's strength.
        trials: the variants, the most promising first.
        what: what the keys are, for the report.
        doses: ascending, in units of the state's norm.

    Returns:
        The best variant, its dose, and the table; the last two are None if there are no held-out rows.
    """
    key, tried = try_each(data, trials, rule, what=what, doses=doses, share=first_look(data))
    if tried is None:
        return key, None, None
    strength: float = next(row["strength"] for row in tried if row[what] == name_of(key))
    return key, strength / trials[key].strength_of(1.0), tried


def _choose(
    data: FitData, rule: float | str, trials: Mapping[Key, Trial], what: str, doses: Sequence[float] = RELATIVE_DOSES
) -> tuple[Key, float | None, list[dict[str, Any]] | None]:
    """The result of `compare`; a single variant is taken without a comparison."""
    if len(trials) == 1:
        return next(iter(trials)), None, None
    return compare(data, rule, trials, what, doses)
