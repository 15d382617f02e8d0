"""Two conditions side by side, as rows for tables, cards and reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finesteer_hf.evaluation.behaviour import Outcome
from finesteer_hf.evaluation.measures.statistics import Mean, Proportion, holm, mcnemar, paired_p_value


@dataclass(frozen=True)
class ComparisonRow:
    """A figure under two conditions.

    Attributes:
        dataset: name of the prompts.
        metric: what is counted.
        unsteered: the figure of the base model; None if it has none (a gate).
        steered: the figure under steering.
        p_value: p of the two conditions on the same prompts: McNemar's exact test for shares, sign flips for means.
    """

    dataset: str
    metric: str
    unsteered: Proportion | Mean | None
    steered: Proportion | Mean | None
    p_value: float | None = None

    def cells(self, holds: bool = False) -> tuple[str, str, str, str, str]:
        """The row as strings, with a star if its p is significant in the table and a dash for missing values."""
        p_value = "-" if self.p_value is None else p_text(self.p_value, holds)
        return self.dataset, self.metric, _text(self.unsteered), _text(self.steered), p_value

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, stored in an adapter's config and shown on its card."""
        return {
            "dataset": self.dataset,
            "metric": self.metric,
            "unsteered": None if self.unsteered is None else self.unsteered.to_dict(),
            "steered": None if self.steered is None else self.steered.to_dict(),
            "p_value": self.p_value,
        }


# Significance level in a table of several p-values, after correction.
ALPHA = 0.05
HOLM_NOTE = f"*: below {ALPHA:g} after Holm's correction for all p of the table."
COLUMNS = ("data", "figure", "unsteered", "steered", "paired p")


def _text(figure: Proportion | Mean | None) -> str:
    return "-" if figure is None else str(figure)


def p_text(value: float, holds: bool) -> str:
    """A p-value as text, with a star if it is significant after the table's correction."""
    return f"{value:.2g}{'*' if holds else ''}"


def table_cells(rows: Sequence[ComparisonRow]) -> list[tuple[str, str, str, str, str]]:
    """The rows of a table as strings; a star marks p-values that are significant after Holm's correction."""
    corrected = iter(holm([row.p_value for row in rows if row.p_value is not None]))
    return [row.cells(row.p_value is not None and bool(next(corrected) < ALPHA)) for row in rows]


def compare(dataset: str, metric: str, base: Outcome, steered: Outcome) -> list[ComparisonRow]:
    """All figures of two conditions on the same prompts.

    Args:
        dataset: name of the prompts.
        metric: what a hit is, for example "truthful".
        base: outcome of the base model.
        steered: outcome under steering.
    """
    rows = [ComparisonRow(dataset, metric, base.share, steered.share, steered.against(base).p_value)]
    if base.choices is not None and steered.choices is not None:
        before, after = base.choices, steered.choices
        mc1, mc2 = mcnemar(before.mc1, after.mc1).p_value, paired_p_value(before.mc2, after.mc2)
        rows.append(ComparisonRow(dataset, "MC1", before.mc1_share, after.mc1_share, mc1))
        rows.append(ComparisonRow(dataset, "MC2", before.mc2_mean, after.mc2_mean, mc2))
    fires = steered.fires()
    if fires is not None:
        rows.append(ComparisonRow(dataset, "gate fires", None, fires))
    rows.append(ComparisonRow(dataset, "identical output", None, steered.identical_to(base)))
    return rows
