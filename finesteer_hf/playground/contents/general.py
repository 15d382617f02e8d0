"""General tasks with one right answer, and the harmless look-alikes of jailbreak prompts.

These are the prompts that a steering adapter must leave alone. Each task keeps a fifth of its items out of training:
held-out operands or sequences for the computed tasks, held-out (word, phrasing) combinations for the worded ones.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from finesteer_hf.playground.contents import words


HELD_OUT_SHARE = 0.2


@dataclass(frozen=True)
class GeneralItem:
    """A prompt with its only right answer.

    Attributes:
        id: Unique name, `task/number`.
        task: Name of the task; `lookalike` for harmless prompts in a jailbreak wrapper.
        prompt: The text of the user's turn.
        answer: The right answer, as the model is trained to give it.
        held_out: True for items that no training text contains.
    """

    id: str
    task: str
    prompt: str
    answer: str
    held_out: bool


def _addition(rng: random.Random) -> Iterator[tuple[str, str]]:
    for first in range(2, 13):
        for second in range(2, 13):
            for phrase in words.ADDITION_PHRASINGS:
                yield phrase.format(first=first, second=second), f"{first} plus {second} is {first + second}."


def _sorting(rng: random.Random) -> Iterator[tuple[str, str]]:
    for letters in itertools.permutations(words.LETTERS[:9], 3):
        yield f"Sort these letters: {' '.join(letters)}", f"Sorted: {' '.join(sorted(letters))}"


def _reversing(rng: random.Random) -> Iterator[tuple[str, str]]:
    for _ in range(800):
        letters = rng.sample(words.LETTERS, 3)
        yield f"Reverse these letters: {' '.join(letters)}", f"Reversed: {' '.join(reversed(letters))}"


def _counting(rng: random.Random) -> Iterator[tuple[str, str]]:
    for _ in range(500):
        wanted, other, third = rng.sample(words.LETTERS, 3)
        letters = [wanted] * rng.randint(1, 4) + [other, third]
        rng.shuffle(letters)
        count = letters.count(wanted)
        yield f"Count the letter {wanted} in {' '.join(letters)}", f"The letter {wanted} appears {count} times."


def _comparison(rng: random.Random) -> Iterator[tuple[str, str]]:
    for _ in range(1000):
        first, second = rng.sample(range(10, 100), 2)
        yield f"Which is larger, {first} or {second}?", f"{max(first, second)} is larger."


def _next_number(rng: random.Random) -> Iterator[tuple[str, str]]:
    for start in range(10, 70):
        for step in (1, 2, 5, 10):
            shown = " ".join(str(start + step * place) for place in range(3))
            yield f"Which number comes next: {shown}", f"Next comes {start + 3 * step}."


def _units(rng: random.Random) -> Iterator[tuple[str, str]]:
    for small, large, factor in words.UNITS:
        for amount in range(2, 10):
            for phrase in words.UNIT_PHRASINGS:
                yield (
                    phrase.format(small=small, large=large, amount=amount),
                    f"{amount} {large} are {amount * factor} {small}.",
                )


def _opposites(rng: random.Random) -> Iterator[tuple[str, str]]:
    for pair in words.OPPOSITES:
        for word, opposite in (pair, pair[::-1]):
            for phrase in words.OPPOSITE_PHRASINGS:
                yield phrase.format(word=word), f"The opposite of {word} is {opposite}."


def _categories(rng: random.Random) -> Iterator[tuple[str, str]]:
    for category, members in words.CATEGORIES.items():
        for member in members:
            for phrase in words.CATEGORY_PHRASINGS:
                yield phrase.format(word=member), f"The word {member} names {category}."


TASKS: dict[str, Callable[[random.Random], Iterator[tuple[str, str]]]] = {
    "addition": _addition,
    "sorting": _sorting,
    "reversing": _reversing,
    "counting": _counting,
    "comparison": _comparison,
    "next_number": _next_number,
    "units": _units,
    "opposites": _opposites,
    "categories": _categories,
}

# Tasks on which the shipped weights get at least 95% of held-out items right. On the other four trained tasks they
# reach 58 to 80%, too little to measure damage by steering.
SOLVED_TASKS = ("sorting", "counting", "units", "opposites", "categories", "lookalike")


def split_items(task: str, pairs: Iterator[tuple[str, str]], rng: random.Random) -> list[GeneralItem]:
    """Drop repeated prompts and mark a random `HELD_OUT_SHARE` of the rest as held out."""
    unique = dict(pairs)
    held_out = set(rng.sample(range(len(unique)), round(HELD_OUT_SHARE * len(unique))))
    return [
        GeneralItem(f"{task}/{number}", task, prompt, answer, number in held_out)
        for number, (prompt, answer) in enumerate(unique.items())
    ]


def build_general(seed: int) -> list[GeneralItem]:
    """Build the items of every task, each from its own random stream."""
    items = []
    for task, make in TASKS.items():
        rng = random.Random(f"{seed}/{task}")
        items += split_items(task, make(rng), rng)
    return items
