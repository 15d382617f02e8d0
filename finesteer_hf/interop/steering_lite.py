"""Vectors of steering-lite: safetensors named `layer<l>.<name>`, with the method's config as JSON in the metadata."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from finesteer_hf.adapters.json_files import unique_keys
from finesteer_hf.adapters.tensor_files import check_header
from finesteer_hf.errors import AdapterFileError
from finesteer_hf.interop.vectors import ForeignVectors, as_layer, as_vector, check_sizes


# Its methods that add `coeff * v` to a block's output in every state; v may be stored in groups of `[k, width]`.
# Bytes of a number in the widest dtype and of its float32 copy.
ITEM_BYTES = 12
CONSTANT_METHODS = ("mean_diff", "pca", "random", "suppressed_mean_diff")
_NAME = re.compile(r"layer(\d+)\.(?:(?:shared|stacked)\.)?([vV])", re.ASCII)


def read_steering_lite(path: Path) -> ForeignVectors:
    """Read a vector of steering-lite whose method adds a constant.

    Raises:
        AdapterFileError: if the file is damaged, from another library, or its method depends on the state.
    """
    check_header(path)
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            config = _config(file.metadata() or {}, path)
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            check_sizes(shapes, ITEM_BYTES, path.name)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"{path.name} is damaged or not a safetensors file: {error}") from error
    method, coefficient = config.get("method"), config.get("coeff", 1.0)
    if method not in CONSTANT_METHODS:
        raise AdapterFileError(
            f"{path.name} holds steering-lite's method {str(method)[:40]!r}, which depends on the state; of its methods "
            f"only {list(CONSTANT_METHODS)} add a constant vector."
        )
    if config.get("target", "residual") != "residual" or config.get("target_submodule") is not None:
        raise AdapterFileError(f"{path.name} steers a module inside the blocks; only their outputs can be read.")
    if isinstance(coefficient, bool) or not isinstance(coefficient, (int, float)) or not math.isfinite(coefficient):
        raise AdapterFileError(f"{path.name} has a coeff that is not a number.")
    vectors: dict[int, torch.Tensor] = {}
    for name, tensor in tensors.items():
        what = f"{name[:60]!r} of {path.name}"
        match = _NAME.fullmatch(name)
        if match is None:
            raise AdapterFileError(f"{what} is not part of a constant vector of steering-lite (layer<l>.v).")
        layer = as_layer(match.group(1), what)
        if layer in vectors:
            raise AdapterFileError(f"{path.name} names layer {layer} twice.")
        # All directions of a group are added.
        vectors[layer] = as_vector(tensor.float().sum(0) if tensor.ndim == 2 else tensor, what)
    return ForeignVectors(vectors, "resid_post", strength=float(coefficient))


def _config(metadata: dict[str, str], path: Path) -> dict[str, Any]:
    try:
        config = json.loads(metadata.get("cfg", ""), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(
            f"{path.name} has no steering-lite config in its metadata. A steering adapter of this library is a folder: "
            "SteeringAdapter.from_pretrained(folder)."
        ) from error
    if not isinstance(config, dict):
        raise AdapterFileError(f"{path.name} has a steering-lite config that is not a JSON object.")
    return config
