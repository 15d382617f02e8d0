"""Data sets as token ids: prompts, and prompts with each answer and its span.

An answer's tokens are those after the prompt's, compared id by id, because a template or a tokenizer may merge text
across the boundary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from finesteer_hf.errors import DatasetError
from finesteer_hf.fitting.data.records import RowNumbers, name_rows
from finesteer_hf.fitting.data.rows import PreferenceRow, PromptRow, Row
from finesteer_hf.fitting.data.templating import render, render_prompt, text_tokenizer, tokenise


AnswerEnd = Literal["include", "exclude"]
# A tokenizer may merge a prompt's last characters with an answer's first; a larger difference means that the template
# renders the prompt differently when an answer follows.
MAX_REJOINED_TOKENS = 2


@dataclass(frozen=True)
class Passage:
    """Token ids of a text for the model.

    Attributes:
        ids: all token ids, with special tokens, without padding.
        answer_start: index of the first answer token; None for a prompt alone.
        closing: number of last tokens that the chat template adds to end the answer's turn.
    """

    ids: tuple[int, ...]
    answer_start: int | None = None
    closing: int = 0

    @property
    def answer_tokens(self) -> int:
        """Number of the answer's tokens."""
        return len(self.ids) - (self.answer_start or 0)

    @property
    def last_content(self) -> int:
        """Index of the last content token."""
        return len(self.ids) - 1 - self.closing


@dataclass(frozen=True)
class EncodedRow:
    """A preference row as token ids."""

    prompt: Passage
    chosen: Passage
    rejected: Passage


@dataclass
class Encoded:
    """Encoded rows, and remarks about them.

    Attributes:
        rows: one for each preference row.
        remarks: messages, each with the numbers of the rows it is about.
    """

    rows: list[EncodedRow]
    remarks: dict[str, set[int]] = field(default_factory=dict)


def encode_prompts(
    tokenizer: Any,
    prompts: Sequence[PromptRow],
    *,
    max_length: int | None = None,
    max_positions: int | None = None,
    what: str = "general_dataset",
) -> list[Passage]:
    """Encode prompts; duplicates are encoded once.

    Args:
        tokenizer: a transformers tokenizer.
        prompts: rows with text or messages.
        max_length: most tokens of a prompt.
        max_positions: most tokens that the model supports.
        what: name of the data set in messages.

    Raises:
        DatasetError: naming the rows: no chat template, a refused role, a prompt that is too long (prompts are never
            truncated: that would cut off the generation prompt).
    """
    tokenizer = text_tokenizer(tokenizer)
    rendered = _each(prompts, lambda row: render_prompt(tokenizer, row.prompt), what)
    encoded: list[list[int]] = [[]] * len(prompts)
    for special in (True, False):
        mine = [i for i, row in enumerate(prompts) if isinstance(row.prompt, str) is special]
        for i, ids in zip(mine, tokenise(tokenizer, [rendered[i] for i in mine], special_tokens=special), strict=True):
            encoded[i] = ids
    limit = min((n for n in (max_length, max_positions) if n is not None), default=None)
    if limit is not None:
        long = [i for i, ids in enumerate(encoded) if len(ids) > limit]
        if long:
            raise DatasetError(
                f"{what}: {_name(prompts, long)}: the prompt has {len(encoded[long[0]])} tokens, at most {limit} are "
                f"possible ({'max_length' if limit == max_length else 'the positions of the model'}). Prompts are never "
                "truncated, because their last token is the query; shorten or drop these rows."
            )
    empty = [i for i, ids in enumerate(encoded) if not ids]
    if empty:
        raise DatasetError(f"{what}: {_name(prompts, empty)}: the prompt has no token.")
    return [Passage(tuple(ids)) for ids in encoded]


def encode_preferences(
    tokenizer: Any,
    rows: Sequence[PreferenceRow],
    *,
    answer_end: AnswerEnd = "include",
    max_length: int | None = None,
    max_positions: int | None = None,
    what: str = "train_dataset",
) -> Encoded:
    """Encode prompts and answers and find each answer's span.

    Args:
        tokenizer: a transformers tokenizer.
        rows: the data set.
        answer_end: whether the chat template's tokens after an answer (end of turn) belong to it. FineSteer's
            published code includes them. Rows of plain text have no such tokens, and none are added. Either way the
            answer's last content token is known (`Passage.closing`).
        max_length: answers are cut so that prompt and answer have at most this many tokens; a remark names the rows.
        max_positions: most tokens that the model supports.
        what: name of the data set in messages.

    Raises:
        DatasetError: naming the rows: as for `encode_prompts`, an answer that is too long for the model, an answer
            without tokens, a template that renders the prompt differently when an answer follows.
    """
    if answer_end not in ("include", "exclude"):
        raise ValueError(f"answer_end must be 'include' or 'exclude', got {answer_end!r}.")
    tokenizer = text_tokenizer(tokenizer)
    prompts = encode_prompts(tokenizer, rows, max_length=max_length, max_positions=max_positions, what=what)
    result = Encoded([])
    sides: dict[str, list[Passage]] = {}
    for side in ("chosen", "rejected"):
        ids, closing = _encode_answers(tokenizer, rows, side, answer_end, what)
        found = _find_spans(tokenizer, rows, prompts, ids, side, max_length, max_positions, what, result.remarks)
        sides[side] = [
            # The cut removed the end.
            replace(passage, closing=min(max(0, own - len(whole) + len(passage.ids)), passage.answer_tokens - 1))
            for passage, whole, own in zip(found, ids, closing, strict=True)
        ]
    result.rows = [EncodedRow(*row) for row in zip(prompts, sides["chosen"], sides["rejected"], strict=True)]
    return result


