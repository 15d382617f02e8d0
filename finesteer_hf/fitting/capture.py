"""Reading states: one pass a text, no further than the deepest site, and only the positions that are needed.

The answers of a row share their prompt, so the prompt goes through the model once: its keys and values are kept, and
every answer continues from them. What all prompts begin with, a template's header and a system message, goes through once
for all of them. Where an architecture's cache cannot do that (state-space layers, windows shorter than
the text), texts go through whole, and the query's state is read in the pass of an answer. The blocks above the deepest
site and the language-model head never run.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from finesteer_hf.errors import DatasetError
from finesteer_hf.fitting.jobs import Job, TextPass, batches, pad_right, sequences_of
from finesteer_hf.fitting.reading import ForwardReader, Wanted
from finesteer_hf.fitting.templating import Passage
from finesteer_hf.methods.base import CaptureRequest, Pool
from finesteer_hf.sites import Site, TextTower


Unit = TypeVar("Unit")
Key = tuple[Site, Pool]
# Padded tokens a batch: on a CPU more only pads and takes memory; on a GPU more fits, and what does not is halved.
CPU_TOKENS, GPU_TOKENS = 256, 16384
UNAFFORDABLE = 1 << 62
# A shorter beginning, or one of fewer prompts, is not worth a pass of its own.
SHORTEST_PREFIX, FEWEST_PROMPTS = 8, 8
# Largest relative difference of a state read through a shared prompt from one read whole, by the model's precision.
SHARED_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
HALF_TOLERANCE = 5e-2


@dataclass
class CaptureCount:
    """What a capture did, to be tested as counts.

    Attributes:
        passes: forwards of the decoder.
        tokens: real tokens that went through it.
        padded_tokens: the same with padding.
    """

    passes: int = 0
    tokens: int = 0
    padded_tokens: int = 0


@dataclass(frozen=True)
class CapturedBatch:
    """States of some passages, float32.

    Attributes:
        prompts: prompts whose states are in `states[site, "query"]`, `[prompts, width]`.
        answers: answers whose states are in the other entries, `[answers, width]`.
        states: by site and pool.
    """

    prompts: tuple[Passage, ...]
    answers: tuple[Passage, ...]
    states: Mapping[Key, np.ndarray]


class StateReader:
    """Runs texts through a decoder up to the deepest of some sites.

    Args:
        model: a causal LM; if it is steered, it is read unsteered.
        request: sites and pools.
        batch_size: texts a forward, or `auto` for a budget of tokens.
        share_prompts: whether answers continue from their prompt's cache; None: if the first rows read alike both ways.
        describe: says where passages come from, for messages.

    Attributes:
        count: what was done so far.
        shares_prompts: what was found out about sharing; None before the first row.
    """

    def __init__(
        self,
        model: Any,
        request: CaptureRequest,
        *,
        batch_size: int | str = "auto",
        share_prompts: bool | None = None,
        describe: Callable[[Sequence[Passage]], str] | None = None,
    ) -> None:
        if batch_size != "auto" and (
            isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1
        ):
            raise ValueError(f"batch_size must be 'auto' or a whole number of at least 1, got {batch_size!r}.")
        self.model = model
        self.request = request
        self.tower = TextTower(model)
        self.reader = ForwardReader(self.tower, request.sites, request.pools)
        self.device = input_device(model)
        self.batch_size = batch_size
        self.token_budget = CPU_TOKENS if self.device.type == "cpu" else GPU_TOKENS
        self.window = shareable_length(model, self.tower)
        self.shares_prompts = False if self.window == 0 else share_prompts
        self.describe = describe or (lambda passages: f"{len(passages)} texts")
        self.count = CaptureCount()
        self._prefix: tuple[int, ...] = ()
        self._prefix_cache: DynamicCache | None = None
        parameters = inspect.signature(self.tower.decoder.forward).parameters
        open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        self._takes_cache_flag = "use_cache" in parameters or open_ended

    def for_request(self, request: CaptureRequest) -> StateReader:
        """A reader of other sites and pools that goes on with the same count and settings."""
        other = StateReader(
            self.model,
            request,
            batch_size=self.batch_size,
            share_prompts=self.shares_prompts,
            describe=self.describe,
        )
        other.count = self.count
        return other

    def read(
        self,
        jobs: Sequence[Job],
        advance: Callable[[int], None] = lambda done: None,
        among: Sequence[Job] | None = None,
    ) -> Iterator[CapturedBatch]:
        """Read the states of jobs, batch by batch.

        Args:
            jobs: what to read; longest first within each kind, so that a batch that is too large fails at once.
            advance: told of each batch's number of texts.
            among: all jobs of a capture of which these are the missing ones, so that a resumed one goes the same way.

        Raises:
            DatasetError: naming the rows whose states are NaN or infinite.
            UnsupportedModelError: if a site has another layout than `[rows, tokens, width]`.
        """
        wants_answers = any(pool != "query" for pool in self.request.pools)
        if not wants_answers:
            jobs = [Job(job.prompt) for job in jobs if job.prompt is not None]
        pairs = [job for job in jobs if job.prompt is not None and len(job.answers) > 1]
        unsteered = getattr(self.model, "disable_steering", contextlib.nullcontext)
        with unsteered(), self.reader.installed():
            shared = [job for job in pairs if sum(padded_widths([job])) < self.window]
            self._prefix, self._prefix_cache = common_prefix(jobs if among is None else among), None
            if shared and self.shares_prompts is None:
                self.shares_prompts = self._reads_alike(shared)
            shared = shared if self.shares_prompts else []
            whole = sequences_of(job for job in jobs if job not in set(shared))
            shared.sort(key=padding_order, reverse=True)
            whole.sort(key=lambda text: len(text.ids), reverse=True)
            for batch in self._run(shared, self._shared_cost, self._read_shared):
                advance(len(batch.prompts) + len(batch.answers))
                yield self._checked(batch)
            self._prefix_cache = None
            for batch in self._run(whole, self._whole_cost, self._read_whole):
                advance(len(batch.prompts) + len(batch.answers))
                yield self._checked(batch)

    # -- batches ------------------------------------------------------------------------------------------------------

    def _shared_cost(self, jobs: Sequence[Job]) -> int:
        texts = sum(len(job.answers) for job in jobs)
        if len(jobs) > 1 and sum(padded_widths(jobs)) >= self.window:
            return UNAFFORDABLE
        return texts if self.batch_size != "auto" else texts * (sum(padded_widths(jobs)) - len(self._prefix)) // 2

    def _whole_cost(self, texts: Sequence[TextPass]) -> int:
        return len(texts) if self.batch_size != "auto" else len(texts) * max(len(text.ids) for text in texts)

    def _run(
        self,
        units: Sequence[Unit],
        cost: Callable[[Sequence[Unit]], int],
        read: Callable[[Sequence[Unit]], CapturedBatch],
    ) -> Iterator[CapturedBatch]:
        """Run units in batches; a batch that exhausts the memory is halved, and so is the budget of those to come."""
        waiting = list(units)
        while waiting:
            budget = self.token_budget if self.batch_size == "auto" else int(self.batch_size)
            batch = next(batches(waiting, cost, budget))
            try:
                result = read(batch)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                if self.batch_size == "auto":
                    self.token_budget = max(1, cost(batch) // 2)
                else:
                    self.batch_size = max(1, cost(batch) // 2)
                continue
            waiting = waiting[len(batch) :]
            yield result

    def _checked(self, batch: CapturedBatch) -> CapturedBatch:
        for (site, pool), values in batch.states.items():
            bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
            if len(bad):
                passages = batch.prompts if pool == "query" else batch.answers
                raise DatasetError(
                    f"{self.describe([passages[i] for i in bad])}: the state at {site} ({pool}) is NaN or infinite. Load "
                    "the model in bfloat16 or float32 (float16 overflows in some models), or drop these rows."
                )
        return batch

    # -- forwards -----------------------------------------------------------------------------------------------------

    def _read_whole(self, texts: Sequence[TextPass]) -> CapturedBatch:
        ids, mask = pad_right([text.ids for text in texts], self.device)
        wanted = Wanted()
        prompts, answers = [], []
        for row, text in enumerate(texts):
            if text.prompt is not None:
                prompts.append(text.prompt)
                wanted.query_rows.append(row)
                wanted.query_columns.append(len(text.prompt.ids) - 1)
            if text.answer is not None:
                answers.append(text.answer)
                wanted.answer_rows.append(row)
                wanted.answer_starts.append(int(text.answer.answer_start or 0))
                wanted.answer_ends.append(len(text.ids))
        states = self._forward({"input_ids": ids, "attention_mask": mask}, mask, wanted)
        return CapturedBatch(tuple(prompts), tuple(answers), as_arrays(states))

    def _read_shared(self, jobs: Sequence[Job]) -> CapturedBatch:
        prompts = [job.prompt for job in jobs if job.prompt is not None]
        begun = len(self._prefix)
        ids, rest = pad_right([prompt.ids[begun:] for prompt in prompts], self.device)
        cache = self._begin(len(jobs))
        mask = torch.nn.functional.pad(rest, (begun, 0), value=1)
        positions = (begun + torch.arange(ids.shape[1], device=ids.device)).expand(len(jobs), -1)
        wanted = Wanted(list(range(len(jobs))), [len(prompt.ids) - 1 - begun for prompt in prompts])
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        of_prompts = self._forward(inputs, rest, wanted, use_cache=True)

        owners = torch.tensor([row for row, job in enumerate(jobs) for _ in job.answers], device=ids.device)
        answers = [answer for job in jobs for answer in job.answers]
        select_rows(cache, owners)
        ids, answer_mask = pad_right([a.ids[a.answer_start :] for a in answers], self.device)
        lengths = mask.sum(1)[owners]
        positions = lengths[:, None] + torch.arange(ids.shape[1], device=ids.device)
        counts = [len(a.ids) - int(a.answer_start or 0) for a in answers]
        wanted = Wanted([], [], list(range(len(answers))), [0] * len(answers), counts)
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.cat([mask[owners], answer_mask], dim=1),
            "position_ids": positions,
            "past_key_values": cache,
        }
        of_answers = self._forward(inputs, answer_mask, wanted, use_cache=True)
        states = {
            site: {**of_answers[site], **{p: v for p, v in pools.items() if p == "query"}}
            for site, pools in of_prompts.items()
        }
        return CapturedBatch(tuple(prompts), tuple(answers), as_arrays(states))

    def _begin(self, rows: int) -> DynamicCache:
        """A cache that holds what all prompts begin with, for so many rows."""
        if not self._prefix:
            return DynamicCache(config=self.model.config)
        if self._prefix_cache is None:
            self._prefix_cache = DynamicCache(config=self.model.config)
            ids, mask = pad_right([self._prefix], self.device)
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
            inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
            self._forward({**inputs, "past_key_values": self._prefix_cache}, mask, Wanted(), use_cache=True)
        cache = copy.deepcopy(self._prefix_cache)
        select_rows(cache, torch.zeros(rows, dtype=torch.long))
        return cache

    def _forward(
        self, inputs: dict[str, Any], mask: torch.Tensor, wanted: Wanted, use_cache: bool = False
    ) -> dict[Site, dict[Pool, torch.Tensor]]:
        if self._takes_cache_flag:
            inputs["use_cache"] = use_cache
        self.count.passes += 1
        self.count.tokens += int(mask.sum())
        self.count.padded_tokens += mask.numel()
        return self.reader.run(inputs, wanted)

    def _reads_alike(self, jobs: Sequence[Job]) -> bool:
        """Whether two rows of different length read the same through a shared prompt as they do whole."""
        by_length = sorted(jobs, key=lambda job: padded_widths([job]))
        short = Job(by_length[0].prompt, by_length[0].answers[:2])
        longer = (Job(job.prompt, job.answers[:2]) for job in reversed(by_length[: len(by_length) // 2 + 1]))
        few = next(([short, job] for job in longer if sum(padded_widths([short, job])) < self.window), [short])
        whole = self._read_whole(sequences_of(few))
        try:
            shared = self._read_shared(few)
        except torch.OutOfMemoryError:
            raise
        except Exception:
            return False
        tolerance = SHARED_TOLERANCE.get(self.model.dtype, HALF_TOLERANCE)
        for key, expected in whole.states.items():
            difference = np.linalg.norm(shared.states[key] - expected, axis=1)
            if not (difference <= tolerance * np.linalg.norm(expected, axis=1)).all():
                return False
        return True


def padded_widths(jobs: Sequence[Job]) -> tuple[int, int]:
    """Widths of the longest prompt and of the longest answer after it."""
    prompts = max(len(job.prompt.ids) for job in jobs if job.prompt is not None)
    return prompts, max((len(a.ids) - int(a.answer_start or 0) for job in jobs for a in job.answers), default=0)


def padding_order(job: Job) -> tuple[int, int]:
    """Order in which batches are padded least: prompts of about the same length, then answers."""
    prompt, answer = padded_widths([job])
    return prompt // 8, answer


def common_prefix(jobs: Sequence[Job]) -> tuple[int, ...]:
    """Ids that all prompts of several answers begin with, short of their last token; nothing where it would not pay."""
    prompts = [job.prompt.ids[:-1] for job in jobs if job.prompt is not None and len(job.answers) > 1]
    if len(prompts) < FEWEST_PROMPTS:
        return ()
    # Where any two differ first, the first and the last in order do.
    first, last = min(prompts), max(prompts)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:length] if length >= SHORTEST_PREFIX else ()


def as_arrays(states: Mapping[Site, Mapping[Pool, torch.Tensor]]) -> dict[Key, np.ndarray]:
    """States on the CPU."""
    return {(site, pool): value.cpu().numpy() for site, pools in states.items() for pool, value in pools.items()}


def select_rows(cache: DynamicCache, rows: torch.Tensor) -> None:
    """Repeat or drop rows of a cache, whose layers may be on several devices, or empty above the deepest site."""
    for layer in cache.layers:
        if isinstance(layer, DynamicLayer) and layer.keys is not None and layer.get_seq_length():
            layer.batch_select_indices(rows.to(layer.keys.device))


def shareable_length(model: Any, tower: TextTower) -> int:
    """Longest text whose prompt's cache can be shared; 0 if the architecture's cache cannot be.

    Layers with a sliding window keep every column of a text that is shorter than the window.
    """
    if (
        getattr(model, "_is_stateful", False)
        or "position_ids" not in inspect.signature(tower.decoder.forward).parameters
    ):
        return 0
    length = UNAFFORDABLE
    for layer in DynamicCache(config=model.config).layers:
        if type(layer) is DynamicSlidingWindowLayer:
            length = min(length, int(layer.sliding_window))
        elif type(layer) is not DynamicLayer:
            return 0
    return length


def input_device(model: Any) -> torch.device:
    """Where token ids go; accelerate's hooks move them on if the embeddings are offloaded."""
    device: torch.device = model.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device
