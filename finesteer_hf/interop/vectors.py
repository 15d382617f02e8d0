"""What is read from another library's file."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from finesteer_hf.errors import AdapterFileError
from finesteer_hf.sites import SiteKind


# Wider than any model's residual stream.
WIDEST = 1 << 20
MOST_LAYERS = 10_000
# A hundred layers of the widest models take tens of megabytes.
MOST_BYTES = 256 * 1024 * 1024


def check_sizes(shapes: Mapping[str, tuple[int, ...]], item_bytes: int, what: str) -> None:
    """Check declared shapes before anything of those sizes is read or allocated.

    Args:
        shapes: shapes of the tensors by name.
        item_bytes: most bytes of a number.
        what: the file, for the message.

    Raises:
        AdapterFileError: for an empty tensor, one that is not a steering vector, or too many bytes in total.
    """
    for name, shape in shapes.items():
        if not shape or min(shape) < 1 or math.prod(shape) > WIDEST:
            raise AdapterFileError(
                f"{name[:60]!r} of {what} has shape {tuple(shape)}, which is not a steering vector."
            )
    total = sum(math.prod(shape) for shape in shapes.values()) * item_bytes
    if len(shapes) > MOST_LAYERS or total > MOST_BYTES:
        raise AdapterFileError(
            f"{what} declares {len(shapes)} tensors of {total} bytes; at most {MOST_BYTES} are read."
        )


@dataclass(frozen=True)
class ForeignVectors:
    """Vectors of a file.

    Attributes:
        vectors: `[width]` for each decoder block, unscaled.
        site: site of the block that they are added to.
        strength: the file's factor.
        model_type: `config.model_type` named in the file, if any.
        positions: steered tokens, if the file says which.
    """

    vectors: dict[int, torch.Tensor]
    site: SiteKind
    strength: float = 1.0
    model_type: str | None = None
    positions: str | None = None


def as_vector(value: Any, what: str) -> torch.Tensor:
    """A value as a float32 vector; leading axes of length 1 are dropped.

    Raises:
        AdapterFileError: if it is not a single vector of finite numbers.
    """
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.ndim == 0:
        raise AdapterFileError(f"{what} is not a vector of floating-point numbers but {reprlib.repr(value)}.")
    shape = tuple(value.shape)
    if any(axis != 1 for axis in shape[:-1]) or not 0 < shape[-1] <= WIDEST:
        raise AdapterFileError(
            f"{what} has shape {shape}: several directions (for tokens, heads or planes) are not a constant vector."
        )
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
        raise AdapterFileError(f"{what} is stored as {value.layout} on {value.device}; plain dense tensors are read.")
    vector = value.detach().reshape(-1).to(torch.float32).clone()
    if not torch.isfinite(vector).all():
        raise AdapterFileError(f"{what} holds NaN, infinity, or numbers too large for float32.")
    return vector


def as_layer(text: str | int, what: str) -> int:
    """A block's number, from 0.

    Raises:
        AdapterFileError: if it is not a block's number.
    """
    digits = str(text)
    if not digits.isascii() or not digits.isdecimal() or len(digits) > 6 or int(digits) >= MOST_LAYERS:
        raise AdapterFileError(f"{what} names layer {digits[:40]!r}; blocks are numbered from 0.")
    return int(digits)
