"""The commands; each has its own file and imports what it needs when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from finesteer_hf import __version__
from finesteer_hf.cli.adapters.convert import convert
from finesteer_hf.cli.adapters.list import list_command
from finesteer_hf.cli.adapters.pull import pull
from finesteer_hf.cli.adapters.push import push
from finesteer_hf.cli.asking.chat import chat
from finesteer_hf.cli.asking.generate import generate
from finesteer_hf.cli.compare import compare
from finesteer_hf.cli.demo.command import demo
from finesteer_hf.cli.doctor.command import doctor
from finesteer_hf.cli.evaluate import evaluate
from finesteer_hf.cli.fit import fit
from finesteer_hf.cli.friendly import friendly
from finesteer_hf.cli.look import look
from finesteer_hf.cli.methods import methods
from finesteer_hf.cli.services.serve import serve
from finesteer_hf.cli.services.ui import ui
from finesteer_hf.cli.show import show


# Plain help: on 80 characters, boxes leave too narrow a column for the text.
app = typer.Typer(name="finesteer", no_args_is_help=True, pretty_exceptions_show_locals=False, rich_markup_mode=None)
for name, command in (
    ("demo", demo),
    ("fit", fit),
    ("eval", evaluate),
    ("compare", compare),
    ("generate", generate),
    ("look", look),
    ("serve", serve),
    ("chat", chat),
    ("show", show),
    ("push", push),
    ("pull", pull),
    ("list", list_command),
    ("convert", convert),
    ("doctor", doctor),
    ("methods", methods),
    ("ui", ui),
):
    app.command(name)(friendly(command))


def print_version(wanted: bool) -> None:
    """Print the version and exit, if asked to."""
    if wanted:
        typer.echo(f"finesteer-hf {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Fit, run, evaluate and inspect steering adapters for Hugging Face models."""
