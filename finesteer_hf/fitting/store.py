"""An activation store: captured states in shards that survive a kill, read without copying, and serve every method.

A store is a folder with `manifest.json` and safetensors shards of consecutive rows. A shard is written to a temporary file
and renamed, then named in the manifest, which is replaced in the same way: whatever moment a process dies at, the store
holds whole shards only, and the next run continues with the first that is missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from finesteer_hf.errors import DatasetError
from finesteer_hf.sites import Site


MANIFEST = "manifest.json"
SHARD_ROWS = 1024
STORE_VERSION = 1

Read = Callable[[int, int], Mapping[tuple[Site, str], np.ndarray]]


class ActivationStore:
    """States of a fixed list of rows.

    Args:
        name: which rows (`preferences`, `general`); the file names begin with it.
        rows: their number.
        identity: what the states depend on: model, template, data. A folder made for another is refused.
        folder: where shards go; None keeps them in memory.
        shard_rows: rows of a shard.

    Raises:
        DatasetError: if the folder belongs to another model or other data.
    """

    def __init__(
        self, name: str, rows: int, identity: Mapping[str, Any], folder: Path | None, *, shard_rows: int = SHARD_ROWS
    ) -> None:
        self.name, self.rows, self.folder, self.shard_rows = name, rows, folder, shard_rows
        self.identity = dict(identity) | {"rows": rows, "shard_rows": shard_rows, "version": STORE_VERSION}
        self.memory: dict[int, dict[str, np.ndarray]] = {}
        self.files: dict[str, list[str]] = {}
        if folder is not None:
            self._open(folder)

    def _open(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise type(error)(f"Cannot make the store folder {folder}: {error.strerror}.") from error
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"The store folder {folder} is read-only; give another `store_dir`.")
        manifest = folder / f"{self.name}-{MANIFEST}"
        if not manifest.exists():
            return
        found = json.loads(manifest.read_text(encoding="utf-8"))
        if found["identity"] != self.identity:
            changed = sorted(
                key
                for key in {*found["identity"], *self.identity}
                if found["identity"].get(key) != self.identity.get(key)
            )
            raise DatasetError(
                f"The store {folder} was captured with another {', '.join(changed)}. Its states do not fit this run: give "
                "another `store_dir`, or delete that one."
            )
        self.files = {
            number: [f for f in names if (folder / f).is_file()] for number, names in found["shards"].items()
        }

    @property
    def starts(self) -> list[int]:
        """First row of each shard."""
        return list(range(0, self.rows, self.shard_rows))

    def missing(self, keys: Sequence[tuple[Site, str]]) -> list[int]:
        """First rows of the shards that lack one of the states."""
        return [start for start in self.starts if not {name_of(k) for k in keys} <= self._names(start)]

    def fill(self, keys: Sequence[tuple[Site, str]], read: Read) -> None:
        """Capture what is missing.

        Args:
            keys: `(site, what)` of the states that will be asked for.
            read: captures rows `[start, stop)`.
        """
        for start in self.missing(keys):
            stop = min(start + self.shard_rows, self.rows)
            have = self._names(start)
            states = {name_of(key): value for key, value in read(start, stop).items() if name_of(key) not in have}
            self._write(start, states)

    def get(self, site: Site, what: str) -> np.ndarray:
        """States of all rows, `[rows, width]` float32; a single shard is memory-mapped."""
        name = name_of((site, what))
        parts = [self._read(start, name) for start in self.starts]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _names(self, start: int) -> set[str]:
        if self.folder is None:
            return set(self.memory.get(start, ()))
        names: set[str] = set()
        for file in self.files.get(str(start), ()):
            with safe_open(self.folder / file, framework="np") as shard:
                names.update(shard.keys())
        return names

    def _read(self, start: int, name: str) -> np.ndarray:
        if self.folder is None:
            return self.memory[start][name]
        for file in self.files.get(str(start), ()):
            with safe_open(self.folder / file, framework="pt") as shard:
                if name in shard.keys():
                    tensor: torch.Tensor = shard.get_tensor(name)
                    return tensor.numpy()
        raise KeyError(f"The store has no {name!r} for the rows from {start} on; call `fill` first.")

    def _write(self, start: int, states: Mapping[str, np.ndarray]) -> None:
        if self.folder is None:
            self.memory.setdefault(start, {}).update(states)
            return
        digest = hashlib.sha256("\n".join(sorted(states)).encode()).hexdigest()[:8]
        file = f"{self.name}-{start:09d}-{digest}.safetensors"
        _replace(self.folder / file, lambda path: save_file(dict(states), path))
        self.files.setdefault(str(start), []).append(file)
        content = json.dumps({"identity": self.identity, "shards": self.files}, indent=1, sort_keys=True)
        _replace(
            self.folder / f"{self.name}-{MANIFEST}", lambda path: Path(path).write_text(content, encoding="utf-8")
        )


def name_of(key: tuple[Site, str]) -> str:
    """Name of a state in a shard."""
    return f"{key[0]}/{key[1]}"


def model_identity(model: Any) -> dict[str, Any]:
    """What tells one base model from another: its config, and a sample of its weights."""
    config = {k: v for k, v in model.config.to_dict().items() if not k.startswith("_") and k != "transformers_version"}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    parameters = list(model.named_parameters())
    for _, parameter in parameters[:: max(1, len(parameters) // 8)]:
        if parameter.device.type != "meta":
            sample = parameter.detach().flatten()[:64]
            if sample.is_floating_point():
                digest.update(sample.float().cpu().numpy().tobytes())
    return {"model": digest.hexdigest()}


def _replace(target: Path, write: Callable[[str], Any]) -> None:
    """Write a file whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".store-")
    os.close(handle)
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise OSError(f"Cannot write {target}: {error}. What was stored before is intact.") from error
    finally:
        Path(temporary).unlink(missing_ok=True)
