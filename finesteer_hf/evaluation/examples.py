"""One prompt with both answers, for an adapter's card."""

from __future__ import annotations

from typing import Any

from torch import nn

from finesteer_hf.evaluation.behaviour import Outcome
from finesteer_hf.evaluation.generation import Answers, greedy_answers
from finesteer_hf.evaluation.prompts import Prompt
from finesteer_hf.evaluation.scoring import steered_as


def first_changed(dataset: str, base: Outcome, steered: Outcome) -> dict[str, Any] | None:
    """The first prompt whose answer steering changes, as `config.fit["example"]` holds it; None if none changes.

    The first, and not the best: a card should not show the luckiest answer.

    Args:
        dataset: name of what was asked.
        base: answers of the base model.
        steered: answers under an adapter, to the same prompts.
    """
    pairs = zip(base.answers.ids, steered.answers.ids, strict=True)
    changed = next((row for row, (before, after) in enumerate(pairs) if before != after), None)
    if changed is None:
        return None
    gate = steered.recorded("gate")
    return {
        "prompt": base.prompts[changed].text,
        "unsteered": base.answers.texts[changed],
        "steered": steered.answers.texts[changed],
        "gate": None if gate is None else round(float(gate[changed]), 4),
        "source": f"the first of {len(base.prompts)} of {dataset} whose answer changes",
    }


def ask_example(
    model: nn.Module, tokenizer: Any, prompt: Prompt, adapter: str, *, max_new_tokens: int = 48
) -> dict[str, Any]:
    """Ask one prompt with and without an adapter; for `config.fit["example"]`.

    Args:
        model: a steered model.
        tokenizer: its tokenizer.
        prompt: a text or a chat.
        adapter: name of a loaded adapter.
        max_new_tokens: limit of an answer.
    """

    def ask(name: str | None) -> Answers:
        with steered_as(model, name):
            return greedy_answers(model, tokenizer, [prompt], max_new_tokens=max_new_tokens)

    base, steered = ask(None), ask(adapter)
    gate = steered.steering.get(adapter, {}).get("gate")
    return {
        "prompt": prompt if isinstance(prompt, str) else str(prompt[-1]["content"]),
        "unsteered": base.texts[0],
        "steered": steered.texts[0],
        "gate": None if gate is None else round(float(gate[0]), 4),
        "source": "chosen by who fitted it",
    }
