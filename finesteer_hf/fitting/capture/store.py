"""An activation store: states by passage, in shards that survive a kill and are shared by all methods.

The key of a state is the passage's token ids, the site and the pool. So added rows, a changed chat template or another
method's sites need no new store: existing states are reused, missing ones are captured. States of another model go to
their own folder.

A shard is a safetensors file that is written under a temporary name, renamed, and then listed in the manifest, which
is replaced in the same way. So whenever a process dies, the store has only complete shards. Each of several processes
has its own manifest, until the main one merges them.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from finesteer_hf.fitting.capture.processes import ALONE, Processes
from finesteer_hf.fitting.capture.reader import CapturedBatch, Key
from finesteer_hf.fitting.capture.store_files import Shard, digests_of, name_of, passage_digest, write_whole
from finesteer_hf.fitting.data.encoding import Passage
from finesteer_hf.method_api import PROMPT_POOLS


MANIFEST = "manifest.json"
STORE_VERSION = 1
SHARD_BYTES = 64 * 1024 * 1024
# A killed process loses at most what it captured in this time.
SHARD_SECONDS = 20.0


class ActivationStore:
    """States of passages of one model.

    Args:
        folder: parent of the model's folder of shards; None keeps them in memory.
        identity: identity of the model; see `model_identity`.
        resume: whether to use existing states; if not, they are removed.
        shard_bytes: bytes to collect before a shard is written.
        processes: this process among several; all must see the folder.

    Raises:
        OSError: if the folder cannot be created or written, or another process writes to it.

    Example:
        >>> with ActivationStore(folder, model_identity(model)) as store:
        ...     for batch in reader.read(jobs_missing):
        ...         store.add(batch)
        ...     states = store.get(Site("resid_post", 12), "query", prompts)
    """

    def __init__(
        self,
        folder: Path | None,
        identity: Mapping[str, Any],
        *,
        resume: bool = True,
        shard_bytes: int = SHARD_BYTES,
        processes: Processes = ALONE,
    ) -> None:
        self.identity = dict(identity)
        self.processes = processes
        self.shard_bytes = shard_bytes
        self._shards: list[Shard] = []
        self._where: dict[bytes, list[tuple[int, int]]] = {}
        self._waiting: list[CapturedBatch] = []
        self._waiting_since = time.monotonic()
        self._entries: list[dict[str, Any]] = []
        self._known: set[str] = set()
        self._lock: FileLock | None = None
        self.folder = None if folder is None else Path(folder) / str(identity["fingerprint"])[:16]
        if self.folder is not None:
            with processes.main_first():
                self._open(self.folder, resume)

    def __enter__(self) -> ActivationStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        # Keeps what was captured before an interrupt; after a failed write, another write would hide the first error.
        if kind is None or not issubclass(kind, OSError):
            self.flush()
        self.close()

    # -- states -------------------------------------------------------------------------------------------------------

    def lacks(self, passage: Passage, keys: Iterable[Key]) -> set[Key]:
        """The states of a passage that are missing."""
        found = self._where.get(passage_digest(passage), ())
        names = {name for shard, _ in found for name in self._shards[shard].names}
        return {key for key in keys if name_of(key) not in names}

    def add(self, batch: CapturedBatch) -> None:
        """Add a batch; with a folder, a shard is written when enough is collected.

        Raises:
            OSError: if the disk is full or the folder not writable; what was written before stays valid.
        """
        if self.folder is None and self.processes.count == 1:
            self._append(batch, {name_of(key): values for key, values in batch.states.items()}, None)
            return
        if not self._waiting:
            self._waiting_since = time.monotonic()
        self._waiting.append(batch)
        if self.folder is None:
            return
        size = sum(values.nbytes for waiting in self._waiting for values in waiting.states.values())
        if size >= self.shard_bytes or time.monotonic() - self._waiting_since > SHARD_SECONDS:
            self.flush()

    def join(self) -> None:
        """Wait for the other processes and share what each has added; all must call it.

        Raises:
            OSError: as for `add`.
        """
        if self.processes.count == 1:
            return
        if self.folder is None:
            gathered, self._waiting = self.processes.gather(self._waiting), []
            for batch in gathered:
                self._append(batch, {name_of(key): values for key, values in batch.states.items()}, None)
            return
        self.flush()
        self.processes.wait()
        self._read_manifests(self.folder)
        self.processes.wait()
        if self.processes.is_main:
            self._take_together(self.folder)
        self.processes.wait()

    def get(self, key: Key, passages: Sequence[Passage]) -> np.ndarray:
        """States of passages, `[passages, width]` float32; reads only these rows.

        Raises:
            KeyError: if one is missing.
        """
        self.flush()
        name = name_of(key)
        rows_of: dict[int, tuple[list[int], list[int]]] = {}
        for row, passage in enumerate(passages):
            found = self._where.get(passage_digest(passage), ())
            place = next(((s, r) for s, r in found if name in self._shards[s].names), None)
            if place is None:
                raise KeyError(f"The store has no {name} of a passage of {len(passage.ids)} tokens; capture it first.")
            targets, sources = rows_of.setdefault(place[0], ([], []))
            targets.append(row)
            sources.append(place[1])
        result: np.ndarray | None = None
        for shard, (targets, sources) in rows_of.items():
            with self._array(self._shards[shard], name) as array:
                if result is None:
                    result = np.empty((len(passages), array.shape[1]), dtype=np.float32)
                result[targets] = array[sources]
        if result is None:
            raise KeyError(f"No passage was given, so the width of {name} is unknown.")
        return result

    @contextlib.contextmanager
    def _array(self, shard: Shard, name: str) -> Any:
        if shard.arrays is not None:
            yield shard.arrays[name]
            return
        assert self.folder is not None and shard.file is not None
        # torch maps the file; numpy's reader would copy the whole tensor.
        with safe_open(self.folder / shard.file, framework="pt") as file:
            yield file.get_tensor(name).numpy()

    # -- files --------------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Write the collected states as a shard.

        Raises:
            OSError: as for `add`.
        """
        if self.folder is None or not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        for keys in dict.fromkeys(frozenset(batch.states) for batch in waiting):
            alike = [batch for batch in waiting if frozenset(batch.states) == keys]
            merged = CapturedBatch(
                tuple(p for batch in alike for p in batch.prompts),
                tuple(a for batch in alike for a in batch.answers),
                {key: np.concatenate([batch.states[key] for batch in alike]) for key in keys},
            )
            self._write(self.folder, merged)

    def _write(self, folder: Path, batch: CapturedBatch) -> None:
        arrays = {name_of(key): np.ascontiguousarray(values) for key, values in batch.states.items()}
        digests = {"prompts": digests_of(batch.prompts), "answers": digests_of(batch.answers)}
        file = f"shard-{self.processes.index}-{len(self._entries):06d}-{secrets.token_hex(4)}.safetensors"
        content = save({**arrays, **digests})
        write_whole(folder / file, content)
        entry = {
            "file": file,
            "bytes": len(content),
            "prompts": len(batch.prompts),
            "answers": len(batch.answers),
            "states": sorted(arrays),
        }
        self._write_manifest(folder, [*self._entries, entry])
        self._entries.append(entry)
        self._known.add(file)
        self._append(batch, arrays, file)

    def _write_manifest(self, folder: Path, entries: list[dict[str, Any]]) -> None:
        content = {"version": STORE_VERSION, **self.identity, "dtype": "float32", "shards": entries}
        name = MANIFEST if self.processes.is_main else f"manifest-{self.processes.index}.json"
        write_whole(folder / name, json.dumps(content, indent=1).encode())

    def _take_together(self, folder: Path) -> None:
        """List every known shard in the main manifest, then remove the other manifests."""
        self._write_manifest(folder, self._entries)
        for manifest in folder.glob("manifest-*.json"):
            manifest.unlink()

    def _append(self, batch: CapturedBatch, arrays: Mapping[str, np.ndarray], file: str | None) -> None:
        self._index(
            digests_of(batch.prompts), digests_of(batch.answers), frozenset(arrays), None if file else arrays, file
        )

    def _index(
        self,
        prompts: np.ndarray,
        answers: np.ndarray,
        names: frozenset[str],
        arrays: Mapping[str, np.ndarray] | None,
        file: str | None,
    ) -> None:
        queries = frozenset(name for name in names if name.rpartition("/")[2] in PROMPT_POOLS)
        for digests, own in ((prompts, queries), (answers, names - queries)):
            if len(digests) and own:
                self._shards.append(Shard(own, arrays, file))
                for row, digest in enumerate(digests):
                    self._where.setdefault(digest.tobytes(), []).append((len(self._shards) - 1, row))

    def _open(self, folder: Path, resume: bool) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self.processes.is_main:
                self._lock = FileLock(folder / ".lock", timeout=0)
                self._lock.acquire()
        except Timeout as error:
            raise OSError(
                f"Another process is writing to the activation store {folder}. Wait for it, or give another store_dir."
            ) from error
        except OSError as error:
            raise type(error)(
                error.errno,
                f"Cannot write to the activation store, give another store_dir ({error.strerror})",
                str(folder),
            ) from error
        try:
            # The main process comes first and has removed unused states.
            if resume or not self.processes.is_main:
                self._read_manifests(folder)
            if self.processes.is_main:
                # Left by a process killed between writing a shard and the manifest.
                for orphan in folder.glob("*shard-*"):
                    if orphan.name not in self._known:
                        orphan.unlink()
                self._take_together(folder)
        except BaseException:
            self.close()
            raise

    def _read_manifests(self, folder: Path) -> None:
        """Index new shards of all manifests."""
        for path in sorted(folder.glob("manifest*.json")):
            try:
                entries = json.loads(path.read_text(encoding="utf-8"))["shards"]
            except (ValueError, KeyError, TypeError):
                warnings.warn(f"{path} cannot be read; its states are captured again.", stacklevel=2)
                continue
            for entry in entries:
                if entry["file"] not in self._known:
                    self._read_entry(folder, entry)

    def _read_entry(self, folder: Path, entry: dict[str, Any]) -> None:
        file = folder / Path(entry["file"]).name
        try:
            if file.stat().st_size != entry["bytes"]:
                raise OSError(f"{file.stat().st_size} bytes, expected {entry['bytes']}")
            with safe_open(file, framework="np") as shard:
                prompts, answers = shard.get_tensor("prompts"), shard.get_tensor("answers")
        except (OSError, SafetensorError) as error:
            warnings.warn(f"{file} is damaged and is captured again: {error}.", stacklevel=2)
            return
        self._known.add(entry["file"])
        if self.processes.is_main:
            self._entries.append(entry)
        self._index(prompts, answers, frozenset(entry["states"]), None, entry["file"])

    def close(self) -> None:
        """Release the lock, so that other processes can write."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None
