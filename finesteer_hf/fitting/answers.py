"""Answers under teacher forcing: the logits that predict their tokens, and the states behind them."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from finesteer_hf.fitting.capture.jobs import batches, pad_right
from finesteer_hf.fitting.capture.prompt_cache import PromptCache
from finesteer_hf.fitting.capture.reader import input_device
from finesteer_hf.fitting.data.encoding import Passage
from finesteer_hf.method_api import AnswerRun
from finesteer_hf.model.auto import SteeredModelForCausalLM
from finesteer_hf.model.verbs import SteeringMixin
from finesteer_hf.model_head import contiguous_head
from finesteer_hf.processors import QueryStates, SteeringProcessor, SteeringProcessorList, TokenView
from finesteer_hf.sites import Site


# Most logits of a batch, in values: the vocabulary is its largest axis.
LOGIT_BUDGET = 1 << 28
TOKEN_BUDGET = 4096


def answer_logits(
    model: Any,
    batch: Sequence[Passage],
    processors: Sequence[SteeringProcessor],
    prompts: PromptCache | None = None,
) -> Iterator[torch.Tensor]:
    """Yield for each passage the logits that predict its answer's tokens and the next one.

    Args:
        model: a steered model; its active adapters are ignored.
        batch: prompts with their answers.
        processors: the processors to use instead.
        prompts: caches the prompts' tokens before the last; None runs whole texts.

    Yields:
        `[answer + 1, vocabulary]` float32.
    """
    starts = torch.tensor([int(p.answer_start or 0) for p in batch])
    inputs: dict[str, Any]
    if prompts is not None and prompts.serves(batch, processors):
        skip = starts - 1
        ids, mask = pad_right([p.ids[int(s) :] for p, s in zip(batch, skip, strict=True)], input_device(model))
        cache, behind = prompts.continue_from(batch)
        positions = skip[:, None] + torch.arange(ids.shape[1])
        inputs = {"attention_mask": torch.cat([behind, mask], dim=1), "position_ids": positions.to(ids.device)}
        inputs |= {"input_ids": ids, "past_key_values": cache, "use_cache": True}
    else:
        skip = torch.zeros_like(starts)
        ids, mask = pad_right([p.ids for p in batch], input_device(model))
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            inputs["logits_to_keep"] = ids.shape[1] - int(starts.min()) + 1
    with model.steering_with(SteeringProcessorList(processors)):
        logits = model(**inputs, prompt_lengths=starts).logits
    skip = skip + ids.shape[1] - logits.shape[1]
    for row, (passage, start, own) in enumerate(zip(batch, starts.tolist(), skip.tolist(), strict=True)):
        yield logits[row, start - 1 - own : len(passage.ids) - own].float()


def logit_budget(model: Any) -> int:
    """Most tokens of a batch, so that its logits fit."""
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    return max(1, min(TOKEN_BUDGET, LOGIT_BUDGET // vocabulary))


def run_answers(
    model: Any,
    passages: Sequence[Passage],
    steering: SteeringProcessor | None = None,
    sites: Sequence[Site] = (),
    prompts: PromptCache | None = None,
) -> Iterator[AnswerRun]:
    """Run answers through a model in batches, in order.

    Gradients reach only the tensors with `requires_grad` that `steering` uses in `transform`: the model's parameters
    are frozen during its forwards, and blocks below the first steered one leave no graph.

    Args:
        model: the base model, steered or not; its active adapters are ignored.
        passages: prompts with their answers.
        steering: processor that steers; None for the unsteered model.
        sites: sites whose states are returned, after steering.
        prompts: as for `answer_logits`.
    """
    recorder = StateRecorder(sites)
    for batch in batches(passages, lambda b: len(b) * max(len(p.ids) for p in b), logit_budget(model)):
        with steered(model), frozen(model), torch.set_grad_enabled(steering is not None):
            processors = [recorder] if steering is None else [steering, recorder]
            logits = list(answer_logits(model, batch, processors, prompts))
        for row, (passage, of_answer) in enumerate(zip(batch, logits, strict=True)):
            columns = slice(int(passage.answer_start or 0) - 1, len(passage.ids) - 1)
            if recorder.behind:
                # After a cached prompt a forward begins with each row's last prompt token.
                columns = slice(0, len(passage.ids) - int(passage.answer_start or 0))
            states = {site: hidden[row, columns] for site, hidden in recorder.states.items()}
            yield AnswerRun(
                ids=torch.tensor(passage.ids[passage.answer_start :]), logits=of_answer[:-1], states=states
            )


class StateRecorder(SteeringProcessor):
    """Keep the streams of the last forward at some sites, `[rows, tokens, width]` each, unchanged."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self.maps = tuple(sites)
        # It changes nothing, so cached prompts remain usable.
        self.positions = "generated"
        self.states: dict[Site, torch.Tensor] = {}
        self.behind = False

    def transform(self, site: Site, hidden: torch.Tensor, view: TokenView) -> torch.Tensor:
        self.states[site] = hidden
        self.behind = view.first_column > 0
        return hidden


class QueryRecorder(StateRecorder):
    """Keep what a gate sees of a batch: the unsteered states of its queries.

    Args:
        batch: the passages of the forward.
        processors: processors that have the gates.
    """

    def __init__(self, batch: Sequence[Passage], processors: Sequence[SteeringProcessor]) -> None:
        super().__init__(sorted({site for processor in processors for site in processor.reads}))
        self.batch = batch
        if any(processor.query_pool == "mean" for processor in processors):
            # In this case whole texts are run.
            self.query_pool = "mean"

    def steered_by(self, processor: SteeringProcessor) -> list[bool]:
        """For each passage, whether a processor would change it: whether its gate is not exactly 0."""
        if not processor.reads:
            return [True] * len(self.batch)
        rows = list(range(len(self.batch)))
        ends = [int(passage.answer_start or 0) for passage in self.batch]
        columns = [0 if self.behind else end - 1 for end in ends]
        states = {site: self.states[site][rows, columns].float() for site in processor.reads}
        if processor.query_pool == "mean":
            states = {
                site: torch.stack([self.states[site][row, :end].float().mean(dim=0) for row, end in enumerate(ends)])
                for site in processor.reads
            }
        device = next(iter(states.values())).device
        gate = processor.decide(QueryStates(states, len(self.batch), device)).gate
        return [True] * len(self.batch) if gate is None else (gate != 0).tolist()


@contextlib.contextmanager
def steered(model: Any) -> Iterator[None]:
    """Make a model steerable inside a block, if it is not, and its head fast."""
    already = isinstance(model, SteeringMixin)
    SteeredModelForCausalLM.from_model(model)
    try:
        with contiguous_head(model):
            yield
    finally:
        if not already:
            model.unload_steering()


@contextlib.contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """Turn off gradients of all parameters inside a block."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
