"""The rows of the comparison of methods: each method as it comes, and as published where that is something else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.real.real_rows import REFERENCE, UNSTEERED, slug_of
from finesteer_hf import steering_methods
from finesteer_hf.adapters.config import SteeringConfig
from finesteer_hf.adapters.registry import get_steering_method


PROMPT = "system prompt"
# Nothing to fit.
LEFT_OUT = {"CONSTANT"}
# Settings of `.paper()` that are sizes of the published models, by method; what they are here depends on the model.
Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        label: its name.
        config: makes its settings of the model's sizes; None for a row that fits nothing.
        note: what is not default in it.
    """

    label: str
    config: Callable[[Sizes], SteeringConfig] | None = None
    note: str = ""

    @property
    def slug(self) -> str:
        """The label as a file name, and as `--methods` takes it."""
        return slug_of(self.label)


def default(method: str, **fields: Any) -> Callable[[Sizes], SteeringConfig]:
    """A method's config, with some fields set."""
    return lambda sizes: get_steering_method(method).config_cls(**fields)


def published(method: str, **fields: str | Callable[[Sizes], Any]) -> Callable[[Sizes], SteeringConfig]:
    """A method's `.paper()` with the strength chosen: published ones are for other models.

    Args:
        method: its name.
        **fields: settings that are sizes of a model: from the sizes of this one.
    """

    def make(sizes: Sizes) -> SteeringConfig:
        own = {name: value(sizes) if callable(value) else value for name, value in fields.items()}
        config: SteeringConfig = get_steering_method(method).config_cls.paper(**{"strength": "auto", **own})  # type: ignore[attr-defined]
        return config

    return make


def middle(sizes: Sizes) -> int:
    """The block that stands where the published one does in its model, 40% up."""
    return round(0.4 * (sizes["layers"] - 1))


def rows() -> dict[str, Row]:
    """All rows by slug, the most telling first."""
    constant = {"experts": "reduced_rank", "num_experts": 1, "residual_rank": 0}
    found = [
        Row(UNSTEERED),
        Row(PROMPT, note="the best of three on the fit half"),
        Row(REFERENCE, default(REFERENCE)),
        Row("FINESTEER, constant", default(REFERENCE, **constant), "its gate with a constant vector"),
    ]
    others = [name for name in steering_methods() if name not in {*LEFT_OUT, REFERENCE}]
    found += [Row(name, default(name)) for name in others]
    found += [
        Row("CAA, gradient", default("CAA", vector="gradient"), 'vector="gradient"'),
        Row("CAA, refusal vector", default("CAA", vector="queries"), 'vector="queries"'),
        Row(
            "FINESTEER, published",
            published(REFERENCE, subspace_rank=lambda sizes: min(128, sizes["width"] // 4)),
            "subspace of rank 128, at most a quarter of the width",
        ),
        Row("CAA, published", published("CAA", pool="answer_mean"), "positions as published"),
        Row("ITI, published", published("ITI"), "48 heads"),
        Row("FASB, published", published("FASB"), "24 heads"),
        Row("CAST, published", published("CAST"), "all positions, unit directions"),
        Row("SADI, published", default("SADI", compat="official"), 'compat="official"'),
        Row("FLORAIN, published", published("FLORAIN", layer=middle), "one block, 40% up"),
        Row("REPS, published", published("REPS", layer=middle), "one block, 40% up"),
        Row("BIPO, published", published("BIPO", layer=middle), "one block, 40% up"),
    ]
    return {row.slug: row for row in found}
