"""Backtracking: generation in which a row may drop its newest tokens and continue from there.

transformers' decoding loop runs until a processor makes a row go back. The row's tokens are dropped and the rest moves
right within ids, mask, positions and cache, so that all rows end in the same column again. Then the loop resumes. Keys
keep their rotary positions, so the kept text is not computed again; only the last kept token goes through the model
once more, for the logits of its successor.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import ALL_CACHE_NAMES, GenerateDecoderOnlyOutput

from finesteer_hf.processors import StepView
from finesteer_hf.runtime.decoding.cache_rows import can_move_rows, crop_columns, empty, shift_columns, shift_right
from finesteer_hf.runtime.plan import row_scales
from finesteer_hf.runtime.session import CallSession


# What generate passes to the model beside the ids, with one column a token.
_BY_COLUMN = ("attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")
_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


def refuse_what_cannot_go_back(mode: Any, config: Any, loop: dict[str, Any]) -> None:
    """Raise `ValueError` for settings of `generate` that do not work with backtracking.

    Args:
        mode: transformers' `GenerationMode`.
        config: the prepared `GenerationConfig`.
        loop: arguments of the decoding loop (`synced_gpus`, `streamer`, ...).
    """
    reason = None
    if mode not in _MODES:
        reason = f"{mode.value} keeps candidates that cannot be cut individually; use greedy search or sampling"
    elif config.cache_implementation is not None and "static" in config.cache_implementation:
        reason = "a static cache has no room for rows that move; leave cache_implementation out"
    elif config.guidance_scale not in (None, 1):
        reason = "guidance keeps a second sequence that cannot be cut; leave guidance_scale out"
    elif config.output_attentions or config.output_hidden_states:
        reason = "the output cannot hold attentions and hidden states of dropped tokens; leave them out"
    elif loop.get("synced_gpus"):
        reason = "synced_gpus needs the same number of steps on all ranks"
    if reason is not None:
        raise ValueError(f"The active steering takes generated tokens back, and {reason}.")


def sample_with_backtracking(
    model: Any,
    sample: Callable[..., Any],
    session: CallSession,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Run transformers' `_sample` in stretches; between them rows go back.

    Args:
        model: the steered model.
        sample: the `_sample` of its class, bound.
        session: the call; its processors with a `lookback` are called after each token.
        input_ids: int64 `[rows, prompt]`.
        logits_processor: as for `_sample`; sees each row as if it had never gone back.
        stopping_criteria: likewise.
        generation_config: as for `_sample`.
        streamer: gets a token once it can no longer be dropped; one row only.
        **model_kwargs: as for `_sample`.

    Returns:
        What `_sample` returns: prompt, new tokens, right padding.

    Raises:
        ValueError: if several rows are streamed, or a processor drops more tokens than there are.
    """
    rows = input_ids.shape[0]
    if streamer is not None and rows > 1:
        raise ValueError(f"Steering that takes tokens back can stream one row at a time, got {rows}.")
    if model_kwargs.get("inputs_embeds") is not None:
        raise ValueError(
            "The active steering takes generated tokens back, and a text that restarts from the prompt needs the prompt's "
            "ids: give input_ids, not inputs_embeds."
        )
    cache = next((model_kwargs[name] for name in ALL_CACHE_NAMES if model_kwargs.get(name) is not None), None)
    if getattr(cache, "is_compileable", False):
        raise ValueError("The active steering takes generated tokens back: give a DynamicCache, not a static one.")
    session.takes_back = True
    pad = generation_config._pad_token_tensor
    text = _Text(model, session, input_ids, 0 if pad is None else int(pad), cache, model_kwargs, generation_config)
    watch = _Watch(session, stopping_criteria, rows, text.lead, input_ids)
    held = None if streamer is None else _HeldBack(streamer, session.plan.lookback)
    config = copy.copy(generation_config)
    config.return_dict_in_generate = True
    scores: list[torch.Tensor] = []
    logits: list[torch.Tensor] = []
    while True:
        output = sample(
            text.ids,
            logits_processor=functools.partial(watch.by_row, logits_processor),
            stopping_criteria=StoppingCriteriaList([watch]),
            generation_config=config,
            streamer=held,
            **text.model_kwargs,
        )
        scores += output.scores or ()
        logits += output.logits or ()
        text.grow(output.sequences)
        if not bool(watch.drop.any()):
            break
        if held is not None:
            held.take_back(int(watch.drop[0]))
        watch.shift += text.take_back(watch.drop)
        text.place(watch.shift)
        watch.stopped = False
        # A resumed stretch is not the first pass over the prompt: images and the like went into that one.
        config = copy.copy(config)
        config.is_assistant, config.prefill_chunk_size = True, None
    if held is not None:
        held.finish()
    sequences, columns = text.sequences(input_ids, watch)
    if not generation_config.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(
        sequences=cast(Any, sequences),
        scores=text.at_steps(scores, columns) if generation_config.output_scores else None,
        logits=text.at_steps(logits, columns) if generation_config.output_logits else None,
        past_key_values=text.returned_cache(watch.shift, sequences.shape[1]),
    )


