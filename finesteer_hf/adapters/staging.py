"""Files that are written beside their destination and moved there once all are complete and on disk."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from safetensors import SafetensorError


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


# Seconds to wait for another save (a save takes milliseconds), and between two tries.
PATIENCE, PAUSE = 30.0, 0.02
_PREFIX = ".saving-"
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Staging:
    """A staging folder inside the destination; staged files are moved one by one, each atomically.

    A folder has one staging at a time: a second one waits, half a minute at most. Leftovers of a killed one are
    deleted by the next. A block that raises leaves the folder as it was, apart from files already published.

    Args:
        directory: where the files go; created if missing.

    Raises:
        FileExistsError: if the directory is a file.
        OSError: if the disk is full or not writable.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.folder = self.directory / f"{_PREFIX}{secrets.token_hex(8)}"
        self._made: list[Path] = []
        self._lock: int | None = None
        self._mode = 0o644

    def __enter__(self) -> Staging:
        if self.directory.is_file():
            raise FileExistsError(f"{self.directory} is a file; give a folder to save in.")
        with self._told():
            missing = [path for path in (self.directory, *self.directory.parents) if not path.exists()]
            self.directory.mkdir(parents=True, exist_ok=True)
            self._made = missing
            self._lock = _locked(self.directory)
            if self._lock is not None:
                for left in self.directory.glob(f"{_PREFIX}*"):
                    shutil.rmtree(left, ignore_errors=True)
            self.folder.mkdir()
            # A new file gets the mode of the user's umask; libraries that write through their own temporary file
            # ignore it.
            probe = self.folder / "mode"
            probe.touch()
            self._mode = probe.stat().st_mode & 0o777
            probe.unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        if error is not None:
            for path in self._made:
                with contextlib.suppress(OSError):
                    path.rmdir()
        if self._lock is not None:
            # Closing is not enough: a process forked meanwhile holds a copy.
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            os.close(self._lock)

    @property
    def alone(self) -> bool:
        """Whether no other save works on the folder, so that leftovers of others may be deleted."""
        return self._lock is not None

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Write a staged file: yields its path, and flushes it to disk at the end of the block.

        Args:
            name: its destination, relative to the directory.

        Raises:
            OSError: if the disk is full or not writable.
        """
        path = self.folder / name
        with self._told():
            path.parent.mkdir(parents=True, exist_ok=True)
            yield path
            path.chmod(self._mode)
            _flush(path)

    def write(self, name: str, content: bytes) -> None:
        """Stage a file; arguments and errors as for `writing`."""
        with self.writing(name) as path:
            path.write_bytes(content)

    def publish(self, name: str, staged: str | None = None) -> None:
        """Move a staged file to its destination.

        Args:
            name: its destination, relative to the directory.
            staged: its name in the staging folder, if it differs.
        """
        target = self.directory / name
        with self._told():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(self.folder / (staged or name), target)
            with contextlib.suppress(OSError):
                _flush(target.parent)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turn a full disk's error into one that names the folder and says that the old files are intact."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            number = getattr(error, "errno", None)
            if number not in _FULL and f"os error {errno.ENOSPC}" not in str(error):
                raise
            raise OSError(
                errno.ENOSPC, f"No space left to save in {self.directory}; the files there are unchanged"
            ) from error


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write a file beside its destination and move it there at the end, so that a full disk leaves no partial file."""
    path = Path(path)
    with Staging(path.parent) as stage:
        with stage.writing(path.name) as staged:
            yield staged
        stage.publish(path.name)


def _locked(directory: Path) -> int | None:
    """A handle that locks a folder; None if the system has no locks, or another process keeps the lock."""
    if fcntl is None:
        return None
    handle = os.open(directory, os.O_RDONLY)
    for _ in range(round(PATIENCE / PAUSE)):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(PAUSE)
        except OSError:  # some network file systems
            break
        else:
            return handle
    os.close(handle)
    return None


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
