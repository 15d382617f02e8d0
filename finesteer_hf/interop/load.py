"""Read another library's vectors, in any known format."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finesteer_hf.adapters.adapter import SteeringAdapter
from finesteer_hf.adapters.algebra import constant_adapter
from finesteer_hf.errors import AdapterFileError
from finesteer_hf.interop.gguf_files import read_gguf
from finesteer_hf.interop.json_vectors import read_svec
from finesteer_hf.interop.plain_tensors import is_plain, read_tensors
from finesteer_hf.interop.steering_lite import read_steering_lite
from finesteer_hf.interop.torch_vectors import read_steer_file
from finesteer_hf.interop.vectors import MOST_BYTES, ForeignVectors
from finesteer_hf.sites import Site, SiteKind


_READERS: dict[str, Callable[[Path], ForeignVectors]] = {
    "gguf": read_gguf,
    "svec": read_svec,
    "lm_eval": read_steer_file,
    "steering_lite": read_steering_lite,
    "tensors": read_tensors,
}
_SUFFIXES = {
    ".gguf": "gguf",
    ".svec": "svec",
    ".pt": "lm_eval",
    ".pth": "lm_eval",
    ".safetensors": "steering_lite",
}
FORMATS = tuple(_READERS)


def load_vectors(
    path: str | Path,
    format: str | None = None,
    *,
    site: SiteKind | None = None,
    strength: float | None = None,
    **settings: Any,
) -> SteeringAdapter:
    """Read the steering vectors of another library into a CONSTANT adapter.

    Nothing is unpickled. A file is refused if a constant vector cannot express what it does.

    Args:
        path: the file.
        format: `gguf` (repeng, llama.cpp), `svec` (CAST, AISteer360), `lm_eval` (its `steered` model's `.pt`),
            `steering_lite`, or `tensors` (safetensors with vectors named as their sites); by default from the file's
            extension and metadata.
        site: site kind to steer, if not the format's own: GGUF, AISteer360, lm-eval and steering-lite add to the
            output (`resid_post`), CAST to the input (`resid_pre`).
        strength: lambda, if not the file's own (1 if it has none).
        **settings: more fields of `ConstantConfig`, such as `base_model_name_or_path` or `positions`.

    Returns:
        The adapter, with a vector for each block that the file names.

    Raises:
        FileNotFoundError: if there is no such file.
        AdapterFileError: if the file is damaged, or a constant vector cannot express it.
        ValueError: for an unknown format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    if path.stat().st_size > MOST_BYTES:
        raise AdapterFileError(f"{path.name} has {path.stat().st_size} bytes; at most {MOST_BYTES} are read.")
    name = format or _SUFFIXES.get(path.suffix.lower())
    if format is None and name == "steering_lite" and is_plain(path):
        name = "tensors"
    if name not in _READERS:
        known = f"Give format= one of {list(FORMATS)}; known extensions: {sorted(_SUFFIXES)}."
        raise ValueError(
            f"Unknown format {format!r}. {known}" if format else f"{path.name} has no known extension. {known}"
        )
    found = _READERS[name](path)
    if not found.vectors:
        raise AdapterFileError(f"{path.name} holds no vectors.")
    if site is not None:
        found = dataclasses.replace(found, site=site)
    vectors = {Site(found.site, layer): vector for layer, vector in found.vectors.items()}
    settings.setdefault("base_model_type", found.model_type)
    if found.positions is not None:
        settings.setdefault("positions", found.positions)
    settings.setdefault("fit", {"imported": {"format": name, "file": path.name}})
    try:
        return constant_adapter(vectors, strength=found.strength if strength is None else strength, **settings)
    except ValueError as error:
        raise AdapterFileError(f"{path.name} cannot be read as an adapter: {error}") from error
