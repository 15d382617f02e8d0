"""Measurements of a strength: answers under teacher forcing, own words, side effects on general prompts."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from finesteer_hf.fitting.data.encoding import Passage


@dataclass(frozen=True)
class SideEffects:
    """Effects of a strength on general prompts; see `DosePoint`."""

    kl: float
    changed: float | None


@dataclass(frozen=True)
class Words:
    """The model's greedy answer to a prompt: tokens, likelihood per token under the base, repeated share, and the
    probability that it is of the wanted kind (None if nothing tells the kinds apart)."""

    log_prob: float
    tokens: int
    repeated: float
    wanted: float | None = None


@dataclass(frozen=True)
class AnswerScores:
    """An answer under teacher forcing: summed log-probability, number of tokens, lowest token probability."""

    total: float
    tokens: int
    least: float

    @classmethod
    def of(cls, passage: Passage, logits: torch.Tensor) -> AnswerScores:
        """From the logits of the answer's tokens and the next one, `[answer + 1, vocabulary]`."""
        answer = torch.tensor(passage.ids[passage.answer_start :], device=logits.device)
        log_probs = logits[:-1].log_softmax(-1).gather(1, answer[:, None])[:, 0]
        return cls(float(log_probs.double().sum()), len(answer), float(log_probs.min().exp()))


@dataclass(frozen=True)
class RowScores:
    """Scores of the rows' answers at a strength, one entry per row.

    Attributes:
        bottleneck: lowest probability of a token of the chosen answer.
        preference, preference_summed: preference for the chosen answer over the rejected one, by log-probability per
            token and summed.
        likelihood: log-probability per token of the chosen answer, in nats.
    """

    bottleneck: np.ndarray
    preference: np.ndarray
    preference_summed: np.ndarray
    likelihood: np.ndarray


@dataclass
class Measured:
    """All measurements of a strength, by text, so that a larger look only runs what is new.

    Attributes:
        answers: scores of rows' answers.
        words: own answers to prompts; empty if none were generated.
        effects: effects on general prompts; None if they were not run.
    """

    answers: dict[Passage, AnswerScores] = field(default_factory=dict)
    words: dict[Passage, Words] = field(default_factory=dict)
    effects: SideEffects | None = None
