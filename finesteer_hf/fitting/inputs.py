"""The data of a fit, read, checked, encoded and split, before the model runs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finesteer_hf.errors import DatasetError
from finesteer_hf.fitting.data import (
    DatasetLike,
    DataSource,
    Message,
    PreferenceRow,
    Text,
    check_contrast,
    name_rows,
    parse_preferences,
    parse_prompts,
    prompt_key,
    read_records,
)
from finesteer_hf.fitting.general import default_general_prompts
from finesteer_hf.fitting.lint import drop_known, lint_general, lint_rows, lint_variants
from finesteer_hf.fitting.splits import Split, SplitBy, split_rows, split_units
from finesteer_hf.fitting.templating import AnswerEnd, EncodedRow, Passage, encode_preferences, encode_prompts


# Name of the packaged general prompts.
PACKAGED = "default"


@dataclass(frozen=True)
class FitInputs:
    """What a fit is made from.

    Attributes:
        rows: training rows, then those of the validation data set.
        trained: number of training rows.
        general: prompts that must not be steered; may be empty.
        side_effects: prompts on which the divergence is measured: held-out general ones, or packaged ones.
        split: parts of the rows.
        general_split: parts of the general prompts.
        prompts: for each row the label of its prompt, int64.
        units: for each row the label of what it was split by, int64.
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
    findings: list[str]
    sources: dict[str, dict[str, Any] | None]

    def describe(self, passages: Sequence[Passage]) -> str:
        """Name the rows that passages come from."""
        wanted = set(passages)
        named = [
            ("train_dataset", [i for i, row in enumerate(self.rows[: self.trained]) if wanted & _passages(row)]),
            ("eval_dataset", [i for i, row in enumerate(self.rows[self.trained :]) if wanted & _passages(row)]),
            ("general_dataset", [i for i, passage in enumerate(self.general) if passage in wanted]),
        ]
        return "; ".join(f"{what}: {name_rows(numbers)}" for what, numbers in named if numbers)


def _passages(row: EncodedRow) -> set[Passage]:
    return {row.prompt, row.chosen, row.rejected}


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
) -> FitInputs:
    """Read, check, encode and split all data of a fit.

    Args:
        tokenizer: a transformers tokenizer.
        train_dataset, eval_dataset, general_dataset: as for `fit_steering`.
        seed: of the splits.
        split: `prompt` or `group`.
        answer_end: as for `encode_preferences`.
        max_length: most tokens of a text.
        max_positions: most tokens that the model can take.

    Raises:
        DatasetError: naming the rows that cannot be fitted.
    """
    limits: dict[str, Any] = {"max_length": max_length, "max_positions": max_positions}
    records, source = read_records(train_dataset)
    rows = parse_preferences(records)
    check_contrast(rows)
    encoded = encode_preferences(tokenizer, rows, answer_end=answer_end, **limits)
    findings = [f"{message}: {name_rows(numbers)}" for message, numbers in encoded.remarks.items()]
    findings += lint_rows(rows, encoded.rows, tokenizer)
    findings += lint_variants(rows, seed) if split == "prompt" else []
    held_out = _read_held_out(tokenizer, eval_dataset, rows, answer_end, limits)
    general, general_source = _read_general(tokenizer, general_dataset, rows, limits)
    kept, shared = drop_known(general, rows, "general_dataset", "left out, for it is to be steered")
    general = [general[i] for i in kept]
    findings += [*held_out.findings, *shared, *lint_general(general, rows)]
    general_encoded = list(dict.fromkeys(encode_prompts(tokenizer, general, **limits)))

    keys = [prompt_key(row.prompt) for row in [*rows, *held_out.rows]]
    groups = None if rows[0].group is None else [str(row.group) for row in rows]
    parts = split_rows(keys[: len(rows)], groups, seed, by=split, validation_rows=len(held_out.rows))
    general_parts = split_units([str(passage.ids) for passage in general_encoded], seed)
    for name, part, count in (("train", parts, 1), ("general", general_parts, len(general_encoded))):
        if count and not part.held_out:
            findings.append(f"{name}_dataset has too few prompts to hold any out: its figures are in-sample")
    side_effects = [general_encoded[i] for i in general_parts.rows["validation"]]
    if not side_effects:
        # One-class fits leave the gate without general prompts; what steering does to them is measured all the same.
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
        findings=findings,
        sources={
            "data": source.to_dict(),
            "eval_data": None if held_out.source is None else held_out.source.to_dict(),
            "general_data": None if general_source is None else general_source.to_dict(),
        },
    )


@dataclass(frozen=True)
class _HeldOut:
    rows: list[PreferenceRow]
    encoded: list[EncodedRow]
    findings: list[str]
    source: DataSource | None


def _read_held_out(
    tokenizer: Any,
    dataset: DatasetLike | None,
    rows: Sequence[PreferenceRow],
    answer_end: AnswerEnd,
    limits: dict[str, Any],
) -> _HeldOut:
    """The validation rows, without those whose prompt is trained on."""
    if dataset is None:
        return _HeldOut([], [], [], None)
    records, source = read_records(dataset, "eval_dataset")
    own = parse_preferences(records, "eval_dataset")
    encoded = encode_preferences(tokenizer, own, answer_end=answer_end, what="eval_dataset", **limits)
    kept, leaked = drop_known([row.prompt for row in own], rows, "eval_dataset", "left out of the validation")
    if not kept:
        raise DatasetError("eval_dataset has no prompt that is not also in train_dataset; give other prompts.")
    remarks = [f"eval_dataset: {message}: {name_rows(numbers)}" for message, numbers in encoded.remarks.items()]
    return _HeldOut([own[i] for i in kept], [encoded.rows[i] for i in kept], [*remarks, *leaked], source)


def _read_general(
    tokenizer: Any, dataset: DatasetLike | None, rows: Sequence[PreferenceRow], limits: dict[str, Any]
) -> tuple[list[Text], DataSource | None]:
    if dataset is None:
        return [], None
    if isinstance(dataset, str) and dataset == PACKAGED:
        texts = _packaged(tokenizer, rows, limits)
        digest = hashlib.sha256("\n".join(default_general_prompts()).encode()).hexdigest()
        return texts, DataSource(PACKAGED, digest, len(texts))
    if isinstance(dataset, (list, tuple)):
        dataset = [{"prompt": item} if isinstance(item, str) else item for item in dataset]
    records, source = read_records(dataset, "general_dataset")
    return [_in_form_of(rows, prompt) for prompt in parse_prompts(records)], source


def _packaged(tokenizer: Any, rows: Sequence[PreferenceRow], limits: dict[str, Any]) -> list[Text]:
    """The packaged prompts that fit the model; nobody can shorten the others."""
    texts = [_in_form_of(rows, prompt) for prompt in default_general_prompts()]
    most = min((limit for limit in limits.values() if limit is not None), default=None)
    lengths = [len(passage.ids) for passage in encode_prompts(tokenizer, texts)]
    return [text for text, length in zip(texts, lengths, strict=True) if most is None or length <= most]


def _in_form_of(rows: Sequence[PreferenceRow], prompt: Text) -> Text:
    """A general prompt in the form of the training prompts, so that a gate cannot tell them by their form.

    Text becomes a user message where they are chats, after their system message if all have the same one.
    """
    if isinstance(prompt, list) or any(isinstance(row.prompt, str) for row in rows):
        return prompt
    starts: list[Message] = [row.prompt[0] for row in rows if isinstance(row.prompt, list)]
    shared = starts[0]["role"] == "system" and all(start == starts[0] for start in starts)
    return [*(starts[:1] if shared else []), {"role": "user", "content": prompt}]
