"""User arguments such as scales and row lists, checked once, before any work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch


# A number, or one number for each row of the batch.
Scale = float | tuple[float, ...]


class Unset:
    """Marks an argument that was not given, where None has a meaning."""

    def __repr__(self) -> str:
        return "<what is active>"


UNSET = Unset()


def as_number(value: Any, name: str) -> float:
    """Convert a Python, numpy or torch number to a finite float.

    Args:
        value: the argument.
        name: its name in the error.

    Raises:
        TypeError: if it is not a number.
        ValueError: if it is not finite.
    """
    number = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(number, bool) or not isinstance(number, Real):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    try:
        number = float(number)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, got {value!r}.")
    return number


def as_scale(value: Any) -> Scale:
    """Normalise `steering_scale`: a number, or a tuple with one number a row.

    Raises:
        TypeError: if it is neither.
        ValueError: if it is empty, or a number is not finite.
    """
    given = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(given, Sequence) or isinstance(given, str):
        return as_number(given, "steering_scale")
    if not given:
        raise ValueError("steering_scale has no entries. Give a number, or one number for each row of the batch.")
    return tuple(as_number(number, f"steering_scale[{row}]") for row, number in enumerate(given))


def as_lengths(value: Any) -> torch.Tensor:
    """Normalise `prompt_lengths` to int64 `[rows]`.

    Raises:
        TypeError: if it is not a list, array or tensor of integers.
    """
    try:
        lengths = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"prompt_lengths must be integers, one for each row, got {value!r}.") from error
    whole = not (lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool)
    if not whole or lengths.ndim != 1:
        raise TypeError(
            f"prompt_lengths must be integers [rows], got {lengths.dtype} of shape {list(lengths.shape)}. Give one "
            "entry for each row, such as `attention_mask.sum(dim=1)` of the prompts."
        )
    return lengths.long()


def check_rows(name: str, given: int, rows: int) -> None:
    """Raise `ValueError` unless a list has one entry for each row of the batch."""
    if given != rows:
        raise ValueError(f"{name} was given for {given} rows, but the batch has {rows}. Give one entry for each row.")
