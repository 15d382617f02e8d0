"""The sequences of a call: their prompts, caches, and the arguments of a decoder forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from finesteer_hf.processors import Decision, Positions
from finesteer_hf.runtime.forwards.forward_check import ForwardCheck
from finesteer_hf.runtime.forwards.window import Window
from finesteer_hf.sites import Site


@dataclass
class Prompt:
    """What is known of the prompts before the first forward.

    Attributes:
        length: absolute position after the last prompt column, including cached turns.
        mask: bool `[rows, length]`, False at pads; None if there are none.
        lengths: int64 `[rows]` numbers of real prompt tokens, if the query is not the last real token.
        inputs: `input_ids` or `inputs_embeds` of the forward, including beams.
        expand: rows of a forward per row of the user's batch.
    """

    length: int
    mask: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    expand: int = 1

    @property
    def columns(self) -> int:
        """Number of prompt columns that the call passed."""
        return int(next(iter(self.inputs.values())).shape[1]) if self.inputs else self.length


@dataclass
class Stream:
    """A growing sequence and its cache.

    Attributes:
        window: which of its columns are prompt, query, pad.
        cache: the cache object, referenced so that its id is not reused.
        seen: columns that have gone through the model.
        rows: rows of each forward.
        memory: each entry's memory of the sequence, by its index in the plan.
        prompt: what is known of the prompts; None for a second sequence.
        expand: rows of a forward per row of the user's batch.
        makes_cache: whether the model creates the cache in the first forward, so that the second one brings it.
        decisions: each entry's decision, by its index in the plan.
        means: prompt means at the sites where an entry reads them, `[rows, width]` float32.
        states: states of the queries at the read sites, `[rows, width]` float32.
        adds: addends by positions, for each site and the entries that add there in one step, in the stream's dtype.
        decode: the addend of a decode step, for sites with a single add.
        compiled: the same for a compiled step.
    """

    window: Window
    cache: Any
    seen: int
    rows: int
    memory: list[dict[str, Any]]
    prompt: Prompt | None = None
    expand: int = 1
    makes_cache: bool = False
    decisions: dict[int, Decision] = field(default_factory=dict)
    means: dict[Site, torch.Tensor] = field(default_factory=dict)
    states: dict[Site, torch.Tensor] = field(default_factory=dict)
    adds: dict[tuple[Site, tuple[int, ...]], dict[Positions, torch.Tensor]] = field(default_factory=dict)
    decode: dict[Site, torch.Tensor | None] = field(default_factory=dict)
    compiled: dict[Site, torch.Tensor] = field(default_factory=dict)


@dataclass
class Forward:
    """One forward of the decoder and its place on its stream.

    Attributes:
        stream: the sequence that it continues.
        past: columns before it; 0 if it passes the whole sequence again.
        tokens: columns in it.
        decoding: whether it comes after the prompt.
        carried: whether its cache held something before the prompt.
        args, kwargs: arguments of the decoder.
        passage: the sites that it has passed.
    """

    stream: Stream
    past: int
    tokens: int
    decoding: bool
    carried: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    passage: ForwardCheck

    @property
    def has_query(self) -> bool:
        """Whether it contains every row's query."""
        return self.stream.window.query_within(self.past, self.tokens)

    @property
    def has_whole_prompt(self) -> bool:
        """Whether it contains the whole prompt, up to every row's query."""
        return self.past == 0 and not self.carried and self.tokens > self.stream.window.last_query


def forward_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The token ids or embeddings that a decoder was called with."""
    for candidate in (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args[:1]):
        if isinstance(candidate, torch.Tensor):
            return candidate
    raise ValueError("The decoder was called without input_ids and without inputs_embeds; it cannot be steered.")


def forward_cache(kwargs: dict[str, Any]) -> Any:
    """The cache that a decoder was called with, or None."""
    cache = kwargs.get("past_key_values")
    return cache if cache is not None else kwargs.get("cache_params")


def mask_fits(mask: Any, columns: int) -> bool:
    """Whether a mask has so many columns; with a static cache `generate` makes masks for its full length."""
    masks = mask.values() if isinstance(mask, Mapping) else [mask]
    return all(not isinstance(m, torch.Tensor) or m.ndim < 4 or m.shape[-1] == columns for m in masks)


def cache_length(cache: Any) -> int:
    """Number of columns in a cache; caches of states only do not count columns and give 0."""
    length = getattr(cache, "get_seq_length", None)
    if length is None:
        return int(getattr(cache, "seqlen_offset", 0))
    try:
        return int(length())
    except ValueError:
        return 0


def holds_states(cache: Any) -> bool:
    """Whether a cache of states has been written to."""
    held = getattr(cache, "has_previous_state", None)
    try:
        return bool(held() if callable(held) else held)
    except ValueError:
        # A cache of keys and values only.
        return False


def shares_a_row(kwargs: Mapping[str, Any]) -> bool:
    """Whether continuous batching called the decoder; it packs requests into one row."""
    return "cu_seq_lens_q" in kwargs and "block_table" in kwargs


def packs_texts(kwargs: Mapping[str, Any]) -> bool:
    """Whether a row of a decoder's inputs holds several texts, as in padding-free training."""
    limits, positions = kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")
    if isinstance(limits, torch.Tensor):
        return limits.numel() > 2
    if kwargs.get("attention_mask") is not None or not isinstance(positions, torch.Tensor) or positions.ndim != 2:
        return False
    return bool((positions.diff(dim=1) < 0).any())


def in_lockstep() -> bool:
    """Whether other processes may be waiting for this one's forwards."""
    dist = torch.distributed
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
