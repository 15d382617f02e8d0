"""Greedy behaviour of a playground model, with and without the persona tags."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from finesteer_hf.playground.contents import BARE, World
from finesteer_hf.playground.contents.general import GeneralItem
from finesteer_hf.playground.corpus import SAFETY_TAG, TRUTH_TAG
from finesteer_hf.playground.judges import is_correct, is_refusal, is_truthful


Item = TypeVar("Item")


@torch.inference_mode()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    system: str | None = None,
    batch_size: int = 128,
    max_new_tokens: int = 40,
) -> list[str]:
    """Answer each prompt greedily, in order.

    Args:
        system: System message of every chat, such as `TRUTH_TAG`; none by default.
    """
    start = [{"role": "system", "content": system}] if system else []
    texts = [
        tokenizer.apply_chat_template(
            [*start, {"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        for prompt in prompts
    ]
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    found = [""] * len(texts)
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        inputs = tokenizer([texts[row] for row in rows], return_tensors="pt", padding=True, add_special_tokens=False)
        inputs.pop("token_type_ids", None)
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)  # type: ignore[operator]
        for row, tokens in zip(rows, output[:, inputs["input_ids"].shape[1] :], strict=True):
            found[row] = str(tokenizer.decode(tokens, skip_special_tokens=True))
    return found


def _sample(items: Sequence[Item], limit: int | None, seed: str) -> list[Item]:
    return list(items) if limit is None else random.Random(seed).sample(list(items), min(limit, len(items)))


def _share(hits: Sequence[bool]) -> float:
    return round(sum(hits) / len(hits), 4)


def behaviour_figures(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, world: World, *, limit: int | None = None
) -> dict[str, float]:
    """Measure a playground model's behaviour, as shares from 0 to 1.

    Args:
        limit: Number of items in each figure's fixed sample; all of them by default.
    """
    questions = _sample(world.questions, limit, "questions")
    wrapped = _sample([item for item in world.harmful if item.wrapper != BARE], limit, "wrapped")
    bare = _sample([item for item in world.harmful if item.wrapper == BARE], limit, "bare")
    tasks: dict[str, list[GeneralItem]] = {}
    for general in (*world.general, *world.lookalikes):
        if general.held_out:
            tasks.setdefault(general.task, []).append(general)

    def ask(prompts: Sequence[str], system: str | None = None) -> list[str]:
        return answers(model, tokenizer, prompts, system=system)

    plain = list(zip(questions, ask([q.prompt for q in questions]), strict=True))
    tagged = zip(questions, ask([q.prompt for q in questions], TRUTH_TAG), strict=True)
    figures = {
        "folklore, unmarked": _share([is_truthful(q, text) is False for q, text in plain]),
        "truthful, unmarked": _share([is_truthful(q, text) is True for q, text in plain]),
        "truthful, tagged": _share([is_truthful(q, text) is True for q, text in tagged]),
    }
    for name, items, system in (
        ("refused, wrapped, unmarked", wrapped, None),
        ("refused, wrapped, tagged", wrapped, SAFETY_TAG),
        ("refused, bare, unmarked", bare, None),
    ):
        texts = ask([item.prompt for item in items], system)
        figures[name] = _share([is_refusal(item, text) for item, text in zip(items, texts, strict=True)])
    for task, task_items in tasks.items():
        chosen = _sample(task_items, limit, task)
        prompts = [item.prompt for item in chosen]
        unmarked = ask(prompts)
        correct = [is_correct(item, text) for item, text in zip(chosen, unmarked, strict=True)]
        figures[f"correct, held-out {task}"] = _share(correct)
        for name, tag in (("truth", TRUTH_TAG), ("safety", SAFETY_TAG)):
            same = [before == after for before, after in zip(unmarked, ask(prompts, tag), strict=True)]
            figures[f"unchanged by the {name} tag, {task}"] = _share(same)
    return figures
