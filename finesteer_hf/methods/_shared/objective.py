"""How candidates are compared: by their effect on held-out answers, within limits on the damage.

One of three figures leads, depending on the held-out rows. If steering makes the wanted answers likely token by token,
the probability of their least likely token leads: it rises only if the model gives whole answers, and an overdose
lowers it. Open answers have many wordings, so steering does not make one of them likely. If a classifier can tell
chosen answers from rejected ones, it judges what the steered model itself says. If steering raises the probability that
this is of the chosen kind, it leads, discounted by what it costs in fluency. Otherwise the preference leads: the
probability that the chosen answer beats the rejected one. A preference can be won by making everything unlikely, so the
limits also bound how much less likely the model's own words and the chosen answers may become.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from finesteer_hf.method_api import DosePoint


Criterion = Literal["sayable", "wanted", "preference"]
# For each criterion, the figure of a point, its standard error, and that of its rise.
LEADING: Mapping[Criterion, tuple[str, str, str]] = {
    "sayable": ("bottleneck", "bottleneck_se", "bottleneck_rise_se"),
    "wanted": ("wanted", "wanted_se", "wanted_rise_se"),
    "preference": ("preference", "preference_se", "preference_rise_se"),
}
# Wanted answers count as sayable if their least likely token reaches this mean probability, and steering raised it: by
# twice the standard error of the difference.
SAYABLE = 0.1
# Own words may become less likely by this share of what the chosen answers gain. With a share of 1 a map for refusals
# got far more than the dose at which the refusals were most likely. With none, where the judge's figure is level over a
# range of doses, the fit took the lowest: 74% of the held-out refusals of SmolLM2, where 83% were to be had.
SURPRISE = 0.5


@dataclass(frozen=True)
class Limits:
    """Limits on what steering may cost.

    Attributes:
        general_kl: 95th percentile of the divergence on general prompts, in nats.
        general_changed: share of general answers that change, if measured.
        own_words: nats per token by which the steered model's greedy answers may be less likely under the base than
            the base's own, plus half of the gain of the chosen answers: new answers must surprise the base, but only
            so far.
        likelihood: nats per token by which the chosen answers may become less likely.
        repetition: repeated share of the model's own answers (see `DosePoint.repeated`) above the unsteered model's.
    """

    general_kl: float = 0.1
    general_changed: float = 0.05
    own_words: float = 0.2
    likelihood: float = 0.5
    repetition: float = 0.1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
                raise ValueError(f"limits[{field.name!r}] must be a number of at least 0, got {value!r}.")

    @classmethod
    def of(cls, given: Mapping[str, float]) -> Limits:
        """The defaults, overridden by a config's values.

        Raises:
            ValueError: for an unknown limit, or a value that is not a number of at least 0.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(given) - set(names))
        if unknown:
            raise ValueError(f"limits has no {unknown}; it has {names}.")
        return cls(**given)

    def to_dict(self) -> dict[str, float]:
        """JSON-ready, as in a config."""
        return dataclasses.asdict(self)

    def broken_by(self, point: DosePoint, unsteered: DosePoint, criterion: Criterion) -> list[str]:
        """Names of the limits that a point breaks.

        If the model gives the wanted answers, they may be unlikely under the base, and their own likelihood leads. So
        the limits on likelihoods do not apply then.
        """
        excess = {
            "general_kl": point.kl,
            "general_changed": point.changed,
            "repetition": _rise(unsteered.repeated, point.repeated),
        }
        if criterion != "sayable":
            excess["likelihood"] = _rise(point.likelihood, unsteered.likelihood)
            excess["own_words"] = surprise(point, unsteered)
        return [name for name, value in excess.items() if value is not None and value > getattr(self, name) + 1e-9]


