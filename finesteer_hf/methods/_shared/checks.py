"""Checks that the configs of several methods share, and helpers that fill configs in."""

from __future__ import annotations

import dataclasses
import math
import reprlib
from typing import Any, TypeVar

from finesteer_hf.adapters.config import MOST_LAYERS, SteeringConfig
from finesteer_hf.errors import AdapterFileError
from finesteer_hf.method_api import ModelInfo
from finesteer_hf.methods._shared.trials import candidate_layers


ConfigT = TypeVar("ConfigT", bound=SteeringConfig)


def check_one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raise `ValueError` unless a field has an allowed value."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}.")


def check_count(name: str, value: Any, least: int) -> None:
    """Raise `ValueError` unless a field is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")


def check_number(name: str, value: Any, *, above: float = -math.inf, below: float = math.inf) -> None:
    """Raise `ValueError` unless a field is a finite number strictly between two others."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not above < value < below:
        raise ValueError(f"{name} must be a number strictly between {above:g} and {below:g}, got {value!r}.")


def check_layer(layer: Any, num_layers: int | None, least: int = 0, name: str = "layer") -> None:
    """Raise `ValueError` unless `layer` is `auto` or a block of a model with `num_layers` (None: unknown)."""
    if layer == "auto":
        return
    if isinstance(layer, bool) or not isinstance(layer, int) or layer < least:
        raise ValueError(f"{name} must be 'auto' or an integer of at least {least}, got {layer!r}.")
    if layer >= MOST_LAYERS:
        raise ValueError(f"{name} must be less than {MOST_LAYERS}, got {reprlib.repr(layer)}.")
    if num_layers is not None and layer >= num_layers:
        raise ValueError(f"{name}={layer} is out of range for a model of {num_layers} layers.")


def check_layers(layers: Any, num_layers: int | None, least: int = 0, name: str = "layers") -> None:
    """Raise `ValueError` unless `layers` is `auto` or distinct ascending blocks of a model with `num_layers`."""
    if layers == "auto":
        return
    if not isinstance(layers, list) or not 0 < len(layers) <= MOST_LAYERS:
        raise ValueError(f"{name} must be 'auto' or a list of at least one block, got {reprlib.repr(layers)}.")
    for layer in layers:
        check_layer(None if layer == "auto" else layer, num_layers, least, name)
    if sorted(set(layers)) != layers:
        raise ValueError(f"{name} must be ascending and without repetition, got {layers[:50]}.")


def check_strength(strength: Any, rules: tuple[str, ...] = ("kl", "norm")) -> None:
    """Raise `ValueError` unless `strength` is a number, `auto`, or one of the rules `kl:<nats>` and `norm:<share>`."""
    if isinstance(strength, (int, float)) or strength == "auto":
        return
    kind, _, number = str(strength).partition(":")
    try:
        valid = kind in rules and 0 < float(number) < math.inf
    except ValueError:
        valid = False
    if not valid:
        written = ["a number", "'auto'", *(f"'{rule}:<{'nats' if rule == 'kl' else 'share'}>'" for rule in rules)]
        raise ValueError(f"strength must be {', '.join(written[:-1])} or {written[-1]}, got {strength!r}.")


def layers_of(layers: list[int] | str, num_layers: int, least: int = 0) -> list[int]:
    """The given blocks, or for `auto` those from `least` on between 20% and 80% of the depth.

    Raises:
        ValueError: if a block is out of range.
    """
    if isinstance(layers, str):
        found = [layer for layer in candidate_layers("auto", num_layers) if layer >= least]
        return found or [min(least, num_layers - 1)]
    return [candidate_layers(layer, num_layers)[0] for layer in layers]


def filled_in(config: ConfigT, info: ModelInfo, **chosen: Any) -> ConfigT:
    """A copy of a config with the model's sizes and the fit's choices."""
    return dataclasses.replace(config, hidden_size=info.hidden_size, num_hidden_layers=info.num_layers, **chosen)


def require_fitted(config: SteeringConfig, *names: str) -> None:
    """Raise `AdapterFileError` if a field that a fit fills in is still `auto` or empty."""
    blank = [name for name in ("hidden_size", *names) if getattr(config, name) in ("auto", None)]
    if blank:
        raise AdapterFileError(
            f"The {config.steering_type} config has no {' and no '.join(blank)}, so it is not fitted. Run `fit_steering`."
        )
