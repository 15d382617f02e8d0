"""Move rows of a batch along the columns, in tensors with one column a token and in caches."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


def shift_right(values: torch.Tensor, shift: torch.Tensor, fill: int) -> torch.Tensor:
    """Move each row to the right; what leaves at the right is lost.

    Args:
        values: `[..., rows, columns]`.
        shift: int64 `[rows]`, not negative.
        fill: value that enters at the left.

    Returns:
        `[..., rows, columns]`.
    """
    shift = shift.to(values.device)
    columns = torch.arange(values.shape[-1], device=values.device) - shift[:, None]
    moved = values.gather(-1, columns.clamp(min=0).expand(values.shape))
    return moved.masked_fill(columns < 0, fill)


def can_move_rows(cache: Any) -> bool:
    """Whether every layer of a cache still holds one key and one value for each column."""
    layers = getattr(cache, "layers", None)
    if layers is None or getattr(cache, "offloading", False):
        return False
    return all(_is_plain(layer) for layer in layers)


def _is_plain(layer: Any) -> bool:
    if type(layer) is DynamicSlidingWindowLayer:
        return bool(layer.cumulative_length < layer.sliding_window)
    return type(layer) is DynamicLayer


def empty(cache: Any) -> None:
    """Empty a cache in place, so that a text can be read into it again."""
    for layer in getattr(cache, "layers", ()):
        if isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None:
            # Older versions of transformers fill such a layer with zeros instead, and append to them.
            layer.keys, layer.values = layer.keys[..., :0, :], layer.values[..., :0, :]
    cache.reset()


def crop_columns(cache: Any, columns: int) -> None:
    """Cut a cache to its first columns; layers that hold fewer stay as they are."""
    for layer in cache.layers:
        if layer.is_initialized:
            surplus = int(layer.get_seq_length()) - columns
            if surplus > 0:
                layer.crop(-surplus)


def shift_columns(cache: Any, shift: torch.Tensor) -> None:
    """Move rows of a cache to the right, or for negative numbers to the left.

    Copies of the outermost column enter at the other end; the mask must hide them.

    Args:
        cache: a cache for which `can_move_rows` is true.
        shift: int64 `[rows]`.
    """
    moving = shift.nonzero()[:, 0]
    if not len(moving):
        return
    for layer in cache.layers:
        if not layer.is_initialized or not layer.get_seq_length():
            continue
        rows = moving.to(layer.keys.device)
        columns = torch.arange(layer.keys.shape[-2], device=rows.device)
        source = (columns - shift.to(rows.device)[rows, None]).clamp(0, len(columns) - 1)[:, None, :, None]
        layer.keys[rows] = layer.keys[rows].take_along_dim(source, dim=2)
        layer.values[rows] = layer.values[rows].take_along_dim(source, dim=2)
