"""Where rows come from: a data set of any form, row by row, in memory that does not grow with it.

Of millions of rows a fit needs some thousands. `PromptSample` takes them as they pass: `datasets` can stream, shuffle a
buffer and take the first rows, but has no uniform draw of a stream, and none that keeps the rows of a prompt together.
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
    """Numbers of rows, of which a message shows the first and the count.

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
        """Count a row."""
        self.count += 1
        if len(self.first) < _SHOWN_ROWS:
            self.first.append(row)

    def __len__(self) -> int:
        return self.count

    def __str__(self) -> str:
        more = f" and {self.count - _SHOWN_ROWS} more" if self.count > _SHOWN_ROWS else ""
        return f"row{'s' if self.count > 1 else ''} {', '.join(map(str, self.first))}{more} (counted from 0)"


def name_rows(rows: Iterable[int]) -> str:
    """Write row numbers for a message: `rows 3, 7`, the first of many and their count."""
    return str(RowNumbers(rows))


@dataclass(frozen=True)
class DataSource:
    """Where rows came from.

    Attributes:
        name: Hub id, or what a file or folder is called; None for rows handed over in memory.
        sha256: of the rows as they were read, in order.
        rows: their number.
        taken: how many of them were kept.
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
        what: how messages call it.

    Attributes:
        count: number of rows that have passed.

    Raises:
        DatasetError: if it has another form, or has several splits; at the end of the rows if there was none, or one
            that is no dict.
        FileNotFoundError: if a path does not exist and is no Hub id either.
    """

    def __init__(self, dataset: DatasetLike, what: str) -> None:
        self.what = what
        self.count = 0
        self.name: str | None = None
        self._rows: Any = dataset
        if isinstance(dataset, (str, Path)):
            path = Path(dataset).expanduser()
            # An adapter is published with the name of its data, which a path of this machine is not.
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
        """What has passed, of which so many rows were taken."""
        return DataSource(self.name, self._digest.hexdigest(), self.count, taken)


class PromptSample(Generic[Item]):
    """At most so many rows of a stream: those of the prompts whose seeded hashes are smallest.

    It is a uniform draw of prompts, whatever the order of the rows; rows of one prompt are all in it or none; and the
    sample for a larger limit holds the one for a smaller. Memory is that of the rows that are kept.

    Args:
        most: rows that are kept; None keeps all.
        seed: of the draw.

    Attributes:
        prompts: number of prompts that are kept; 0 where all rows are.

    Raises:
        ValueError: for a limit below 2, which is no data set to fit.
    """

    def __init__(self, most: int | None, seed: int = 0) -> None:
        if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 2):
            raise ValueError(f"max_rows must be None or a whole number of at least 2, got {most!r}.")
        self.most = most
        self.seed = seed
        self._rows: dict[int, list[tuple[int, Item]]] = {}
        # Kept hashes, negated, so that the largest comes out first; and the smallest of those that were dropped.
        self._largest_first: list[int] = []
        self._too_large = 1 << 128
        self._kept = 0

    @property
    def prompts(self) -> int:
        """Number of prompts that are kept."""
        return len(self._rows)

    def add(self, key: str, number: int, item: Item) -> None:
        """Take a row in, if it belongs to the sample of what has passed so far.

        Args:
            key: what makes two prompts the same.
            number: of the row.
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
            # More rows than fit have hashes up to this one, so it cannot be in the sample of the whole either.
            self._too_large = -heapq.heappop(self._largest_first)
            self._kept -= len(self._rows.pop(self._too_large))

    def rows(self) -> list[tuple[int, Item]]:
        """The rows that are kept with their numbers, in the order in which they came."""
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
        # A byte order mark would become a part of the first column's name.
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
