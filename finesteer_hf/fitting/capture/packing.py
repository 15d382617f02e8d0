"""Packing: several prompts with their answers in one row, each token seeing only its own text.

The answers of a prompt follow it one after another. A mask shows each answer the prompt and itself but not the other
answers, and positions continue from the prompt's. So a prompt is run once for all its answers, and texts of different
lengths need no padding.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from finesteer_hf.fitting.capture.forward import Wanted
from finesteer_hf.fitting.capture.jobs import Job
from finesteer_hf.fitting.data.encoding import Passage
from finesteer_hf.sites import TextTower


UNBOUNDED = 1 << 62
# A shorter beginning, or one of fewer prompts, is not worth a pass of its own.
SHORTEST_PREFIX, FEWEST_PROMPTS = 8, 8


@dataclass(frozen=True)
class PackedRows:
    """Inputs of one forward, and what is read from it.

    Attributes:
        ids, positions: int64 `[rows, tokens]`; pads at the end are 0.
        visible: bool `[rows, tokens, begun + tokens]`: what each token sees, the common prefix first.
        real: number of tokens that are not pads.
        wanted: positions whose states are kept.
        prompts, answers: their passages, in the order of `wanted`.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    visible: torch.Tensor
    real: int
    wanted: Wanted
    prompts: tuple[Passage, ...]
    answers: tuple[Passage, ...]

    def additive_mask(self, dtype: torch.dtype) -> torch.Tensor:
        """The mask as attention takes it, `[rows, 1, tokens, begun + tokens]`: 0, or the dtype's minimum."""
        hidden = torch.zeros(self.visible.shape, dtype=dtype, device=self.visible.device)
        return hidden.masked_fill_(~self.visible, torch.finfo(dtype).min)[:, None]


def packed_length(job: Job, begun: int = 0) -> int:
    """Tokens of a job in a row, without the first `begun` of its prompt, which have been run already."""
    prompt = 0 if job.prompt is None else len(job.prompt.ids)
    return prompt - begun + sum(len(answer.ids) - prompt for answer in job.answers)


def texts_in(job: Job) -> int:
    """Number of texts in a job; a prompt without answers counts as one."""
    return max(1, len(job.answers))


def longest_text(job: Job) -> int:
    """Tokens of a job's longest text."""
    return max(len(passage.ids) for passage in (job.prompt, *job.answers) if passage is not None)


def pack(jobs: Sequence[Job], begun: int, most_tokens: int, most_texts: int) -> list[list[Job]]:
    """Fill rows, longest jobs first; a job above a limit gets its own row.

    Args:
        jobs: prompts whose answers continue them.
        begun: length of the common prefix, which no row contains.
        most_tokens: most tokens of a row.
        most_texts: most texts of a row.
    """
    rows: list[list[Job]] = []
    tokens = texts = 0
    for job in sorted(jobs, key=lambda job: packed_length(job, begun), reverse=True):
        own, own_texts = packed_length(job, begun), texts_in(job)
        if not rows or tokens + own > most_tokens or texts + own_texts > most_texts:
            rows.append([])
            tokens = texts = 0
        rows[-1].append(job)
        tokens, texts = tokens + own, texts + own_texts
    return rows


def lay_out(rows: Sequence[Sequence[Job]], begun: int, device: torch.device) -> PackedRows:
    """Lay out rows of jobs as the inputs of a forward.

    Args:
        rows: jobs by row; all prompts are longer than `begun` and share their first `begun` tokens.
        begun: length of the common prefix.
        device: device of the tensors.
    """
    width = max(sum(packed_length(job, begun) for job in row) for row in rows)
    ids, positions, owners, branches = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(4))
    owners.fill_(-1)  # pads, which see each other
    wanted, real = Wanted(), 0
    prompts: list[Passage] = []
    answers: list[Passage] = []
    for number, row in enumerate(rows):
        end = 0
        for owner, job in enumerate(row):
            assert job.prompt is not None
            length = len(job.prompt.ids)
            parts = [(job.prompt.ids[begun:], begun), *((answer.ids[length:], length) for answer in job.answers)]
            for branch, (part, position) in enumerate(parts):
                start, end = end, end + len(part)
                ids[number, start:end] = torch.tensor(part)
                positions[number, start:end] = torch.arange(position, position + len(part))
                owners[number, start:end] = owner
                branches[number, start:end] = branch
                if branch == 0:
                    wanted.query_starts.append(start)
                    wanted.query_rows.append(number)
                    wanted.query_columns.append(end - 1)
                else:
                    wanted.answer_rows.append(number)
                    wanted.answer_starts.append(start)
                    wanted.answer_ends.append(end)
                    wanted.answer_lasts.append(end - 1 - job.answers[branch - 1].closing)
            prompts.append(job.prompt)
            answers.extend(job.answers)
        real += end
    visible = _visible(owners.to(device), branches.to(device), begun)
    return PackedRows(ids.to(device), positions.to(device), visible, real, wanted, tuple(prompts), tuple(answers))


def _visible(owners: torch.Tensor, branches: torch.Tensor, begun: int) -> torch.Tensor:
    """Earlier tokens of the same job, in the prompt or the same answer, and the common prefix."""
    tokens = owners.shape[1]
    own = owners[:, :, None] == owners[:, None, :]
    line = (branches[:, None, :] == 0) | (branches[:, :, None] == branches[:, None, :])
    earlier = torch.ones(tokens, tokens, dtype=torch.bool, device=owners.device).tril()
    return torch.nn.functional.pad(own & line & earlier, (begun, 0), value=True)


def by_kind(jobs: Sequence[Job], among: Sequence[Job]) -> Iterator[tuple[list[Job], list[Passage | None]]]:
    """Jobs whose prompts have answers, then the others, which begin otherwise; each with all prompts of its kind."""
    answered = {job.prompt for job in among if job.answers}
    for kind in (True, False):
        prompts = [job.prompt for job in among if (job.prompt in answered) is kind]
        yield [job for job in jobs if (job.prompt in answered) is kind], prompts


def common_prefix(prompts: Iterable[Passage | None]) -> tuple[int, ...]:
    """Ids that all prompts begin with, short of their last token; nothing where it would not pay."""
    texts = [prompt.ids[:-1] for prompt in prompts if prompt is not None]
    if len(texts) < FEWEST_PROMPTS:
        return ()
    # Where any two differ first, the first and the last in order do.
    first, last = min(texts), max(texts)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:length] if length >= SHORTEST_PREFIX else ()


def shareable_length(model: Any, tower: TextTower) -> int:
    """Length that a packed text must stay below; 0 if an architecture's texts cannot be packed.

    A text that is shorter than a sliding window is seen whole by its layers.
    """
    if (
        getattr(model, "_is_stateful", False)
        or "position_ids" not in inspect.signature(tower.decoder.forward).parameters
    ):
        return 0
    length = UNBOUNDED
    for layer in DynamicCache(config=model.config).layers:
        if type(layer) is DynamicSlidingWindowLayer:
            length = min(length, int(layer.sliding_window))
        elif type(layer) is not DynamicLayer:
            return 0
    return length
