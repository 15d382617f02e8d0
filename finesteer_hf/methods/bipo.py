"""BIPO: a constant vector learned from preferences in both directions (Cao et al., NeurIPS 2024, arXiv 2406.00045).

With the model frozen, a vector v minimises, for a direction d drawn as -1 or 1 with equal chance in each step,

    -log sigmoid(d beta [log p(chosen | d v) - log p(chosen) - log p(rejected | d v) + log p(rejected)])

so that adding it makes wanted answers more likely and subtracting it unwanted ones. Log-probabilities are sums over an
answer's tokens; those without v are the unsteered model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from finesteer_hf.adapters.config import setting
from finesteer_hf.adapters.registry import register_steering_method
from finesteer_hf.methods._shared.checks import check_number
from finesteer_hf.methods._shared.preference_training import PairScores, PreferenceRows, TrainedShift
from finesteer_hf.methods._shared.preference_vector import PreferenceVector, PreferenceVectorConfig
from finesteer_hf.processors import SteeringProcessor
from finesteer_hf.sites import Site


@dataclass(kw_only=True)
class BIPOConfig(PreferenceVectorConfig):
    """Settings of BIPO; see `PreferenceVectorConfig` for those of the training.

    The default uses fewer epochs than the paper, a rate scaled to the model's states, and stops on held-out rows; see
    `paper`.

    Attributes:
        beta: factor of the log-probabilities: the smaller, the further the model may move from the unsteered one.
    """

    steering_type: ClassVar[str] = "BIPO"

    beta: float = field(default=0.1, metadata=setting("Factor of the log-probabilities."))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("beta", self.beta, above=0)

    @classmethod
    def paper(cls, **overrides: Any) -> BIPOConfig:
        """The published settings, for models of 7 billion parameters.

        AdamW at 5e-4 with decay 0.05, 20 epochs of batches of 4, all rows, beta 0.1, a cosine after 100 steps of warm-up;
        the last vector, unscaled. The paper's layers are 15 of Llama-2-7b-chat and 13 of Mistral-7B-Instruct.

        Args:
            **overrides: fields to change, for example `layer=15`.
        """
        settings: dict[str, Any] = {
            "num_rows": None,
            "epochs": 20,
            "batch_size": 4,
            "learning_rate": 5e-4,
            "weight_decay": 0.05,
            "schedule": "cosine",
            "warmup_steps": 100,
            "beta": 0.1,
            "keep": "last",
            "strength": 1.0,
        }
        return cls(**{**settings, **overrides})


def bipo_loss(steered: PairScores, plain: PairScores, direction: float, beta: float) -> torch.Tensor:
    """The loss of each row, `[rows]` float32.

    Args:
        steered: scores with `direction` times the vector.
        plain: scores of the unsteered model.
        direction: -1 or 1.
        beta: factor of the log-probabilities.
    """
    return -logsigmoid(direction * beta * (steered.margins - plain.margins))


class BIPO(PreferenceVector[BIPOConfig]):
    """`H <- H + strength * v` at the output of one block, for every query.

    Args:
        config: a fitted `BIPOConfig`.
        tensors: `vector`, `[hidden_size]` float32.
    """

    @classmethod
    def first_losses(
        cls, rows: PreferenceRows, which: Sequence[int], steering: SteeringProcessor, config: BIPOConfig
    ) -> torch.Tensor:
        """The loss in direction 1; at zero the other direction has the same slope."""
        return bipo_loss(rows.steered(which, steering), rows.plain[which], 1.0, config.beta)

    @classmethod
    def losses(
        cls,
        rows: PreferenceRows,
        which: Sequence[int],
        site: Site,
        vector: torch.Tensor,
        config: BIPOConfig,
        rng: np.random.Generator | None,
    ) -> torch.Tensor:
        """The loss in a drawn direction, or the mean of both."""

        def towards(direction: float) -> torch.Tensor:
            steering = TrainedShift({site: vector}, positions=config.positions, factor=direction)
            return bipo_loss(rows.steered(which, steering), rows.plain[which], direction, config.beta)

        if rng is None:
            return (towards(1.0) + towards(-1.0)) / 2
        return towards(float(rng.choice((-1.0, 1.0))))


register_steering_method(BIPO)
