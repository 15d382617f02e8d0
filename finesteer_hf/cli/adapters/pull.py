"""`finesteer pull`: an adapter from the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from finesteer_hf.cli.adapters.list import size
from finesteer_hf.cli.common import AsJson, check_folder, console, print_json, say, table


def pull(
    name: Annotated[str, typer.Argument(help="org/name, org/name@revision or org/name/folder.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write it to; by default it stays in the cache.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit, if not in the name.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Download what is in the cache again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Pull an adapter from the Hub, all files from one commit.

    Every command that takes --steering does this by itself; pull before you go offline, or to have a copy.
    """
    from finesteer_hf.adapters.adapter import SteeringAdapter
    from finesteer_hf.adapters.config import CONFIG_NAME, WEIGHTS_NAME
    from finesteer_hf.hub import resolve_adapter_files

    if out is not None:
        check_folder(out)
    if Path(name).is_dir():
        raise ValueError(f"{name} is a folder on this machine, and pull takes an adapter of the Hub: org/name.")
    say(f"pulling {name}")
    adapter = SteeringAdapter.from_pretrained(name, revision=revision, force_download=force)
    # From the cache now, at the commit that was just loaded.
    path = resolve_adapter_files(name, revision=revision, local_files_only=True).config.parent
    if out is not None:
        path = adapter.save_pretrained(out)
    config = adapter.config
    facts: dict[str, Any] = {
        "name": name,
        "commit": adapter.revision,
        "method": config.steering_type,
        "base_model": config.base_model_name_or_path,
        "path": str(path),
        "bytes": sum((path / file).stat().st_size for file in (CONFIG_NAME, WEIGHTS_NAME)),
    }
    if as_json:
        print_json(facts)
        return
    rows = [
        ("commit", str(adapter.revision)),
        ("method", config.steering_type),
        ("base model", config.base_model_name_or_path or "not named"),
        ("kept in", "the cache of the Hub" if out is None else str(out)),
        ("size", size(facts["bytes"])),
    ]
    console.print(table(("pulled", name), rows))
    if config.base_model_name_or_path:
        say(f"finesteer chat {config.base_model_name_or_path} --steering {out or name}")
