"""What the commands share: the console, loading, errors as one line."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from finesteer_hf.errors import SteeringError


console = Console()
errors = Console(stderr=True)
PLAYGROUND = "playground"
DTYPES = ("auto", "float32", "bfloat16", "float16")


def friendly(command: Callable[..., None]) -> Callable[..., None]:
    """Show what a user can mend as a message; anything else is a fault of the package and keeps its traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (SteeringError, ValueError, OSError) as error:
            errors.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as stop:
            errors.print("[bold red]stopped[/]")
            raise typer.Exit(130) from stop

    return run


def model_location(model: str) -> str:
    """The path or Hub id of a model; `playground` is the one that ships with the package."""
    if model == PLAYGROUND:
        from finesteer_hf.playground import model_path

        return model_path()
    return model


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_location(model))


def load_model(model: str, *, steering: str | None = None, dtype: str = "auto", device: str | None = None) -> Any:
    """A model that can be steered, on a device.

    Args:
        model: Hub id, folder or `playground`.
        steering: adapter to load; None for none.
        dtype: one of `DTYPES`; `auto` is what the model was saved in.
        device: where it goes; by default a GPU if there is one.

    Raises:
        ValueError: for another dtype.
    """
    import torch

    from finesteer_hf import SteeredModelForCausalLM

    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {list(DTYPES)}, got {dtype!r}.")
    loaded = SteeredModelForCausalLM.from_pretrained(model_location(model), steering=steering, dtype=dtype)
    return loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> Table:
    """A rich table of texts, none of which is read as markup."""
    made = Table(title=title, title_justify="left", header_style="bold", pad_edge=False)
    for index, name in enumerate(columns):
        made.add_column(name, overflow="fold", style="bold" if index == 0 else None)
    for row in rows:
        made.add_row(*(escape(cell) for cell in row))
    return made


def say(message: str) -> None:
    """A line of progress."""
    console.print(f"[dim]{escape(message)}[/]", highlight=False)
