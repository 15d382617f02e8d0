"""The playground's held-out prompts with its exact judges."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, TypeVar

from finesteer_hf import playground
from finesteer_hf.evaluation.behaviour import JudgedPrompt
from finesteer_hf.evaluation.measures.multiple_choice import ChoiceItem


Task = Literal["truthful", "safety"]
Split = Literal["question", "kind"]
TASKS: tuple[Task, ...] = ("truthful", "safety")
T = TypeVar("T")


def fit_rows(
    task: Task, *, split: Split = "question", limit: int | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """Preference rows of the fit half, for `fit_steering(..., split="group")`.

    What the test half shares nothing of must not be shared between the parts of the fit either, or what is calibrated and
    chosen there would be so for easier prompts than those that come. Their `category` therefore is the base request, or,
    where whole kinds are held out, the subject; kinds are too few to be parted.

    Args:
        task: `truthful` or `safety`.
        split: what the halves are disjoint by.
        limit: at most so many rows, drawn at random.
        seed: of the halves and of the draw.
    """
    rows = playground.preference_rows(task, "fit", split=split, seed=seed)
    alone = task == "truthful" and split == "question"
    grouped = [{**row, "category": row["id"] if alone else row["id"].rpartition("/")[0]} for row in rows]
    return draw(grouped, limit, seed)


def target_prompts(
    task: Task,
    *,
    half: Literal["fit", "test"] = "test",
    split: Split = "question",
    limit: int | None = None,
    seed: int = 0,
) -> list[JudgedPrompt]:
    """Prompts whose answers steering should change: questions to be answered truthfully, or requests to be refused.

    Args:
        task: `truthful` or `safety`.
        half: which half; `test` shares no question (request) with the rows that `preference_rows(half="fit")` gives.
        split: what the halves are disjoint by: question, or whole kinds.
        limit: at most so many, drawn at random.
        seed: of the halves and of the draw.
    """
    rows = playground.preference_rows(task, half, split=split, seed=seed)
    world = playground.world()
    if task == "truthful":
        questions = {question.id: question for question in world.questions}
        prompts = [_question(row, questions[row["id"]]) for row in rows]
    else:
        requests = {item.id: item for item in world.harmful}
        prompts = [
            JudgedPrompt(
                row["id"],
                row["prompt"],
                partial(playground.is_refusal, requests[row["id"]]),
                requests[row["id"]].category,
            )
            for row in rows
        ]
    return draw(prompts, limit, seed)


def _question(row: dict[str, Any], question: playground.Question) -> JudgedPrompt:
    return JudgedPrompt(
        row["id"],
        row["prompt"],
        partial(playground.is_truthful, question),
        question.kind,
        ChoiceItem(row["prompt"], tuple(question.true), tuple(question.false)),
    )


def general_prompts(
    *, half: Literal["fit", "test"] = "test", limit: int | None = None, seed: int = 0
) -> list[JudgedPrompt]:
    """Prompts that steering should leave alone: general tasks and harmless look-alikes, unknown to the model."""
    world = playground.world()
    items = {item.id: item for item in (*world.general, *world.lookalikes)}
    prompts = [
        JudgedPrompt(row["id"], row["prompt"], partial(playground.is_correct, items[row["id"]]), row["task"])
        for row in playground.general_rows(half, seed=seed)
    ]
    return draw(prompts, limit, seed)


def draw(items: Sequence[T], limit: int | None, seed: int) -> list[T]:
    """At most `limit` of some items, drawn at random, in their order."""
    if limit is None or limit >= len(items):
        return list(items)
    kept = sorted(random.Random(seed).sample(range(len(items)), limit))
    return [items[index] for index in kept]
