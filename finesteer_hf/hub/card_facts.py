"""Facts of an adapter for its card and `finesteer show`: settings, data, held-out figures."""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from finesteer_hf.adapters.base_models import LOCAL, is_public, last_part
from finesteer_hf.adapters.config import SteeringConfig


if TYPE_CHECKING:
    from finesteer_hf.adapters.adapter import SteeringAdapter


Row = tuple[str, str]
Figures = TypeVar("Figures", dict[str, Any], list[Any])
_LONGEST_TEXT = 200
# They display text in another order than it is stored.
_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
# Parts of `fit` that are not rows of the data table.
SHOWN_ELSEWHERE: dict[str, type] = {"report": dict, "evaluation": list, "examples": list, "about": str}


@dataclass(frozen=True)
class AdapterFacts:
    """Rows of name and text.

    Attributes:
        settings: method, base, sites, strength, size.
        data: data and versions that it was fitted with.
        held_out: figures of the fit's own held-out rows.
        evaluation: rows of `dataset`, `metric`, `unsteered`, `steered`, `p_value`, all strings.
    """

    settings: list[Row]
    data: list[Row]
    held_out: list[Row]
    evaluation: list[dict[str, str]]


def adapter_facts(adapter: SteeringAdapter) -> AdapterFacts:
    """Collect an adapter's facts; figures in a form that no fit writes become plain text."""
    report, evaluation = figures_of(adapter, "report", dict), figures_of(adapter, "evaluation", list)
    rest = {
        name: value
        for name, value in adapter.config.fit.items()
        if not isinstance(value, SHOWN_ELSEWHERE.get(name, ()))
    }
    return AdapterFacts(
        settings=_settings(adapter),
        data=flatten(rest),
        held_out=flatten(report),
        evaluation=[_evaluation_row(row) for row in evaluation if isinstance(row, dict)],
    )


def figures_of(adapter: SteeringAdapter, name: str, kind: type[Figures]) -> Figures:
    """A part of an adapter's provenance, empty if it has another type than a fit writes."""
    found = adapter.config.fit.get(name)
    return found if isinstance(found, kind) else kind()


def _settings(adapter: SteeringAdapter) -> list[Row]:
    config = adapter.config
    base = base_name(adapter)
    commit = config.base_model_revision
    numbers = sum(tensor.numel() for tensor in adapter.tensors.values())
    size = sum(tensor.numel() * tensor.element_size() for tensor in adapter.tensors.values())
    rows = [
        ("method", config.steering_type),
        ("base model", (base or "not recorded") + (f" at {commit[:12]}" if commit else "")),
        ("LoRA at fit", ", ".join(config.lora) or "none"),
        ("steered tokens", config.positions),
        ("strength", as_text(config.strength)),
    ]
    shared = {field.name for field in dataclasses.fields(SteeringConfig)}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in shared and value is not None:
            rows.append((field.name.replace("_", " "), as_text(value)))
    rows.append(("parameters", f"{numbers:,} numbers, {size:,} bytes"))
    return [(plain(name), plain(value)) for name, value in rows]


def base_name(adapter: SteeringAdapter) -> str | None:
    """The base model's Hub id; of a local path only the last part, since a card may be published."""
    name = adapter.config.base_model_name_or_path
    return plain(name if is_public(name) else last_part(name.removeprefix(LOCAL))) if name else name


def plain(text: str) -> str:
    """A text on one line, without terminal control characters and without marks that change its direction."""
    line = " ".join(text.split())
    return "".join(
        character for character in line if unicodedata.category(character) != "Cc" and character not in _BIDI
    )


def flatten(values: dict[str, Any], prefix: str = "") -> list[Row]:
    """Nested settings and figures as rows; curves and samples are left out."""
    rows: list[Row] = []
    for key, value in values.items():
        name = plain(f"{prefix}{key}".replace("_", " "))
        if isinstance(value, dict):
            if is_share(value) or is_estimate(value):
                rows.append((name, share_text(value)))
            else:
                rows += flatten(value, f"{name}: ")
        elif isinstance(value, list):
            if value and all(isinstance(item, str) for item in value) and len(", ".join(value)) <= _LONGEST_TEXT:
                rows.append((name, plain(", ".join(value))))
        elif value is not None:
            text = plain(as_text(value))
            if len(text) <= _LONGEST_TEXT:
                rows.append((name, shorten_digest(text)))
    return rows


def is_share(value: Any) -> bool:
    """Whether a value is a `Proportion` as JSON."""
    return is_estimate(value) and all(isinstance(value.get(name), int) for name in ("k", "n"))


def is_estimate(value: Any) -> bool:
    """Whether a value is a `Mean` as JSON."""
    if not isinstance(value, dict) or not {"value", "low", "high"} <= set(value):
        return False
    return value["value"] is None or all(isinstance(value[name], (int, float)) for name in ("value", "low", "high"))


def is_number(value: Any) -> bool:
    """Whether a value is a JSON number; true is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def share_text(value: Any) -> str:
    """A share or mean from JSON as text, with n and interval; anything else as it is."""
    if value is None:
        return "-"
    if not is_estimate(value):
        return plain(as_text(value)[:_LONGEST_TEXT])
    if value["value"] is None:
        return "no items"
    if is_share(value):
        return f"{100 * value['value']:.1f}% [{100 * value['low']:.1f}, {100 * value['high']:.1f}] n={value['n']}"
    number = f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
    return number + (f" n={value['n']}" if "n" in value else "")


def as_text(value: Any) -> str:
    """A number with at most four significant digits after rounding, anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def shorten_digest(text: str) -> str:
    """The first digits of a hexadecimal digest, enough to compare by eye; the config has all of it."""
    return text[:12] if re.fullmatch(r"[0-9a-f]{40,64}", text) else text


def _evaluation_row(row: dict[str, Any]) -> dict[str, str]:
    p_value = row.get("p_value")
    return {
        "dataset": plain(str(row.get("dataset", ""))),
        "metric": plain(str(row.get("metric", ""))),
        "unsteered": share_text(row.get("unsteered")),
        "steered": share_text(row.get("steered")),
        "p_value": "-" if p_value is None else plain(f"{p_value:.2g}" if is_number(p_value) else str(p_value)),
    }
