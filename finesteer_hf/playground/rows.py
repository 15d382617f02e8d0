"""The playground's data as rows for fitting and evaluation."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any, Literal

from finesteer_hf.playground.contents import BARE, world
from finesteer_hf.playground.contents.general import SOLVED_TASKS


Half = Literal["fit", "test", "all"]
PREFERENCE_TASKS = ("truthful", "safety")
HALVES = ("fit", "test", "all")
SPLITS = ("question", "subject", "kind")


def _check(name: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(map(repr, allowed))}")


def _in_half(keys: Iterable[str], half: Half, seed: int) -> set[str]:
    """Choose half of the distinct keys at random; the halves of one seed are disjoint and cover all keys."""
    ordered = sorted(set(keys))
    random.Random(f"halves/{seed}").shuffle(ordered)
    middle = len(ordered) // 2
    return set({"fit": ordered[:middle], "test": ordered[middle:], "all": ordered}[half])


def _preference(identifier: str, category: str, prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    return {
        "id": identifier,
        "category": category,
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def preference_rows(
    task: Literal["truthful", "safety"],
    half: Half,
    split: Literal["question", "subject", "kind"] = "question",
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Return contrast rows in TRL's conversational preference format, one per prompt.

    Args:
        task: `truthful` pairs a true and a folklore answer to each question; `safety` a refusal and a compliance for
            each request in a jailbreak wrapper (bare requests are refused anyway and are left out).
        half: `fit`, `test`, or `all` of them.
        split: What the halves do not share. `question`: questions, although six questions are about one subject.
            `subject`: subjects. `kind`: kinds of misconception (safety: categories of harm). Halves of the safety task
            never share a base request.
        seed: Draws the halves and each row's pair of answers.

    Returns:
        Rows with `id`, `category` (the kind), and `prompt`, `chosen`, `rejected` as lists of chat messages.

    Raises:
        ValueError: For an unknown task, half or split.
    """
    _check("task", task, PREFERENCE_TASKS)
    _check("half", half, HALVES)
    _check("split", split, SPLITS)
    entries: list[tuple[str, str, str, str, tuple[str, ...], tuple[str, ...]]] = []
    if task == "truthful":
        for q in world().questions:
            key = {"question": q.id, "subject": f"{q.kind}/{q.subject}", "kind": q.kind}[split]
            entries.append((key, q.id, q.kind, q.prompt, q.true, q.false))
    else:
        for item in world().harmful:
            if item.wrapper != BARE:
                key = item.category if split == "kind" else item.base
                entries.append((key, item.id, item.category, item.prompt, item.refusals, item.compliances))
    kept = _in_half((entry[0] for entry in entries), half, seed)
    rows = []
    for key, identifier, category, prompt, chosen, rejected in entries:
        if key in kept:
            rng = random.Random(f"pair/{seed}/{identifier}")
            rows.append(_preference(identifier, category, prompt, rng.choice(chosen), rng.choice(rejected)))
    return rows


def general_rows(half: Half, seed: int = 0) -> list[dict[str, Any]]:
    """Return held-out items of the solved general tasks and harmless look-alikes, which steering must not change.

    Args:
        half: `fit`, `test`, or `all` of them; the halves are disjoint.
        seed: Draws the halves.

    Returns:
        Rows with `id`, `task`, `prompt` (chat messages) and `answer` (text); no training text contains any of them.
        Tasks that the shipped weights do not solve (those not in `SOLVED_TASKS`) are left out.

    Raises:
        ValueError: For an unknown half.
    """
    _check("half", half, HALVES)
    items = [item for item in (*world().general, *world().lookalikes) if item.held_out and item.task in SOLVED_TASKS]
    kept = _in_half((item.id for item in items), half, seed)
    return [
        {
            "id": item.id,
            "task": item.task,
            "prompt": [{"role": "user", "content": item.prompt}],
            "answer": item.answer,
        }
        for item in items
        if item.id in kept
    ]
