"""Reads states: one pass per text, up to the deepest site, keeping only the needed positions.

The answers of a row share their prompt, so the prompt is run once, with its answers packed after it (see `packing`).
The common prefix of all prompts, a template's header and a system message, is run once for all. If an architecture
does not allow this (state-space layers, windows shorter than the text, its own masks), whole texts are run, and the
query's state is read in an answer's pass. The blocks above the deepest site and the language-model head never run.
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

from finesteer_hf.errors import DatasetError
from finesteer_hf.fitting.capture.forward import ForwardReader, Wanted
from finesteer_hf.fitting.capture.jobs import Job, TextPass, batches, pad_right, sequences_of
from finesteer_hf.fitting.capture.packing import (
    UNBOUNDED,
    by_kind,
    common_prefix,
    lay_out,
    longest_text,
    pack,
    packed_length,
    shareable_length,
    texts_in,
)
from finesteer_hf.fitting.data.encoding import Passage
from finesteer_hf.method_api import PROMPT_POOLS, CaptureRequest, Pool
from finesteer_hf.sites import Site, TextTower


Unit = TypeVar("Unit")
Key = tuple[Site, Pool]
# Padded tokens per batch: on a CPU more only takes memory; on a GPU more fits, and batches that do not are halved.
CPU_TOKENS, GPU_TOKENS = 384, 16384
# Attention in a row is quadratic in tokens, so rows are short enough that it stays small beside the model's width.
SHORTEST_ROW, LONGEST_ROW = 128, 1024
# Longer jobs would need a mask of more than a quarter of a gigabyte.
LONGEST_PACKED = 8192
# Largest relative difference between states read with a shared prompt and with whole texts, by the model's precision.
SHARED_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
HALF_TOLERANCE = 5e-2


@dataclass
class CaptureCount:
    """Counts of a capture's work, for tests.

    Attributes:
        passes: forwards of the decoder.
        tokens: real tokens run through it.
        padded_tokens: the same with padding.
    """

    passes: int = 0
    tokens: int = 0
    padded_tokens: int = 0


@dataclass(frozen=True)
class CapturedBatch:
    """States of some passages, float32.

    Attributes:
        prompts: prompts whose states are in the entries of `PROMPT_POOLS`, `[prompts, width]`.
        answers: answers whose states are in the other entries, `[answers, width]`.
        states: by site and pool.
    """

    prompts: tuple[Passage, ...]
    answers: tuple[Passage, ...]
    states: Mapping[Key, np.ndarray]


class StateReader:
    """Runs texts through a decoder up to the deepest given site.

    Args:
        model: a causal LM, read unsteered.
        request: sites and pools.
        batch_size: texts per forward, or `auto` for a token budget.
        share_prompts: whether prompts are run once, packed with their answers; None: if the first rows give the same
            states both ways.
        describe: names the rows of passages, for messages.

    Attributes:
        count: counts so far.
        shares_prompts: whether prompts are shared; None before the first row.
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
            raise ValueError(f"batch_size must be 'auto' or an integer of at least 1, got {batch_size!r}.")
        self.model = model
        self.request = request
        self.tower = TextTower(model)
        self.reader = ForwardReader(self.tower, request.sites, request.pools)
        self.device = input_device(model)
        self.batch_size = batch_size
        self.token_budget = CPU_TOKENS if self.device.type == "cpu" else GPU_TOKENS
        self.row_tokens = min(self.token_budget, LONGEST_ROW, max(SHORTEST_ROW, self.tower.hidden_size))
        self.window = shareable_length(model, self.tower)
        self.shares_prompts = False if self.window == 0 else share_prompts
        self.describe = describe or (lambda passages: f"{len(passages)} texts")
        self.count = CaptureCount()
        self._prefix: tuple[int, ...] = ()
        self._prefix_cache: DynamicCache | None = None
        self._prefix_means: dict[Site, torch.Tensor] = {}
        parameters = inspect.signature(self.tower.decoder.forward).parameters
        open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        self._takes_cache_flag = "use_cache" in parameters or open_ended

    def for_request(self, request: CaptureRequest) -> StateReader:
        """A reader of other sites and pools with the same count and settings."""
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
        """Read the states of jobs in batches.

        Args:
            jobs: the jobs; the longest of each kind run first, so that a batch that is too large fails at once.
            advance: called with each batch's number of texts.
            among: all jobs of the capture, of which these are missing, so that a resumed capture works the same way.

        Raises:
            DatasetError: naming the rows whose states are NaN or infinite.
            UnsupportedModelError: if a site has another layout than `[rows, tokens, width]`.
        """
        wants_answers = any(pool not in PROMPT_POOLS for pool in self.request.pools)
        if not wants_answers:
            jobs = [Job(job.prompt) for job in jobs if job.prompt is not None]
        unsteered = getattr(self.model, "disable_steering", contextlib.nullcontext)
        with unsteered(), self.reader.installed():
            apart: list[Job] = []
            for own, prompts in by_kind(jobs, jobs if among is None else among):
                self._prefix, self._prefix_cache = common_prefix(prompts), None
                shared = [job for job in own if self._can_be_packed(job)]
                if shared and self.shares_prompts is None:
                    self.shares_prompts = self._reads_alike(shared)
                shared = shared if self.shares_prompts else []
                packed = set(shared)
                apart += [job for job in own if job not in packed]
                for batch in self._run(self._rows_of(shared), self._packed_cost, self._read_packed):
                    advance(len(batch.prompts) + len(batch.answers))
                    yield self._checked(batch)
            self._prefix_cache = None
            whole = sorted(sequences_of(apart), key=lambda text: len(text.ids), reverse=True)
            for batch in self._run(whole, self._whole_cost, self._read_whole):
                advance(len(batch.prompts) + len(batch.answers))
                yield self._checked(batch)

    # -- batches ------------------------------------------------------------------------------------------------------

    def _can_be_packed(self, job: Job) -> bool:
        if job.prompt is None or longest_text(job) >= self.window:
            return False
        begun = len(self._prefix)
        begins_alike = len(job.prompt.ids) > begun and job.prompt.ids[:begun] == self._prefix
        return begins_alike and packed_length(job, begun) <= LONGEST_PACKED

    def _rows_of(self, jobs: Sequence[Job]) -> list[list[Job]]:
        texts = UNBOUNDED if self.batch_size == "auto" else int(self.batch_size)
        return sorted(pack(jobs, len(self._prefix), self.row_tokens, texts), key=self._row_length, reverse=True)

    def _row_length(self, row: Sequence[Job]) -> int:
        return sum(packed_length(job, len(self._prefix)) for job in row)

    def _packed_cost(self, rows: Sequence[Sequence[Job]]) -> int:
        if self.batch_size != "auto":
            return sum(texts_in(job) for row in rows for job in row)
        return len(rows) * self._row_length(rows[0])  # the first is the longest

    def _whole_cost(self, texts: Sequence[TextPass]) -> int:
        return len(texts) if self.batch_size != "auto" else len(texts) * max(len(text.ids) for text in texts)

    def _run(
        self,
        units: Sequence[Unit],
        cost: Callable[[Sequence[Unit]], int],
        read: Callable[[Sequence[Unit]], CapturedBatch],
    ) -> Iterator[CapturedBatch]:
        """Run units in batches; a batch that runs out of memory is halved, and so is the budget of later ones."""
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
                passages = batch.prompts if pool in PROMPT_POOLS else batch.answers
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
                wanted.query_starts.append(0)
            if text.answer is not None:
                answers.append(text.answer)
                wanted.answer_rows.append(row)
                wanted.answer_starts.append(int(text.answer.answer_start or 0))
                wanted.answer_ends.append(len(text.ids))
                wanted.answer_lasts.append(text.answer.last_content)
        states = self._forward({"input_ids": ids, "attention_mask": mask}, int(mask.sum()), wanted)
        return CapturedBatch(tuple(prompts), tuple(answers), as_arrays(states))

    def _read_packed(self, rows: Sequence[Sequence[Job]]) -> CapturedBatch:
        begun = len(self._prefix)
        packed = lay_out(rows, begun, self.device)
        inputs: dict[str, Any] = {
            "input_ids": packed.ids,
            "attention_mask": packed.additive_mask(self.model.dtype),
            "position_ids": packed.positions,
        }
        if begun:
            inputs["past_key_values"] = self._begin(len(rows))
        states = self._forward(inputs, packed.real, packed.wanted, use_cache=begun > 0)
        if begun and "query_mean" in self.request.pools:
            self._add_beginning(states, packed.wanted, begun)
        batch = CapturedBatch(packed.prompts, packed.answers, as_arrays(states))
        if all(np.isfinite(values).all() for values in batch.states.values()):
            return batch
        # Non-finite values spread to neighbours through zero weights; read separately, they stay in their own row.
        return self._read_whole(sequences_of(job for row in rows for job in row))

    def _begin(self, rows: int) -> DynamicCache:
        """A cache with the common prefix of all prompts, for so many rows."""
        if self._prefix_cache is None:
            # Without a config: a window layer would keep only the end of a row, which has many texts.
            self._prefix_cache = DynamicCache()
            ids, mask = pad_right([self._prefix], self.device)
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
            inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
            inputs["past_key_values"] = self._prefix_cache
            whole = Wanted(query_rows=[0], query_columns=[len(self._prefix) - 1], query_starts=[0])
            states = self._forward(inputs, ids.numel(), whole, use_cache=True)
            self._prefix_means = {s: pools["query_mean"] for s, pools in states.items() if "query_mean" in pools}
        cache = copy.deepcopy(self._prefix_cache)
        if rows > 1:
            cache.batch_repeat_interleave(rows)
        return cache

    def _add_beginning(self, states: dict[Site, dict[Pool, torch.Tensor]], wanted: Wanted, begun: int) -> None:
        """Add the common prefix to each prompt's mean over the rest."""
        for site, pools in states.items():
            mean = pools["query_mean"]
            ends, starts = (torch.tensor(c, device=mean.device) for c in (wanted.query_columns, wanted.query_starts))
            own = (ends - starts + 1)[:, None]
            pools["query_mean"] = (own * mean + begun * self._prefix_means[site].to(mean.device)) / (own + begun)

    def _forward(
        self, inputs: dict[str, Any], real_tokens: int, wanted: Wanted, use_cache: bool = False
    ) -> dict[Site, dict[Pool, torch.Tensor]]:
        if self._takes_cache_flag:
            inputs["use_cache"] = use_cache
        self.count.passes += 1
        self.count.tokens += real_tokens
        self.count.padded_tokens += inputs["input_ids"].numel()
        return self.reader.run(inputs, wanted)

    def _reads_alike(self, jobs: Sequence[Job]) -> bool:
        """Whether two jobs of different length give the same states packed in a row as each text alone."""
        by_length = sorted((Job(job.prompt, job.answers[:2]) for job in jobs), key=packed_length)
        few = list(dict.fromkeys([by_length[0], by_length[len(by_length) // 2]]))
        whole = self._read_whole(sequences_of(few))
        try:
            shared = self._read_packed([few])
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


def as_arrays(states: Mapping[Site, Mapping[Pool, torch.Tensor]]) -> dict[Key, np.ndarray]:
    """States on the CPU."""
    return {(site, pool): value.cpu().numpy() for site, pools in states.items() for pool, value in pools.items()}


def input_device(model: Any) -> torch.device:
    """Device of token ids; accelerate's hooks move them if the embeddings are offloaded."""
    device: torch.device = model.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device
