"""`finesteer look`: where steering acts in a prompt and its answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from finesteer_hf.cli.common import console, load, say
from finesteer_hf.cli.options import LOAD, takes


@takes(loading=LOAD)
def look(
    model: Annotated[str, typer.Argument(help="Base model: Hub id, folder, or `playground`.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The prompt.")],
    answer: Annotated[
        str | None, typer.Option(help="Its answer; by default the model's own, greedy and steered.")
    ] = None,
    scale: Annotated[float, typer.Option(help="Multiplies the adapter's strength.")] = 1.0,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Use the prompt as it is, without the chat template.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of the answer.")] = 64,
    html: Annotated[Path | None, typer.Option(help="Write the view to this file as a web page.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the view as JSON.")] = False,
    *,
    loading: dict[str, Any],
) -> None:
    """Show where steering acts: each token with its share |delta| / |h|.

    Colours show how far steering moves the state of each token, relative to the state's norm. Without colours, as in
    a pipe, bars below the tokens do.
    """
    from finesteer_hf.evaluation.measures.prompts import as_chat
    from finesteer_hf.views.by_token import steering_by_token
    from finesteer_hf.views.html import tokens_page
    from finesteer_hf.views.terminal import TokensInTerminal

    if loading["steering"] is None:
        raise ValueError("Give --steering ADAPTER: a folder or a Hub id. Unsteered, there is nothing to see.")
    if plain and system:
        raise ValueError("--system needs the chat template; leave --plain out.")
    if html is not None and html.is_dir():
        raise ValueError(f"--html {html} is a folder; give a file.")
    loaded, tokenizer = load(model, **loading)
    view = steering_by_token(
        loaded,
        tokenizer,
        prompt if plain else as_chat(prompt, system),
        steering_scale=scale,
        answer=answer,
        max_new_tokens=max_new_tokens,
    )
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(tokens_page(view), encoding="utf-8")
        say(f"wrote {html}")
    if as_json:
        typer.echo(json.dumps(view.to_dict()))
    else:
        console.print(TokensInTerminal(view))
