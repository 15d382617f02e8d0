"""Progress of a fit: on the terminal, and for programs that watch it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TypeAlias

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


#: Gets a task's description, how much of it is done, and its total.
Watcher: TypeAlias = Callable[[str, int, int], None]
_WATCHER: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


@contextlib.contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Tell a function about the progress of the fits inside a block, in this thread.

    It is called at the start of each task and whenever a batch is done. What it raises ends the fit.
    """
    token = _WATCHER.set(watcher)
    try:
        yield
    finally:
        _WATCHER.reset(token)


class FitProgress:
    """Bars and lines on stderr, or nothing; a watcher is told in both cases.

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
        watcher, done = _WATCHER.get(), 0

        def advance(more: int) -> None:
            nonlocal done
            done += more
            self._bars.advance(task, more)
            if watcher is not None:
                watcher(description, done, total)

        try:
            advance(0)
            yield advance
        finally:
            self._bars.remove_task(task)
