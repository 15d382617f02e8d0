"""`finesteer methods`: what can be fitted."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from finesteer_hf.cli.common import console, table
from finesteer_hf.config import SteeringConfig, get_steering_method, steering_methods


def methods(
    name: Annotated[str | None, typer.Argument(help="A method, to list its settings.")] = None,
) -> None:
    """List the steering methods, or the settings of one."""
    if name is None:
        rows = []
        for method in steering_methods():
            config = get_steering_method(method).config_cls
            rows.append((method, config.__name__, first_line(config)))
        console.print(table(("method", "config", "what it is"), rows))
        return
    config = get_steering_method(name.upper()).config_cls
    shared = {field.name for field in dataclasses.fields(SteeringConfig)} - {"positions", "strength"}
    settings = [
        (field.name, default_of(field), str(field.metadata.get("help", "")))
        for field in dataclasses.fields(config)
        if field.name not in shared
    ]
    console.print(table(("setting", "default", "meaning"), settings, title=f"{name.upper()}: {first_line(config)}"))


def first_line(thing: type) -> str:
    """First line of a class's docstring."""
    return (thing.__doc__ or "").strip().split("\n")[0]


def default_of(field: dataclasses.Field) -> str:
    """A field's default as text."""
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    return repr(field.default_factory()) if callable(field.default_factory) else "required"