class _Watch(StoppingCriteria):
    """Calls the processors after each token; ends the stretch once a row goes back or all rows are done.

    Attributes:
        lengths: int64 `[rows]`: number of kept new tokens of each row.
        shift: int64 `[rows]`: columns by which a row has moved right.
        finished: bool `[rows]`.
        drop: int64 `[rows]`: tokens dropped in the last step.
        stopped: whether the stretch has ended.
    """

    def __init__(self, session: CallSession, criteria: Any, rows: int, lead: int, prompt: torch.Tensor) -> None:
        device = prompt.device
        self.criteria = criteria
        self.lead = lead
        self.prompt_end = lead + prompt.shape[1]
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.shift = torch.zeros_like(self.lengths)
        self.drop = torch.zeros_like(self.lengths)
        self.finished = torch.zeros(rows, dtype=torch.bool, device=device)
        self.stopped = False
        expand = session.prompt.expand if session.prompt is not None else 1
        self.watchers = [
            (entry.processor, session.memory[index], row_scales(entry.scale, rows, expand, device))
            for index, entry in enumerate(session.plan.entries)
            if entry.processor.lookback
        ]
        # The loop pads finished rows if a criterion has the end-of-sequence token.
        for criterion in criteria:
            if hasattr(criterion, "eos_token_id"):
                self.eos_token_id = criterion.eos_token_id

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.stopped:
            return torch.ones_like(self.finished)
        active = ~self.finished
        self.lengths = torch.where(active, input_ids.shape[1] - self.prompt_end - self.shift, self.lengths)
        ended = self.by_row(self.criteria, input_ids, scores, **kwargs) & active
        self.drop = torch.zeros_like(self.lengths)
        for processor, state, scale in self.watchers:
            asked = active & (scale != 0) if isinstance(scale, torch.Tensor) else active
            drop = processor.watch(StepView(self.lengths, input_ids[:, -1], asked, ended, state))
            drop = torch.where(asked, drop.to(self.drop), 0)
            self.drop = torch.maximum(self.drop, drop)
        if bool(((self.drop < 0) | (self.drop > self.lengths)).any()):
            raise ValueError(
                f"A processor drops {self.drop.tolist()} tokens of rows that have {self.lengths.tolist()} new ones."
            )
        self.lengths = self.lengths - self.drop
        self.finished = self.finished | (ended & (self.drop == 0))
        self.stopped = bool(self.finished.all()) or bool(self.drop.any())
        return torch.ones_like(self.finished) if self.stopped else self.finished.clone()

    def by_row(self, function: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Apply a function that counts columns (lengths, penalties, limits) to each row as if it had never moved."""
        result: torch.Tensor | None = None
        for shift in self.shift.unique().tolist():
            value = function(input_ids[:, self.lead + shift :], *args, **kwargs)
            mine = (self.shift == shift).view(-1, *[1] * (value.ndim - 1))
            result = value if result is None else torch.where(mine, value, result)
        assert result is not None
        return result


class _Text:
    """Everything with one column a token: ids, masks, positions, the cache, and the step that made each token."""

    def __init__(
        self,
        model: Any,
        session: CallSession,
        ids: torch.Tensor,
        pad: int,
        cache: Any,
        kwargs: dict[str, Any],
        config: Any,
    ) -> None:
        self.model, self.session, self.pad, self.cache = model, session, pad, cache
        self.model_kwargs = kwargs
        self.step = 0
        mask = kwargs.get("attention_mask")
        recorded = getattr(config, "_mask_length", None)
        # More columns than ids: the user's cache holds earlier turns.
        self.columns = int(mask.shape[1]) if mask is not None else int(recorded or ids.shape[1])
        self.lead = self.columns - ids.shape[1]
        # The loop feeds exactly what the cache lacks only if ids and mask are equally wide.
        self.ids = torch.cat([ids.new_full((ids.shape[0], self.lead), pad), ids], dim=1)
        self.steps = torch.full_like(self.ids, -1)

    def grow(self, sequences: torch.Tensor) -> None:
        """Append what a stretch has generated."""
        rows, new = sequences.shape[0], sequences.shape[1] - self.ids.shape[1]
        self.ids = sequences
        made = torch.arange(self.step, self.step + new, device=sequences.device).expand(rows, -1)
        self.steps = torch.cat([self.steps, made], dim=1)
        self.step += new
        if self.model_kwargs.get("attention_mask") is None:
            self.model_kwargs["attention_mask"] = self.ids.new_ones(rows, self.columns)
        self.model_kwargs = self.model._update_model_kwargs_for_generation({}, self.model_kwargs, num_new_tokens=new)
        self.columns += new

    def take_back(self, drop: torch.Tensor) -> torch.Tensor:
        """Drop each row's newest tokens.

        Args:
            drop: int64 `[rows]`.

        Returns:
            `[rows]`: columns by which each row has moved right.
        """
        # Columns that no row needs are cut off; a row moves by what it drops beyond them.
        cut = int(drop.min())
        shift = drop - cut
        self.columns -= cut
        kept = self.ids.shape[1] - cut
        self.ids = shift_right(self.ids[:, :kept], shift, self.pad)
        self.steps = shift_right(self.steps[:, :kept], shift, -1)
        for name in _BY_COLUMN:
            value = self.model_kwargs.get(name)
            if value is not None:
                value = value[..., : value.shape[-1] - cut]
                value = value.expand(len(drop), -1) if value.ndim == 2 else value
                self.model_kwargs[name] = shift_right(value, shift, 0)
        if self.cache is not None:
            if can_move_rows(self.cache):
                crop_columns(self.cache, self.columns - 1)
                shift_columns(self.cache, shift)
            elif self.lead:
                raise ValueError(
                    f"{type(self.cache).__name__} cannot be cut, and its earlier turns are not in input_ids to be read "
                    "again. Give the whole text, or a DynamicCache of plain attention layers."
                )
            else:
                # Read the whole text again: such layers keep a summary of it, not its columns.
                empty(self.cache)
        return shift

    def place(self, shift: torch.Tensor) -> None:
        """Tell the session where the rows are now."""
        seen = 0 if self.cache is None else int(self.cache.get_seq_length())
        self.session.rows_moved(shift, self.model_kwargs["attention_mask"], seen)

    def sequences(self, prompt: torch.Tensor, watch: _Watch) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompt, new tokens and right padding, and the column of each new token."""
        count = int(watch.lengths.max())
        offsets = torch.arange(count, device=self.ids.device)
        columns = (watch.prompt_end + watch.shift[:, None] + offsets).clamp(max=self.ids.shape[1] - 1)
        new = self.ids.gather(1, columns).masked_fill(offsets >= watch.lengths[:, None], self.pad)
        return torch.cat([prompt, new], dim=1), columns

    def at_steps(self, values: list[torch.Tensor], columns: torch.Tensor) -> Any:
        """For each kept new token, the scores `[rows, vocabulary]` of the step that made it."""
        steps = self.steps.gather(1, columns)
        stacked = torch.stack(values)
        rows = torch.arange(steps.shape[0], device=steps.device)
        return tuple(stacked[steps[:, token], rows] for token in range(steps.shape[1]))

    def returned_cache(self, shift: torch.Tensor, columns: int) -> Any:
        """The cache with its rows moved to their place in the returned sequences; None if it cannot be moved."""
        if self.cache is None or not bool(shift.any()):
            return self.cache
        if not can_move_rows(self.cache):
            return None
        shift_columns(self.cache, -shift)
        crop_columns(self.cache, self.lead + columns - 1)
        return self.cache


class _HeldBack:
    """Passes tokens to a streamer once they can no longer be dropped."""

    def __init__(self, streamer: Any, lookback: int) -> None:
        self.streamer = streamer
        self.lookback = lookback
        self.waiting: list[torch.Tensor] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.waiting.append(tokens)
        while len(self.waiting) > self.lookback:
            self.streamer.put(self.waiting.pop(0))

    def end(self) -> None:
        """Do nothing: a stretch ends, not the text."""

    def take_back(self, count: int) -> None:
        del self.waiting[len(self.waiting) - count :]

    def finish(self) -> None:
        for tokens in self.waiting:
            self.streamer.put(tokens)
        self.streamer.end()
