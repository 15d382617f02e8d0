"""Trying layers and strengths on held-out rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from finesteer_hf.methods.base import DosePoint, FitData
from finesteer_hf.methods.strength import KL_BUDGET, STRENGTHS, choose_strength
from finesteer_hf.processors import SteeringProcessor


Key = TypeVar("Key", bound="int | str")

# The first blocks still read words, the last already write them.
SHALLOWEST, DEEPEST = 0.2, 0.8
# In deeper models neighbouring blocks hardly differ, and each costs memory and time.
EVERY_BLOCK_UP_TO = 32
# What a closed form says of a layer costs next to nothing; whether steering acts there, only the model tells.
SHORT_LIST = 4
# Norms of the vector in units of the state's: the same strength means another dose at each layer. What helps may span
# less than a factor of two.
RELATIVE_DOSES = (0.05, 0.1, 0.2, 0.28, 0.4, 0.57, 0.8)


@dataclass(frozen=True)
class Trial:
    """A way to steer, of which the strength is open.

    Attributes:
        build: makes the processor of a strength.
        vector_norm: median norm of its vectors.
        state_norm: median norm of the states that they are added to.
    """

    build: Callable[[float], SteeringProcessor]
    vector_norm: float
    state_norm: float

    def strength_of(self, relative_dose: float) -> float:
        """The strength at which the vector has a share of the state's norm."""
        return relative_dose * self.state_norm / self.vector_norm if self.vector_norm > 0 else relative_dose

    def choose_strength(self, rule: float | str, data: FitData) -> tuple[float, list[DosePoint], str]:
        """Choose by `choose_strength`, on a curve that reaches from a part of the vector's own length to the state's."""
        highest = max(STRENGTHS[-1], self.strength_of(1.0))
        strengths = np.geomspace(STRENGTHS[0], highest, len(STRENGTHS)).tolist()
        return choose_strength(
            rule,
            data,
            self.build,
            vector_norm=self.vector_norm,
            state_norm=self.state_norm,
            strengths=[float(f"{strength:.3g}") for strength in strengths],
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


def try_each(
    data: FitData,
    trials: Mapping[Key, Trial],
    strength: float | str,
    *,
    what: str = "layer",
    doses: Sequence[float] = RELATIVE_DOSES,
) -> tuple[Key, list[dict[str, Any]] | None]:
    """Steer in each of several ways and take the one with the best `DosePoint.bottleneck` on held-out rows.

    A point whose divergence on general prompts is above the budget counts only where no other is.

    Args:
        data: runs the model on its validation part.
        trials: what to steer with; the most promising first.
        strength: the config's; a number is tried as it is, for a rule the ways are compared at equal doses.
        what: what the keys of `trials` are.
        doses: norms of the vector, in units of the state's, ascending.

    Returns:
        The key, and for each key its best point; None if there are no held-out rows.
    """
    best: dict[Key, DosePoint] = {}
    given = isinstance(strength, (int, float))
    for key, trial in trials.items():
        data.note(f"trying {what} {key} on held-out rows")
        strengths = [float(strength)] if given else [trial.strength_of(dose) for dose in doses]
        points = data.dose_response(trial.build, (0.0, *strengths))[1:]
        finite = [point for point in points if math.isfinite(point.bottleneck)]
        if finite:
            best[key] = max(finite, key=_merit)
    if not best:
        return next(iter(trials)), None
    table = [{what: key, "strength": p.strength, "bottleneck": p.bottleneck, "kl": p.kl} for key, p in best.items()]
    return max(best, key=lambda key: _merit(best[key])), table


def _merit(point: DosePoint) -> tuple[bool, float]:
    return point.kl <= KL_BUDGET, point.bottleneck
