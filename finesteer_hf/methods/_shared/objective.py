"""What candidates are compared by: what they make of held-out answers, within limits on what they break.

Two figures can lead, and the held-out rows say which. Where steering makes the wanted answers sayable, token by token, the
likelihood of their least likely token leads: it rises only if whole answers come, and an overdose lowers it. Open answers
have many wordings, so no steering makes one of them likely; there the preference leads, the probability that the chosen
answer beats the rejected one, and because a preference alone is won by making everything unlikely, the model's own words
and the chosen answers must stay as likely as the limits say.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from finesteer_hf.method_api import DosePoint


Criterion = Literal["sayable", "preference"]
# Wanted answers count as sayable where their least likely token reaches this probability on the mean, and is lifted
# there: by twice the standard error of the difference.
SAYABLE = 0.1
# Share of what the chosen answers gain by which own words may be less likely. At all of it a map for refusals was taken
# far beyond the dose at which the refusals themselves were likeliest.
SURPRISE = 0.5


@dataclass(frozen=True)
class Limits:
    """What steering may cost, at most.

    Attributes:
        general_kl: 95th percentile of the divergence on general prompts, in nats.
        general_changed: share of general answers that change, where it is counted.
        own_words: nats a token that the steered model's own greedy words may be less likely under the base than the
            base's own are, beside half of what the chosen answers became likelier: who moves to say what the base did
            not is bound to surprise it, but no more than that.
        likelihood: nats a token that the chosen answers may become less likely.
        repetition: share of tokens of the model's own words that repeat earlier ones (see `DosePoint.repeated`), above
            the unsteered model's.
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
        """The defaults, with what a config gives instead.

        Raises:
            ValueError: for a name that is no limit, or a value that is no number of at least 0.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(given) - set(names))
        if unknown:
            raise ValueError(f"limits has no {unknown}; it takes {names}.")
        return cls(**given)

    def to_dict(self) -> dict[str, float]:
        """JSON-ready, as a config holds it."""
        return dataclasses.asdict(self)

    def broken_by(self, point: DosePoint, unsteered: DosePoint, criterion: Criterion) -> list[str]:
        """Names of the limits that a point breaks.

        Where whole answers come, they are what the model says, and they may be as unlikely under the base as they are;
        their own likelihood is what leads. So those limits hold for preferences alone.
        """
        excess = {
            "general_kl": point.kl,
            "general_changed": point.changed,
            "repetition": _rise(unsteered.repeated, point.repeated),
        }
        if criterion == "preference":
            excess["likelihood"] = _rise(point.likelihood, unsteered.likelihood)
            lost = _rise(point.own_words, unsteered.own_words)
            gained = max(0.0, point.likelihood - unsteered.likelihood)
            excess["own_words"] = None if lost is None else lost - SURPRISE * gained
        return [name for name, value in excess.items() if value is not None and value > getattr(self, name) + 1e-9]


@dataclass(frozen=True)
class Objective:
    """Compares points that were measured on the same rows.

    Attributes:
        unsteered: the model itself.
        limits: what steering may cost.
        criterion: what leads.
    """

    unsteered: DosePoint
    limits: Limits
    criterion: Criterion

    @classmethod
    def of(cls, points: Iterable[DosePoint], limits: Limits) -> Objective:
        """Let points say what leads; the unsteered one, of strength 0, must be among them."""
        points = list(points)
        unsteered = next(point for point in points if point.strength == 0)
        sayable = any(is_sayable(p) and not limits.broken_by(p, unsteered, "sayable") for p in points if p.strength)
        return cls(unsteered, limits, "sayable" if sayable else "preference")

    def value(self, point: DosePoint) -> float:
        """What is raised: a probability."""
        value = point.bottleneck if self.criterion == "sayable" else point.preference
        return value if math.isfinite(value) else -math.inf

    def broken(self, point: DosePoint) -> list[str]:
        """Names of the limits that a point breaks."""
        return self.limits.broken_by(point, self.unsteered, self.criterion)

    def allowed(self, points: Sequence[DosePoint]) -> list[DosePoint]:
        """Steered points within the limits."""
        return [point for point in points if point.strength and not self.broken(point)]

    def merit(self, point: DosePoint) -> tuple[bool, float]:
        """Sorts points: those within the limits above the others, then by value."""
        return not self.broken(point), self.value(point)

    def describe(self, point: DosePoint) -> str:
        """A sentence on what a point reaches, for reports."""
        if self.criterion == "sayable":
            return (
                f"the least likely token of the wanted answers has probability {point.bottleneck:.3f}, unsteered "
                f"{self.unsteered.bottleneck:.3f}"
            )
        return (
            f"the chosen answer is preferred with probability {point.preference:.3f} (a token), unsteered "
            f"{self.unsteered.preference:.3f}"
        )

    def describe_limits(self) -> str:
        """The limits in words."""
        limits, parts = self.limits, []
        parts.append(f"divergence on general prompts at most {limits.general_kl:g} nats")
        if self.unsteered.changed is not None:
            parts.append(f"at most {limits.general_changed:.0%} of their answers changed")
        if self.criterion == "preference":
            parts.append(f"own words at most {limits.own_words:g} nats a token less likely under the base")
            parts.append(f"chosen answers at most {limits.likelihood:g} nats a token less likely")
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, for reports."""
        return {"criterion": self.criterion, "limits": self.limits.to_dict()}


def is_sayable(point: DosePoint) -> bool:
    """Whether a steered point makes the wanted answers come token by token."""
    return point.bottleneck >= SAYABLE and point.bottleneck_rise > 2 * point.bottleneck_rise_se


def _rise(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before
