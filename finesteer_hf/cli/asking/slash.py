"""The commands of a chat that begin with a slash."""

from __future__ import annotations

import math
from collections.abc import Callable

from finesteer_hf.cli.asking.chat import named_source
from finesteer_hf.cli.asking.session import ChatSession
from finesteer_hf.cli.common import errors, table


# Each command with what follows it, and what it does; in the order of /help.
HELP: dict[str, tuple[str, str]] = {
    "/steer": ("NAME", "steer with an adapter; NAME=FOLDER loads one first"),
    "/scale": ("NUMBER", "multiply the adapter's strength, such as /scale 1.5"),
    "/off": ("", "stop steering; /steer brings it back"),
    "/compare": ("", "answer twice, unsteered and steered; again: once"),
    "/adapters": ("", "list the loaded adapters"),
    "/reset": ("", "forget the conversation"),
    "/help": ("", "this list"),
    "/quit": ("", "end; so do ctrl-D and ctrl-C twice"),
}


class Quit(Exception):
    """The user wants to end the chat."""


def run(session: ChatSession, line: str) -> None:
    """Run a command; what it says goes to stderr.

    Raises:
        Quit: for /quit.
        ValueError: for an unknown command, or a wrong argument; says what there is.
    """
    name, _, argument = line.strip().partition(" ")
    if name == "/exit":
        name = "/quit"
    found = [command for command in HELP if command.startswith(name)]
    if name != "/" and len(found) == 1:
        name = found[0]
    if name not in _RUN:
        raise ValueError(f"There is no {name}. There are {', '.join(HELP)}.")
    if argument and not HELP[name][0]:
        raise ValueError(f"{name} takes nothing after it.")
    _RUN[name](session, argument.strip())


def _steer(session: ChatSession, argument: str) -> None:
    adapters = session.adapters
    argument = argument or session.before or ""
    if argument not in adapters and "=" in argument:
        name, source = named_source(argument)
        session.turns.model.load_steering(source, name)
        argument = name
    elif argument not in adapters:
        loaded = f"Loaded: {', '.join(adapters)}." if adapters else "None is loaded."
        raise ValueError(f"/steer takes the name of an adapter. {loaded} /steer NAME=FOLDER loads another.")
    session.active = argument
    _say_state(session)


def _scale(session: ChatSession, argument: str) -> None:
    try:
        scale = float(argument)
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale):
        raise ValueError(f"/scale takes a number, such as /scale 1.5; it is {session.scale:g} now.")
    session.scale = scale
    _say_state(session)


def _off(session: ChatSession, _: str) -> None:
    session.before, session.active = session.active or session.before, None
    _say_state(session)


def _compare(session: ChatSession, _: str) -> None:
    if session.active is None:
        raise ValueError("/compare needs an adapter that steers: /steer NAME first.")
    session.compare = not session.compare
    _say_state(session)


def _adapters(session: ChatSession, _: str) -> None:
    if not session.adapters:
        raise ValueError("No adapter is loaded. /steer NAME=FOLDER or NAME=ORG/REPO loads one.")
    rows = [
        (
            ("* " if name == session.active else "  ") + name,
            adapter.config.steering_type,
            f"{adapter.config.strength:g}",
            adapter.config.positions,
            adapter.source or "",
        )
        for name, adapter in session.adapters.items()
    ]
    errors.print(table(("adapter", "method", "strength", "tokens", "from"), rows))


def _reset(session: ChatSession, _: str) -> None:
    session.turns.messages.clear()
    errors.print("[dim]a new conversation[/]")


def _help(session: ChatSession, _: str) -> None:
    for name, (argument, what) in HELP.items():
        errors.print(f"  {f'{name} {argument}':<15} {what}", markup=False, highlight=False)


def _quit(session: ChatSession, _: str) -> None:
    raise Quit


def _say_state(session: ChatSession) -> None:
    text = "unsteered" if session.active is None else f"steered by {session.active} x {session.scale:g}"
    twice = "; each answer comes unsteered, then steered" if len(session.conditions()) == 2 else ""
    errors.print(f"{text}{twice}", style="dim", markup=False, highlight=False)


_RUN: dict[str, Callable[[ChatSession, str], None]] = {
    "/steer": _steer,
    "/scale": _scale,
    "/off": _off,
    "/compare": _compare,
    "/adapters": _adapters,
    "/reset": _reset,
    "/help": _help,
    "/quit": _quit,
}
