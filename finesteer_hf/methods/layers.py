"""Which layer to steer: candidates, and a short list of them tried on held-out rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from finesteer_hf.methods.base import FitData
from finesteer_hf.methods.strength import KL_BUDGET
from finesteer_hf.processors import SteeringProcessor


# The first blocks still read words, the last already write them.
SHALLOWEST, DEEPEST = 0.2, 0.8
# In deeper models neighbouring blocks hardly differ, and each costs memory and time.
EVERY_BLOCK_UP_TO = 32
# What a closed form says of a layer costs next to nothing; whether steering acts there, only the model tells.
SHORT_LIST = 3
PROBE_STRENGTHS = (0.5, 1.0, 2.0)


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


def try_layers(
    data: FitData, builds: Mapping[int, Callable[[float], SteeringProcessor]], strength: float | str
) -> tuple[int, list[dict[str, Any]]]:
    """Steer at each layer and take the one with the best margin on held-out rows.

    A point whose divergence on general prompts is above the budget counts only where no other is.

    Args:
        data: runs the model on its validation part.
        builds: for each layer what makes its processor of a strength; the most promising layer first.
        strength: the config's; a number is tried as it is.

    Returns:
        The layer, and for each layer its margin and divergence.
    """
    if len(builds) == 1:
        return next(iter(builds)), []
    probes = (float(strength),) if isinstance(strength, (int, float)) else PROBE_STRENGTHS
    table: list[dict[str, Any]] = []
    for layer, build in builds.items():
        data.note(f"trying layer {layer} on held-out rows")
        points = [point for point in data.dose_response(build, probes) if math.isfinite(point.margin)]
        if points:
            best = max(points, key=lambda point: (point.kl <= KL_BUDGET, point.margin))
            table.append({"layer": layer, "strength": best.strength, "margin": best.margin, "kl": best.kl})
    if not table:
        return next(iter(builds)), []
    chosen = max(table, key=lambda row: (row["kl"] <= KL_BUDGET, row["margin"]))
    return chosen["layer"], table
