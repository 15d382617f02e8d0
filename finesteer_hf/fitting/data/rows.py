"""Contrast data: the accepted forms of rows, and their internal form.

Rows have TRL's preference format, so its data sets work as they are: `prompt`, `chosen`, `rejected` as text or as
lists of chat messages, with the prompt in its own column or at the start of both answers. Every row of a data set is
checked when it is read; only those to fit are kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeAlias, TypeVar

from finesteer_hf.errors import DatasetError
from finesteer_hf.fitting.data.records import DatasetLike, DataSource, PromptSample, RecordStream, RowNumbers


Message: TypeAlias = dict[str, Any]
Text: TypeAlias = "str | list[Message]"

GROUP_COLUMNS = ("category", "group")


@dataclass(frozen=True)
class PromptRow:
    """A query.

    Attributes:
        prompt: text, or the messages up to the query.
        number: number of the row in its data set.
    """

    prompt: Text
    number: int = field(default=0, kw_only=True)


@dataclass(frozen=True)
class PreferenceRow(PromptRow):
    """A query with a wanted and an unwanted answer.

    Attributes:
        chosen: the wanted answer without the prompt: text, or its messages.
        rejected: the unwanted answer without the prompt.
        group: category, if the data set has one.
    """

    chosen: Text
    rejected: Text
    group: str | None = None


Row = TypeVar("Row", bound=PromptRow)


@dataclass(frozen=True)
class ReadRows(Generic[Row]):
    """Rows read from a data set.

    Attributes:
        rows: the kept rows, in order.
        source: their source, with its number of rows.
        findings: remarks for the user.
    """

    rows: list[Row]
    source: DataSource
    findings: list[str]


def read_preferences(
    dataset: DatasetLike, what: str = "train_dataset", *, max_rows: int | None = None, seed: int = 0
) -> ReadRows[PreferenceRow]:
    """Read preference rows, refuse bad ones, and keep a sample if there are many.

    Args:
        dataset: as for `RecordStream`: rows with `chosen`, `rejected` and, unless the answers begin with it, `prompt`;
            optionally `category` or `group`.
        what: name of the data set in messages.
        max_rows: as for `PromptSample`.
        seed: seed of the sample.

    Raises:
        DatasetError: naming the rows, kept or not: a missing column, a wrong type, an empty text, equal answers.
    """
    without = RowNumbers()

    def parse(record: Mapping[str, Any], number: int) -> PreferenceRow:
        prompt, chosen, rejected = _split_row(record)
        group = next((record[name] for name in GROUP_COLUMNS if record.get(name) is not None), None)
        if group is None:
            without.add(number)
        return PreferenceRow(prompt, chosen, rejected, None if group is None else str(group), number=number)

    read = _read(dataset, what, ("chosen", "rejected"), parse, max_rows, seed)
    if without and len(without) < read.source.rows:
        raise DatasetError(f"{what}: {without} have no category, but the others do. Give all rows one, or none.")
    return read


def read_prompts(
    dataset: DatasetLike, what: str = "general_dataset", *, max_rows: int | None = None, seed: int = 0
) -> ReadRows[PromptRow]:
    """Read general prompts, and keep a sample if there are many.

    Raises:
        DatasetError: naming the rows: no `prompt` column, a wrong type, an empty text.
    """

    def parse(record: Mapping[str, Any], number: int) -> PromptRow:
        prompt = _checked(record["prompt"], "prompt")
        _check_prompt(prompt)
        return PromptRow(prompt, number=number)

    return _read(dataset, what, ("prompt",), parse, max_rows, seed)


def _read(
    dataset: DatasetLike,
    what: str,
    columns: Sequence[str],
    parse: Callable[[Mapping[str, Any], int], Row],
    max_rows: int | None,
    seed: int,
) -> ReadRows[Row]:
    sample: PromptSample[Row] = PromptSample(max_rows, seed)
    stream = RecordStream(dataset, what)
    missing = {column: RowNumbers() for column in columns}
    problems: dict[str, RowNumbers] = {}
    names: list[str] = []
    for number, record in stream:
        names = names or sorted(record)
        lacks = [column for column in columns if record.get(column) is None]
        for column in lacks:
            missing[column].add(number)
        if lacks:
            continue
        try:
            row = parse(record, number)
        except DatasetError as error:
            problems.setdefault(str(error), RowNumbers()).add(number)
            continue
        sample.add(prompt_key(row.prompt), number, row)
    for column, numbers in missing.items():
        if len(numbers) == stream.count:
            raise DatasetError(
                f"{what} has no column {column!r}. Columns: {names}. Rename one with "
                f"`dataset.rename_column(..., {column!r})`."
            )
        if numbers:
            raise DatasetError(f"{what}: {numbers}: no {column!r}.")
    _raise_first(problems, what)
    rows = [row for _, row in sample.rows()]
    findings = []
    if len(rows) < stream.count:
        if sample.prompts < 2:
            raise DatasetError(
                f"{what} has {stream.count:,} rows; max_rows={max_rows:,} leaves those of {sample.prompts} "
                "prompts, since rows of one prompt stay together. Give a larger max_rows, or fewer rows of each prompt."
            )
        findings = [
            f"{what} has {stream.count:,} rows; {len(rows):,} of them are used, from {sample.prompts:,} prompts drawn "
            f"at random (max_rows={max_rows:,}; None uses all)"
        ]
    return ReadRows(rows, stream.source(len(rows)), findings)


def check_contrast(rows: Sequence[PreferenceRow], what: str = "train_dataset") -> None:
    """Refuse data that teaches nothing query-dependent.

    Raises:
        DatasetError: for a single row, and if all rows share one prompt.
    """
    if len(rows) < 2:
        raise DatasetError(f"{what} has {len(rows)} row; at least 2 are needed, 100 or more are recommended.")
    if len({prompt_key(row.prompt) for row in rows}) == 1:
        raise DatasetError(f"{what}: all {len(rows)} rows have the same prompt; give rows with different queries.")


def plain_text(value: Text) -> str:
    """The text of a prompt or an answer: its messages, one per line, without a chat template."""
    return value if isinstance(value, str) else "\n".join(message["content"] for message in value)


def prompt_key(prompt: Text) -> str:
    """A key that is equal for prompts with equal roles and contents."""
    if isinstance(prompt, str):
        return prompt
    return json.dumps([(m["role"], m["content"]) for m in prompt], ensure_ascii=False)


def _raise_first(problems: Mapping[str, RowNumbers], what: str) -> None:
    if problems:
        message, numbers = next(iter(problems.items()))
        rest = len(problems) - 1
        more = f" ({rest} other kind{'s' if rest > 1 else ''} of problem in other rows)" if rest else ""
        raise DatasetError(f"{what}: {numbers}: {message}{more}")


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
            raise DatasetError(f"{name} must end with a message with role 'assistant'.")
    return prompt, chosen, rejected


def _checked(value: Any, column: str) -> Text:
    """A non-blank text, or messages with a role and non-blank content."""
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
            raise DatasetError(f"{column}: a message must be a dict with the strings 'role' and 'content'.")
        if not message["content"].strip():
            raise DatasetError(f"{column} has an empty message with role {message['role']!r}.")
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
    """Take the common beginning of both answers as the prompt."""
    if isinstance(chosen, list) and isinstance(rejected, list):
        shared = _common(chosen, rejected)
    elif isinstance(chosen, str) and isinstance(rejected, str):
        shared = _common(chosen, rejected)
        # Back to the start of a word: answers may share the first letters of a word.
        while shared and not chosen[shared - 1].isspace():
            shared -= 1
        while shared and chosen[shared - 1].isspace():
            shared -= 1
    else:
        raise DatasetError("chosen and rejected must both be text or both be messages when there is no prompt column.")
    if not shared:
        raise DatasetError("there is no prompt column, and chosen and rejected have no common beginning.")
    if shared in (len(chosen), len(rejected)):
        raise DatasetError("one answer is the beginning of the other; give the prompt in its own column.")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the common beginning of two sequences."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))
