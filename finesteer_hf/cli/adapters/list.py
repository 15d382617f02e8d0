"""`finesteer list`: adapters on this machine, and on the Hub."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from finesteer_hf.cli.common import AsJson, console, print_json, say, table


if TYPE_CHECKING:
    from finesteer_hf.hub import AdapterAtHand, HubAdapter


# Columns of a name that are kept on a narrow screen.
MOST_NAME = 40


def list_command(
    query: Annotated[
        str | None,
        typer.Argument(help="Folder to look in, by default this one; with --hub, text in the adapter's id."),
    ] = None,
    hub: Annotated[bool, typer.Option("--hub", help="Search the Hub instead.")] = False,
    base_model: Annotated[str | None, typer.Option(help="Only adapters for this base model.")] = None,
    method: Annotated[str | None, typer.Option(help="Only adapters of this method.")] = None,
    author: Annotated[str | None, typer.Option(help="With --hub: only this user's or organisation's.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most results.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List steering adapters: in a folder, in the Hub's cache, or on the Hub.

    The name in the first column is what --steering takes.
    """
    if hub:
        from finesteer_hf.hub import list_adapters

        found = list_adapters(base_model, search=query, method=method, author=author, limit=limit)
        if as_json:
            print_json([dataclasses.asdict(each) for each in found])
        elif found:
            console.print(listed(("adapter", "method", "base model", "downloads"), map(hub_cells, found)))
        else:
            say("The Hub has no such adapters.")
        return
    if author is not None:
        raise ValueError("--author needs --hub: adapters on this machine have no author.")
    from finesteer_hf.hub import adapters_in, cached_adapters

    here = [
        each
        for each in [*adapters_in(query or "."), *(() if query else cached_adapters())]
        if (base_model is None or each.base_model == base_model)
        and (method is None or (each.method or "").upper() == method.upper())
    ][:limit]
    if as_json:
        print_json([dataclasses.asdict(each) for each in here])
    elif here:
        console.print(listed(("adapter", "method", "base model", "size"), map(cells, here)))
        for each in here:
            if each.problem is not None:
                say(f"{each.name}: {each.problem}")
    else:
        place = f"{Path(query or '.').resolve()}{'' if query else ' or in the cache of the Hub'}"
        say(f"No such adapters in {place}. `finesteer list --hub` searches the Hub.")


def listed(columns: Sequence[str], rows: Iterable[tuple[str, ...]]) -> Table:
    """A table whose first column, names to copy, is broken last."""
    rows = list(rows)
    made = table(columns, rows)
    made.columns[0].min_width = min(MOST_NAME, max(len(row[0]) for row in rows))
    return made


def cells(adapter: AdapterAtHand) -> tuple[str, ...]:
    """The row of an adapter on this machine."""
    return adapter.name, adapter.method or "damaged", adapter.base_model or "", size(adapter.bytes)


def hub_cells(adapter: HubAdapter) -> tuple[str, ...]:
    """The row of an adapter on the Hub."""
    from finesteer_hf.adapters.registry import steering_methods

    methods = [name for name in steering_methods() if name.lower() in adapter.tags]
    private = " (private)" if adapter.private else ""
    return adapter.repo_id + private, ", ".join(methods), ", ".join(adapter.base_models), f"{adapter.downloads:,}"


def size(count: int) -> str:
    """A number of bytes in the largest unit that leaves at least one."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if count >= 10**power:
            return f"{count / 10**power:.1f} {unit}"
    return f"{count} B"
