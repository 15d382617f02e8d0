"""Log-probabilities of tokens, from token ids; used for scoring and for the choice of a strength."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from finesteer_hf.errors import DatasetError


def is_steerable(model: nn.Module) -> bool:
    """Whether the model was made by `SteeredModelForCausalLM`."""
    return callable(getattr(model, "disable_steering", None))


@torch.inference_mode()
def token_log_probs(
    model: nn.Module,
    prompt_ids: Sequence[Sequence[int]],
    answer_ids: Sequence[Sequence[int]],
    *,
    per_token: bool = False,
    batch_tokens: int = 4096,
) -> np.ndarray:
    """Like `answer_log_probs`, from token ids.

    Raises:
        DatasetError: if an answer has no token.
    """
    empty = [index for index, ids in enumerate(answer_ids) if len(ids) == 0]
    if empty:
        raise DatasetError(f"Answers without a token, at rows {empty[:10]}: nothing to score.")
    totals = np.zeros(len(prompt_ids))
    device = model_device(model)
    for rows in batches_by_length(
        [len(p) + len(a) for p, a in zip(prompt_ids, answer_ids, strict=True)], batch_tokens
    ):
        starts = torch.tensor([len(prompt_ids[row]) for row in rows])
        lengths = torch.tensor([len(answer_ids[row]) for row in rows])
        ids, mask = pad_right([[*prompt_ids[row], *answer_ids[row]] for row in rows])
        logits = forward_logits(model, ids.to(device), mask.to(device), starts.to(device))
        # Only the logits that predict an answer token are converted to float32 (float64 stays): [rows, tokens,
        # vocabulary] is large.
        place = torch.arange(ids.shape[1] - 1)
        predicts = (place >= starts[:, None] - 1) & (place < (starts + lengths)[:, None] - 1)
        chosen = ids[:, 1:][predicts].to(logits.device)
        precision = torch.promote_types(logits.dtype, torch.float32)
        log_probs = -nn.functional.cross_entropy(
            logits[:, :-1][predicts.to(logits.device)].to(precision), chosen, reduction="none"
        )
        owner = torch.arange(len(rows))[:, None].expand_as(predicts)[predicts]
        sums = torch.zeros(len(rows), dtype=torch.float64).index_add_(0, owner, log_probs.double().cpu())
        totals[rows] = (sums / lengths if per_token else sums).numpy()
    return totals


def forward_logits(
    model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, prompt_lengths: torch.Tensor
) -> torch.Tensor:
    """Logits `[rows, tokens, vocabulary]` of right-padded rows, the query at each prompt's last token."""
    extra = {"prompt_lengths": prompt_lengths} if is_steerable(model) else {}
    return model(input_ids=ids, attention_mask=mask, use_cache=False, **extra).logits


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Row numbers in batches of similar length whose padded size is at most `batch_tokens` (at least one row)."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if batch and (len(batch) + 1) * lengths[row] > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def pad_right(rows: Sequence[Sequence[int]], pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both int64 `[rows, tokens]`."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


def model_device(model: nn.Module) -> torch.device:
    """The device of the model's inputs: that of its input embeddings."""
    return model.get_input_embeddings().weight.device  # type: ignore[operator]
