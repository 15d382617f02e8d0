"""Parts of a store: shards, names of passages and states in them, and atomic file writes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finesteer_hf.fitting.capture.reader import Key
from finesteer_hf.fitting.data.encoding import Passage


DIGEST_BYTES = 16


def passage_digest(passage: Passage) -> bytes:
    """Digest that names a passage in a store."""
    # An answer's states depend on its last content token; texts without a closing keep their digest.
    closing = f"-{passage.closing}" if passage.closing else ""
    text = f"{passage.answer_start}{closing}:{','.join(map(str, passage.ids))}"
    return hashlib.sha256(text.encode()).digest()[:DIGEST_BYTES]


@dataclass
class Shard:
    """States of some passages: in memory, or in a file that is memory-mapped when read.

    Attributes:
        names: names of its states.
        arrays: the states by name, if they are in memory.
        file: its file name, if they are not in memory.
    """

    names: frozenset[str]
    arrays: Mapping[str, np.ndarray] | None = None
    file: str | None = None


def name_of(key: Key) -> str:
    """Name of a state in a shard: `resid_post[12]/answer_mean`."""
    return f"{key[0]}/{key[1]}"


def digests_of(passages: Sequence[Passage]) -> np.ndarray:
    """Digests, uint8 `[passages, 16]`."""
    joined = b"".join(passage_digest(passage) for passage in passages)
    return np.frombuffer(joined, dtype=np.uint8).reshape(-1, DIGEST_BYTES)


def write_whole(target: Path, content: bytes) -> None:
    """Write a file completely or not at all.

    Raises:
        OSError: with the space that was needed and what to do.
    """
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        free = 0
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(target.parent).free
        raise OSError(
            error.errno,
            f"{error.strerror}: {len(content):,} bytes could not be written ({free:,} free). Earlier states are "
            "intact; make room and run again to continue",
            str(target),
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
