"""Contrast data: where rows come from, what they must look like, and their one inner form.

Rows are TRL's preference format, so its data sets fit as they are: `prompt`, `chosen`, `rejected` as text or as lists of
chat messages, with the prompt in its own column or at the head of both answers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from finesteer_hf.errors import DatasetError


Message: TypeAlias = dict[str, Any]
Text: TypeAlias = "str | list[Message]"
DatasetLike: TypeAlias = Any

GROUP_COLUMNS = ("category", "group")
_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_SHOWN_ROWS = 10


@dataclass(frozen=True)
class PreferenceRow:
    """A query with a wanted and an unwanted answer.

    Attributes:
        prompt: text, or the messages up to the query.
        chosen: the wanted answer alone: text, or its messages.
        rejected: the unwanted answer alone.
        group: category, if the data set has one.
        id: the row's own id, or its number.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    group: str | None = None
    id: str = ""


@dataclass(frozen=True)
class DataSource:
    """Where rows came from.

    Attributes:
        name: Hub id or path; None for rows handed over in memory.
        sha256: of the rows as they were read, in order.
        rows: their number.
    """

    name: str | None
    sha256: str
    rows: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form for the adapter's provenance."""
        return {"id": self.name, "sha256": self.sha256, "rows": self.rows}


def name_rows(rows: Iterable[int]) -> str:
    """Write row numbers for a message: `rows 3, 7`, the first of many and their count."""
    numbers = list(rows)
    shown = ", ".join(str(n) for n in numbers[:_SHOWN_ROWS])
    more = f" and {len(numbers) - _SHOWN_ROWS} more" if len(numbers) > _SHOWN_ROWS else ""
    return f"row{'s' if len(numbers) > 1 else ''} {shown}{more} (counted from 0)"


# -- reading ----------------------------------------------------------------------------------------------------------


def read_records(dataset: DatasetLike, what: str = "train_dataset") -> tuple[list[dict[str, Any]], DataSource]:
    """Read the rows of a data set, whatever form it has.

    Args:
        dataset: a list of dicts, a `datasets.Dataset` or `IterableDataset`, a json, jsonl, csv, tsv or parquet file, a
            folder saved with `save_to_disk`, or a Hub id (its `train` split).
        what: how messages call it.

    Raises:
        DatasetError: if it has another form, has several splits, or no row.
        FileNotFoundError: if a path does not exist and is no Hub id either.
    """
    name = str(dataset) if isinstance(dataset, (str, Path)) else None
    source = _open(dataset, what) if name is not None else dataset
    if isinstance(source, Mapping):
        raise DatasetError(
            f"{what} has the splits {sorted(source)}; give one of them, for example `dataset[{sorted(source)[0]!r}]`."
        )
    if isinstance(source, (bytes, bytearray)) or not isinstance(source, Iterable):
        raise DatasetError(
            f"{what} must be a list of dicts, a datasets.Dataset, a file or a Hub id; got {type(dataset).__name__}."
        )
    records = list(source)
    if not records:
        raise DatasetError(f"{what} is empty.")
    wrong = [i for i, record in enumerate(records) if not isinstance(record, Mapping)]
    if wrong:
        raise DatasetError(
            f"{what}: {name_rows(wrong)}: a row must be a dict, got {type(records[wrong[0]]).__name__}."
        )
    rows = [dict(record) for record in records]
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode() + b"\n")
    return rows, DataSource(name, digest.hexdigest(), len(rows))


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


# -- preference rows --------------------------------------------------------------------------------------------------


def parse_preferences(records: Sequence[Mapping[str, Any]], what: str = "train_dataset") -> list[PreferenceRow]:
    """Bring records into their inner form and refuse what cannot be fitted.

    Args:
        records: rows with `chosen`, `rejected` and, unless the answers begin with it, `prompt`; optionally `category` or
            `group`, and `id`.
        what: how messages call the data set.

    Raises:
        DatasetError: naming the rows: a missing column, a wrong type, an empty text, equal answers.
    """
    _need_columns(records, ("chosen", "rejected"), what)
    rows: list[PreferenceRow] = []
    problems: dict[str, list[int]] = {}
    for number, record in enumerate(records):
        try:
            prompt, chosen, rejected = _split_row(record)
        except DatasetError as error:
            problems.setdefault(str(error), []).append(number)
            continue
        group = next((record[name] for name in GROUP_COLUMNS if record.get(name) is not None), None)
        own_id = record.get("id")
        rows.append(
            PreferenceRow(
                prompt,
                chosen,
                rejected,
                None if group is None else str(group),
                str(number) if own_id is None else str(own_id),
            )
        )
    _raise_first(problems, what)
    without = [i for i, row in enumerate(rows) if row.group is None]
    if without and len(without) < len(rows):
        raise DatasetError(
            f"{what}: {name_rows(without)} have no category, the others do. Give all rows one, or none."
        )
    return rows