def _each(rows: Sequence[Row], make: Callable[[Row], str], what: str) -> list[str]:
    """Make a text of each row; the error names rows for which that fails."""
    made: list[str] = []
    refused: dict[str, RowNumbers] = {}
    for row in rows:
        try:
            made.append(make(row))
        except DatasetError as error:
            refused.setdefault(str(error), RowNumbers()).add(row.number)
    if refused:
        message, numbers = next(iter(refused.items()))
        raise DatasetError(f"{what}: {numbers}: {message}")
    return made


def _name(rows: Sequence[PromptRow], places: Iterable[int]) -> str:
    """Numbers of the rows at some places in their data set, for a message."""
    return name_rows(rows[place].number for place in places)


def _encode_answers(
    tokenizer: Any, rows: Sequence[PreferenceRow], side: str, answer_end: AnswerEnd, what: str
) -> tuple[list[list[int]], list[int]]:
    """Ids of prompt and answer together, and the number of tokens after the answer's content."""

    def whole(row: PreferenceRow) -> str:
        prompt, answer = row.prompt, getattr(row, side)
        if isinstance(prompt, str):
            return prompt + str(answer)
        return render(tokenizer, [*prompt, *answer], add_generation_prompt=False)

    def content(row: PreferenceRow, text: str) -> str:
        """The text up to the end of the answer's content."""
        if isinstance(row.prompt, str):
            return text
        said = getattr(row, side)[-1]["content"].strip()
        at = text.rfind(said)
        if at < 0 and answer_end == "exclude":
            raise DatasetError(
                "the chat template changes the answer's text, so its end cannot be found; use answer_end='include'."
            )
        return text if at < 0 else text[: at + len(said)]

    texts = _each(rows, whole, what)
    rendered = dict(zip(map(id, rows), texts, strict=True))
    contents = _each(rows, lambda row: content(row, rendered[id(row)]), what)
    ids: list[list[int]] = [[]] * len(rows)
    closing = [0] * len(rows)
    for special in (True, False):
        mine = [i for i, row in enumerate(rows) if isinstance(row.prompt, str) is special]
        said = tokenise(tokenizer, [contents[i] for i in mine], special_tokens=special)
        for i, own in zip(mine, said, strict=True):
            ids[i] = own
        if special or answer_end == "exclude":
            continue
        for i, own in zip(mine, tokenise(tokenizer, [texts[i] for i in mine], special_tokens=False), strict=True):
            # A last token that merges content and end is content.
            alike = next((at for at, (a, b) in enumerate(zip(own, ids[i], strict=False)) if a != b), len(ids[i]))
            closing[i] = max(0, len(own) - max(alike, min(alike + 1, len(ids[i]))))
            ids[i] = own
    return ids, closing


def _find_spans(
    tokenizer: Any,
    rows: Sequence[PreferenceRow],
    prompts: Sequence[Passage],
    answers: Sequence[list[int]],
    side: str,
    max_length: int | None,
    max_positions: int | None,
    what: str,
    remarks: dict[str, set[int]],
) -> list[Passage]:
    passages: list[Passage] = []
    reworded: list[int] = []
    empty: list[int] = []
    too_long: list[int] = []
    for place, (row, prompt, ids) in enumerate(zip(rows, prompts, answers, strict=True)):
        pairs = zip(prompt.ids, ids, strict=False)
        start = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(prompt.ids), len(ids)))
        rejoined = len(prompt.ids) - start
        if rejoined > MAX_REJOINED_TOKENS:
            reworded.append(place)
        elif rejoined:
            message = (
                f"the first tokens of an answer merge with the prompt's last {rejoined}; they count as the answer's"
            )
            _remark(remarks, message, row)
        if max_length is not None and len(ids) > max_length:
            _remark(remarks, f"the {side} answer was cut to max_length={max_length} tokens", row)
            ids = ids[:max_length]
        elif max_positions is not None and len(ids) > max_positions:
            too_long.append(place)
        if len(ids) <= start:
            empty.append(place)
        passages.append(Passage(tuple(ids), start))
    if reworded:
        first = reworded[0]
        start = passages[first].answer_start or 0
        raise DatasetError(
            f"{what}: {_name(rows, reworded)}: with the {side} answer after it, the prompt is rendered differently from "
            f"token {start} on: {tokenizer.decode(list(prompts[first].ids[start:]))!r} became "
            f"{tokenizer.decode(list(passages[first].ids[start : start + 8]))!r}. Use a chat template whose generation "
            "prompt is also what it puts before an answer (for a thinking model: its non-thinking form)."
        )
    if too_long:
        raise DatasetError(
            f"{what}: {_name(rows, too_long)}: prompt and {side} answer have {len(passages[too_long[0]].ids)} tokens, the "
            f"model supports {max_positions}. Shorten them, or cut the answers with `max_length={max_positions}`."
        )
    if empty:
        raise DatasetError(f"{what}: {_name(rows, empty)}: no token is left of the {side} answer.")
    return passages


def _remark(remarks: dict[str, set[int]], message: str, row: PromptRow) -> None:
    remarks.setdefault(message, set()).add(row.number)
