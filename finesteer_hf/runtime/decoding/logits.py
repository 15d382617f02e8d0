"""Steering of logits: the unsteered model's logits, and plain forwards, which have no list of logits processors.

In `generate`, processors that act on logits join transformers' list. A plain forward steers the logits that choose
generated tokens, from the query on, each with the tokens before it. So scoring agrees with generating.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicLayer

from finesteer_hf.errors import UnsupportedModelError


if TYPE_CHECKING:
    from finesteer_hf.runtime.session import CallSession


# The plain forward of this thread that has left the decoder but whose logits are not steered yet.
_LEFT_DECODER: ContextVar[CallSession | None] = ContextVar("finesteer_hf_left_decoder", default=None)


class UnsteeredLogits:
    """The unsteered model beside a call of `generate`, with its own cache.

    Rows may be reordered, as beams are, and tokens dropped, as rejected candidates are. So cached prefixes are found
    by their tokens.

    Args:
        session: the call.
    """

    def __init__(self, session: CallSession) -> None:
        self.session = session
        self.model = session.runtime.model
        self.cache: Any = None
        self.ids = torch.zeros(0, 0, dtype=torch.long)

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The unsteered model's next-token logits.

        Args:
            input_ids: `[rows, tokens]`, prompt and generated tokens, pads as in the prompt.

        Returns:
            Logits `[rows, vocabulary]` float32.

        Raises:
            UnsupportedModelError: if the prompt was given as embeddings or is only in a cache, so that its tokens are
                unknown.
        """
        prompt = self.session.prompt
        assert prompt is not None
        if "input_ids" not in prompt.inputs or input_ids.shape[1] < prompt.length:
            raise UnsupportedModelError(
                "The active steering compares with the unsteered model, which needs the whole text as input_ids; the "
                "prompt was given as inputs_embeds, or only in a cache."
            )
        mask = torch.ones_like(input_ids)
        if prompt.mask is not None:
            mask[:, : prompt.length] = prompt.mask.to(mask.device).long()
        kept = self._take_over(input_ids, mask)
        inputs: dict[str, Any] = {"input_ids": input_ids[:, kept:], "attention_mask": mask}
        parameters = self._forward_parameters
        if "position_ids" in parameters:
            inputs["position_ids"] = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)[:, kept:]
        if "logits_to_keep" in parameters:
            inputs["logits_to_keep"] = 1
        with self.session.unsteered():
            out = self.model(**inputs, past_key_values=self.cache, use_cache=True)
        self.cache, self.ids, self.mask = out.past_key_values, input_ids, mask
        return out.logits[:, -1].float()

    @functools.cached_property
    def _forward_parameters(self) -> Mapping[str, Any]:
        return inspect.signature(self.model.forward).parameters

    def _take_over(self, input_ids: torch.Tensor, mask: torch.Tensor) -> int:
        """Make the cache hold prefixes of these rows; returns how many of their columns it holds."""
        # The last token always goes through the model, to get its logits.
        width = min(self.ids.shape[1], input_ids.shape[1] - 1)
        if self.cache is None or not width:
            return self._forget()
        same = self.ids[None, :, :width] == input_ids[:, None, :width]
        same &= self.mask[None, :, :width] == mask[:, None, :width]
        shared, rows = same.long().cumprod(dim=-1).sum(dim=-1).max(dim=1)
        kept = int(shared.min())
        in_order = len(rows) == len(self.ids) and bool((rows == torch.arange(len(rows), device=rows.device)).all())
        if kept == self.ids.shape[1] and in_order:
            return kept
        if not kept or any(type(layer) is not DynamicLayer for layer in getattr(self.cache, "layers", [None])):
            # Other kinds of states can be neither cut nor reordered by row.
            return self._forget()
        if not in_order:
            self.cache.batch_select_indices(rows)
        if kept < self.ids.shape[1]:
            self.cache.crop(kept - self.ids.shape[1])
        return kept

    def _forget(self) -> int:
        self.cache = None
        return 0