@dataclass(frozen=True)
class Objective:
    """Compares points measured on the same rows.

    Attributes:
        unsteered: the point of the unsteered model.
        limits: limits on what steering may cost.
        criterion: the figure that leads.
    """

    unsteered: DosePoint
    limits: Limits
    criterion: Criterion

    @classmethod
    def of(cls, points: Iterable[DosePoint], limits: Limits) -> Objective:
        """Choose the leading figure from points, which must include the unsteered one of strength 0."""
        points = list(points)
        unsteered = next(point for point in points if point.strength == 0)
        raises: dict[Criterion, Callable[[DosePoint], bool]] = {
            "sayable": is_sayable,
            "wanted": lambda point: raises_wanted(point, unsteered),
        }
        for criterion, moves in raises.items():
            if any(moves(p) and not limits.broken_by(p, unsteered, criterion) for p in points if p.strength):
                return cls(unsteered, limits, criterion)
        return cls(unsteered, limits, "preference")

    def value(self, point: DosePoint) -> float:
        """The figure to raise: a probability.

        For `wanted` it is discounted by the ratio of perplexities, less what new answers must surprise: when nearly all
        answers are of the chosen kind, a higher dose still moves the judge a little, and breaks the text.
        """
        value = getattr(point, LEADING[self.criterion][0])
        if value is None or not math.isfinite(value):
            return -math.inf
        if self.criterion == "wanted":
            value *= math.exp(-max(0.0, surprise(point, self.unsteered) or 0.0))
        return float(value)

    def rise_se(self, point: DosePoint) -> float:
        """Standard error of the rise of that figure."""
        return float(getattr(point, LEADING[self.criterion][2]))

    def broken(self, point: DosePoint) -> list[str]:
        """Names of the limits that a point breaks."""
        return self.limits.broken_by(point, self.unsteered, self.criterion)

    def allowed(self, points: Sequence[DosePoint]) -> list[DosePoint]:
        """Steered points within the limits."""
        return [point for point in points if point.strength and not self.broken(point)]

    def merit(self, point: DosePoint) -> tuple[bool, float]:
        """Sort key of points: those within the limits above the others, then by value."""
        return not self.broken(point), self.value(point)

    def describe(self, point: DosePoint) -> str:
        """A sentence on a point's figures, for reports."""
        if self.criterion == "sayable":
            return (
                f"the least likely token of the wanted answers has probability {point.bottleneck:.3f}, unsteered "
                f"{self.unsteered.bottleneck:.3f}"
            )
        if self.criterion == "wanted":
            return (
                f"the model's own answers are of the chosen kind with probability {point.wanted or 0:.3f}, unsteered "
                f"{self.unsteered.wanted:.3f}"
            )
        return (
            f"the chosen answer is preferred with probability {point.preference:.3f} (per token), unsteered "
            f"{self.unsteered.preference:.3f}"
        )

    def describe_limits(self) -> str:
        """The limits in words."""
        limits, parts = self.limits, []
        parts.append(f"divergence on general prompts at most {limits.general_kl:g} nats")
        if self.unsteered.changed is not None:
            parts.append(f"at most {limits.general_changed:.0%} of their answers changed")
        if self.criterion != "sayable":
            parts.append(f"own words at most {limits.own_words:g} nats per token less likely under the base")
            parts.append(f"chosen answers at most {limits.likelihood:g} nats per token less likely")
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, for reports."""
        return {"criterion": self.criterion, "limits": self.limits.to_dict()}


def is_sayable(point: DosePoint) -> bool:
    """Whether a steered point makes the wanted answers likely token by token."""
    return point.bottleneck >= SAYABLE and point.bottleneck_rise > 2 * point.bottleneck_rise_se


def raises_wanted(point: DosePoint, unsteered: DosePoint) -> bool:
    """Whether a steered model's own answers are judged, and clearly more of them are of the wanted kind."""
    if point.wanted is None or unsteered.wanted is None:
        return False
    return point.wanted - unsteered.wanted > 2 * point.wanted_rise_se


def surprise(point: DosePoint, unsteered: DosePoint) -> float | None:
    """Nats per token by which own words are less likely under the base than new answers must be; None if not measured.

    New answers are unlikely under it even where nothing is wrong with them, so half of what the chosen answers gain is
    free.
    """
    lost = _rise(point.own_words, unsteered.own_words)
    gained = max(0.0, point.likelihood - unsteered.likelihood)
    return None if lost is None else lost - SURPRISE * gained


def _rise(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before
