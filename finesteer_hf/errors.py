"""The errors that users of the package meet.

Each is a subclass of the built-in that fits, so that `except ValueError` keeps working, and each message names the
thing, lists what exists and says what to do.
"""

from __future__ import annotations

from collections.abc import Iterable


_LONGEST_MESSAGE = 2_000


class SteeringError(Exception):
    """Root of the package's errors."""


class UnsupportedModelError(SteeringError, ValueError):
    """The model's layout cannot be steered (no decoder stack found, an unknown residual layout, an encoder-decoder)."""


class SiteError(SteeringError, ValueError):
    """A site does not exist in the model, or its name cannot be read."""


class AdapterNotFoundError(SteeringError, ValueError):
    """An adapter name that is not loaded."""

    def __init__(self, name: str, available: Iterable[str]) -> None:
        names = sorted(available)
        hint = (
            f"Loaded adapters: {names}." if names else "No adapter is loaded; call `model.load_steering(...)` first."
        )
        super().__init__(f"Steering adapter {name!r} is not loaded. {hint}")


class AdapterFileError(SteeringError, ValueError):
    """An adapter folder or repo whose files are missing, truncated, malformed or unsafe.

    Args:
        message: what is wrong. It may quote a stranger's file, so of a long one only both ends are kept.
    """

    def __init__(self, message: str) -> None:
        if len(message) > _LONGEST_MESSAGE:
            half = _LONGEST_MESSAGE // 2
            message = f"{message[:half]} ... {message[-half:]}"
        super().__init__(message)


class AdapterMismatchError(SteeringError, ValueError):
    """An adapter fitted for another base model."""


class UnknownMethodError(SteeringError, ValueError):
    """A `steering_type` that no installed package provides."""

    def __init__(self, name: str, available: Iterable[str]) -> None:
        super().__init__(
            f"Unknown steering_type {name!r}. Installed methods: {sorted(available)}. Upgrade finesteer_hf, install the "
            "package that provides the method, or register it with `register_steering_method`."
        )


class DatasetError(SteeringError, ValueError):
    """A data set that cannot be fitted: empty, a missing column, identical answers, one class only."""


class NoAdapterError(SteeringError, FileNotFoundError):
    """No adapter where one was looked for: a folder, a repo, a revision of it, or a folder in it."""


class HubUnreachableError(SteeringError, ConnectionError):
    """The Hub did not answer, or answered with an error of its own, and the cache has not what was asked for."""


class PushError(SteeringError, RuntimeError):
    """A push that did not go through; the message says what is on the Hub now."""


class PushConflictError(PushError):
    """Somebody else changed the same files on the Hub meanwhile; nothing was pushed."""


class BlockElsewhereWarning(UserWarning):
    """A call steers with what is set on the model while a `with model.steering(...)` block is open in another thread."""


class PromptEndWarning(UserWarning):
    """A plain forward whose steering depends on where the prompt ends, which nothing says."""
