"""Rows of one prompt are one unit: in means, standard errors and draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from finesteer_hf.fitting.data.encoding import EncodedRow


Item = TypeVar("Item")


def mean_over_units(values: np.ndarray, units: np.ndarray) -> float:
    """Mean over units of the mean over each unit's rows; NaN without rows.

    Args:
        values: `[rows]`.
        units: `[rows]` numbers of the units.
    """
    if not len(values):
        return float("nan")
    _, numbers = np.unique(units, return_inverse=True)
    return float((np.bincount(numbers, weights=values) / np.bincount(numbers)).mean())


def clustered_se(values: np.ndarray, units: np.ndarray) -> float:
    """Standard error of `mean_over_units`; 0 with fewer than two units."""
    _, numbers = np.unique(units, return_inverse=True)
    if not len(numbers) or numbers.max() < 1:
        return 0.0
    means = np.bincount(numbers, weights=values) / np.bincount(numbers)
    return float(means.std(ddof=1) / np.sqrt(len(means)))


def shuffle_units(rows: Sequence[EncodedRow], seed: int) -> list[EncodedRow]:
    """Rows with their prompts in random order, so that the first ones are representative."""
    prompts = list(dict.fromkeys(row.prompt for row in rows))
    rank = dict(zip(prompts, np.random.default_rng(seed).permutation(len(prompts)), strict=True))
    return sorted(rows, key=lambda row: rank[row.prompt])


def draw(items: Sequence[Item], most: int, seed: int) -> list[Item]:
    """At most `most` items, drawn at random, in their order."""
    if len(items) <= most:
        return list(items)
    kept = np.sort(np.random.default_rng(seed).choice(len(items), most, replace=False))
    return [items[i] for i in kept]