def leave_decoder(session: CallSession) -> None:
    """Record a plain forward whose logits must be steered after the model's head."""
    if any(entry.processor.acts_on_logits for entry in session.plan.entries):
        _LEFT_DECODER.set(session)


def steer_forward(forward: Callable[..., Any], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a model's forward and, if it is a plain one with processors that act on logits, steer its logits.

    Args:
        forward: forward of the base class.
        model: the steered model.
        args: of the forward.
        kwargs: its keyword arguments.

    Raises:
        UnsupportedModelError: if a loss is requested, which the head computes from unsteered logits; if a processor
            compares with the unsteered model and the forward continues a cache.
    """
    if torch.compiler.is_compiling():
        if model._steering.compiled.on_logits and not model._steering.compiled.bound:
            raise UnsupportedModelError(
                "An adapter that acts on logits cannot be part of a compiled plain forward; use `generate`, or an "
                "uncompiled forward."
            )
        return forward(model, *args, **kwargs)
    # A forward that failed in the head, or a decoder called directly, leaves its session behind.
    _LEFT_DECODER.set(None)
    output = forward(model, *args, **kwargs)
    session = _LEFT_DECODER.get()
    if session is None:
        return output
    _LEFT_DECODER.set(None)
    bound = inspect.signature(forward).bind(model, *args, **kwargs).arguments
    bound = {**bound, **bound.pop("kwargs", {})}
    if bound.get("labels") is not None:
        raise UnsupportedModelError(
            "The active steering acts on logits, but the model computes the loss from unsteered logits. Leave `labels` out "
            "and compute the loss from the returned logits."
        )

    def unsteered() -> torch.Tensor:
        if (session.forward is not None and session.forward.past) or bound.get("past_key_values") is not None:
            raise UnsupportedModelError(
                "The active steering compares with the unsteered model, for which a plain forward has no cache. Give "
                "the whole text in one forward, or use `generate`."
            )
        with session.unsteered(), torch.no_grad():
            base = forward(model, *args, **kwargs)
        return base.logits if hasattr(base, "logits") else base[0]

    if hasattr(output, "logits"):
        output.logits = _steered_logits(session, output.logits, bound, unsteered)
        return output
    return (_steered_logits(session, output[0], bound, unsteered), *output[1:])


def _steered_logits(
    session: CallSession, logits: torch.Tensor, arguments: dict[str, Any], unsteered: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """Logits `[rows, kept, vocabulary]` of a plain forward, steered from the query on."""
    assert session.forward is not None
    past, tokens = session.forward.past, session.forward.tokens
    named = session.forward.stream.window.token_mask("generated", past, tokens, logits.device)
    if named is None:
        named = torch.ones(1, tokens, dtype=torch.bool, device=logits.device)
    columns = torch.arange(tokens, device=logits.device)
    keep = arguments.get("logits_to_keep", 0)
    columns = columns[keep] if isinstance(keep, torch.Tensor) else columns[tokens - logits.shape[1] :]
    base: list[torch.Tensor] = []

    def unsteered_at(number: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def at(input_ids: torch.Tensor) -> torch.Tensor:
            if not base:
                base.append(unsteered().float())
            return base[0][:, number]

        return at

    ids = arguments.get("input_ids")
    if ids is None:
        ids = torch.zeros(logits.shape[0], tokens, dtype=torch.long, device=logits.device)
    steered = []
    for number, column in enumerate(columns.tolist()):
        scores = logits[:, number]
        if bool(named[:, column].any()):
            before = scores.float()
            after = before
            for entry in session.plan.entries:
                scale = session.row_scale(entry, logits.device)
                for processor in entry.processor.logits_processors(scale):
                    after = processor(ids[:, : column + 1], after)
                for processor in entry.processor.contrast_processors(scale, unsteered_at(number)):
                    after = processor(ids[:, : column + 1], after)
            scores = torch.where(named[:, column, None], after.to(scores.dtype), scores)
        steered.append(scores)
    return torch.stack(steered, dim=1)
