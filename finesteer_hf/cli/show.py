"""`finesteer show`: an adapter at a glance."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from finesteer_hf.cli.common import console, table


def show(
    adapter: Annotated[str, typer.Argument(help="Folder or Hub id (org/name, org/name@revision).")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole steering_config.json instead.")] = False,
) -> None:
    """Show an adapter's settings and figures."""
    from finesteer_hf.adapters.adapter import SteeringAdapter
    from finesteer_hf.hub.card_facts import adapter_facts

    loaded = SteeringAdapter.from_pretrained(adapter)
    if as_json:
        typer.echo(json.dumps(loaded.config.to_dict(), indent=2, sort_keys=True))
        return
    facts = adapter_facts(loaded)
    console.print(table(("adapter", adapter), facts.settings))
    for title, rows in (("Data", facts.data), ("Held out", facts.held_out)):
        if rows:
            console.print(table((title, ""), rows))
    if facts.evaluation:
        columns = ("dataset", "metric", "unsteered", "steered", "p_value")
        figures = [tuple(row[name] for name in columns) for row in facts.evaluation]
        console.print(table(("data", "figure", "unsteered", "steered", "paired p"), figures, title="Evaluation"))
    sizes = [
        (name, "x".join(map(str, tensor.shape)) or "scalar", f"{tensor.numel() * tensor.element_size():,} bytes")
        for name, tensor in sorted(loaded.tensors.items())
    ]
    total = sum(tensor.numel() * tensor.element_size() for tensor in loaded.tensors.values())
    console.print(table(("tensor", "shape", "size"), [*sizes, ("all", "", f"{total:,} bytes")]))
