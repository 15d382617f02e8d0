"""Files that are written beside where they go, and moved there once all of them are complete and on the disk."""

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


# Seconds to wait for another save, which takes milliseconds, and between two looks.
PATIENCE, PAUSE = 30.0, 0.02
_PREFIX = ".saving-"
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Staging:
    """A folder inside the one that is written to; what is staged there is moved file by file, each at once.

    One staging at a time works on a folder: a second one waits, half a minute at most. What one that was killed left behind
    is deleted by the next. A block that raises leaves the folder as it was, apart from what it had published.

    Args:
        directory: where the files go; made if it is not there.

    Raises:
        FileExistsError: if it is a file.
        OSError: if the disk is full or cannot be written.
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
            # A new file has the mode that the user's umask asks for; libraries that write through one of their own do not.
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
            # Closing alone would not do: a process that was forked meanwhile has a copy.
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            os.close(self._lock)

    @property
    def alone(self) -> bool:
        """Whether no other save works on the folder, so that what is left of others may be deleted."""
        return self._lock is not None

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Write a staged file: gives its path, and puts it onto the disk at the end of the block.

        Args:
            name: where it will go, from the directory on.

        Raises:
            OSError: if the disk is full or cannot be written.
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
        """Move a staged file to its place.

        Args:
            name: the place, from the directory on.
            staged: its name here, if it is another.
        """
        target = self.directory / name
        with self._told():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(self.folder / (staged or name), target)
            with contextlib.suppress(OSError):
                _flush(target.parent)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Say where a disk is full, and that what was there is still there."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            number = getattr(error, "errno", None)
            if number not in _FULL and f"os error {errno.ENOSPC}" not in str(error):
                raise
            raise OSError(
                errno.ENOSPC, f"No space left to save in {self.directory}; what was there is as it was"
            ) from error


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write a file beside its place and move it there at the end, so that a full disk leaves no half file."""
    path = Path(path)
    with Staging(path.parent) as stage:
        with stage.writing(path.name) as staged:
            yield staged
        stage.publish(path.name)


def _locked(directory: Path) -> int | None:
    """A handle that keeps others out of a folder; None where the system has no such thing, or one stays in it."""
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
