"""Find the steering adapters of this machine: in folders, and in the Hub's cache. Makes no request."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CacheNotFound, constants, scan_cache_dir

from finesteer_hf.adapters.config import CONFIG_NAME, WEIGHTS_NAME, read_config_file
from finesteer_hf.errors import AdapterFileError


# Folders that hold thousands of files and no adapters.
_SKIPPED = {"node_modules", "site-packages", "__pycache__"}
_COMMIT_SHOWN = 12


@dataclass(frozen=True)
class AdapterAtHand:
    """An adapter on this machine.

    Attributes:
        name: name for `steering=`: a folder, or `org/name@revision` in the Hub's cache.
        where: `folder` or `cache`.
        path: its folder.
        method: its `steering_type`; None if its config cannot be read.
        base_model: base model that it names.
        strength: its lambda.
        bytes: size of its config and tensors.
        problem: why it cannot be loaded, if its files say so.
    """

    name: str
    where: str
    path: str
    method: str | None
    base_model: str | None
    strength: float | None
    bytes: int
    problem: str | None = None


def adapters_in(folder: str | Path, *, depth: int = 4) -> list[AdapterAtHand]:
    """List the adapters in a folder and the folders in it.

    Args:
        folder: where to look.
        depth: how many folders deep.

    Raises:
        NotADirectoryError: if there is no such folder.
    """
    top = Path(folder)
    if not top.is_dir():
        raise NotADirectoryError(f"There is no folder {top}.")
    return [_described(str(path), "folder", path) for path in _adapter_folders(top, depth)]


def cached_adapters(cache_dir: str | Path | None = None) -> list[AdapterAtHand]:
    """List the adapters in the Hub's cache, each commit of a repo once, by its branch or tag if it has one.

    Args:
        cache_dir: the cache, if not the default one.
    """
    try:
        cache = scan_cache_dir(cache_dir or constants.HF_HUB_CACHE)
    except CacheNotFound:
        return []
    found = []
    for repo in sorted(cache.repos, key=lambda repo: repo.repo_id):
        if repo.repo_type != "model":
            continue
        for revision in sorted(repo.revisions, key=lambda revision: revision.commit_hash):
            refs = sorted(revision.refs, key=lambda ref: (ref != "main", ref)) or [
                revision.commit_hash[:_COMMIT_SHOWN]
            ]
            for path in _adapter_folders(revision.snapshot_path, depth=3):
                inner = path.relative_to(revision.snapshot_path).as_posix()
                name = repo.repo_id if inner == "." else f"{repo.repo_id}/{inner}"
                found.append(_described(name if refs[0] == "main" else f"{name}@{refs[0]}", "cache", path))
    return found


def _adapter_folders(top: Path, depth: int) -> Iterator[Path]:
    for place, folders, files in os.walk(top):
        if CONFIG_NAME in files:
            yield Path(place)
        here = len(Path(place).relative_to(top).parts)
        folders[:] = sorted(f for f in folders if here < depth and f not in _SKIPPED and not f.startswith("."))


def _described(name: str, where: str, path: Path) -> AdapterAtHand:
    config, problem = dict[str, Any](), None
    try:
        config = read_config_file(path / CONFIG_NAME)
    except (AdapterFileError, OSError) as error:
        problem = str(error)
    weights = path / WEIGHTS_NAME
    if problem is None and not weights.is_file():
        problem = f"{WEIGHTS_NAME} is not there" + ("; loading it downloads the file" if where == "cache" else "")
    method, base, strength = (config.get(key) for key in ("steering_type", "base_model_name_or_path", "strength"))
    return AdapterAtHand(
        name=name,
        where=where,
        path=str(path),
        method=method if isinstance(method, str) else None,
        base_model=base if isinstance(base, str) else None,
        strength=float(strength) if isinstance(strength, int | float) else None,
        bytes=sum(file.stat().st_size for file in (path / CONFIG_NAME, weights) if file.is_file()),
        problem=problem,
    )
