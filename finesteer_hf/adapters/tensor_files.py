"""Tensors in safetensors files, checked before any is read into memory."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from finesteer_hf.adapters.json_files import unique_keys
from finesteer_hf.errors import AdapterFileError
from finesteer_hf.sites import Site


@dataclass(frozen=True)
class Free:
    """An axis whose size is not in the config; axes of the same name have the same size.

    Attributes:
        name: name of the axis.
        most: its largest size.
    """

    name: str
    most: int = 1 << 20

    def __repr__(self) -> str:
        return f"{self.name} (1 to {self.most})"


#: Size of the outputs of one attention head; the model's own at the steered block.
HEAD_SIZE = Free("head_size", 1 << 14)
#: Neurons of a block's feed-forward; the model's own at the steered block.
NEURONS = Free("neurons", 1 << 18)

Axis = int | Free | None
Shape = tuple[Axis, ...]


class Indices(tuple[Axis, ...]):
    """The shape of a tensor of int64 indices; a plain tuple is one of float32."""


def dtype_of(shape: Shape) -> str:
    """The dtype of a shape, in safetensors' spelling."""
    return "I64" if isinstance(shape, Indices) else "F32"


def most_bytes(shapes: Mapping[str, Shape]) -> int:
    """Size of the largest file that holds tensors of these shapes."""
    total = MAX_HEADER_BYTES
    for shape in shapes.values():
        free = Free("any")
        sizes = [axis if isinstance(axis, int) else (axis or free).most for axis in shape]
        total += math.prod(sizes) * (8 if isinstance(shape, Indices) else 4)
    return total


# The header takes about 100 bytes a tensor. Adapters have tens of tensors.
MAX_HEADER_BYTES = 4 * 1024 * 1024
SHA256 = re.compile(r"[0-9a-f]{64}")
_ALL_NEEDED = " strict=False ignores undeclared tensors; the method cannot steer without a declared one."
DTYPES = {"F32": torch.float32, "I64": torch.int64}


def read_tensors(
    path: str | Path, shapes: Mapping[str, Shape], *, strict: bool = True, sha256: str | None = None
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Read a safetensors file; names, dtypes and shapes are checked in its header before any tensor is loaded.

    Args:
        path: the file.
        shapes: name and shape of each declared tensor.
        strict: whether other tensors are an error; if not, they are not read.
        sha256: hash that the file must have, if known.

    Returns:
        float32 and int64 tensors by name, and the sorted names of the file's other tensors.

    Raises:
        AdapterFileError: if the file is truncated, malformed or does not match its hash, or a tensor is missing,
            undeclared, of another shape or dtype, or holds NaN or infinity.
    """
    path = Path(path)
    check_header(path)
    if sha256 is not None and sha256_of(path) != sha256:
        raise AdapterFileError(
            f"{path.name} is not the file that its config was saved with (its SHA-256 differs): it is damaged, or one "
            "of the two was replaced. Download or save the adapter again."
        )
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            found = {
                name: (file.get_slice(name).get_dtype(), tuple(file.get_slice(name).get_shape()))
                for name in file.keys()
            }
            unexpected = check_layout(path.name, found, shapes, strict)
            tensors = {name: file.get_tensor(name) for name in shapes}
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"{path.name} is damaged or no safetensors file: {error}") from error
    check_finite(tensors)
    return tensors, unexpected


def check_layout(
    what: str, found: Mapping[str, tuple[str, tuple[int, ...]]], shapes: Mapping[str, Shape], strict: bool
) -> tuple[str, ...]:
    """Compare names, dtypes and shapes with the declared ones.

    Args:
        what: the file or adapter, for the message.
        found: dtype, as safetensors names it, and shape of each tensor.
        shapes: name and shape of each declared tensor.
        strict: whether other tensors are an error.

    Returns:
        Sorted names of the other tensors.

    Raises:
        AdapterFileError: for a missing tensor, a wrong shape or dtype and, if strict, for other tensors.
    """
    missing, unexpected = sorted(set(shapes) - set(found)), sorted(set(found) - set(shapes))
    if missing or (unexpected and strict):
        raise AdapterFileError(
            f"{what} does not match its config: missing {missing[:20]}, unexpected {unexpected[:20]}. Declared: "
            f"{sorted(shapes)[:50]}." + ("" if strict or not missing else _ALL_NEEDED)
        )
    for name, want in shapes.items():
        if found[name][0] != dtype_of(want):
            raise AdapterFileError(
                f"Tensor {name!r} has dtype {found[name][0]}; the config declares {dtype_of(want)}."
            )
    sizes: dict[str, int] = {}
    for name, want in shapes.items():
        shape = found[name][1]
        fits = len(shape) == len(want) and all(_fits(w, s, sizes) for w, s in zip(want, shape, strict=True))
        if not fits:
            raise AdapterFileError(
                f"Tensor {name!r} has shape {shape}, the config declares {want}"
                + (f", where others of the adapter have {sizes}." if sizes else ".")
            )
    return tuple(unexpected)


def _fits(want: Axis, size: int, sizes: dict[str, int]) -> bool:
    """Whether an axis has its declared size; a free axis takes the first size seen."""
    if isinstance(want, int):
        return size == want
    if want is None:
        return 1 <= size <= Free("any").most
    return 1 <= size <= want.most and sizes.setdefault(want.name, size) == size


def check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise `AdapterFileError` if a tensor holds NaN or infinity."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterFileError(f"Tensor {name!r} holds NaN or infinity; the file is damaged.")


def check_header(path: Path) -> None:
    """Refuse a safetensors header that takes too much memory or declares a tensor twice (the last would win).

    Raises:
        AdapterFileError: for such a header, or if there is none.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise AdapterFileError(
                f"{path.name} is damaged or no safetensors file: {size} bytes cannot begin with a header of {length} "
                f"(at most {MAX_HEADER_BYTES} are read)."
            )
        header = file.read(length)
    try:
        json.loads(header, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path.name} is damaged or no safetensors file: {error}") from error


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor]) -> str:
    """Write a safetensors file; returns its SHA-256, which is the same for the same tensors."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # One metadata entry: with several, their order in the file, and so its hash, varies from save to save.
    save_file(contiguous, path, metadata={"format": "pt"})
    return sha256_of(Path(path))


def hashed_name(sha256: str) -> str:
    """Temporary name of `steering_model.safetensors` while a save is in progress."""
    return f"steering_model-{sha256}.safetensors"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def vector_name(site: Site) -> str:
    """Name of a constant vector in an adapter's file."""
    return f"vectors.{site.layer}"
