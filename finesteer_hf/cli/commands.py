"""The `finesteer` command; one file a command."""

from __future__ import annotations

import typer

from finesteer_hf.cli.common import friendly
from finesteer_hf.cli.demo import demo
from finesteer_hf.cli.evaluate import evaluate
from finesteer_hf.cli.fit import fit
from finesteer_hf.cli.generate import generate
from finesteer_hf.cli.methods import methods
from finesteer_hf.cli.show import show


app = typer.Typer(
    name="finesteer",
    help="Fit, use, evaluate and look at steering adapters for Hugging Face models.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
for name, command in (
    ("demo", demo),
    ("fit", fit),
    ("eval", evaluate),
    ("generate", generate),
    ("show", show),
    ("methods", methods),
):
    app.command(name)(friendly(command))

__all__ = ["app"]
