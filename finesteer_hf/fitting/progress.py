"""Progress of a fit on the terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class FitProgress:
    """Bars and lines on stderr, or nothing.

    Args:
        shown: whether anything is printed.
    """

    def __init__(self, shown: bool) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        # Stdout is for results, stderr for progress.
        self._bars = Progress(*columns, console=Console(stderr=True), disable=not shown, transient=True)
        self._shown = shown

    def __enter__(self) -> FitProgress:
        if self._shown:
            self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        # Older versions of rich print an empty line even after hidden bars.
        if self._shown:
            self._bars.stop()

    def say(self, message: str) -> None:
        """Print a line above the bars."""
        if self._shown:
            self._bars.console.print(message, markup=False, highlight=False)

    @contextlib.contextmanager
    def task(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show a bar during a block; yields the function that advances it."""
        task = self._bars.add_task(description, total=total)
        try:
            yield lambda done: self._bars.advance(task, done)
        finally:
            self._bars.remove_task(task)
