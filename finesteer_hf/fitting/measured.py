"""What is known of a strength: answers under teacher forcing, the model's own words, side effects on general prompts."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from finesteer_hf.fitting.data.encoding import Passage


@dataclass(frozen=True)
class SideEffects:
    """What a strength does to general prompts; see `DosePoint`."""

    kl: float
    changed: float | None


@dataclass(frozen=True)
class Words:
    """What the model says to a prompt itself, greedily: its tokens, what the base thinks of one, what it repeats."""

    log_prob: float
    tokens: int
    repeated: float


@dataclass(frozen=True)
class AnswerScores:
    """An answer under teacher forcing: its summed log-probability, its tokens, and its least likely one's probability."""

    total: float
    tokens: int
    least: float


@dataclass(frozen=True)
class RowScores:
    """What a strength makes of the rows' answers, an entry a row.

    Attributes:
        bottleneck: least probability of a token of the chosen answer.
        preference, preference_summed: of the chosen answer over the rejected one, by log-probability a token and summed.
        likelihood: log-probability a token of the chosen answer, in nats.
    """

    bottleneck: np.ndarray
    preference: np.ndarray
    preference_summed: np.ndarray
    likelihood: np.ndarray


@dataclass
class Measured:
    """All that is known of a strength, text by text, so that a longer look costs only what it adds.

    Attributes:
        answers: of rows' answers.
        words: what was said to prompts; empty where nobody has listened.
        effects: on general prompts; None where they have not been run.
    """

    answers: dict[Passage, AnswerScores] = field(default_factory=dict)
    words: dict[Passage, Words] = field(default_factory=dict)
    effects: SideEffects | None = None
