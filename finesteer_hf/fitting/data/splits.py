"""Disjoint parts of a data set: fit, calibration and validation.

Rows of one prompt are never in two parts: a threshold or a strength chosen on the rows of the fit says nothing about
new queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from finesteer_hf.errors import DatasetError
from finesteer_hf.method_api import Part


SplitBy = Literal["prompt", "group"]
PARTS: tuple[Part, ...] = ("fit", "calibration", "validation")
# Shares of the units; with a separate validation data set, its share goes to the other two in proportion.
SHARES: dict[Part, float] = {"fit": 0.6, "calibration": 0.2, "validation": 0.2}
# With fewer units a part would have none or one: held-out figures would be noise, so there are none.
MIN_UNITS = 6


@dataclass(frozen=True)
class Split:
    """Row numbers of each part.

    Attributes:
        rows: int64, ascending, for each part.
        held_out: False if there were too few units to split, so that the parts share their rows.
    """

    rows: Mapping[Part, np.ndarray]
    held_out: bool = True

    def sizes(self) -> dict[str, int]:
        """Number of rows of each part."""
        return {part: len(self.rows[part]) for part in PARTS}


def split_units(units: Sequence[str], seed: int, *, validation_rows: int = 0, min_units: int = MIN_UNITS) -> Split:
    """Split rows so that rows of one unit stay together.

    Args:
        units: for each row, its unit: its prompt or its group.
        seed: seed of the shuffle; the parts depend on it and on the set of units, not on the order of the rows.
        validation_rows: number of rows of a separate validation data set, numbered after those of `units`.
        min_units: with fewer, every part is all rows (and `validation` the validation data set, if there is one).
    """
    everything = np.arange(len(units))
    separate = np.arange(len(units), len(units) + validation_rows)
    distinct = sorted(set(units))
    if len(distinct) < min_units:
        held_out = separate if validation_rows else everything
        return Split({"fit": everything, "calibration": everything, "validation": held_out}, held_out=False)
    shares = {part: share for part, share in SHARES.items() if not (validation_rows and part == "validation")}
    shuffled = [distinct[i] for i in np.random.default_rng(seed).permutation(len(distinct))]
    assigned: dict[str, Part] = {}
    for part in ("calibration", "validation"):
        if part in shares:
            count = max(1, round(len(shuffled) * shares[part] / sum(shares.values())))
            start = len(assigned)
            assigned.update(dict.fromkeys(shuffled[start : start + count], part))
    parts = np.array([assigned.get(unit, "fit") for unit in units])
    split = {part: np.flatnonzero(parts == part) for part in PARTS}
    if validation_rows:
        split["validation"] = separate
    return Split(split)


def split_rows(
    prompts: Sequence[str],
    groups: Sequence[str] | None,
    seed: int,
    *,
    by: SplitBy = "prompt",
    validation_rows: int = 0,
) -> Split:
    """Split preference rows by prompt or by group.

    Args:
        prompts: for each row, the key of its prompt.
        groups: for each row, its category, or None.
        seed: seed of the shuffle.
        by: `prompt`, or `group` for figures on unseen categories.
        validation_rows: as for `split_units`.

    Raises:
        ValueError: for another `by`.
        DatasetError: if rows are split by group and there are no groups, or too few.
    """
    if by == "prompt":
        return split_units(prompts, seed, validation_rows=validation_rows)
    if by != "group":
        raise ValueError(f"split must be 'prompt' or 'group', got {by!r}.")
    if groups is None:
        raise DatasetError("split='group' needs a column `category` or `group`; the data set has neither.")
    units = _joined(prompts, groups)
    if len(set(units)) < len(PARTS):
        raise DatasetError(
            f"split='group' needs at least {len(PARTS)} groups that share no prompt; the data set has the groups "
            f"{sorted(set(groups))}. Use split='prompt'."
        )
    return split_units(units, seed, validation_rows=validation_rows, min_units=len(PARTS))


def _joined(prompts: Sequence[str], groups: Sequence[str]) -> list[str]:
    """Groups of the rows; groups that share a prompt are merged."""
    parent = {group: group for group in groups}

    def root(group: str) -> str:
        while parent[group] != group:
            group = parent[group]
        return group

    first: dict[str, str] = {}
    for prompt, group in zip(prompts, groups, strict=True):
        parent[root(group)] = root(first.setdefault(prompt, group))
    return [root(group) for group in groups]
