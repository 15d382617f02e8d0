"""`finesteer chat`: a conversation on the screen, steered or not."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from finesteer_hf.cli.common import errors, load
from finesteer_hf.cli.options import LOAD, takes


@takes(loading=dataclasses.replace(LOAD, without=("steering", "steering_revision")))
def chat(
    model: Annotated[str, typer.Argument(help="Base model: Hub id, folder, or `playground`.")],
    steering: Annotated[
        list[str] | None,
        typer.Option(
            "--steering", "-s", help="Adapter, name=folder or name=org/repo; may be repeated. The first one is active."
        ),
    ] = None,
    scale: Annotated[float, typer.Option(help="Multiplies the adapter's strength.")] = 1.0,
    compare: Annotated[bool, typer.Option("--compare", help="Show each answer twice: unsteered and steered.")] = False,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of sampling; 0 is greedy.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 256,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write an object a line for each turn, instead of streaming.")
    ] = False,
    *,
    loading: dict[str, Any],
) -> None:
    """Chat with a model, steered or not.

    Answers stream; below each are its adapter and gate. /help lists what can be typed: /steer, /scale, /off, /compare
    and more. Ctrl-C stops an answer; twice ends. Lines from a pipe are answered one after another.
    """
    sources = named_sources(steering or [])
    if compare and not sources:
        raise ValueError("--compare needs an adapter: give --steering name=folder.")
    loaded, tokenizer = load(model, steering=sources or None, **loading)
    if not tokenizer.chat_template:
        raise ValueError(
            f"{model} has no chat template, so it was not trained to chat. Use `finesteer generate {model} --plain`."
        )
    from finesteer_hf.cli.asking.session import ChatSession, Turns
    from finesteer_hf.cli.asking.terminal import ChatLoop

    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    turns = Turns(loaded, tokenizer, system, max_new_tokens, sampling)
    session = ChatSession(turns, active=next(iter(sources), None), scale=scale, compare=compare)
    steered = f"steered by {session.active} x {scale:g}" if session.active else "unsteered"
    errors.print(f"{steered}; /help lists the commands", style="dim", markup=False, highlight=False)
    ChatLoop(session, as_json).run()


def named_sources(texts: list[str]) -> dict[str, str]:
    """Adapters by name, from `name=source` or a source alone, which is named by its last part.

    Raises:
        ValueError: for an empty name or source, or a name given twice.
    """
    sources: dict[str, str] = {}
    for text in texts:
        name, source = named_source(text)
        if name in sources:
            raise ValueError(f"--steering names {name!r} twice; give each adapter its own name, name=folder.")
        sources[name] = source
    return sources


def named_source(text: str) -> tuple[str, str]:
    """Name and source of an adapter; see `named_sources`."""
    name, equals, source = text.partition("=")
    if not equals or Path(text).exists():
        name, source = Path(text.partition("@")[0]).name, text
    if not name or not source:
        raise ValueError(f"--steering {text!r}: write name=folder or name=org/repo.")
    return name, source
