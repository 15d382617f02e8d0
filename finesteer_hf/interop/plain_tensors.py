"""Constant vectors as plain tensors: one safetensors file with a vector for each site, for any code that adds vectors.

A tensor is named as its site, `resid_post[12]` (the output of block 12, from 0), and is float32 with the strength in it.
The metadata says which tokens are steered.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from finesteer_hf.adapters.adapter import SteeringAdapter
from finesteer_hf.adapters.algebra import constant_vectors
from finesteer_hf.adapters.staging import replacing
from finesteer_hf.adapters.tensor_files import check_header
from finesteer_hf.errors import AdapterFileError, SiteError
from finesteer_hf.interop.vectors import ForeignVectors, as_layer, as_vector, check_sizes
from finesteer_hf.processors import Positions
from finesteer_hf.sites import Site


FORMAT = "finesteer_hf.vectors"
# Bytes of a number in the widest dtype and of its float32 copy.
ITEM_BYTES = 12


def save_tensors(adapter: SteeringAdapter, path: str | Path) -> Path:
    """Write what a constant adapter adds, strength included, as plain tensors.

    Args:
        adapter: an adapter whose update does not depend on the query.
        path: the file, ending in `.safetensors`.

    Returns:
        The path.

    Raises:
        ValueError: if the adapter is gated, depends on the query, maps the stream or acts on logits.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path.name} must end in .safetensors.")
    vectors = {str(site): vector.contiguous() for site, vector in constant_vectors(adapter).items()}
    metadata = {"format": FORMAT, "positions": adapter.config.positions}
    with replacing(path) as temporary:
        save_file(vectors, str(temporary), metadata=metadata)
    return path


def is_plain(path: Path) -> bool:
    """Whether a safetensors file says that it is one of these.

    Raises:
        AdapterFileError: if its header is damaged or too large.
    """
    check_header(path)
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            return bool((file.metadata() or {}).get("format") == FORMAT)
    except (SafetensorError, OSError):
        return False


def read_tensors(path: Path) -> ForeignVectors:
    """Read a file of vectors named as their sites.

    Raises:
        AdapterFileError: if the file is damaged, names something other than sites, or sites of several kinds.
    """
    check_header(path)
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            metadata: dict[str, Any] = file.metadata() or {}
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            check_sizes(shapes, ITEM_BYTES, path.name)
            tensors = {name: file.get_tensor(name) for name in shapes}
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"{path.name} is damaged or not a safetensors file: {error}") from error
    found = {}
    for name, tensor in tensors.items():
        what = f"{name[:60]!r} of {path.name}"
        try:
            site = Site.parse(name)
        except SiteError as error:
            raise AdapterFileError(f"{what} is not named as a site, such as resid_post[12].") from error
        found[Site(site.kind, as_layer(site.layer, what))] = as_vector(tensor, what)
    kinds = sorted({site.kind for site in found})
    if len(kinds) != 1:
        raise AdapterFileError(f"{path.name} has sites of the kinds {kinds}; an adapter of constant vectors has one.")
    positions = metadata.get("positions", "all")
    if positions not in get_args(Positions):
        raise AdapterFileError(f"{path.name} steers positions={str(positions)[:40]!r}; known: {get_args(Positions)}.")
    return ForeignVectors({site.layer: v for site, v in found.items()}, kinds[0], positions=positions)
