"""The data of a fit: read, checked, encoded and split before the model runs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finesteer_hf.errors import DatasetError
from finesteer_hf.fitting.data.encoding import (
    AnswerEnd,
    Encoded,
    EncodedRow,
    Passage,
    encode_preferences,
    encode_prompts,
)
from finesteer_hf.fitting.data.general import default_general_prompts
from finesteer_hf.fitting.data.lint import drop_known, lint_general, lint_rows, lint_variants
from finesteer_hf.fitting.data.records import DatasetLike, DataSource, name_rows
from finesteer_hf.fitting.data.rows import (
    Message,
    PreferenceRow,
    PromptRow,
    Text,
    check_contrast,
    plain_text,
    prompt_key,
    read_preferences,
    read_prompts,
)
from finesteer_hf.fitting.data.splits import Split, SplitBy, split_rows, split_units


# Name of the packaged general prompts.
PACKAGED = "default"


@dataclass(frozen=True)
class FitInputs:
    """The inputs of a fit.

    Attributes:
        rows: training rows, then those of the validation data set.
        trained: number of training rows.
        general: prompts that must not be steered; may be empty.
        side_effects: prompts on which the divergence is measured: held-out general ones, or the packaged ones.
        split: parts of the rows.
        general_split: parts of the general prompts.
        prompts: for each row, the label of its prompt, int64.
        units: for each row, the label of its split unit, int64.
        kinds: for each row, its category, str; None if the training rows have none.
        texts: for each row, the text of its prompt.
        general_texts: the same for the general prompts.
        numbers: for each row, its number in its data set.
        general_numbers: the same for the general prompts.
        findings: what the lint found.
        sources: where `data`, `eval_data` and `general_data` came from.
    """

    rows: list[EncodedRow]
    trained: int
    general: list[Passage]
    side_effects: list[Passage]
    split: Split
    general_split: Split
    prompts: np.ndarray
    units: np.ndarray
    kinds: np.ndarray | None
    texts: list[str]
    general_texts: list[str]
    numbers: list[int]
    general_numbers: list[int]
    findings: list[str]
    sources: dict[str, dict[str, Any] | None]

    def describe(self, passages: Sequence[Passage]) -> str:
        """Name the rows that passages come from."""
        wanted = set(passages)
        own = [
            (number, bool(wanted & {row.prompt, row.chosen, row.rejected}))
            for number, row in zip(self.numbers, self.rows, strict=True)
        ]
        general = [(n, passage in wanted) for n, passage in zip(self.general_numbers, self.general, strict=True)]
        parts = {
            "train_dataset": own[: self.trained],
            "eval_dataset": own[self.trained :],
            "general_dataset": general,
        }
        named = {what: [number for number, is_meant in part if is_meant] for what, part in parts.items()}
        return "; ".join(f"{what}: {name_rows(numbers)}" for what, numbers in named.items() if numbers)


def prepare_inputs(
    tokenizer: Any,
    train_dataset: DatasetLike,
    eval_dataset: DatasetLike | None,
    general_dataset: DatasetLike | None,
    *,
    seed: int,
    split: SplitBy = "prompt",
    answer_end: AnswerEnd = "include",
    max_length: int | None = None,
    max_positions: int | None = None,
    max_rows: int | None = None,
) -> FitInputs:
    """Read, check, encode and split all data of a fit.

    Args:
        tokenizer: a transformers tokenizer.
        train_dataset, eval_dataset, general_dataset: as for `fit_steering`.
        seed: seed of the splits.
        split: `prompt` or `group`.
        answer_end: as for `encode_preferences`.
        max_length: most tokens of a text.
        max_positions: most tokens that the model supports.
        max_rows: most rows kept of a data set, whole prompts at a time; None keeps all. Other rows are checked for
            their form but not tokenised.

    Raises:
        DatasetError: naming the rows that cannot be fitted.
    """
    limits: dict[str, Any] = {"max_length": max_length, "max_positions": max_positions}
    taking: dict[str, Any] = {"max_rows": max_rows, "seed": seed}
    train = read_preferences(train_dataset, **taking)
    rows = train.rows
    check_contrast(rows)
    encoded = encode_preferences(tokenizer, rows, answer_end=answer_end, **limits)
    findings = [*train.findings, *_remarks(encoded)]
    findings += lint_rows(rows, encoded.rows, tokenizer)
    findings += lint_variants(rows, seed) if split == "prompt" else []
    held_out = _read_held_out(tokenizer, eval_dataset, rows, answer_end, limits, taking)
    general = _read_general(tokenizer, general_dataset, rows, limits, taking)
    kept, shared = drop_known(general.rows, rows, "general_dataset", "left out, because it should be steered")
    findings += [
        *held_out.findings,
        *general.findings,
        *shared,
        *lint_general([row.prompt for row in kept], rows, seed),
    ]
    # Each text once, with the number of its first row.
    first: dict[Passage, PromptRow] = {}
    for passage, row in zip(encode_prompts(tokenizer, kept, **limits), kept, strict=True):
        first.setdefault(passage, row)
    general_encoded = list(first)

    keys = [prompt_key(row.prompt) for row in [*rows, *held_out.rows]]
    groups = None if rows[0].group is None else [str(row.group) for row in rows]
    parts = split_rows(keys[: len(rows)], groups, seed, by=split, validation_rows=len(held_out.rows))
    general_parts = split_units([str(passage.ids) for passage in general_encoded], seed)
    for name, part, count in (("train", parts, 1), ("general", general_parts, len(general_encoded))):
        if count and not part.held_out:
            findings.append(f"{name}_dataset has too few prompts to hold any out: its figures are in-sample")
    side_effects = [general_encoded[i] for i in general_parts.rows["validation"]]
    if not side_effects:
        # In a one-class fit the gate sees no general prompts; the effect of steering on them is still measured.
        side_effects = encode_prompts(tokenizer, _packaged(tokenizer, rows, limits))
    units = keys if split == "prompt" else [str(row.group) for row in [*rows, *held_out.rows]]
    return FitInputs(
        rows=[*encoded.rows, *held_out.encoded],
        trained=len(rows),
        general=general_encoded,
        side_effects=side_effects,
        split=parts,
        general_split=general_parts,
        prompts=np.unique(keys, return_inverse=True)[1],
        units=np.unique(units, return_inverse=True)[1],
        kinds=None if groups is None else np.array([str(row.group or "") for row in [*rows, *held_out.rows]]),
        texts=[plain_text(row.prompt) for row in [*rows, *held_out.rows]],
        general_texts=[plain_text(row.prompt) for row in first.values()],
        numbers=[row.number for row in [*rows, *held_out.rows]],
        general_numbers=[row.number for row in first.values()],
        findings=findings,
        sources={
            "data": train.source.to_dict(),
            "eval_data": None if held_out.source is None else held_out.source.to_dict(),
            "general_data": None if general.source is None else general.source.to_dict(),
        },
    )


@dataclass(frozen=True)
class _HeldOut:
    rows: list[PreferenceRow]
    encoded: list[EncodedRow]
    findings: list[str]
    source: DataSource | None


def _remarks(encoded: Encoded) -> list[str]:
    return [f"{message}: {name_rows(sorted(numbers))}" for message, numbers in encoded.remarks.items()]


def _read_held_out(
    tokenizer: Any,
    dataset: DatasetLike | None,
    rows: Sequence[PreferenceRow],
    answer_end: AnswerEnd,
    limits: dict[str, Any],
    taking: dict[str, Any],
) -> _HeldOut:
    """The validation rows, without those whose prompt is in the training data."""
    if dataset is None:
        return _HeldOut([], [], [], None)
    read = read_preferences(dataset, "eval_dataset", **taking)
    kept, leaked = drop_known(read.rows, rows, "eval_dataset", "left out of the validation")
    if not kept:
        raise DatasetError("eval_dataset has no prompt that is not also in train_dataset; give other prompts.")
    encoded = encode_preferences(tokenizer, kept, answer_end=answer_end, what="eval_dataset", **limits)
    remarks = [f"eval_dataset: {remark}" for remark in _remarks(encoded)]
    return _HeldOut(kept, encoded.rows, [*read.findings, *remarks, *leaked], read.source)


@dataclass(frozen=True)
class _General:
    rows: list[PromptRow]
    findings: list[str]
    source: DataSource | None


def _read_general(
    tokenizer: Any,
    dataset: DatasetLike | None,
    rows: Sequence[PreferenceRow],
    limits: dict[str, Any],
    taking: dict[str, Any],
) -> _General:
    if dataset is None:
        return _General([], [], None)
    if isinstance(dataset, str) and dataset == PACKAGED:
        packaged = _packaged(tokenizer, rows, limits)
        digest = hashlib.sha256("\n".join(default_general_prompts()).encode()).hexdigest()
        return _General(packaged, [], DataSource(PACKAGED, digest, len(packaged), len(packaged)))
    if isinstance(dataset, (list, tuple)):
        dataset = [{"prompt": item} if isinstance(item, str) else item for item in dataset]
    read = read_prompts(dataset, **taking)
    return _General(in_form_of(rows, read.rows), read.findings, read.source)


def _packaged(tokenizer: Any, rows: Sequence[PreferenceRow], limits: dict[str, Any]) -> list[PromptRow]:
    """The packaged prompts that are short enough for the model; users cannot shorten the others."""
    packaged = [PromptRow(prompt, number=number) for number, prompt in enumerate(default_general_prompts())]
    prompts = in_form_of(rows, packaged)
    most = min((limit for limit in limits.values() if limit is not None), default=None)
    lengths = [len(passage.ids) for passage in encode_prompts(tokenizer, prompts)]
    return [row for row, length in zip(prompts, lengths, strict=True) if most is None or length <= most]


def in_form_of(rows: Sequence[PreferenceRow], prompts: Sequence[PromptRow]) -> list[PromptRow]:
    """General prompts in the form of the training prompts, so that a gate cannot separate them by form.

    If the training prompts are chats, text becomes a user message, after their system message if all share one.
    """
    if any(isinstance(row.prompt, str) for row in rows):
        return list(prompts)
    starts: list[Message] = [row.prompt[0] for row in rows if isinstance(row.prompt, list)]
    shared = starts[0]["role"] == "system" and all(start == starts[0] for start in starts)

    def chat(prompt: Text) -> Text:
        return (
            prompt
            if isinstance(prompt, list)
            else [*(starts[:1] if shared else []), {"role": "user", "content": prompt}]
        )

    return [PromptRow(chat(row.prompt), number=row.number) for row in prompts]
