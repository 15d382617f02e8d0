"""The errors and warnings of the package.

Each error subclasses a built-in one, so that `except ValueError` keeps working. Each message names the thing, lists
what exists and says what to do.
"""

from __future__ import annotations

from collections.abc import Iterable


_LONGEST_MESSAGE = 2_000


class SteeringError(Exception):
    """Base of the package's errors."""


class UnsupportedModelError(SteeringError, ValueError):
    """The model's layout cannot be steered (no decoder stack found, an unknown residual layout, an encoder-decoder)."""


class SiteError(SteeringError, ValueError):
    """A site does not exist in the model, or its name cannot be read."""


class AdapterNotFoundError(SteeringError, ValueError):
    """No adapter of that name is loaded."""

    def __init__(self, name: str, available: Iterable[str]) -> None:
        names = sorted(available)
        hint = (
            f"Loaded adapters: {names}." if names else "No adapter is loaded; call `model.load_steering(...)` first."
        )
        super().__init__(f"Steering adapter {name!r} is not loaded. {hint}")


class AdapterFileError(SteeringError, ValueError):
    """An adapter folder or repo has files that are missing, truncated, malformed or unsafe.

    Args:
        message: what is wrong. It may quote an untrusted file, so a long message is cut in the middle.
    """

    def __init__(self, message: str) -> None:
        if len(message) > _LONGEST_MESSAGE:
            half = _LONGEST_MESSAGE // 2
            message = f"{message[:half]} ... {message[-half:]}"
        super().__init__(message)


class AdapterMismatchError(SteeringError, ValueError):
    """The adapter was fitted for another base model."""


class UnknownMethodError(SteeringError, ValueError):
    """No installed package provides the `steering_type`."""

    def __init__(self, name: str, available: Iterable[str]) -> None:
        super().__init__(
            f"Unknown steering_type {name!r}. Installed methods: {sorted(available)}. Upgrade finesteer_hf, install the "
            "package that provides the method, or register it with `register_steering_method`."
        )


class DatasetError(SteeringError, ValueError):
    """The data set cannot be fitted: empty, a missing column, identical answers, one class only."""


class NoAdapterError(SteeringError, FileNotFoundError):
    """There is no adapter in the given folder, repo, revision or subfolder."""


class HubUnreachableError(SteeringError, ConnectionError):
    """The Hub did not answer, or answered with a server error, and the cache does not have the files."""


class PushError(SteeringError, RuntimeError):
    """A push failed; the message says what is on the Hub now."""


class PushConflictError(PushError):
    """Someone else changed the same files on the Hub in the meantime; nothing was pushed."""


class BlockElsewhereWarning(UserWarning):
    """A call steers with what is set on the model while a `with model.steering(...)` block is open in another thread."""


class PromptEndWarning(UserWarning):
    """A plain forward's steering depends on where the prompt ends, and the call does not say where."""
