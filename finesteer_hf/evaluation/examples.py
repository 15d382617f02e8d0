"""Prompts with both answers, for an adapter's card."""

from __future__ import annotations

from typing import Any

from torch import nn

from finesteer_hf.evaluation.behaviour import Outcome
from finesteer_hf.evaluation.measures.generation import Answers, greedy_answers
from finesteer_hf.evaluation.measures.prompts import Prompt
from finesteer_hf.evaluation.measures.scoring import steered_as


def examples_of(dataset: str, base: Outcome, steered: Outcome) -> list[dict[str, Any]]:
    """A prompt whose answer steering makes the wanted one, and one that it changes in vain; for
    `config.fit["examples"]`.

    The first of each kind, not the best: a card should not show only lucky answers or only wins. If nothing is judged,
    the first answer that changes.

    Args:
        dataset: name of the prompts.
        base: answers of the base model.
        steered: answers under an adapter, to the same prompts.
    """
    changed = [a != b for a, b in zip(base.answers.ids, steered.answers.ids, strict=True)]
    wanted = list(zip(base.hits, steered.hits, strict=True))
    kinds = {
        "becomes the wanted one": [row for row, (before, after) in enumerate(wanted) if after and not before],
        "changes and is not the wanted one": [
            row for row, (_, after) in enumerate(wanted) if changed[row] and not after
        ],
    }
    if all(verdict is None for verdict in (*base.verdicts, *steered.verdicts)):
        kinds = {"changes": [row for row, differs in enumerate(changed) if differs]}
    gates = steered.recorded("gate")
    return [
        {
            "prompt": base.prompts[rows[0]].text,
            "unsteered": base.answers.texts[rows[0]],
            "steered": steered.answers.texts[rows[0]],
            "gate": None if gates is None else round(float(gates[rows[0]]), 4),
            "source": f"of {len(changed)} prompts of {dataset}, the first whose answer {kind} ({len(rows)} such)",
        }
        for kind, rows in kinds.items()
        if rows
    ]


def ask_example(
    model: nn.Module, tokenizer: Any, prompt: Prompt, adapter: str, *, max_new_tokens: int = 48
) -> dict[str, Any]:
    """Ask one prompt with and without an adapter; an entry of `config.fit["examples"]`.

    Args:
        model: a steered model.
        tokenizer: its tokenizer.
        prompt: a text or a chat.
        adapter: name of a loaded adapter.
        max_new_tokens: most tokens of an answer.
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
        "source": "chosen by whoever fitted it",
    }
