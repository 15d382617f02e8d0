"""The calling thread's current session, and code that runs inside or outside it."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from finesteer_hf.runtime.call import SteeringRuntime
    from finesteer_hf.runtime.session import CallSession


CURRENT: ContextVar[CallSession | None] = ContextVar("finesteer_hf_session", default=None)


def current_session(runtime: SteeringRuntime) -> CallSession | None:
    """The innermost session of this thread for a model; an assistant model has its own.

    None also inside a block that was entered later: calls in the block are separate calls.
    """
    session = CURRENT.get()
    while session is not None and session.runtime is not runtime:
        session = session.outer
    return None if session is not None and session.blocks else session


def end_interrupted_forward(runtime: SteeringRuntime) -> None:
    """End the session of an interrupted plain forward: torch runs hooks after errors, not after interrupts."""
    session = CURRENT.get()
    if session is not None and session.of_forward and session.runtime is runtime:
        session.__exit__()


def outside_sessions(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function outside the running call: its calls of the model are separate calls."""
    token = CURRENT.set(None)
    try:
        return function(*args, **kwargs)
    finally:
        CURRENT.reset(token)


def in_session(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function to run in the now current session, whenever and in whichever thread it is called."""
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
