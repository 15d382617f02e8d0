"""The playground's world: every text that its model is trained on, generated from a seed."""

from __future__ import annotations

from functools import lru_cache

from finesteer_hf.playground.contents.general import GeneralItem, build_general
from finesteer_hf.playground.contents.questions import Question, build_questions
from finesteer_hf.playground.contents.safety import BARE, HarmfulItem, build_harmful, build_lookalikes


__all__ = ["BARE", "GeneralItem", "HarmfulItem", "Question", "World", "world"]


class World:
    """All questions, general items, harmful requests and look-alikes; the same seed gives the same world.

    Args:
        seed: Draws the random operands of the general tasks and which of their items are held out of training.
            Questions and requests are composed, not drawn, and do not depend on it. The shipped weights were trained
            on seed 0.

    Attributes:
        questions: 1,200 questions, 120 of each of 10 kinds.
        general: Items of the nine general tasks, five of which the shipped weights solve (`general.SOLVED_TASKS`).
        harmful: 240 base requests, each bare and in 8 wrappers.
        lookalikes: Harmless requests in the same wrappers.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.questions: list[Question] = build_questions()
        self.general: list[GeneralItem] = build_general(seed)
        self.harmful: list[HarmfulItem] = build_harmful()
        self.lookalikes: list[GeneralItem] = build_lookalikes(seed)


@lru_cache(maxsize=1)
def world() -> World:
    """Return the world of the shipped weights (seed 0), built once."""
    return World(seed=0)
