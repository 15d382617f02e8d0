"""`.svec` files: JSON of IBM's activation-steering (CAST) and of AISteer360.

Both hold `{"model_type": ..., "directions": {"<layer>": numbers}}`. For each layer CAST writes a list of numbers,
added to the block's input; AISteer360 writes a list of such lists (one for a constant vector), added to the block's
output.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from finesteer_hf.adapters.json_files import read_json_object
from finesteer_hf.errors import AdapterFileError
from finesteer_hf.interop.vectors import ForeignVectors, as_layer, as_vector


# 80 layers of width 8192, with every digit of a float64.
MOST_BYTES = 32 * 1024 * 1024


def read_svec(path: Path) -> ForeignVectors:
    """Read an `.svec` file.

    Raises:
        AdapterFileError: if it is damaged, not an `.svec` file, or has several directions for a layer.
    """
    data = read_json_object(path, MOST_BYTES)
    directions = data.get("directions")
    if not isinstance(directions, dict) or not directions:
        raise AdapterFileError(
            f"{path.name} has no `directions` by layer; it is not an .svec file of CAST or AISteer360."
        )
    nested = {isinstance(value, list) and bool(value) and isinstance(value[0], list) for value in directions.values()}
    if len(nested) != 1:
        raise AdapterFileError(f"{path.name} has one vector for some layers and several for others.")
    vectors = {}
    for key, value in directions.items():
        what = f"layer {key[:20]!r} of {path.name}"
        layer = as_layer(key, what)
        if layer in vectors:
            raise AdapterFileError(f"{path.name} names layer {layer} twice.")
        vectors[layer] = as_vector(_tensor(value, what), what)
    model_type = data.get("model_type")
    return ForeignVectors(
        vectors,
        "resid_post" if nested == {True} else "resid_pre",
        model_type=model_type if isinstance(model_type, str) and model_type else None,
    )


def _tensor(value: Any, what: str) -> torch.Tensor:
    try:
        return torch.tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError, RecursionError) as error:
        raise AdapterFileError(f"{what} is not a list of numbers: {error}") from error
