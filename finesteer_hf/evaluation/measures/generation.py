"""Greedy answers in padded batches, with the gates' records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from finesteer_hf.evaluation.measures.likelihood import batches_by_length, is_steerable, model_device
from finesteer_hf.evaluation.measures.prompts import Prompt, encode_prompt


@dataclass
class Answers:
    """Generated answers, in the order of the prompts.

    Attributes:
        texts: decoded, without special tokens.
        ids: new token ids up to and including the first end token.
        steering: the records of each active adapter: tensors with one entry per prompt, on the CPU.
    """

    texts: list[str]
    ids: list[list[int]]
    steering: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.texts)


@torch.inference_mode()
def greedy_answers(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    batch_tokens: int = 8192,
    advance: Callable[[int], object] = lambda answered: None,
    **generate_kwargs: Any,
) -> Answers:
    """Answer prompts greedily with the model's active steering.

    Args:
        model: any causal LM with `generate`.
        tokenizer: its tokenizer.
        prompts: texts or chats.
        max_new_tokens: most tokens of each answer.
        batch_tokens: padded tokens per batch, including new ones.
        advance: called with the number of prompts that a batch has answered.
        **generate_kwargs: for `generate`.
    """
    prompt_ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    ends = end_token_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (min(ends) if ends else 0)
    device = model_device(model)
    new_ids: list[list[int]] = [[] for _ in prompts]
    records: dict[str, dict[str, list[tuple[int, torch.Tensor]]]] = {}
    if is_steerable(model):
        generate_kwargs = {"output_steering": True, **generate_kwargs}
    for rows in batches_by_length([len(ids) + max_new_tokens for ids in prompt_ids], batch_tokens):
        width = max(len(prompt_ids[row]) for row in rows)
        ids = torch.tensor([[pad] * (width - len(prompt_ids[row])) + prompt_ids[row] for row in rows])
        mask = torch.tensor([[0] * (width - len(prompt_ids[row])) + [1] * len(prompt_ids[row]) for row in rows])
        output = model.generate(  # type: ignore[operator]
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
            return_dict_in_generate=True,
            **generate_kwargs,
        )
        for row, tokens in zip(rows, output.sequences[:, width:].tolist(), strict=True):
            new_ids[row] = until_end(tokens, ends)
        advance(len(rows))
        for adapter, record in (getattr(output, "steering", None) or {}).items():
            for name, values in record.items():
                if isinstance(values, torch.Tensor) and values.ndim and values.shape[0] == len(rows):
                    entries = records.setdefault(adapter, {}).setdefault(name, [])
                    entries.extend(zip(rows, values.detach().float().cpu(), strict=True))
    steering = {
        adapter: {
            name: torch.stack([value for _, value in sorted(entries, key=lambda entry: entry[0])])
            for name, entries in record.items()
            if len(entries) == len(prompts)
        }
        for adapter, record in records.items()
    }
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in new_ids]
    return Answers(texts, new_ids, steering)


def end_token_ids(model: nn.Module, tokenizer: Any) -> set[int]:
    """Ids at which `generate` stops."""
    config: Any = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    if ends is None:
        ends = tokenizer.eos_token_id
    if ends is None:
        return set()
    return {ends} if isinstance(ends, int) else set(ends)


def until_end(tokens: Sequence[int], ends: set[int]) -> list[int]:
    """New tokens up to and including the first end token; what follows it in a batch is padding."""
    for index, token in enumerate(tokens):
        if token in ends:
            return list(tokens[: index + 1])
    return list(tokens)
