"""McNemar's tests of a table, as its cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finesteer_hf.evaluation.comparison import ALPHA
from finesteer_hf.evaluation.measures.statistics import holm, mcnemar


def mcnemar_cells(pairs: Sequence[tuple[Sequence[Any], Sequence[Any]]]) -> list[str]:
    """McNemar's exact p of each pair, starred where Holm's correction for all of them leaves it, and what changed.

    Args:
        pairs: hits of the reference and of another condition, on the same items.

    Returns:
        Cells such as `.003* (+12, -1)`: items gained and lost against the reference.
    """
    tests = [mcnemar([bool(hit) for hit in before], [bool(hit) for hit in after]) for before, after in pairs]
    cells = []
    for test, corrected in zip(tests, holm([test.p_value for test in tests]), strict=True):
        text = "<.001" if test.p_value < 0.001 else f"{test.p_value:.3f}"
        star = "*" if corrected < ALPHA else ""
        cells.append(f"{text}{star} (+{test.only_second}, -{test.only_first})")
    return cells
