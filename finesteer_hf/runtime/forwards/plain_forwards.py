"""Forwards outside `generate`: each is a separate call, or continues the call whose cache it continues."""

from __future__ import annotations

import warnings
import weakref
from typing import TYPE_CHECKING, Any

import torch

from finesteer_hf.errors import PromptEndWarning, UnsupportedModelError
from finesteer_hf.runtime.arguments import check_rows
from finesteer_hf.runtime.decoding.logits import leave_decoder
from finesteer_hf.runtime.forwards.prompt_ends import PROMPT_ENDS, PromptEnds, prompt_lengths_of
from finesteer_hf.runtime.forwards.streams import (
    Prompt,
    cache_length,
    forward_cache,
    forward_inputs,
    packs_texts,
    shares_a_row,
)
from finesteer_hf.runtime.plan import Plan
from finesteer_hf.runtime.session import CallSession


if TYPE_CHECKING:
    from finesteer_hf.runtime.call import SteeringRuntime


class PlainForwards:
    """The plain forwards of one model.

    Args:
        runtime: the model's run time.

    Attributes:
        sessions: the session of the forward that filled a cache, while the cache exists.
        told_of_prompt_ends: whether the user was warned of a forward with an unknown prompt end.
    """

    def __init__(self, runtime: SteeringRuntime) -> None:
        self.runtime = runtime
        self.sessions: weakref.WeakKeyDictionary[Any, CallSession] = weakref.WeakKeyDictionary()
        self.told_of_prompt_ends = False

    def session(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallSession | None:
        """The session of a forward outside `generate`; None if nothing is active.

        A forward that continues the cache of an earlier plain forward keeps that one's decisions, so that a
        hand-written decoding loop steers like `generate`; with `prompt_lengths` it decides again.
        """
        ends = PROMPT_ENDS.get()
        self.runtime.blocks.warn_of_others(self.runtime.selection)
        selection, processors = self.runtime.active()
        if not selection and not processors:
            return None
        self.runtime.follow_modules()
        plan = self.runtime.plan(selection, processors, 1.0)
        if shares_a_row(kwargs) or (plan.depends_on_query and packs_texts(kwargs)):
            raise UnsupportedModelError(
                "Steering is active, but a row of this forward has several texts (continuous batching, packing, "
                "padding-free training), so the queries are unknown. Use `generate`, or pad instead of packing, or "
                "switch steering off with `model.set_steering(None)`."
            )
        cache = forward_cache(kwargs)
        earlier = None if cache is None else self.session_of(cache, plan)
        if earlier is not None:
            earlier.streams[0].cache = cache
            return earlier
        if not plan:
            return None
        return CallSession(self.runtime, plan, self._prompt(plan, ends, args, kwargs))

    def session_of(self, cache: Any, plan: Plan) -> CallSession | None:
        """The session of the plain forward that filled a cache, if this forward should continue it.

        None if the plan differs, or if `prompt_lengths` ask for a new decision.
        """
        if PROMPT_ENDS.get().lengths is not None:
            return None
        earlier = self.sessions.get(cache)
        return earlier if earlier is not None and earlier.plan == plan else None

    def keep(self, session: CallSession, output: Any) -> None:
        """Keep a plain forward's session with the cache that it filled."""
        if output is not None:
            leave_decoder(session)
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            cache = getattr(output, "cache_params", None)
        if cache is not None and session.streams:
            # The dictionary's value must not keep its key alive.
            session.forget_forward()
            self.sessions[cache] = session

    def check_prompt_ends(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Give the same warning for a compiled plain forward, which finds its queries inside the graph."""
        plan = self.runtime.plan(*self.runtime.active(), 1.0)
        if plan:
            self._prompt(plan, PROMPT_ENDS.get(), args, kwargs)

    def _prompt(self, plan: Plan, ends: PromptEnds, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Prompt | None:
        """The prompts of a plain forward; None if they end at its last token as far as is known."""
        lengths = ends.lengths
        if lengths is None and not plan.depends_on_query:
            return None
        inputs, cache, mask = forward_inputs(args, kwargs), forward_cache(kwargs), kwargs.get("attention_mask")
        past = 0 if cache is None else cache_length(cache)
        rows, tokens = int(inputs.shape[0]), int(inputs.shape[1])
        mask = mask.bool() if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
        if lengths is not None:
            check_rows("prompt_lengths", len(lengths), rows)
        else:
            lengths, all_known = prompt_lengths_of(ends.labels, (rows, tokens), mask, past)
            if not all_known and tokens > 1:
                self._tell_of_prompt_ends()
        return None if lengths is None else Prompt(past + tokens, mask, lengths)

    def _tell_of_prompt_ends(self) -> None:
        if self.told_of_prompt_ends:
            return
        self.told_of_prompt_ends = True
        warnings.warn(
            "Steering depends on where the prompt ends, and this forward does not say: it uses the last token of each row "
            "as the query. If a row has prompt and answer, give `prompt_lengths` (numbers of real prompt tokens) or "
            "`labels` that begin with -100; if it has only a prompt, `prompt_lengths=attention_mask.sum(1)`. For lm-eval "
            "use its model `finesteer`. This warning appears once per model.",
            PromptEndWarning,
            stacklevel=2,
        )