def parse_prompts(records: Sequence[Mapping[str, Any]], what: str = "general_dataset") -> list[Text]:
    """Bring the records of general prompts into their inner form.

    Raises:
        DatasetError: naming the rows: no `prompt` column, a wrong type, an empty text.
    """
    _need_columns(records, ("prompt",), what)
    prompts: list[Text] = []
    problems: dict[str, list[int]] = {}
    for number, record in enumerate(records):
        try:
            prompts.append(_checked(record["prompt"], "prompt"))
            _check_prompt(prompts[-1])
        except DatasetError as error:
            problems.setdefault(str(error), []).append(number)
    _raise_first(problems, what)
    return prompts


def check_contrast(rows: Sequence[PreferenceRow], what: str = "train_dataset") -> None:
    """Refuse data from which nothing query-dependent can be learned.

    Raises:
        DatasetError: for a single row, and if all rows share one prompt.
    """
    if len(rows) < 2:
        raise DatasetError(f"{what} has {len(rows)} row; at least 2 are needed, and 100 or more are advised.")
    if len({prompt_key(row.prompt) for row in rows}) == 1:
        raise DatasetError(f"{what}: all {len(rows)} rows have the same prompt; give rows with different queries.")


def prompt_key(prompt: Text) -> str:
    """What makes two prompts the same: their roles and contents."""
    if isinstance(prompt, str):
        return prompt
    return json.dumps([(m["role"], m["content"]) for m in prompt], ensure_ascii=False)


def _need_columns(records: Sequence[Mapping[str, Any]], columns: Sequence[str], what: str) -> None:
    for column in columns:
        missing = [i for i, record in enumerate(records) if record.get(column) is None]
        if len(missing) == len(records):
            raise DatasetError(
                f"{what} has no column {column!r}. Columns: {sorted(records[0])}. Rename one with "
                f"`dataset.rename_column(..., {column!r})`."
            )
        if missing:
            raise DatasetError(f"{what}: {name_rows(missing)}: no {column!r}.")


def _raise_first(problems: Mapping[str, list[int]], what: str) -> None:
    if problems:
        message, numbers = next(iter(problems.items()))
        rest = len(problems) - 1
        more = f" ({rest} other kind{'s' if rest > 1 else ''} of problem in other rows)" if rest else ""
        raise DatasetError(f"{what}: {name_rows(numbers)}: {message}{more}")


def _split_row(record: Mapping[str, Any]) -> tuple[Text, Text, Text]:
    chosen = _checked(record["chosen"], "chosen")
    rejected = _checked(record["rejected"], "rejected")
    prompt = None if record.get("prompt") is None else _checked(record["prompt"], "prompt")
    if chosen == rejected:
        raise DatasetError("chosen and rejected are the same.")
    if prompt is None:
        prompt, chosen, rejected = _implicit_prompt(chosen, rejected)
    elif isinstance(chosen, list) or isinstance(rejected, list) or isinstance(prompt, list):
        prompt, chosen, rejected = _conversation(prompt, _messages(chosen), _messages(rejected))
    _check_prompt(prompt)
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(answer, list) and (not answer or answer[-1]["role"] != "assistant"):
            raise DatasetError(f"{name} must end with a message of the role 'assistant'.")
    return prompt, chosen, rejected


def _checked(value: Any, column: str) -> Text:
    """A text that is not blank, or messages with a role and a content that is not blank."""
    if isinstance(value, str):
        if not value.strip():
            raise DatasetError(f"{column} is empty.")
        return value
    if not isinstance(value, list):
        raise DatasetError(f"{column} must be text or a list of messages, got {type(value).__name__}.")
    if not value:
        raise DatasetError(f"{column} is empty.")
    for message in value:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise DatasetError(f"{column}: a message must be a dict with the texts 'role' and 'content'.")
        if not message["content"].strip():
            raise DatasetError(f"{column} has an empty message of the role {message['role']!r}.")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _check_prompt(prompt: Text) -> None:
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise DatasetError("the prompt ends with an assistant message; it must end with the query.")


def _messages(answer: Text) -> list[Message]:
    return [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer


def _conversation(
    prompt: Text, chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Strip the prompt from answers that repeat it."""
    if isinstance(prompt, str):
        shared = _common(chosen, rejected)
        if any(message["content"].strip() == prompt.strip() for message in chosen[:shared]):
            return chosen[:shared], chosen[shared:], rejected[shared:]
        prompt = [{"role": "user", "content": prompt}]
    if chosen[: len(prompt)] == prompt and rejected[: len(prompt)] == prompt:
        return prompt, chosen[len(prompt) :], rejected[len(prompt) :]
    return prompt, chosen, rejected


def _implicit_prompt(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """Take what both answers begin with as the prompt."""
    if isinstance(chosen, list) and isinstance(rejected, list):
        shared = _common(chosen, rejected)
    elif isinstance(chosen, str) and isinstance(rejected, str):
        shared = _common(chosen, rejected)
        # Back to a word's beginning: answers may share the first letters of a word.
        while shared and not chosen[shared - 1].isspace():
            shared -= 1
        while shared and chosen[shared - 1].isspace():
            shared -= 1
    else:
        raise DatasetError("chosen and rejected must both be text or both be messages when there is no prompt column.")
    if not shared:
        raise DatasetError("there is no prompt column, and chosen and rejected do not begin alike.")
    if shared in (len(chosen), len(rejected)):
        raise DatasetError("one answer is the beginning of the other; give the prompt in a column of its own.")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the common beginning of two sequences."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))
