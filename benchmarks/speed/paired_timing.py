"""Timing `generate` steered and unsteered in pairs, so that a machine that is busy for a while slows both.

One call gives three times: until its first token, from there to its end, and as a whole.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList


Generate = Callable[..., torch.Tensor]
# Gives, for the length of a block, a function that generates as a condition says.
Condition = Callable[[], AbstractContextManager[Generate]]
PHASES = ("first token", "decode", "whole call")


class Clock(StoppingCriteria):
    """Never stops; takes the time at which the first token is there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.first: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.first is None:
            self.first = self.now()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def now(self) -> float:
        """Seconds, once the device has done what it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def timed_call(generate: Generate, device: torch.device, **inputs: Any) -> tuple[torch.Tensor, dict[str, float]]:
    """Generate once.

    Returns:
        The sequences, and the seconds of each of `PHASES`.
    """
    clock = Clock(device)
    start = clock.now()
    sequences = generate(**inputs, stopping_criteria=StoppingCriteriaList([clock]))
    end = clock.now()
    if clock.first is None:
        raise RuntimeError("This condition does not hand stopping_criteria on to generate, so it cannot be timed.")
    return sequences, dict(zip(PHASES, (clock.first - start, end - clock.first, end - start), strict=True))


@dataclass
class Ratios:
    """What the pairs of one condition gave.

    Attributes:
        by_phase: steered / unsteered of each pair.
    """

    by_phase: dict[str, list[float]] = field(default_factory=lambda: {phase: [] for phase in PHASES})

    def add(self, steered: dict[str, float], unsteered: dict[str, float]) -> None:
        """Take one pair."""
        for phase, values in self.by_phase.items():
            values.append(steered[phase] / unsteered[phase])

    def summary(self) -> dict[str, list[float]]:
        """For each phase the median of the pairs and their quartiles."""
        result = {}
        for phase, values in self.by_phase.items():
            low, median, high = statistics.quantiles(values, n=4, method="inclusive")
            result[phase] = [round(value, 4) for value in (median, low, high)]
        return result


def pairs_within(seconds: float, a_call: float, conditions: int, fewest: int, most: int) -> int:
    """How many pairs of each condition fit into a time; even, so that both sides are first as often.

    Args:
        seconds: the time there is.
        a_call: seconds of one unsteered call.
        conditions: how many are timed.
        fewest, most: limits.
    """
    # A call that is steered by another library may take twice as long, and every condition is warmed up once.
    pairs = int(seconds / (a_call * conditions * 2.3)) - 1
    return min(max(pairs, fewest), most) // 2 * 2


def time_pairs(
    unsteered: Generate, conditions: dict[str, Condition], inputs: dict[str, Any], device: torch.device, pairs: int
) -> Iterator[tuple[str, torch.Tensor, Ratios]]:
    """Time every condition against the unsteered model, in rounds: one pair of each, `pairs` times over.

    Yields:
        For each condition its name, the sequences that it gave, and its ratios.
    """
    ratios = {name: Ratios() for name in conditions}
    said: dict[str, torch.Tensor] = {}
    for number in range(-1, pairs):
        for name, condition in conditions.items():
            before = timed_call(unsteered, device, **inputs)[1] if number % 2 else None
            with condition() as generate:
                said[name], steered = timed_call(generate, device, **inputs)
            # Whoever comes second finds a warmer cache: take turns.
            plain = before or timed_call(unsteered, device, **inputs)[1]
            # The first round warms up.
            if number >= 0:
                ratios[name].add(steered, plain)
    for name in conditions:
        yield name, said[name], ratios[name]
