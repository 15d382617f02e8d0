"""McNemar's cells against the reference, corrected for multiple tests."""

from __future__ import annotations

from benchmarks.real.paired_tests import mcnemar_cells


def differing(gained: int, lost: int) -> tuple[list[int], list[int]]:
    """Twenty items, of which so many change."""
    return [0] * gained + [1] * lost + [1] * (20 - gained - lost), [1] * gained + [0] * lost + [1] * (
        20 - gained - lost
    )


def test_a_star_marks_what_is_significant_after_holm() -> None:
    # p of 6 to 0: 2 / 2^6 = .031, which three tests make .094; p of 10 to 0: .002, which they make .006.
    assert mcnemar_cells([differing(6, 0)]) == ["0.031* (+6, -0)"]
    assert mcnemar_cells([differing(6, 0), differing(0, 10), differing(1, 1)]) == [
        "0.031 (+6, -0)",
        "0.002* (+0, -10)",
        "1.000 (+1, -1)",
    ]
