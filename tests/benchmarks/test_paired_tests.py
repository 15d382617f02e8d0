"""The p-values of the methods' page: against the reference, corrected for their number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compare_methods_page import REFERENCE, page
from paired_tests import mcnemar_cells


def differing(gained: int, lost: int) -> tuple[list[int], list[int]]:
    """Twenty items of which so many change."""
    return [0] * gained + [1] * lost + [1] * (20 - gained - lost), [1] * gained + [0] * lost + [1] * (
        20 - gained - lost
    )


def test_a_star_is_for_what_holm_leaves() -> None:
    # p of 6 to 0: 2 / 2^6 = .031, which three tests make .094; p of 10 to 0: .002, which they make .006.
    assert mcnemar_cells([differing(6, 0)]) == ["0.031* (+6, -0)"]
    assert mcnemar_cells([differing(6, 0), differing(0, 10), differing(1, 1)]) == [
        "0.031 (+6, -0)",
        "0.002* (+0, -10)",
        "1.000 (+1, -1)",
    ]


def result(label: str, hits: list[bool]) -> dict[str, Any]:
    own = {"hits": hits, "neither": 0, "general_hits": 5, "general": 5, "identical": 5, "fires": None}
    dose = {"strength": None, "kl": 0.0, "own_kl": 0.0}
    seconds = {"fit": 1.0, "capture": 1.0}
    return {"label": label, "note": "", "strength": 1.0, "bytes": 1, "seconds": seconds, "own": own, "dose": dose}


def test_the_page_tests_every_row_but_the_references_own(tmp_path: Path) -> None:
    folder = tmp_path / "truthful-20"
    folder.mkdir()
    for label, hits in (("unsteered", 0), (REFERENCE, 10), ("ONE", 16), ("TWO", 10)):
        (folder / f"{label.lower()}.json").write_text(json.dumps(result(label, [i < hits for i in range(20)])))
    text = page(tmp_path, 20, 0.05, 8, 32)
    cells = {row.split(" | ")[0].strip("| "): row.split(" | ") for row in text.splitlines() if row.startswith("| ")}
    assert [cells[name][2] for name in ("unsteered", "ONE")] == ["", "1 [1, 1]"]
    assert cells[REFERENCE][2] == cells["TWO"][2] == "2.5 [2, 3]"
    assert [cells[name][3] for name in ("unsteered", REFERENCE, "ONE", "TWO")] == [
        "0.002* (+0, -10)",
        "",
        "0.031 (+6, -0)",
        "1.000 (+0, -0)",
    ]
    assert "Holm's correction" in text
