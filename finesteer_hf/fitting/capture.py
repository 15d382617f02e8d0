"""Reading states: one pass a text, no further than the deepest site, and only the positions that are needed.

Chosen and rejected answers of a row share their prompt, so the prompt goes through the model once: its keys and values are
kept, and both answers continue from them. The query's state comes out of that same pass. Batches are of similar length
within a token budget; the blocks above the deepest site and the language-model head never run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from finesteer_hf.errors import DatasetError
from finesteer_hf.fitting.data import name_rows
from finesteer_hf.fitting.templating import EncodedRow, Passage
from finesteer_hf.methods.base import CaptureRequest, Pool
from finesteer_hf.session import StopForward
from finesteer_hf.sites import Site, TextTower, stream_of


Key = tuple[Site, str]
# Padded tokens a batch; a wider batch gains nothing on a CPU and costs memory on a GPU.
CPU_TOKENS, GPU_TOKENS = 2048, 16384


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


@dataclass
class StateReader:
    """Runs texts through a decoder up to the deepest of some sites.

    Args:
        model: a causal LM; if it is steered, it is read unsteered.
        request: sites and pools.
        token_budget: padded tokens a batch; None for a default by device.
        share_prefix: whether both answers continue from their prompt's cache; None: where the cache allows it.

    Attributes:
        count: what was done so far.
    """

    model: Any
    request: CaptureRequest
    token_budget: int | None = None
    share_prefix: bool | None = None
    count: CaptureCount = field(default_factory=CaptureCount)

    def __post_init__(self) -> None:
        self.tower = TextTower(self.model)
        for site in self.request.sites:
            self.tower.check(site)
        self.device = self.model.get_input_embeddings().weight.device
        if self.device.type == "meta":
            # Under offload the weights are elsewhere until they are used; inputs go where accelerate wants them.
            self.device = torch.device("cpu")
        if self.token_budget is None:
            self.token_budget = CPU_TOKENS if self.device.type == "cpu" else GPU_TOKENS
        if self.share_prefix is None:
            self.share_prefix = cache_can_be_shared(self.model)

    # -- prompts ------------------------------------------------------------------------------------------------------

    def read_prompts(
        self, prompts: Sequence[Passage], advance: Callable[[int], None] | None = None
    ) -> dict[Key, np.ndarray]:
        """States of the prompts' last tokens.

        Args:
            prompts: token ids.
            advance: told of each batch's number of rows.

        Returns:
            For each site `(site, "query")`: `[rows, width]` float32.

        Raises:
            DatasetError: naming the rows whose states are NaN or infinite.
        """
        out = self._empty(len(prompts), ("query",))
        with self._reading() as states:
            for rows in self._batches([len(p.ids) for p in prompts]):
                ids, mask = pad_left([prompts[i].ids for i in rows], self.device)
                self._forward(states, ids, mask)
                for site, hidden in states.items():
                    out[site, "query"][rows] = to_numpy(hidden[:, -1])
                if advance is not None:
                    advance(len(rows))
        check_finite(out, "general_dataset")
        return out

    # -- preference rows ----------------------------------------------------------------------------------------------

    def read_rows(
        self, rows: Sequence[EncodedRow], advance: Callable[[int], None] | None = None
    ) -> dict[Key, np.ndarray]:
        """States of queries and answers.

        Args:
            rows: encoded preference rows.
            advance: told of each batch's number of rows.

        Returns:
            For each site `(site, "query")`, `(site, "chosen/answer_mean")` and so on: `[rows, width]` float32.

        Raises:
            DatasetError: naming the rows whose states are NaN or infinite.
        """
        names = [f"{side}/{pool}" for side in ("chosen", "rejected") for pool in self.request.pools if pool != "query"]
        out = self._empty(len(rows), ("query", *names))
        shared = [i for i, row in enumerate(rows) if self.share_prefix and continues_prompt(row)]
        whole = sorted(set(range(len(rows))) - set(shared))
        with self._reading() as states:
            lengths = [max(len(rows[i].chosen.ids), len(rows[i].rejected.ids)) for i in shared]
            for batch in self._batches(lengths, copies=2):
                numbers = [shared[i] for i in batch]
                self._read_shared(states, rows, numbers, out)
                if advance is not None:
                    advance(len(numbers))
            for batch in self._batches([max(len(rows[i].chosen.ids), len(rows[i].rejected.ids)) for i in whole]):
                numbers = [whole[i] for i in batch]
                self._read_whole(states, rows, numbers, out)
                if advance is not None:
                    advance(len(numbers))
        check_finite(out, "train_dataset")
        return out

    def _read_shared(
        self,
        states: dict[Site, torch.Tensor],
        rows: Sequence[EncodedRow],
        numbers: list[int],
        out: dict[Key, np.ndarray],
    ) -> None:
        prompt_ids, prompt_mask = pad_left([rows[i].prompt.ids for i in numbers], self.device)
        cache = DynamicCache(config=self.model.config)
        self._forward(states, prompt_ids, prompt_mask, cache=cache)
        for site, hidden in states.items():
            out[site, "query"][numbers] = to_numpy(hidden[:, -1])
        if len(self.request.pools) == 1:
            return
        answers = [side.ids[side.answer_start :] for i in numbers for side in (rows[i].chosen, rows[i].rejected)]
        cache.batch_repeat_interleave(2)
        ids, mask = pad_right(answers, self.device)
        self._forward(states, ids, mask, cache=cache, before=prompt_mask.repeat_interleave(2, dim=0))
        self._pool(states, mask.bool(), numbers, ("chosen", "rejected"), out)

    def _read_whole(
        self,
        states: dict[Site, torch.Tensor],
        rows: Sequence[EncodedRow],
        numbers: list[int],
        out: dict[Key, np.ndarray],
    ) -> None:
        prompts = [rows[i].prompt.ids for i in numbers]
        for side in ("chosen", "rejected"):
            passages: list[Passage] = [getattr(rows[i], side) for i in numbers]
            # The last column of each row's prompt; where text was joined across the boundary, the prompt has a pass of
            # its own below.
            ids, mask = pad_left([p.ids for p in passages], self.device)
            self._forward(states, ids, mask)
            widths = torch.tensor([len(p.ids) for p in passages], device=ids.device)
            starts = torch.tensor([p.answer_start or 0 for p in passages], device=ids.device)
            columns = torch.arange(ids.shape[1], device=ids.device)[None]
            span = columns >= (ids.shape[1] - widths + starts)[:, None]
            self._pool(states, span, numbers, (side,), out)
        ids, mask = pad_left(prompts, self.device)
        self._forward(states, ids, mask)
        for site, hidden in states.items():
            out[site, "query"][numbers] = to_numpy(hidden[:, -1])

    def _pool(
        self,
        states: dict[Site, torch.Tensor],
        span: torch.Tensor,
        numbers: list[int],
        sides: tuple[str, ...],
        out: dict[Key, np.ndarray],
    ) -> None:
        for site, hidden in states.items():
            inside = span.to(hidden.device)
            values: dict[Pool, torch.Tensor] = {}
            if "answer_mean" in self.request.pools:
                # Outside the span there may be anything, NaN at fully masked pads included: it must not be multiplied.
                total = torch.where(inside[..., None], hidden.float(), 0.0).sum(1)
                values["answer_mean"] = total / inside.sum(1, keepdim=True)
            if "answer_last" in self.request.pools:
                last = inside.shape[1] - 1 - inside.int().flip(1).argmax(1)
                values["answer_last"] = hidden[torch.arange(len(hidden), device=hidden.device), last]
            for pool, value in values.items():
                for offset, side in enumerate(sides):
                    out[site, f"{side}/{pool}"][numbers] = to_numpy(value[offset :: len(sides)])

    # -- the forward --------------------------------------------------------------------------------------------------

    def _batches(self, lengths: Sequence[int], copies: int = 1) -> Iterator[list[int]]:
        """Row numbers of similar length, longest first, so that too large a budget fails at once."""
        assert self.token_budget is not None
        batch: list[int] = []
        widest = 0
        for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            widest = widest or lengths[row]
            if batch and (len(batch) + 1) * widest * copies > self.token_budget:
                yield batch
                batch, widest = [], lengths[row]
            batch.append(row)
        if batch:
            yield batch

    def _empty(self, rows: int, names: Sequence[str]) -> dict[Key, np.ndarray]:
        return {
            (site, name): np.empty((rows, self.tower.width(site)), dtype=np.float32)
            for site in self.request.sites
            for name in names
        }

    @contextlib.contextmanager
    def _reading(self) -> Iterator[dict[Site, torch.Tensor]]:
        """Hooks at the sites, evaluation mode, no gradients and no steering, for the length of a block."""
        states: dict[Site, torch.Tensor] = {}
        deepest = max(self.request.sites)

        def keep(site: Site, value: Any) -> None:
            states[site] = stream_of(value, site, self.tower.width(site))
            if site == deepest:
                raise StopForward

        def entering(site: Site) -> Callable[..., None]:
            return lambda module, args: keep(site, args)

        def leaving(site: Site) -> Callable[..., None]:
            return lambda module, args, output: keep(site, output)

        handles = []
        training = self.model.training
        unsteered = getattr(self.model, "disable_steering", contextlib.nullcontext)
        try:
            for site in self.request.sites:
                module = self.tower.module(site)
                if site.kind == "resid_post":
                    handles.append(module.register_forward_hook(leaving(site)))
                else:
                    handles.append(module.register_forward_pre_hook(entering(site)))
            self.model.eval()
            with torch.no_grad(), unsteered():
                yield states
        finally:
            for handle in handles:
                handle.remove()
            self.model.train(training)

    def _forward(
        self,
        states: dict[Site, torch.Tensor],
        ids: torch.Tensor,
        mask: torch.Tensor,
        cache: DynamicCache | None = None,
        before: torch.Tensor | None = None,
    ) -> None:
        states.clear()
        whole = mask if before is None else torch.cat([before, mask], dim=1)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": whole, "use_cache": cache is not None}
        if cache is not None:
            inputs["past_key_values"] = cache
            positions = (whole.cumsum(-1) - 1).clamp(min=0)
            inputs["position_ids"] = positions[:, -ids.shape[1] :]
        elif takes_position_ids(self.tower.decoder):
            inputs["position_ids"] = (whole.cumsum(-1) - 1).clamp(min=0)
        self.count.passes += 1
        self.count.tokens += int(mask.sum())
        self.count.padded_tokens += mask.numel()
        with contextlib.suppress(StopForward):
            self.tower.decoder(**inputs)


def continues_prompt(row: EncodedRow) -> bool:
    """Whether both answers begin after exactly the prompt's tokens."""
    length = len(row.prompt.ids)
    return all(
        side.answer_start == length and side.ids[:length] == row.prompt.ids for side in (row.chosen, row.rejected)
    )


