"""`finesteer ui`: a page with both answers, the gate, and a fit of your own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from finesteer_hf.cli.common import console, load
from finesteer_hf.cli.options import LOAD, takes


LOOPBACK = ("127.0.0.1", "localhost", "::1")


@takes(loading=dataclasses.replace(LOAD, without=("steering", "steering_revision")))
def ui(
    model: Annotated[str, typer.Argument(help="Base model: Hub id, folder, or `playground`.")],
    steering: Annotated[
        list[str] | None,
        typer.Option("--steering", "-s", help="Adapter: name=folder, name=org/name@revision, or without a name."),
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port; by default 7860, or the next free.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on, 0.0.0.0 for all. Other machines load no folders of this one.")
    ] = "127.0.0.1",
    *,
    loading: dict[str, Any],
) -> None:
    """Open a page: both answers, the gate, a fit of your own.

    Needs the extra `ui`.
    """
    try:
        from finesteer_hf.ui.page import build_page, launch
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ValueError("finesteer ui needs gradio: pip install 'finesteer-hf[ui]'.") from error
    from finesteer_hf.ui.workbench import Workbench

    sources = named(steering or [])
    loaded, tokenizer = load(model, **loading)
    for name, source in sources.items():
        loaded.load_steering(source, name)
    bench = Workbench(loaded, tokenizer, model, own=tuple(sources), folders=host in LOOPBACK)
    page = build_page(bench)
    try:
        console.print(f"{launch(page, host=host, port=port)}  (ctrl-C ends it)", highlight=False, soft_wrap=True)
        page.block_thread()
    finally:
        bench.close()


def named(steering: list[str]) -> dict[str, str]:
    """Adapters by name: the one before `=`, else the last part of the folder or Hub id.

    Raises:
        ValueError: if two have the same name, or one is empty.
    """
    sources: dict[str, str] = {}
    for text in steering:
        name, equals, source = text.partition("=")
        if not equals or "/" in name:
            name, source = Path(text.partition("@")[0]).name, text
        if not name or not source:
            raise ValueError(f"--steering {text!r}: write name=adapter, or the adapter alone.")
        if name in sources:
            raise ValueError(f"--steering: two adapters are called {name!r}. Write other=... for one of them.")
        sources[name] = source
    return sources
