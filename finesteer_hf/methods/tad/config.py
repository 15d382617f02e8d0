"""The settings of TAD."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from finesteer_hf.adapters.config import MOST_HEADS, SteeringConfig, setting, written_by_fit
from finesteer_hf.methods._shared.checks import check_layer, check_number, check_one_of, check_strength
from finesteer_hf.processors import Positions
from finesteer_hf.sites import BACK


UNCERTAINTIES = ("answers", "entropy")
GATES = ("hard", "soft")
POOLS = ("answer_mean", "answer_last")


@dataclass(kw_only=True)
class TADConfig(SteeringConfig):
    """Settings of a token-level gate by uncertainty.

    Attributes:
        layer: decoder block whose output is judged and steered; `auto` takes, among the three where the head is best
            on held-out tokens, the one with the best held-out effect.
        uncertainty: what the head predicts: `answers` (log-odds that the token belongs to a rejected answer, not a
            chosen one) or `entropy` (of the model's next-token distribution after it, in nats).
        gate: `hard` steers a token or leaves it bit-identical; `soft` weights the vector.
        quantile: share of trusted tokens whose uncertainty is below the threshold.
        pool: answer states whose mean difference is the vector.
        recurrence: N, number of earlier tokens that a token's score uses; 0 judges each token alone. Needs
            `uncertainty="answers"`, and excludes beams, which reorder rows.
        attention: whether the score also uses the attention to these tokens, of all heads up to the judged block.
            Needs a model with `attn_implementation="eager"`, the only one that returns attention weights.
        attention_heads: number of heads of each block, filled in by the fit if attention is used.
    """

    steering_type: ClassVar[str] = "TAD"
    understands: ClassVar[frozenset[str]] = frozenset({"gate:soft", "recurrence", "attention"})

    positions: Positions = field(default="generated", metadata=setting("Steered tokens: all, prompt or generated."))
    strength: float | str = field(
        default="auto", metadata=setting("Lambda: a number, auto, kl:<nats> or norm:<share>.")
    )
    layer: int | str = field(default="auto", metadata=setting("Judged and steered decoder block, or auto."))
    uncertainty: Literal["answers", "entropy"] = field(
        default="answers", metadata=setting("What the head predicts: answers or entropy.")
    )
    gate: Literal["hard", "soft"] = field(default="hard", metadata=setting("hard or soft."))
    quantile: float = field(default=0.5, metadata=setting("Share of trusted tokens below the threshold."))
    pool: Literal["answer_mean", "answer_last"] = field(
        default="answer_mean", metadata=setting("Pooled answer states: answer_mean or answer_last.")
    )
    recurrence: int = field(default=0, metadata=setting("Number of earlier tokens used.", least=0, most=BACK))
    attention: bool = field(default=False, metadata=setting("Whether attention to them is used."))
    attention_heads: int | None = field(
        default=None, metadata=written_by_fit("Heads of each block.", least=1, most=MOST_HEADS)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layer(self.layer, self.num_hidden_layers)
        check_strength(self.strength)
        for name, allowed in (("uncertainty", UNCERTAINTIES), ("gate", GATES), ("pool", POOLS)):
            check_one_of(name, getattr(self, name), allowed)
        check_number("quantile", self.quantile, above=0, below=1)
        if self.recurrence and self.uncertainty != "answers":
            raise ValueError(
                f"recurrence={self.recurrence} regresses a confidence, so it needs uncertainty='answers', not "
                f"{self.uncertainty!r}."
            )
        if self.attention and not self.recurrence:
            raise ValueError("attention=True is attention to earlier tokens: set their number with `recurrence`.")

    @classmethod
    def paper(cls, **overrides: Any) -> TADConfig:
        """The score of the authors' code: ten earlier tokens, and the attention to them.

        Args:
            **overrides: fields to change.
        """
        return cls(**{"recurrence": 10, "attention": True, "uncertainty": "answers", **overrides})
