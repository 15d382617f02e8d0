"""Rows of a data set in any form, read one by one in constant memory.

A fit needs a few thousand of millions of rows. `PromptSample` draws them from the stream: `datasets` can stream,
shuffle a buffer and take the first rows, but cannot draw uniformly from a stream or keep the rows of a prompt
together.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

from finesteer_hf.errors import DatasetError


DatasetLike: TypeAlias = Any
Item = TypeVar("Item")

_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_SHOWN_ROWS = 10


class RowNumbers:
    """Row numbers; a message shows the first ones and the count.

    Example:
        >>> str(RowNumbers([3, 7]))
        'rows 3, 7 (counted from 0)'
    """

    def __init__(self, rows: Iterable[int] = ()) -> None:
        self.first: list[int] = []
        self.count = 0
        for row in rows:
            self.add(row)

    def add(self, row: int) -> None:
        """Add a row."""
        self.count += 1
        if len(self.first) < _SHOWN_ROWS:
            self.first.append(row)

    def __len__(self) -> int:
        return self.count

    def __str__(self) -> str:
        more = f" and {self.count - _SHOWN_ROWS} more" if self.count > _SHOWN_ROWS else ""
        return f"row{'s' if self.count > 1 else ''} {', '.join(map(str, self.first))}{more} (counted from 0)"


def name_rows(rows: Iterable[int]) -> str:
    """Row numbers for a message: `rows 3, 7`, the first of many and their count."""
    return str(RowNumbers(rows))


@dataclass(frozen=True)
class DataSource:
    """The source of rows.

    Attributes:
        name: Hub id, or name of a file or folder; None for rows in memory.
        sha256: hash of the rows as read, in order.
        rows: their number.
        taken: number of kept rows.
    """

    name: str | None
    sha256: str
    rows: int
    taken: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form for the adapter's provenance."""
        return {"id": self.name, "sha256": self.sha256, "rows": self.rows, "taken": self.taken}


class RecordStream:
    """The rows of a data set, one at a time.

    Args:
        dataset: dicts, from a list, a generator, a `datasets.Dataset` or `IterableDataset`; a json, jsonl, csv, tsv or
            parquet file, a folder saved with `save_to_disk`, or a Hub id (its `train` split). `datasets` maps files into
            memory.
        what: name of the data set in messages.

    Attributes:
        count: number of rows read so far.

    Raises:
        DatasetError: if it has another form or several splits; at the end of the rows if there was none, or one was
            not a dict.
        FileNotFoundError: if a path does not exist and is not a Hub id.
    """

    def __init__(self, dataset: DatasetLike, what: str) -> None:
        self.what = what
        self.count = 0
        self.name: str | None = None
        self._rows: Any = dataset
        if isinstance(dataset, (str, Path)):
            path = Path(dataset).expanduser()
            # An adapter is published with the name of its data, which must not be a local path.
            self.name = path.resolve().name if path.exists() else str(dataset)
            self._rows = _open(dataset, what)
        self._digest = hashlib.sha256()
        if isinstance(self._rows, Mapping):
            raise DatasetError(
                f"{what} has the splits {sorted(self._rows)}; give one of them, for example "
                f"`dataset[{sorted(self._rows)[0]!r}]`."
            )
        if isinstance(self._rows, (bytes, bytearray)) or not isinstance(self._rows, Iterable):
            raise DatasetError(
                f"{what} must be a list of dicts, a datasets.Dataset, a file or a Hub id; got {type(dataset).__name__}."
            )

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        wrong, kind = RowNumbers(), ""
        for number, record in enumerate(self._rows):
            self.count += 1
            if not isinstance(record, Mapping):
                kind = kind or type(record).__name__
                wrong.add(number)
                continue
            row = dict(record)
            self._digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode() + b"\n")
            yield number, row
        if not self.count:
            raise DatasetError(f"{self.what} is empty.")
        if wrong:
            raise DatasetError(f"{self.what}: {wrong}: a row must be a dict, got {kind}.")

    def source(self, taken: int) -> DataSource:
        """The source of the rows read so far, with the number taken."""
        return DataSource(self.name, self._digest.hexdigest(), self.count, taken)


class PromptSample(Generic[Item]):
    """A bounded sample of a stream's rows: those of the prompts with the smallest seeded hashes.

    It is a uniform draw of prompts, whatever the order of the rows. Rows of one prompt are all in it or none, and a
    larger limit's sample contains a smaller one's. Memory grows only with the kept rows.

    Args:
        most: most rows to keep; None keeps all.
        seed: seed of the draw.

    Attributes:
        prompts: number of kept prompts; 0 if all rows are kept.

    Raises:
        ValueError: for a limit below 2, too few rows to fit.
    """

    def __init__(self, most: int | None, seed: int = 0) -> None:
        if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 2):
            raise ValueError(f"max_rows must be None or an integer of at least 2, got {most!r}.")
        self.most = most
        self.seed = seed
        self._rows: dict[int, list[tuple[int, Item]]] = {}
        # Kept hashes, negated, so that the largest comes out first; and the smallest dropped hash.
        self._largest_first: list[int] = []
        self._too_large = 1 << 128
        self._kept = 0

    @property
    def prompts(self) -> int:
        """Number of kept prompts."""
        return len(self._rows)

    def add(self, key: str, number: int, item: Item) -> None:
        """Keep a row if it belongs to the sample of the rows so far.

        Args:
            key: key of its prompt, equal for equal prompts.
            number: number of the row.
            item: the row.
        """
        digest = hashlib.blake2b(f"{self.seed}:{key}".encode(), digest_size=16).digest()
        value = int.from_bytes(digest, "big")
        if value >= self._too_large:
            return
        if value not in self._rows:
            self._rows[value] = []
            heapq.heappush(self._largest_first, -value)
        self._rows[value].append((number, item))
        self._kept += 1
        while self.most is not None and self._kept > self.most:
            # More rows than allowed have hashes up to this one, so it cannot be in the final sample.
            self._too_large = -heapq.heappop(self._largest_first)
            self._kept -= len(self._rows.pop(self._too_large))

    def rows(self) -> list[tuple[int, Item]]:
        """The kept rows with their numbers, in order."""
        return sorted((row for rows in self._rows.values() for row in rows), key=lambda row: row[0])


def _open(dataset: str | Path, what: str) -> Any:
    import datasets

    path = Path(dataset).expanduser()
    if path.is_dir():
        return datasets.load_from_disk(str(path))
    if path.is_file():
        builder = _BUILDERS.get(path.suffix.lower())
        if builder is None:
            raise DatasetError(f"{what}: cannot read {path.suffix!r} files; use one of {sorted(_BUILDERS)}.")
        # A byte order mark would become part of the first column's name.
        options: dict[str, Any] = {"encoding": "utf-8-sig", "keep_default_na": False} if builder == "csv" else {}
        if path.suffix.lower() == ".tsv":
            options["sep"] = "\t"
        if not path.stat().st_size:
            raise DatasetError(f"{what}: {path.name} is empty.")
        try:
            return datasets.load_dataset(builder, data_files=str(path), split="train", **options)
        except datasets.exceptions.DatasetGenerationError as error:
            raise DatasetError(
                f"{what}: {path.name} cannot be read as {builder}: {error.__cause__ or error}"
            ) from error
    if path.suffix.lower() in _BUILDERS or str(dataset).count("/") != 1:
        raise FileNotFoundError(f"{what}: there is no file {str(dataset)!r}. Give a path, or a Hub id `org/name`.")
    return datasets.load_dataset(str(dataset), split="train")
