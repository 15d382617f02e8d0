"""Teacher-forced likelihoods of answers, with the model's active steering."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from torch import nn

from finesteer_hf.errors import DatasetError
from finesteer_hf.evaluation.measures.likelihood import (
    is_steerable,
    token_log_probs,
)
from finesteer_hf.evaluation.measures.prompts import Prompt, encode_pairs


def steered_as(model: nn.Module, adapter: str | None, scale: float = 1.0) -> AbstractContextManager[Any]:
    """A context in which one adapter steers, or none.

    Args:
        model: a steered model, or a plain one if `adapter` is None.
        adapter: name of a loaded adapter; None for the base model.
        scale: run-time factor of its strength.

    Raises:
        TypeError: if an adapter is named and the model cannot be steered.
    """
    if adapter is None:
        return model.disable_steering() if is_steerable(model) else nullcontext()  # type: ignore[operator]
    if not is_steerable(model):
        raise TypeError(
            f"{type(model).__name__} cannot be steered by {adapter!r}. Load it with "
            "SteeredModelForCausalLM.from_pretrained or from_model."
        )
    return model.steering(adapter, scale=scale)  # type: ignore[operator]


def answer_log_probs(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    answers: Sequence[str],
    *,
    per_token: bool = False,
    batch_tokens: int = 4096,
) -> np.ndarray:
    """Log-probability of each answer given its prompt, teacher forced, without the end-of-turn token.

    The model's active steering applies, and the query is the prompt's last token, as in `generate`.

    Args:
        model: any causal LM.
        tokenizer: its tokenizer.
        prompts: texts or chats.
        answers: one per prompt.
        per_token: whether to divide by the answer's number of tokens (nats per token); otherwise the sum, as for MC1
            and MC2.
        batch_tokens: padded tokens per forward.

    Returns:
        `[n]` float64, in nats.

    Raises:
        DatasetError: if an answer has no token, or prompts and answers differ in number.
    """
    if len(prompts) != len(answers):
        raise DatasetError(f"Got {len(prompts)} prompts for {len(answers)} answers.")
    prompt_ids, answer_ids = encode_pairs(tokenizer, prompts, answers)
    return token_log_probs(model, prompt_ids, answer_ids, per_token=per_token, batch_tokens=batch_tokens)
