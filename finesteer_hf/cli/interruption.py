"""Ctrl-C: one line and exit code 130, at any point; a fit keeps what it has captured."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any


STOPPED = 130
_came = False
# Says how to go on, if there is something to go on from.
_resume: list[str] = []


def came() -> bool:
    """Whether ctrl-C was pressed: an interrupted import often raises an error other than KeyboardInterrupt."""
    return _came


def watch() -> None:
    """Record ctrl-C; exit at once on a second press, or where Python would only print it."""
    usual = sys.unraisablehook

    def stop(number: int, frame: FrameType | None) -> None:
        global _came
        if _came:
            leave()
        _came = True
        raise KeyboardInterrupt

    def unraisable(report: Any) -> None:
        if isinstance(report.exc_value, KeyboardInterrupt):
            leave()
        usual(report)

    signal.signal(signal.SIGINT, stop)
    sys.unraisablehook = unraisable


def leave() -> None:
    """End the process at once."""
    say_so()
    os._exit(STOPPED)


def say_so() -> None:
    """Print the one line."""
    print("; ".join(["stopped", *_resume]), file=sys.stderr, flush=True)


@contextlib.contextmanager
def resumable(out: Path, store_dir: str | None) -> Iterator[str | None]:
    """A folder for the states that a fit captures, so that the same command continues after ctrl-C or a crash.

    Args:
        out: folder of the result; the states go beside it, into `<out>.states`, and are removed when the block is done.
        store_dir: the user's own folder, which is used and kept instead.

    Yields:
        The folder; None where several processes share a fit: they end at different times, so none can remove it.
    """
    if store_dir is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield None
        return
    states = Path(store_dir or f"{os.path.normpath(out)}.states")
    try:
        yield str(states)
    except BaseException:
        if any(path.is_file() for path in states.rglob("*.safetensors")):
            note = f"the states captured so far are in {states}: run the same command again to continue"
            if came():
                _resume[:] = [note]
            else:
                print(note, file=sys.stderr)
        elif store_dir is None:
            shutil.rmtree(states, ignore_errors=True)
        raise
    if store_dir is None:
        shutil.rmtree(states, ignore_errors=True)
