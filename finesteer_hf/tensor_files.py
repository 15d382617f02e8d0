"""Tensors in safetensors files: written at once or not at all, and checked before any is read into memory."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from finesteer_hf.errors import AdapterFileError
from finesteer_hf.json_files import unique_keys


Shape = tuple[int | None, ...]

# The header names each tensor once: 100 bytes or so for each. Adapters have tens of them.
MAX_HEADER_BYTES = 4 * 1024 * 1024
DTYPES = {"F32": torch.float32, "I64": torch.int64}


def read_tensors(
    path: str | Path, shapes: Mapping[str, Shape], *, strict: bool = True, sha256: str | None = None
) -> dict[str, torch.Tensor]:
    """Read a safetensors file whose names, dtypes and shapes were checked in its header before any tensor is loaded.

    Args:
        path: the file.
        shapes: name and shape of each tensor that is called for; None for an axis of any size.
        strict: whether other tensors are an error.
        sha256: hash that the file must have, if it is known.

    Returns:
        float32 and int64 tensors by name.

    Raises:
        AdapterFileError: if the file is truncated, malformed or another one than its hash says, or a tensor is missing,
            not called for, of another shape or dtype, or holds NaN or infinity.
    """
    path = Path(path)
    check_header(path)
    if sha256 is not None and sha256_of(path) != sha256:
        raise AdapterFileError(
            f"{path.name} is not the file that its config was saved with (its SHA-256 is another): it is damaged, or one "
            "of the two was replaced. Download or save the adapter again."
        )
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            found = {
                name: (file.get_slice(name).get_dtype(), tuple(file.get_slice(name).get_shape()))
                for name in file.keys()
            }
            check_layout(path.name, found, shapes, strict)
            tensors = {name: file.get_tensor(name) for name in found}
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"{path.name} is damaged or no safetensors file: {error}") from error
    check_finite(tensors)
    return tensors


def check_layout(
    what: str, found: Mapping[str, tuple[str, tuple[int, ...]]], shapes: Mapping[str, Shape], strict: bool
) -> None:
    """Compare names, dtypes and shapes with what is called for; raises `AdapterFileError`."""
    missing, unexpected = sorted(set(shapes) - set(found)), sorted(set(found) - set(shapes))
    if missing or (unexpected and strict):
        raise AdapterFileError(
            f"{what} does not match its config: missing {missing[:20]}, unexpected {unexpected[:20]}. Called for: "
            f"{sorted(shapes)[:50]}."
        )
    for name, (dtype, _) in found.items():
        if dtype not in DTYPES:
            raise AdapterFileError(f"Tensor {name!r} has dtype {dtype}; adapters hold {' or '.join(DTYPES)}.")
    for name, want in shapes.items():
        shape = found[name][1]
        if len(shape) != len(want) or any(w is not None and w != s for w, s in zip(want, shape, strict=True)):
            raise AdapterFileError(f"Tensor {name!r} has shape {shape}, the config calls for {want} (None is free).")


def check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise `AdapterFileError` if a tensor holds NaN or infinity."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterFileError(f"Tensor {name!r} holds NaN or infinity; the file is damaged.")


def check_header(path: Path) -> None:
    """Refuse a safetensors header that would take much memory, or declares a tensor twice (the last would win).

    Raises:
        AdapterFileError: for such a header, or none.
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
    with replacing(path) as temporary:
        # One entry of metadata: of several, the order in the file is another each time, and so would be its hash.
        save_file(contiguous, temporary, metadata={"format": "pt"})
        return sha256_of(temporary)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write to a temporary file beside a path and move it there at the end, so that a full disk leaves no half file."""
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".steering-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
