"""Answers under teacher forcing: the logits that predict their tokens, and the states that these come from."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from finesteer_hf.auto import SteeredModelForCausalLM
from finesteer_hf.fitting.capture import input_device
from finesteer_hf.fitting.jobs import batches, pad_right
from finesteer_hf.fitting.templating import Passage
from finesteer_hf.methods.base import AnswerRun
from finesteer_hf.mixin import SteeringMixin
from finesteer_hf.processors import SteeringProcessor, SteeringProcessorList, TokenView
from finesteer_hf.sites import Site


# Logits of a batch, in values: the vocabulary is what a batch is wide in.
LOGIT_BUDGET = 1 << 28
TOKEN_BUDGET = 4096


def answer_logits(
    model: Any, batch: Sequence[Passage], processors: Sequence[SteeringProcessor]
) -> Iterator[torch.Tensor]:
    """For each passage the logits that predict its answer's tokens and the one after.

    Args:
        model: a steered model; what is active on it plays no part.
        batch: prompts with their answers.
        processors: what steers instead.

    Yields:
        `[answer + 1, vocabulary]` float32.
    """
    ids, mask = pad_right([p.ids for p in batch], input_device(model))
    starts = [int(p.answer_start or 0) for p in batch]
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "prompt_lengths": torch.tensor(starts)}
    first = min(starts) - 1
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs["logits_to_keep"] = ids.shape[1] - first
    with model.steering_with(SteeringProcessorList(processors)):
        logits = model(**inputs, use_cache=False).logits
    skipped = ids.shape[1] - logits.shape[1]
    for row, (passage, start) in enumerate(zip(batch, starts, strict=True)):
        yield logits[row, start - 1 - skipped : len(passage.ids) - skipped].float()


def logit_budget(model: Any) -> int:
    """Tokens of a batch whose logits fit."""
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    return max(1, min(TOKEN_BUDGET, LOGIT_BUDGET // vocabulary))


def run_answers(
    model: Any, passages: Sequence[Passage], steering: SteeringProcessor | None = None, sites: Sequence[Site] = ()
) -> Iterator[AnswerRun]:
    """Run answers through a model, batch by batch, in their order.

    Gradients reach the tensors that `steering` uses in `transform` and that ask for them, and nothing else: the model's
    own parameters are frozen in its forwards, and blocks below the first steered one leave no graph.

    Args:
        model: the base model, steered or not; adapters that are active on it play no part.
        passages: prompts with their answers.
        steering: what steers; None for the model itself.
        sites: whose states are wanted, as they are after steering.
    """
    recorder = StateRecorder(sites)
    for batch in batches(passages, lambda b: len(b) * max(len(p.ids) for p in b), logit_budget(model)):
        with steered(model), frozen(model), torch.set_grad_enabled(steering is not None):
            processors = [recorder] if steering is None else [steering, recorder]
            logits = list(answer_logits(model, batch, processors))
        for row, (passage, of_answer) in enumerate(zip(batch, logits, strict=True)):
            columns = slice(int(passage.answer_start or 0) - 1, len(passage.ids) - 1)
            states = {site: hidden[row, columns] for site, hidden in recorder.states.items()}
            yield AnswerRun(
                ids=torch.tensor(passage.ids[passage.answer_start :]), logits=of_answer[:-1], states=states
            )


class StateRecorder(SteeringProcessor):
    """Keep the streams of the last forward at some sites, `[rows, tokens, width]` each, as they are."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self.maps = tuple(sites)
        self.states: dict[Site, torch.Tensor] = {}

    def transform(self, site: Site, hidden: torch.Tensor, view: TokenView) -> torch.Tensor:
        self.states[site] = hidden
        return hidden


@contextlib.contextmanager
def steered(model: Any) -> Iterator[None]:
    """Give a model the steering verbs inside a block, if it has not got them."""
    already = isinstance(model, SteeringMixin)
    SteeredModelForCausalLM.from_model(model)
    try:
        yield
    finally:
        if not already:
            model.unload_steering()


@contextlib.contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """Let no parameter ask for gradients inside a block."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
