"""REPS: a constant vector learned from preferences without a reference (Wu et al., NeurIPS 2025, arXiv 2505.20809).

With the model frozen, a vector v minimises -log sigmoid(D+) - log sigmoid(D-), where per token of an answer

    D+ = b+ / |c| log p(c | h + a v) - 1 / |r| log p(r | h + a v),    b+ = max(log p(r) - log p(c), 1)
    D- = b- / |r| log p(r | h - n v) - 1 / |c| log p(c | h - n v),    b- = max(log p(c) - log p(r), 1)

for the chosen answer c, the rejected r, and a factor a drawn from several in each step. The weights b come from the
unsteered model: the less likely the side that should win, the more it counts. D- removes the vector's direction from
each token's state, n = relu(h . v) / |v|^2, so that without it the model gives the unwanted answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from finesteer_hf.adapters.config import setting
from finesteer_hf.adapters.registry import register_steering_method
from finesteer_hf.methods._shared.checks import check_number, check_one_of
from finesteer_hf.methods._shared.preference_training import PairScores, PreferenceRows, TrainedShift
from finesteer_hf.methods._shared.preference_vector import PreferenceVector, PreferenceVectorConfig
from finesteer_hf.processors import Positions, SteeringProcessor, TokenView
from finesteer_hf.sites import Site


# The published factors, 2 to 20; only their ratios matter.
PAPER_FACTORS = tuple(float(factor) for factor in range(2, 21, 2))
NEGATIVES = ("null", "subtract")

Length = torch.Tensor | float


@dataclass(kw_only=True)
class REPSConfig(PreferenceVectorConfig):
    """Settings of REPS; see `PreferenceVectorConfig` for those of the training.

    The default uses fewer epochs than the paper, a rate scaled to the model's states, and stops on held-out rows; see
    `paper`.

    Attributes:
        factors: factors of the vector in training; each step draws one. The stored vector is the trained one times
            their mean, so that strength 1 is the training average.
        negative: steering under which the rejected answers should win: `null` (as in the paper: the direction is
            removed from states that show it) or `subtract` (a factor times the vector is subtracted).
        compat: `official` divides by the length of prompt and answer together, as the published code does; the paper
            divides by the answer's.
    """

    steering_type: ClassVar[str] = "REPS"

    factors: list[float] = field(
        default_factory=lambda: list(PAPER_FACTORS), metadata=setting("Factors of the vector in training.")
    )
    negative: Literal["null", "subtract"] = field(
        default="null", metadata=setting("Negative steering in training: null or subtract.")
    )
    compat: Literal["official"] | None = field(
        default=None, metadata=setting("official: divide by the length of prompt and answer.")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.factors:
            raise ValueError("factors must have at least one factor of the vector, got none. Give for example [1.0].")
        for factor in self.factors:
            check_number("factors", factor, above=0)
        check_one_of("negative", self.negative, NEGATIVES)
        check_one_of("compat", self.compat, (None, "official"))

    @property
    def unit(self) -> float:
        """Mean of the factors."""
        return float(np.mean(self.factors))

    @classmethod
    def paper(cls, **overrides: Any) -> REPSConfig:
        """The published settings of a steering vector, for Gemma-2-2b.

        AdamW at 0.04 (0.08 for Gemma-2-9b), falling linearly to zero, without decay, gradients clipped to a norm of 1,
        18 epochs of batches of 6, all rows, factors 2 to 20; the last vector. The factor in use is chosen on held-out
        prompts, so `strength` stays `auto`.

        Args:
            **overrides: fields to change, for example `layer=10`.
        """
        settings: dict[str, Any] = {
            "num_rows": None,
            "epochs": 18,
            "batch_size": 6,
            "learning_rate": 0.04,
            "clip": 1.0,
            "factors": list(PAPER_FACTORS),
            "keep": "last",
        }
        return cls(**{**settings, **overrides})


def reps_loss(
    positive: PairScores, negative: PairScores, plain: PairScores, chosen_lengths: Length, rejected_lengths: Length
) -> torch.Tensor:
    """The loss of each row, `[rows]` float32: the sum of both halves.

    Args:
        positive: scores under positive steering.
        negative: scores under negative steering.
        plain: scores of the unsteered model, for the weights; no gradients reach them.
        chosen_lengths: divisors of the chosen answers' log-probabilities, `[rows]` tokens.
        rejected_lengths: those of the rejected answers.
    """
    return positive_half(positive, plain, chosen_lengths, rejected_lengths) + _half(
        negative.rejected / rejected_lengths, negative.chosen / chosen_lengths, plain.margins
    )


def positive_half(
    positive: PairScores, plain: PairScores, chosen_lengths: Length, rejected_lengths: Length
) -> torch.Tensor:
    """-log sigmoid(D+), `[rows]`; arguments as for `reps_loss`."""
    return _half(positive.chosen / chosen_lengths, positive.rejected / rejected_lengths, -plain.margins)


def _half(winning: torch.Tensor, losing: torch.Tensor, behind: torch.Tensor) -> torch.Tensor:
    """`winning` and `losing` in nats per token; `behind`: by how many nats the winning side is less likely."""
    return -logsigmoid(behind.detach().clamp(min=1.0) * winning - losing)


class NulledDirection(SteeringProcessor):
    """Remove a direction from states that show it: `h - relu(h . v) / |v|^2 v`.

    Args:
        site: the site.
        vector: v, `[width]` float32; its length does not matter.
        positions: tokens whose states are changed.
    """

    def __init__(self, site: Site, vector: torch.Tensor, positions: Positions) -> None:
        self.maps = (site,)
        self.vector = vector
        self.positions = positions

    def transform(self, site: Site, hidden: torch.Tensor, view: TokenView) -> torch.Tensor:
        """Remove the direction from the selected tokens of `[rows, tokens, width]`."""
        unit = torch.nn.functional.normalize(self.vector, dim=0).to(hidden.device)
        shown = torch.relu(hidden.float() @ unit)[..., None] * unit
        return hidden - (shown if view.mask is None else view.mask[..., None] * shown).to(hidden.dtype)


class REPS(PreferenceVector[REPSConfig]):
    """`H <- H + strength * v` at the output of one block, for every query.

    Args:
        config: a fitted `REPSConfig`.
        tensors: `vector`, `[hidden_size]` float32.
    """

    @classmethod
    def start(cls, width: int, learning_rate: float, rng: np.random.Generator) -> torch.Tensor:
        """Random and about as long as a step, because at zero there is no direction to remove."""
        return torch.from_numpy(rng.uniform(-learning_rate, learning_rate, width).astype(np.float32))

    @classmethod
    def first_losses(
        cls, rows: PreferenceRows, which: Sequence[int], steering: SteeringProcessor, config: REPSConfig
    ) -> torch.Tensor:
        """The positive half, which has a slope at zero."""
        lengths = _lengths(rows, which, config)
        return positive_half(rows.steered(which, steering), rows.plain[which], *lengths)

    @classmethod
    def losses(
        cls,
        rows: PreferenceRows,
        which: Sequence[int],
        site: Site,
        vector: torch.Tensor,
        config: REPSConfig,
        rng: np.random.Generator | None,
    ) -> torch.Tensor:
        """The loss at drawn factors, one for each half, or at their mean."""

        def drawn() -> float:
            return config.unit if rng is None else float(rng.choice(config.factors))

        added = TrainedShift({site: vector}, positions=config.positions, factor=drawn())
        taken: SteeringProcessor = NulledDirection(site, vector, config.positions)
        if config.negative == "subtract":
            taken = TrainedShift({site: vector}, positions=config.positions, factor=-drawn())
        return reps_loss(
            rows.steered(which, added),
            rows.steered(which, taken),
            rows.plain[which],
            *_lengths(rows, which, config),
        )


def _lengths(rows: PreferenceRows, which: Sequence[int], config: REPSConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Divisors of the two answers' log-probabilities, `[rows]` tokens each."""
    plain = rows.plain[which]
    prompt = rows.prompt_tokens[list(which)] if config.compat == "official" else 0.0
    return plain.chosen_tokens + prompt, plain.rejected_tokens + prompt


register_steering_method(REPS)
