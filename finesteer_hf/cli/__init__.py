"""The `finesteer` command; each command has its own file."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from finesteer_hf.cli import interruption


if TYPE_CHECKING:
    from finesteer_hf.cli.commands import app

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line."""
    interruption.watch()
    try:
        from finesteer_hf.cli.commands import app

        app()
    except BaseException as error:
        if not interruption.came() or isinstance(error, SystemExit):
            raise
        interruption.say_so()
        sys.exit(interruption.STOPPED)


def __getattr__(name: str) -> Any:
    # Typer and rich are imported when a command runs, after the ctrl-C handler is set.
    if name == "app":
        from finesteer_hf.cli.commands import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
