"""What is told of an adapter, by its card and by `finesteer show`: settings, data, held-out figures."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from finesteer_hf.config import SteeringConfig


if TYPE_CHECKING:
    from finesteer_hf.adapter import SteeringAdapter


Row = tuple[str, str]
_LONGEST_TEXT = 200
# Parts of `fit` that are no row of the data table.
SHOWN_ELSEWHERE = ("report", "evaluation", "examples", "about")


@dataclass(frozen=True)
class AdapterFacts:
    """Rows of name and text.

    Attributes:
        settings: method, base, sites, strength, size.
        data: what it was fitted on, with what.
        held_out: figures of the fit's own held-out rows.
        evaluation: rows of `dataset`, `metric`, `unsteered`, `steered`, `p_value`, all texts.
    """

    settings: list[Row]
    data: list[Row]
    held_out: list[Row]
    evaluation: list[dict[str, str]]


def adapter_facts(adapter: SteeringAdapter) -> AdapterFacts:
    """Collect what an adapter says of itself."""
    fit = adapter.config.fit
    report = fit.get("report", {})
    rest = {name: value for name, value in fit.items() if name not in SHOWN_ELSEWHERE}
    return AdapterFacts(
        settings=_settings(adapter),
        data=flatten(rest),
        held_out=flatten(report) if isinstance(report, dict) else [],
        evaluation=[_evaluation_row(row) for row in fit.get("evaluation", []) if isinstance(row, dict)],
    )


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
    return rows


def base_name(adapter: SteeringAdapter) -> str | None:
    """The base model's Hub id; of a local path only the last part, for a card may be published."""
    name = adapter.config.base_model_name_or_path
    return name if not name or is_hub_id(name) else Path(name).name


def is_hub_id(name: str) -> bool:
    """Whether a base model's name can be a Hub id and is no path of this machine."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def flatten(values: dict[str, Any], prefix: str = "") -> list[Row]:
    """Nested settings and figures as rows; curves and samples, which are no text, are left out."""
    rows: list[Row] = []
    for key, value in values.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, dict):
            if is_share(value) or is_estimate(value):
                rows.append((name, share_text(value)))
            else:
                rows += flatten(value, f"{name}: ")
        elif isinstance(value, list):
            if value and all(isinstance(item, str) for item in value) and len(", ".join(value)) <= _LONGEST_TEXT:
                rows.append((name, ", ".join(value)))
        elif value is not None:
            text = as_text(value)
            if len(text) <= _LONGEST_TEXT:
                rows.append((name, shorten_digest(text)))
    return rows


def is_share(value: Any) -> bool:
    """Whether a value is a `Proportion` as JSON."""
    return isinstance(value, dict) and {"k", "n", "value", "low", "high"} <= set(value)


def is_estimate(value: Any) -> bool:
    """Whether a value is a `Mean` as JSON."""
    return isinstance(value, dict) and {"value", "low", "high"} <= set(value)


def share_text(value: dict[str, Any] | None) -> str:
    """A share or mean of JSON as text, with n and interval."""
    if value is None:
        return "-"
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
    """The first digits of a hexadecimal digest: enough to compare by eye; the config has it whole."""
    return text[:12] if re.fullmatch(r"[0-9a-f]{40,64}", text) else text


def _evaluation_row(row: dict[str, Any]) -> dict[str, str]:
    p_value = row.get("p_value")
    return {
        "dataset": str(row.get("dataset", "")),
        "metric": str(row.get("metric", "")),
        "unsteered": share_text(row.get("unsteered")),
        "steered": share_text(row.get("steered")),
        "p_value": "-" if p_value is None else f"{p_value:.2g}",
    }
