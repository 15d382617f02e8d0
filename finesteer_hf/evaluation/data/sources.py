"""Rows of a benchmark, from a local file or from the Hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from finesteer_hf.errors import DatasetError


Row = dict[str, Any]
_LOCAL_SUFFIXES = (".csv", ".json", ".jsonl")


def read_rows(source: str | Path, *, config: str | None = None, split: str | None = None) -> list[Row]:
    """Read all rows of a data set.

    Args:
        source: a `.csv`, `.json` (a list of objects) or `.jsonl` file, or the id of a data set on the Hub.
        config: configuration of a Hub data set.
        split: its split.

    Raises:
        FileNotFoundError: if the name has a file's extension and there is no such file.
        DatasetError: if the file has another form or no rows.
    """
    path = Path(source)
    if path.suffix.lower() in _LOCAL_SUFFIXES:
        rows = _read_local(path)
    else:
        import datasets

        rows = [dict(row) for row in datasets.load_dataset(str(source), config, split=split)]
    if not rows:
        raise DatasetError(f"{source} has no rows.")
    return rows


def _read_local(path: Path) -> list[Row]:
    if not path.is_file():
        raise FileNotFoundError(
            f"No file {path}. Give a .csv, .json or .jsonl file, or the id of a data set on the Hub."
        )
    # Published files may start with a byte order mark, which would become part of the first column's name.
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix.lower() == ".csv":
            return list(csv.DictReader(file))
        try:
            rows = json.load(file) if path.suffix.lower() == ".json" else [json.loads(x) for x in file if x.strip()]
        except json.JSONDecodeError as error:
            raise DatasetError(f"{path.name} is not readable JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DatasetError(f"{path.name} must hold a list of objects.")
    return rows


def column(rows: list[Row], names: Iterable[str], source: str | Path) -> str:
    """The first of the given column names that the rows have; files and Hub copies of a set differ in case.

    Raises:
        DatasetError: if they have none; lists the existing columns.
    """
    wanted = list(names)
    for name in wanted:
        if name in rows[0]:
            return name
    raise DatasetError(f"{source} has none of the columns {wanted}. Its columns: {sorted(map(str, rows[0]))}.")
