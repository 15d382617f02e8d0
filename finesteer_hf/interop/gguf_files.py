"""Control vectors as GGUF: repeng's and llama.cpp's format.

A tensor `direction.<l>` is added to the output of block l at all tokens (llama.cpp: after the block's feed-forward
residual; repeng: to the block's return value). llama.cpp has no vector for block 0 and refuses a file that names one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from finesteer_hf.adapters.adapter import SteeringAdapter
from finesteer_hf.adapters.algebra import constant_vectors
from finesteer_hf.adapters.staging import replacing
from finesteer_hf.errors import AdapterFileError
from finesteer_hf.interop.vectors import MOST_LAYERS, ForeignVectors, as_layer, as_vector, check_sizes
from finesteer_hf.sites import INNER_KINDS


ARCHITECTURE = "controlvector"
PREFIX = "direction."
# A control vector has a few metadata entries; a model with its vocabulary has hundreds of thousands.
MOST_ENTRIES = 10_000


def read_gguf(path: Path) -> ForeignVectors:
    """Read a control vector.

    Raises:
        AdapterFileError: if the file is damaged or not a control vector.
        ImportError: without the `gguf` package.
    """
    try:
        reader = _bounded_reader(path)
        fields, tensors = reader.fields, reader.tensors
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, RecursionError) as error:
        raise AdapterFileError(f"{path.name} is damaged or not a control vector: {error}") from error
    architecture = _text(fields.get("general.architecture"))
    if architecture != ARCHITECTURE:
        raise AdapterFileError(f"{path.name} is a GGUF of {architecture!r}, not {ARCHITECTURE}.")
    shapes = {f"{number}: {tensor.name}": tuple(int(n) for n in tensor.shape) for number, tensor in enumerate(tensors)}
    check_sizes(shapes, 8, path.name)
    if sum(int(tensor.n_bytes) for tensor in tensors) > path.stat().st_size:
        raise AdapterFileError(f"{path.name} is damaged: its tensors overlap.")
    vectors = {}
    for tensor in tensors:
        what = f"{tensor.name!r} of {path.name}"
        if not tensor.name.startswith(PREFIX):
            raise AdapterFileError(f"{what} is not a control vector's tensor; those are named {PREFIX}<layer>.")
        if tensor.tensor_type.name not in ("F32", "F16", "F64"):
            raise AdapterFileError(f"{what} is stored as {tensor.tensor_type.name}; F32, F16 and F64 are read.")
        layer = as_layer(tensor.name.removeprefix(PREFIX), what)
        vectors[layer] = as_vector(torch.from_numpy(np.array(tensor.data)), what)
    return ForeignVectors(vectors, "resid_post", model_type=_text(fields.get(f"{ARCHITECTURE}.model_hint")) or None)


def save_gguf(adapter: SteeringAdapter, path: str | Path) -> Path:
    """Write a constant adapter as a control vector for llama.cpp and repeng, strength included.

    Args:
        adapter: an adapter whose update does not depend on the query, at `resid_post` or `resid_pre` sites.
        path: the file, ending in `.gguf`.

    Returns:
        The path.

    Raises:
        ValueError: if a control vector cannot express the adapter: it is gated or depends on the query, steers only
            some tokens, or steers inside attention or the output of block 0.
        ImportError: without the `gguf` package.
    """
    path = Path(path)
    if path.suffix != ".gguf":
        raise ValueError(f"{path.name} must end in .gguf: llama.cpp and repeng require it.")
    vectors = constant_vectors(adapter)
    if adapter.config.positions != "all":
        raise ValueError(
            f"This adapter steers positions={adapter.config.positions!r}; a control vector is added at all tokens."
        )
    directions: dict[int, np.ndarray] = {}
    for site, vector in vectors.items():
        # The input of a block is the output of the one before it.
        layer = site.layer if site.kind == "resid_post" else site.layer - 1
        if site.kind in INNER_KINDS or layer < 1:
            raise ValueError(
                f"A control vector cannot steer {site}: llama.cpp adds vectors to the outputs of blocks from 1 on."
            )
        directions[layer] = directions.get(layer, np.float32(0)) + vector.numpy()
    gguf = _gguf()
    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(temporary, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", adapter.config.base_model_type or "")
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(directions))
        for layer, direction in sorted(directions.items()):
            writer.add_tensor(f"{PREFIX}{layer}", np.ascontiguousarray(direction, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError("Control vectors are GGUF files: pip install 'finesteer-hf[gguf]'.") from error
    return gguf


def _bounded_reader(path: Path) -> Any:
    """gguf's reader with bounds checks: the original trusts declared lengths and loops forever past the file's end."""

    class BoundedReader(_gguf().GGUFReader):  # type: ignore[misc]
        entries = 0

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            end = int(offset) + int(np.dtype(dtype).itemsize) * int(count)
            if end > len(self.data):
                raise ValueError(f"it declares {end} bytes but has {len(self.data)}")
            return super()._get(offset, dtype, count, override_order)

        def _build_tensor_info(self, offs: int, count: int) -> Any:
            if count > MOST_LAYERS:
                raise ValueError(f"it declares {count} tensors")
            return super()._build_tensor_info(offs, count)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            self.entries += 1
            if self.entries > MOST_ENTRIES:
                raise ValueError(f"it has more than {MOST_ENTRIES} metadata entries")
            return super()._get_field_parts(orig_offs, raw_type)

    return BoundedReader(path)


def _text(field: Any) -> str:
    return bytes(field.parts[-1]).decode("utf-8", "replace") if field is not None and field.parts else ""