def cache_can_be_shared(model: Any) -> bool:
    """Whether a prompt's cache holds nothing but keys and values of all its columns.

    Sliding windows drop columns, and state-space layers keep a state that padding would enter.
    """
    if getattr(model, "_is_stateful", False) or not takes_position_ids(TextTower(model).decoder):
        return False
    layers = DynamicCache(config=model.config).layers
    return bool(layers) and all(type(layer).__name__ == "DynamicLayer" for layer in layers)


def takes_position_ids(decoder: torch.nn.Module) -> bool:
    """Whether a decoder lets its caller say where tokens stand."""
    import inspect

    return "position_ids" in inspect.signature(decoder.forward).parameters


def pad_left(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, int64 `[rows, tokens]`, texts at the right edge."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def pad_right(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, int64 `[rows, tokens]`, texts at the left edge."""
    width = max(map(len, rows))
    ids = torch.tensor([list(row) + [0] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, mask


def to_numpy(states: torch.Tensor) -> np.ndarray:
    """States as float32 on the CPU."""
    return states.detach().float().cpu().numpy()


def check_finite(states: Mapping[Key, np.ndarray], what: str) -> None:
    """Raise `DatasetError` naming the rows with NaN or infinite states."""
    for (site, name), values in states.items():
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if len(bad):
            raise DatasetError(
                f"{what}: {name_rows(bad.tolist())}: the state at {site} ({name}) is NaN or infinite. Load the model in "
                "bfloat16 or float32 (float16 overflows in some models), or drop these rows."
            )
