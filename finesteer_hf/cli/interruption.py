"""Ctrl-C: one line and exit code 130, wherever it comes."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any


STOPPED = 130
_came = False


def came() -> bool:
    """Whether ctrl-C was pressed: an import that it cuts short often raises another error than KeyboardInterrupt."""
    return _came


def watch() -> None:
    """Note ctrl-C, and end at once where Python would only print it or where it is pressed twice."""
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
    """End the process as it is."""
    say_so()
    os._exit(STOPPED)


def say_so() -> None:
    """The one line."""
    print("stopped", file=sys.stderr, flush=True)
