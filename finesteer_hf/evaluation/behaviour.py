"""A model's behaviour on judged prompts: answers, likelihoods and gates of one condition, to compare with another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from finesteer_hf.evaluation.measures.generation import Answers, greedy_answers
from finesteer_hf.evaluation.measures.multiple_choice import ChoiceItem, ChoiceScores, score_choices
from finesteer_hf.evaluation.measures.prompts import Prompt
from finesteer_hf.evaluation.measures.scoring import steered_as
from finesteer_hf.evaluation.measures.statistics import (
    Mean,
    PairedTest,
    Proportion,
    mcnemar,
    paired_difference,
    proportion,
)
from finesteer_hf.evaluation.measures.utility import identical_share


@dataclass(frozen=True)
class JudgedPrompt:
    """A prompt and how its answer is judged.

    Attributes:
        id: unique name.
        prompt: text or chat.
        judge: whether an answer is the wanted one; None if it is neither right nor wrong.
        category: kind of question, task or harm.
        choices: right and wrong answers for MC1 and MC2, if any.
    """

    id: str
    prompt: Prompt
    judge: Callable[[str], bool | None]
    category: str
    choices: ChoiceItem | None = None

    @property
    def text(self) -> str:
        """The user's text."""
        return self.prompt if isinstance(self.prompt, str) else str(self.prompt[-1]["content"])


@dataclass(frozen=True)
class Outcome:
    """One condition on a list of judged prompts.

    Attributes:
        prompts: the prompts.
        answers: the answers.
        verdicts: the judge's verdict on each answer.
        choices: MC1 and MC2, if the prompts have choices.
        adapter: name of the adapter that steered; None for the base model.
    """

    prompts: list[JudgedPrompt]
    answers: Answers
    verdicts: list[bool | None]
    choices: ChoiceScores | None
    adapter: str | None

    @property
    def hits(self) -> list[bool]:
        """Whether each answer is the wanted one."""
        return [verdict is True for verdict in self.verdicts]

    @property
    def share(self) -> Proportion:
        """Share of wanted answers."""
        return proportion(self.hits)

    def recorded(self, name: str) -> np.ndarray | None:
        """The adapter's record for each prompt (`gate`, `score`, `experts`); None if it has none."""
        values = self.answers.steering.get(self.adapter or "", {}).get(name)
        return None if values is None else values.numpy()

    def fires(self, threshold: float = 0.5) -> Proportion | None:
        """Share of prompts on which the gate is at least `threshold`; None for an ungated condition."""
        gate = self.recorded("gate")
        return None if gate is None else proportion(gate >= threshold)

    def identical_to(self, other: Outcome) -> Proportion:
        """Share of prompts with the same greedy token ids as in another condition."""
        return identical_share(self.answers.ids, other.answers.ids)

    def against(self, other: Outcome) -> PairedTest:
        """McNemar's exact test of another condition (first) against this one (second), on the same prompts."""
        return mcnemar(other.hits, self.hits)

    def mc2_change(self, other: Outcome) -> Mean:
        """Paired change of MC2 from another condition to this one.

        Raises:
            ValueError: if one of the two was not scored.
        """
        if self.choices is None or other.choices is None:
            raise ValueError("MC2 was not scored in both conditions; evaluate with choices=True.")
        return paired_difference(other.choices.mc2, self.choices.mc2)


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[JudgedPrompt],
    *,
    adapter: str | None = None,
    scale: float = 1.0,
    choices: bool = True,
    max_new_tokens: int = 32,
    advance: Callable[[int], object] = lambda answered: None,
) -> Outcome:
    """Ask a list of prompts under one condition.

    Args:
        model: a causal LM; a steered one if an adapter is named.
        tokenizer: its tokenizer.
        prompts: the prompts.
        adapter: name of a loaded adapter; None for the base model.
        scale: run-time factor of its strength.
        choices: whether to score MC1 and MC2 for prompts that have choices.
        max_new_tokens: most tokens of an answer.
        advance: called with the number of prompts that have been answered, as they are.
    """
    with steered_as(model, adapter, scale):
        answers = greedy_answers(
            model, tokenizer, [item.prompt for item in prompts], max_new_tokens=max_new_tokens, advance=advance
        )
        items = [item.choices for item in prompts if item.choices is not None]
        scores = score_choices(model, tokenizer, items) if choices and items else None
    verdicts = [item.judge(text) for item, text in zip(prompts, answers.texts, strict=True)]
    return Outcome(list(prompts), answers, verdicts, scores, adapter)
