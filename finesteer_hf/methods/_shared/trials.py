"""Tries layers and strengths on held-out rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from finesteer_hf.method_api import DosePoint, FitData
from finesteer_hf.methods._shared.objective import Objective
from finesteer_hf.methods._shared.strength import choose_strength, explore
from finesteer_hf.processors import SteeringProcessor


Key = TypeVar("Key")

# The first blocks still read words, the last ones already write them.
SHALLOWEST, DEEPEST = 0.2, 0.8
# In deeper models neighbouring blocks barely differ, and each costs memory and time.
EVERY_BLOCK_UP_TO = 32
# A closed form's figures for a layer cost almost nothing; only running the model shows whether steering works there.
SHORT_LIST = 4
# Norms of the vector in units of the state's: the same strength is a different dose at each layer. The useful range
# may span less than a factor of two.
RELATIVE_DOSES = (0.1, 0.2, 0.28, 0.4, 0.57, 0.8)


@dataclass(frozen=True)
class Trial:
    """A way to steer, with open strength.

    Attributes:
        build: makes the processor of a strength.
        vector_norm: median norm of its vectors.
        state_norm: median norm of the states that they are added to.
    """

    build: Callable[[float], SteeringProcessor]
    vector_norm: float
    state_norm: float

    @classmethod
    def of_factor(cls, build: Callable[[float], SteeringProcessor]) -> Trial:
        """For a method whose strength is a plain factor: a share of a turn, a factor of logits."""
        return cls(build, 1.0, 1.0)

    def strength_of(self, relative_dose: float) -> float:
        """The strength at which the vector's norm is this share of the state's."""
        return relative_dose * self.state_norm / self.vector_norm if self.vector_norm > 0 else relative_dose

    def choose_strength(
        self, rule: float | str, data: FitData, doses: Sequence[float]
    ) -> tuple[float, list[DosePoint], str]:
        """Call `choose_strength` over some doses."""
        strengths = [self.strength_of(dose) for dose in doses]
        return choose_strength(
            rule,
            data,
            self.build,
            vector_norm=self.vector_norm,
            state_norm=self.state_norm,
            strengths=[float(f"{strength:.4g}") for strength in strengths],
        )


def candidate_layers(layer: int | str, num_layers: int) -> list[int]:
    """Layers to compare: the given one, or for `auto` those between 20% and 80% of the depth.

    Args:
        layer: index of a block, or `auto`.
        num_layers: number of blocks.

    Raises:
        ValueError: if the layer is out of range.
    """
    if isinstance(layer, int):
        if layer >= num_layers:
            raise ValueError(f"layer={layer} is out of range: the model has layers 0 to {num_layers - 1}.")
        return [layer]
    last = num_layers - 1
    step = 1 if num_layers <= EVERY_BLOCK_UP_TO else 2
    return list(range(math.floor(SHALLOWEST * last), math.ceil(DEEPEST * last) + 1, step))


def evenly(layers: Sequence[int], most: int) -> list[int]:
    """At most so many of some layers, the first one and others at equal steps."""
    return list(layers[:: max(1, -(-len(layers) // most))])


def try_each(
    data: FitData,
    trials: Mapping[Key, Trial],
    strength: float | str,
    *,
    what: str = "layer",
    doses: Sequence[float] = RELATIVE_DOSES,
    share: float = 1.0,
) -> tuple[Key, list[dict[str, Any]] | None]:
    """Try several ways to steer and take the best by the `Objective` of all of them.

    A point that breaks a limit counts only if no point is within them.

    Args:
        data: runs the model on its validation part.
        trials: the trials, the most promising first.
        strength: the config's; a number is tried as it is, with a rule all trials use the same doses.
        what: what the keys of `trials` are.
        doses: norms of the vector, in units of the state's, ascending; higher ones are skipped if they only do more
            damage (see `explore`).
        share: share of the held-out prompts.

    Returns:
        The best key, and the best point of each key; None if there are no held-out rows.
    """
    curves: dict[Key, list[DosePoint]] = {}
    given = isinstance(strength, (int, float))
    for key, trial in trials.items():
        data.note(f"trying {what} {key} on held-out rows")
        if given:
            points = data.dose_response(trial.build, (0.0, float(strength)), share)
        else:
            points = explore(data, trial.build, [trial.strength_of(dose) for dose in doses], share)
        curves[key] = [point for point in points if math.isfinite(point.bottleneck)]
    points = [point for curve in curves.values() for point in curve]
    if not any(point.strength for point in points):
        return next(iter(trials)), None
    objective = Objective.of(points, data.limits)
    best = {key: max(curve[1:], key=objective.merit) for key, curve in curves.items() if len(curve) > 1}
    table = [{what: name_of(key), **point_row(point, objective)} for key, point in best.items()]
    return max(best, key=lambda key: objective.merit(best[key])), table


def name_of(key: Any) -> Any:
    """A key in the form of a report."""
    return key if isinstance(key, (str, int)) else str(key)


def point_row(point: DosePoint, objective: Objective) -> dict[str, Any]:
    """A point as a row of a report."""
    return {
        "strength": point.strength,
        "bottleneck": point.bottleneck,
        "preference": point.preference,
        "wanted": point.wanted,
        "likelihood": point.likelihood,
        "own_words": point.own_words,
        "kl": point.kl,
        "criterion": objective.criterion,
        "broken": objective.broken(point),
    }
