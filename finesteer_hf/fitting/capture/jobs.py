"""The texts to run through the model: each prompt once, with its answers, in batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from finesteer_hf.fitting.data.encoding import EncodedRow, Passage


Item = TypeVar("Item")
# More texts in a forward gain nothing, even if they are short.
MAX_TEXTS = 512


@dataclass(frozen=True)
class Job:
    """A prompt with its answers.

    Attributes:
        prompt: prompt whose last token's state is read; None for an answer that was tokenised together with its prompt
            and so does not continue the prompt's own tokens.
        answers: passages whose answers' states are read; they begin with the prompt's ids.
    """

    prompt: Passage | None
    answers: tuple[Passage, ...] = ()


@dataclass(frozen=True)
class TextPass:
    """One text of a forward, and what is read from it."""

    ids: tuple[int, ...]
    prompt: Passage | None = None
    answer: Passage | None = None


def make_jobs(rows: Iterable[EncodedRow], prompts: Iterable[Passage] = ()) -> list[Job]:
    """Group passages by prompt; duplicates are in a job once.

    Args:
        rows: preference rows.
        prompts: prompts without answers.
    """
    answers: dict[Passage, dict[Passage, None]] = {}
    joined: dict[Passage, None] = {}
    for row in rows:
        own = answers.setdefault(row.prompt, {})
        for answer in (row.chosen, row.rejected):
            continues = answer.answer_start == len(row.prompt.ids)
            (own if continues else joined)[answer] = None
    for prompt in prompts:
        answers.setdefault(prompt, {})
    return [*(Job(prompt, tuple(own)) for prompt, own in answers.items()), *(Job(None, (a,)) for a in joined)]


def sequences_of(jobs: Iterable[Job]) -> list[TextPass]:
    """The whole texts of jobs; a prompt's state is read with its first answer."""
    sequences = []
    for job in jobs:
        if not job.answers and job.prompt is not None:
            sequences.append(TextPass(job.prompt.ids, prompt=job.prompt))
        for number, answer in enumerate(job.answers):
            sequences.append(TextPass(answer.ids, job.prompt if number == 0 else None, answer))
    return sequences


def batches(items: Sequence[Item], cost: Callable[[Sequence[Item]], int], budget: int) -> Iterator[list[Item]]:
    """Split items, in order, into batches of at most a cost and `MAX_TEXTS`; a larger item is its own batch."""
    batch: list[Item] = []
    for item in items:
        if batch and (len(batch) == MAX_TEXTS or cost([*batch, item]) > budget):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def pad_right(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, int64 `[rows, tokens]`, padded at the end: no real token sees pads there, in any architecture."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, mask
