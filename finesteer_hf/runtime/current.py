"""The session that the calling thread stands in, and code that runs inside or outside it."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from finesteer_hf.runtime.call import SteeringRuntime
    from finesteer_hf.runtime.session import CallSession


CURRENT: ContextVar[CallSession | None] = ContextVar("finesteer_hf_session", default=None)


def current_session(runtime: SteeringRuntime) -> CallSession | None:
    """The innermost session of this thread that belongs to a model; an assistant model has its own.

    None also inside a block that was entered since: the block's calls are calls of their own.
    """
    session = CURRENT.get()
    while session is not None and session.runtime is not runtime:
        session = session.outer
    return None if session is not None and session.blocks else session


def end_interrupted_forward(runtime: SteeringRuntime) -> None:
    """End the session of a plain forward that an interrupt has ended: torch runs hooks after errors, not after those."""
    session = CURRENT.get()
    if session is not None and session.of_forward and session.runtime is runtime:
        session.__exit__()


def outside_sessions(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function that is not part of the running call: what it asks of the model are calls of their own."""
    token = CURRENT.set(None)
    try:
        return function(*args, **kwargs)
    finally:
        CURRENT.reset(token)


def in_session(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that runs in the session that is current now, whenever and in whichever thread it is called."""
    session = CURRENT.get()
    if session is None:
        return function

    def run(*args: Any, **kwargs: Any) -> Any:
        token = CURRENT.set(session)
        try:
            return function(*args, **kwargs)
        finally:
            CURRENT.reset(token)

    return run
