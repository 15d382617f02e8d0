"""`finesteer methods`: the methods that can be fitted."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from finesteer_hf.cli.common import AsJson, console, print_json, table


def methods(
    name: Annotated[str | None, typer.Argument(help="A method, to list its settings.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the steering methods, or the settings of one."""
    from finesteer_hf.adapters.registry import get_steering_method, steering_methods

    if name is None:
        specs = [(method, get_steering_method(method)) for method in steering_methods()]
        rows = [(method, spec.config_cls.__name__, spec.summary) for method, spec in specs]
        if as_json:
            print_json([dict(zip(("method", "config", "summary"), row, strict=True)) for row in rows])
            return
        console.print(table(("method", "config", "what it is"), rows))
        return
    spec = get_steering_method(name.upper())
    config = spec.config_cls
    settings = [
        (field.name, default_of(field), str(field.metadata.get("help", "")))
        for field in config.setting_fields().values()
    ]
    if as_json:
        fields = [dict(zip(("setting", "default", "meaning"), setting, strict=True)) for setting in settings]
        print_json({"method": spec.name, "summary": spec.summary, "settings": fields})
        return
    console.print(table(("setting", "default", "meaning"), settings, title=f"{spec.name}: {spec.summary}"))


def default_of(field: dataclasses.Field) -> str:
    """A field's default as text."""
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    return repr(field.default_factory()) if callable(field.default_factory) else "required"
