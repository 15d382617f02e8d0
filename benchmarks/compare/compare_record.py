"""What the comparison has measured, item by item, as the repository keeps it: a file for each subject and split.

Rows can so be added one by one, by other machines and on other days, and the page is made of all of them. Items are named
by a hash: the data sets are not this project's to hand on. A row is measured again once its line is taken out of the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.real.real_study import write_text
from finesteer_hf import __version__


RECORD = Path("benchmarks/results/compare")
PARTS = ("own", "equal")
# Answers that are kept of each row, to be read on the page.
TEXTS = 3
NUMBERS = ("scores", "identical", "general_right")


def file_of(folder: Path, subject: str, seed: int | str) -> Path:
    """Where the rows of a subject and split are; with `*` for the seed, a pattern of all splits."""
    return folder / f"{subject}-{seed}.json"


def read(folder: Path, subject: str, seed: int) -> dict[str, dict[str, Any]]:
    """All rows of a subject and split, by slug; none where nothing was measured.

    A row has its label and note, the library's `version` that made it, and for each part of `PARTS` that was measured what
    `Subject.ask` found, with hashes for ids.
    """
    file = file_of(folder, subject, seed)
    if not file.exists():
        return {}
    found = json.loads(file.read_text())
    return {slug: _opened(row, found["ids"]) for slug, row in found["rows"].items()}


def splits(folder: Path, subject: str) -> dict[int, dict[str, dict[str, Any]]]:
    """All rows of a subject, by seed and slug."""
    seeds = sorted(int(file.stem.rpartition("-")[2]) for file in folder.glob(file_of(folder, subject, "*").name))
    return {seed: read(folder, subject, seed) for seed in seeds}


def add(folder: Path, subject: str, seed: int, slug: str, found: dict[str, Any]) -> None:
    """Add what was found of a row to the file: a new row, or another part of it.

    Raises:
        ValueError: the row's items are not those of the other rows.
    """
    file = file_of(folder, subject, seed)
    kept = json.loads(file.read_text()) if file.exists() else {"ids": None, "rows": {}}
    ids = next([_hash(item) for item in found[part]["ids"]] for part in PARTS if part in found)
    if kept["ids"] not in (None, ids):
        raise ValueError(f"{file} is of other held-out items than {slug}: were they drawn otherwise? Move it away.")
    kept["ids"] = ids
    kept["rows"][slug] = {**kept["rows"].get(slug, {}), **_closed(found), "version": __version__}
    _write(file, kept)


def _write(file: Path, kept: dict[str, Any]) -> None:
    """Write one line a row, for differences that can be read."""
    lines = [f"{json.dumps(slug)}: {json.dumps(row)}" for slug, row in sorted(kept["rows"].items())]
    write_text(file, "{\n" + f'"ids": {json.dumps(kept["ids"])},\n"rows": {{\n' + ",\n".join(lines) + "\n}\n}\n")


def _hash(item: str) -> str:
    return hashlib.sha256(item.encode()).hexdigest()[:12]


def _closed(row: dict[str, Any]) -> dict[str, Any]:
    """A row as it is kept."""
    kept = dict(row)
    for part in PARTS:
        if part in row:
            asked = {name: value for name, value in row[part].items() if name not in ("ids", "sources")}
            asked["texts"] = asked["texts"][:TEXTS]
            asked["others"] = {name: _packed(values) for name, values in asked["others"].items()}
            kept[part] = {name: _packed(value) if name in NUMBERS else value for name, value in asked.items()}
    return kept


def _opened(row: dict[str, Any], ids: list[str]) -> dict[str, Any]:
    """The row again."""
    found = dict(row)
    for part in PARTS:
        if part in row:
            asked = {name: _unpacked(value) if name in NUMBERS else value for name, value in row[part].items()}
            asked["others"] = {name: _unpacked(values) for name, values in asked["others"].items()}
            found[part] = {**asked, "ids": ids}
    return found


def _packed(values: Sequence[float]) -> str | list[float]:
    """Numbers, briefly: a digit each where all are 0 or 1."""
    if all(value in (0, 1) for value in values):
        return "".join(str(int(value)) for value in values)
    return [round(float(value), 4) for value in values]


def _unpacked(values: str | list[float]) -> list[float]:
    return [float(value) for value in values]
