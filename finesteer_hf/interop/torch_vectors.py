"""Steer files of lm-eval's `steered` model: a `.pt` with vectors by module name, read without an unpickler."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch

from finesteer_hf.errors import AdapterFileError
from finesteer_hf.interop.saved_tensors import read_saved_tensors
from finesteer_hf.interop.vectors import ForeignVectors, as_layer, as_vector


# A decoder block by its module name, with or without its parents' names.
_BLOCK = re.compile(r"(?:[a-z_]+\.)*(?:layers|h|blocks|layer)\.(\d+)", re.ASCII)


def read_steer_file(path: Path) -> ForeignVectors:
    """Read a steer file of lm-eval whose entries add vectors to the outputs of blocks.

    Raises:
        AdapterFileError: if it is damaged, holds objects, or an entry clamps or does not steer a block.
    """
    entries = _entries(read_saved_tensors(path), path)
    vectors: dict[int, torch.Tensor] = {}
    for hookpoint, entry in entries:
        what = f"{str(hookpoint)[:80]!r} of {path.name}"
        if not isinstance(entry, dict):
            raise AdapterFileError(f"{what} is not an entry of a steer file.")
        if entry.get("action") != "add":
            raise AdapterFileError(
                f"{what} has the action {str(entry.get('action'))[:40]!r}: what it adds depends on the state, "
                "which a constant vector cannot express."
            )
        block = _BLOCK.fullmatch(hookpoint) if isinstance(hookpoint, str) else None
        if block is None:
            raise AdapterFileError(f"{what} steers a module inside a block; only blocks (layers.<n>) can be read.")
        layer = as_layer(block.group(1), what)
        if layer in vectors:
            raise AdapterFileError(f"{path.name} names layer {layer} twice.")
        factor = entry.get("steering_coefficient", 1.0)
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not math.isfinite(factor):
            raise AdapterFileError(f"{what} has a steering_coefficient that is not a number.")
        vectors[layer] = as_vector(as_vector(entry.get("steering_vector"), what) * factor, what)
    return ForeignVectors(vectors, "resid_post")


def _entries(data: Any, path: Path) -> list[tuple[Any, Any]]:
    """lm-eval reads a dictionary by hookpoint; its documentation shows a list of entries with hookpoints."""
    if isinstance(data, dict) and data:
        return list(data.items())
    if isinstance(data, list) and data and all(isinstance(entry, dict) for entry in data):
        return [(entry.get("hookpoint"), entry) for entry in data]
    raise AdapterFileError(f"{path.name} is not a steer file of lm-eval: it holds a {type(data).__name__}.")
