"""Ctrl-C: one line and exit code 130, at any point."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any


STOPPED = 130
_came = False


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
    print("stopped", file=sys.stderr, flush=True)
