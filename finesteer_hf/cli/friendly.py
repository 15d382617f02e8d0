"""How a command ends: one line for an error, with a hint; the traceback only with `--debug`."""

from __future__ import annotations

import functools
import inspect
import traceback
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.markup import escape

from finesteer_hf import errors as known
from finesteer_hf.cli import interruption
from finesteer_hf.cli.common import errors


# Errors that a user can fix, and errors of the user's machine; anything else is a bug of ours.
FORESEEN = (known.SteeringError, ValueError, OSError, ImportError)
_DEBUG = inspect.Parameter(
    "debug",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")],
)
# The first class that fits an error says what to try; the message itself says what is wrong.
_HINTS: tuple[tuple[type[Exception], str], ...] = (
    (known.UnknownMethodError, "finesteer methods lists the methods."),
    (
        known.HubUnreachableError,
        "finesteer list shows the adapters on this machine; HF_HUB_OFFLINE=1 uses only the cache.",
    ),
    (known.NoAdapterError, "finesteer list shows the adapters on this machine."),
    (known.AdapterMismatchError, "finesteer doctor MODEL --steering ADAPTER shows what fits and what does not."),
    (known.UnsupportedModelError, "finesteer doctor MODEL shows what works on a model."),
)
# What transformers says of a name that is neither a folder nor in reach on the Hub.
_NO_MODEL = ("to load the files", "is not a local folder", "is not a valid model identifier", "Repo id must")
_MODEL_HINT = "a model is a folder, a Hub id (in the cache, if you are offline) or `playground`."
_MEMORY_HINT = "use a smaller --batch-size, --dtype bfloat16, --quantization 4bit or --device-map auto."


def friendly(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command `--debug`, and show its errors as one line."""
    own = inspect.signature(command, eval_str=True)

    @functools.wraps(command)
    def run(*args: Any, debug: bool, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            warnings.showwarning = functools.partial(show_warning, set())
            try:
                command(*args, **kwargs)
            except (Exception, KeyboardInterrupt) as error:
                if isinstance(error, KeyboardInterrupt) or interruption.came():
                    interruption.say_so()
                    raise typer.Exit(interruption.STOPPED) from error
                if isinstance(error, BrokenPipeError) or is_ending(error):
                    raise
                show_error(error, debug)
                raise typer.Exit(1) from error

    every = [*own.parameters.values(), _DEBUG]
    run.__signature__ = own.replace(parameters=every)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in every}
    return run


def is_ending(error: Exception) -> bool:
    """Whether an exception is typer's way to end a command or to report wrong usage, which it prints itself."""
    return isinstance(error, typer.Exit | typer.Abort | typer.BadParameter)


def show_error(error: Exception, debug: bool) -> None:
    """Print an error on one line, and a hint; with `debug`, the traceback before it."""
    if debug:
        errors.print("".join(traceback.format_exception(error)), markup=False, highlight=False, end="")
    foreseen = isinstance(error, FORESEEN) or is_memory(error)
    text = " ".join(str(error).split()) or type(error).__name__
    what = text if foreseen else f"{type(error).__name__}: {text}"
    say_line("[bold red]error:[/]", what)
    hint = hint_for(error)
    if hint is None and not foreseen and not debug:
        hint = "this is a bug; --debug shows the traceback."
    if hint is not None:
        say_line("[bold]hint:[/]", hint)


def say_line(label: str, text: str) -> None:
    """Print one line to stderr; only a terminal gets line breaks in it."""
    errors.print(f"{label} {escape(text)}", highlight=False, soft_wrap=not errors.is_terminal)


def hint_for(error: Exception) -> str | None:
    """What to try after an error, if more is known than its message says."""
    if is_memory(error):
        return _MEMORY_HINT
    if isinstance(error, OSError) and any(part in str(error) for part in _NO_MODEL):
        return _MODEL_HINT
    return next((hint for kind, hint in _HINTS if isinstance(error, kind)), None)


def is_memory(error: Exception) -> bool:
    """Whether the device ran out of memory; torch, whose class this is, may not be imported yet."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def show_warning(shown: set[str], message: Warning | str, *_: Any) -> None:
    """Show a warning as a message, once, without the source line, which does not help the user."""
    if str(message) in shown:
        return
    shown.add(str(message))
    say_line("[bold yellow]warning:[/]", str(message))
