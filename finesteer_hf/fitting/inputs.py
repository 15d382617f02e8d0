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
from finesteer_hf.fitting.lint import drop_known, lint_general, lint_rows
from finesteer_hf.fitting.splits import Split, SplitBy, split_rows, split_units
from finesteer_hf.fitting.templating import AnswerEnd, EncodedRow, Passage, encode_preferences, encode_prompts


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
    sources: dict[str, dict[str, Any] | None] = {"data": source.to_dict(), "eval_data": None, "general_data": None}

    held_out: list[PreferenceRow] = []
    held_out_encoded: list[EncodedRow] = []
    if eval_dataset is not None:
        records, eval_source = read_records(eval_dataset, "eval_dataset")
        sources["eval_data"] = eval_source.to_dict()
        held_out = parse_preferences(records, "eval_dataset")
        found = encode_preferences(tokenizer, held_out, answer_end=answer_end, what="eval_dataset", **limits)
        kept, leaked = drop_known([row.prompt for row in held_out], rows, "eval_dataset", "left out of the validation")
        if not kept:
            raise DatasetError("eval_dataset has no prompt that is not also in train_dataset; give other prompts.")
        findings += leaked
        held_out, held_out_encoded = [held_out[i] for i in kept], [found.rows[i] for i in kept]

    general, general_source = _general_prompts(general_dataset, rows)
    sources["general_data"] = None if general_source is None else general_source.to_dict()
    kept, shared = drop_known(general, rows, "general_dataset", "left out, for it is to be steered")
    general = [general[i] for i in kept]
    findings += [*shared, *lint_general(general, rows)]
    general_encoded = list(dict.fromkeys(encode_prompts(tokenizer, general, **limits)))

    everything = rows + held_out
    keys = [prompt_key(row.prompt) for row in everything]
    groups = None if rows[0].group is None else [str(row.group) for row in rows]
    parts = split_rows(keys[: len(rows)], groups, seed, by=split, validation_rows=len(held_out))
    general_parts = split_units([str(passage.ids) for passage in general_encoded], seed)
    if not parts.held_out:
        findings.append("train_dataset has too few prompts to hold any out: its figures are in-sample")
    if general_encoded and not general_parts.held_out:
        findings.append("general_dataset has too few prompts to hold any out: its figures are in-sample")
    side_effects = [general_encoded[i] for i in general_parts.rows["validation"]]
    if not side_effects:
        # One-class fits leave the gate without general prompts; what steering does to them is measured all the same.
        packaged = [_in_form_of(rows, prompt) for prompt in default_general_prompts()]
        side_effects = encode_prompts(tokenizer, packaged)
    units = keys if split == "prompt" else [str(row.group) for row in everything]
    return FitInputs(
        rows=encoded.rows + held_out_encoded,
        trained=len(rows),
        general=general_encoded,
        side_effects=side_effects,
        split=parts,
        general_split=general_parts,
        prompts=np.unique(keys, return_inverse=True)[1],
        units=np.unique(units, return_inverse=True)[1],
        findings=findings,
        sources=sources,
    )


def _general_prompts(
    dataset: DatasetLike | None, rows: Sequence[PreferenceRow]
) -> tuple[list[Text], DataSource | None]:
    if dataset is None:
        return [], None
    if isinstance(dataset, str) and dataset == "default":
        texts = default_general_prompts()
        source = DataSource("default", hashlib.sha256("\n".join(texts).encode()).hexdigest(), len(texts))
        return [_in_form_of(rows, text) for text in texts], source
    if isinstance(dataset, (list, tuple)):
        dataset = [{"prompt": item} if isinstance(item, str) else item for item in dataset]
    records, source = read_records(dataset, "general_dataset")
    return [_in_form_of(rows, prompt) for prompt in parse_prompts(records)], source


def _in_form_of(rows: Sequence[PreferenceRow], prompt: Text) -> Text:
    """A general prompt in the form of the training prompts, so that a gate cannot tell them by their form.

    Text becomes a user message where they are chats, after their system message if all have the same one.
    """
    if isinstance(prompt, list) or any(isinstance(row.prompt, str) for row in rows):
        return prompt
    starts: list[Message] = [row.prompt[0] for row in rows if isinstance(row.prompt, list)]
    shared = starts[0]["role"] == "system" and all(start == starts[0] for start in starts)
    return [*(starts[:1] if shared else []), {"role": "user", "content": prompt}]
