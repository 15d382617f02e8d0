"""The rows of a fit: queries with their shifts, each counted once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finesteer_hf.errors import DatasetError
from finesteer_hf.method_api import FitData, Part, Pool
from finesteer_hf.sites import Site


@dataclass(frozen=True)
class ContrastRows:
    """Queries and their shifts.

    Attributes:
        queries: `[M, d]` float64.
        shifts: chosen minus rejected, `[M, w]` float64, all sites side by side.
        groups: `[M]` labels of rows that must be held out together, or None for single rows.
    """

    queries: NDArray[np.float64]
    shifts: NDArray[np.float64]
    groups: NDArray[Any] | None

    def __len__(self) -> int:
        return len(self.queries)

    @property
    def vary(self) -> bool:
        """Whether the queries differ: at the input of the first block a template makes all last tokens the same."""
        return rows_vary(self.queries)

    def sample(self, most: int, seed: int) -> ContrastRows:
        """At most `most` rows, drawn without replacement."""
        if len(self) <= most:
            return self
        kept = np.sort(np.random.default_rng(seed).choice(len(self), most, replace=False))
        return ContrastRows(self.queries[kept], self.shifts[kept], None if self.groups is None else self.groups[kept])


def rows_vary(rows: np.ndarray) -> bool:
    """Whether rows `[M, d]` differ by more than rounding."""
    return bool(np.ptp(rows, axis=0).max(initial=0.0) > 1e-6 * np.abs(rows).max(initial=0.0))


def contrast_rows(
    data: FitData,
    read: Site,
    shifts: Sequence[Site],
    parts: Sequence[Part],
    pool: Pool = "answer_mean",
    scales: Sequence[float] | None = None,
) -> ContrastRows:
    """Rows of some parts; a part that repeats an earlier one is left out.

    Args:
        data: captured states.
        read: where queries are read.
        shifts: where answers are compared.
        parts: in order.
        pool: pool of the compared answers.
        scales: factor of each site in `shifts`; 1 by default.

    Raises:
        DatasetError: if a state is not finite.
    """
    distinct = _distinct([(part, data.query(read, part)) for part in parts])
    queries = np.concatenate([data.query(read, part) for part in distinct])
    found = []
    for site, scale in zip(shifts, scales or [1.0] * len(shifts), strict=True):
        of_parts = [
            data.chosen(site, part, pool).astype(np.float64) - data.rejected(site, part, pool) for part in distinct
        ]
        found.append(np.concatenate(of_parts) * scale)
    differences = np.concatenate(found, axis=1)
    for what, site, rows in (("queries", read, queries), ("answers", shifts[0], differences)):
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if len(bad):
            raise DatasetError(
                f"{len(bad)} of {len(rows)} rows have {what} whose states at {site} contain NaN or Inf; the first is row "
                f"{bad[0]} of {distinct}. Run the model in bfloat16 or float32, or drop the rows."
            )
    groups = np.concatenate([data.groups(part) for part in distinct])
    alone = len(np.unique(groups)) in (1, len(groups))
    return ContrastRows(queries.astype(np.float64), differences, None if alone else groups)


def query_rows(data: FitData, read: Site, parts: Sequence[Part]) -> NDArray[np.float32]:
    """One row per prompt of some parts, `[prompts, d]`: a gate's guarantee counts queries, not answers."""
    return np.concatenate([data.query(read, part)[first] for part, first in _prompts_once(data, read, parts)])


def query_kinds(data: FitData, read: Site, parts: Sequence[Part]) -> NDArray[Any] | None:
    """The categories of `query_rows`, `[prompts]` of str; None if the data set has none."""
    kinds = [(data.kinds(part), first) for part, first in _prompts_once(data, read, parts)]
    known = [of_part[first] for of_part, first in kinds if of_part is not None]
    return np.concatenate(known) if len(known) == len(kinds) else None


def query_texts(data: FitData, read: Site, parts: Sequence[Part]) -> list[str]:
    """The texts of the prompts of `query_rows`."""
    return [data.texts("prompt", part)[row] for part, first in _prompts_once(data, read, parts) for row in first]


def _prompts_once(data: FitData, read: Site, parts: Sequence[Part]) -> list[tuple[Part, NDArray[np.intp]]]:
    """For each distinct part, the first row of each prompt."""
    distinct = _distinct([(part, data.query(read, part)) for part in parts])
    return [(part, np.sort(np.unique(data.prompts(part), return_index=True)[1])) for part in distinct]


def general_rows(data: FitData, read: Site, parts: Sequence[Part]) -> NDArray[np.float32]:
    """General queries of some parts, `[rows, d]`; zero rows if there are none."""
    distinct = _distinct([(part, data.general(read, part)) for part in parts])
    return np.concatenate([data.general(read, part) for part in distinct])


def general_texts(data: FitData, read: Site, parts: Sequence[Part]) -> list[str]:
    """The texts of the prompts of `general_rows`."""
    distinct = _distinct([(part, data.general(read, part)) for part in parts])
    return [text for part in distinct for text in data.texts("general", part)]


def _distinct(parts: Sequence[tuple[Part, np.ndarray]]) -> list[Part]:
    """Parts whose rows differ from those of earlier ones: a data set too small to split has all rows in each part."""
    kept: list[tuple[Part, np.ndarray]] = []
    for part, rows in parts:
        if not any(np.array_equal(rows, earlier) for _, earlier in kept):
            kept.append((part, rows))
    return [part for part, _ in kept]


def json_ready(value: Any) -> Any:
    """A report in JSON's types: built-in numbers, None for non-finite ones."""
    if isinstance(value, dict):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [json_ready(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def over_rows(rows: np.ndarray, figure: Callable[[], float]) -> float | None:
    """A figure of held-out rows, or None if none were held out."""
    return float(figure()) if len(rows) else None
