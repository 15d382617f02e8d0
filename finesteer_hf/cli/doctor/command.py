"""`finesteer doctor`: the command."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from finesteer_hf.cli.common import AsJson, console, print_json, say, table
from finesteer_hf.cli.options import assignments


COLUMNS = ("what", "works", "how, or why not and what to do")


def doctor(
    model: Annotated[
        str | None, typer.Argument(help="Base model: Hub id, folder, or `playground`. Its weights are not loaded.")
    ] = None,
    steering: Annotated[
        str | None, typer.Option("--steering", "-s", help="Adapter: folder or Hub id (org/name, org/name@revision).")
    ] = None,
    steering_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the adapter's repo.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the base model's repo.")] = None,
    model_arg: Annotated[
        list[str] | None, typer.Option(help="One more argument of transformers' from_pretrained, name=value.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what works here, on a model and with an adapter.

    Without arguments: versions, device, Hub. With a model and an adapter also what each can do and what would break.
    The exit code is 1 if the model or the adapter cannot be used.
    """
    from finesteer_hf.cli.doctor.environment import environment

    facts = environment()
    if not as_json:
        console.print(table(("here", ""), facts))
    looked, of_adapter = None, []
    if model is not None:
        from finesteer_hf.cli.doctor.model_checks import look_at_model

        say(f"looking at {model}")
        arguments = assignments("--model-arg", model_arg or [])
        looked = look_at_model(model, **arguments, **({} if revision is None else {"revision": revision}))
        if not as_json:
            console.print(table(COLUMNS, [check.cells() for check in looked.checks], title=f"model {model}"))
    if steering is not None:
        from finesteer_hf.adapters.adapter import SteeringAdapter
        from finesteer_hf.cli.doctor.adapter_checks import look_at_adapter

        say(f"looking at {steering}")
        adapter = SteeringAdapter.from_pretrained(steering, revision=steering_revision)
        of_adapter = look_at_adapter(adapter, looked)
        if not as_json:
            title = f"adapter {steering}" + (
                f" on {model}" if model else "; give its model too to see whether it fits"
            )
            console.print(table(COLUMNS, [check.cells() for check in of_adapter], title=title))
    checks = [*(looked.checks if looked is not None else []), *of_adapter]
    if as_json:
        found: dict[str, Any] = {"environment": dict(facts)}
        if looked is not None:
            found["model"] = [dataclasses.asdict(check) for check in looked.checks]
        if steering is not None:
            found["adapter"] = [dataclasses.asdict(check) for check in of_adapter]
        print_json(found)
    if any(check.needed and check.state == "no" for check in checks):
        raise typer.Exit(1)
