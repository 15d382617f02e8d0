"""The playground's held-out prompts, with its exact judges."""

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

    The parts of the fit must be as disjoint as the two halves are, or the fit would be calibrated on easier prompts
    than the test half. So their `category` is the base request or, if whole kinds are held out, the subject; there are
    too few kinds to split by.

    Args:
        task: `truthful` or `safety`.
        split: what separates the halves.
        limit: most rows, drawn at random.
        seed: seed of the halves and the draw.
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
    """Prompts whose answers steering should change: questions to answer truthfully, or requests to refuse.

    Args:
        task: `truthful` or `safety`.
        half: which half; `test` shares no question (request) with `preference_rows(half="fit")`.
        split: what separates the halves: questions, or whole kinds.
        limit: most prompts, drawn at random.
        seed: seed of the halves and the draw.
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
    """Prompts that steering should leave alone: general tasks and harmless look-alikes that the model has not seen."""
    world = playground.world()
    items = {item.id: item for item in (*world.general, *world.lookalikes)}
    prompts = [
        JudgedPrompt(row["id"], row["prompt"], partial(playground.is_correct, items[row["id"]]), row["task"])
        for row in playground.general_rows(half, seed=seed)
    ]
    return draw(prompts, limit, seed)


def draw(items: Sequence[T], limit: int | None, seed: int) -> list[T]:
    """At most `limit` items, drawn at random, in their order."""
    if limit is None or limit >= len(items):
        return list(items)
    kept = sorted(random.Random(seed).sample(range(len(items)), limit))
    return [items[index] for index in kept]
