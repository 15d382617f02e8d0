"""The model's own answers, steered or not, and how backtracking methods judge them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from finesteer_hf.decoder_layout import context_length
from finesteer_hf.fitting.answers import StateRecorder, answer_logits, logit_budget, steered
from finesteer_hf.fitting.capture.jobs import batches
from finesteer_hf.fitting.capture.prompt_cache import PromptCache
from finesteer_hf.fitting.capture.reader import input_device
from finesteer_hf.fitting.data.encoding import Passage
from finesteer_hf.processors import Decision, QueryStates, SteeringProcessor, SteeringProcessorList, TokenView
from finesteer_hf.sites import Site


@torch.no_grad()
def own_words(
    model: Any,
    prompts: Sequence[Passage],
    new_tokens: int,
    processors: Sequence[SteeringProcessor] = (),
    cache: PromptCache | None = None,
) -> list[Passage]:
    """The prompts with the model's greedy continuations, up to and including the first end of text.

    Args:
        model: the base model, steered or not; its active adapters are ignored.
        prompts: the prompts; answers in them are ignored.
        new_tokens: most tokens of a continuation; fewer if the model's context is too short.
        processors: processors that steer; none by default.
        cache: caches the prompts.

    Returns:
        Passages in the order of the prompts.
    """
    eos = model.generation_config.eos_token_id
    ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    settings = GenerationConfig(do_sample=False, eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0)
    positions = context_length(model)
    asked = list(dict.fromkeys(prompt.ids[: prompt.answer_start] for prompt in prompts))
    asked.sort(key=len, reverse=True)
    device, found = input_device(model), dict[tuple[int, ...], Passage]()
    for batch in batches(asked, lambda b: len(b) * (max(map(len, b)) + new_tokens), logit_budget(model)):
        width = max(map(len, batch))
        settings.max_new_tokens = new_tokens if positions is None else max(1, min(new_tokens, positions - width))
        ids = torch.tensor([[0] * (width - len(own)) + list(own) for own in batch], device=device)
        mask = torch.tensor([[0] * (width - len(own)) + [1] * len(own) for own in batch], device=device)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        with steered(model), model.steering_with(SteeringProcessorList(processors)):
            alone = [Passage(own, len(own)) for own in batch]
            if cache is not None and cache.serves(alone, processors):
                inputs["past_key_values"], _ = cache.continue_from(alone)
            texts = model.generate(**inputs, generation_config=settings)
        for own, said in zip(batch, texts[:, width:].tolist(), strict=True):
            length = next((i + 1 for i, token in enumerate(said) if token in ends), len(said))
            found[own] = Passage((*own, *said[:length]), len(own))
    return [found[prompt.ids[: prompt.answer_start]] for prompt in prompts]


def repeated_share(said: Passage) -> float:
    """Share of an answer's 4-grams that occurred earlier in it; 0 for an answer of fewer than four tokens."""
    answer = said.ids[said.answer_start :]
    runs = [answer[i : i + 4] for i in range(len(answer) - 3)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


class Heard:
    """The states of the model's own answers, for backtracking processors to judge.

    Args:
        model: a steered model.
        said: its answer to each prompt of a batch.
        sites: sites that the processors read.
    """

    @torch.no_grad()
    def __init__(self, model: Any, said: Sequence[Passage], sites: Sequence[Site]) -> None:
        recorder = StateRecorder(sites)
        for _ in answer_logits(model, said, [recorder]):
            pass
        self._states = recorder.states
        self._starts = torch.tensor([int(passage.answer_start or 0) for passage in said])
        self._lengths = torch.tensor([len(passage.ids) for passage in said])

    def judged_by(self, processor: SteeringProcessor) -> SteeringProcessor:
        """The processor in the state it has in generation after it went back: it steers the next answer by its
        judgement of the previous one.
        """
        memory: dict[str, Any] = {}
        first = next(iter(self._states.values()))
        columns = torch.arange(first.shape[1], device=first.device)
        mask = columns < self._lengths.to(first.device)[:, None]
        scale = torch.ones(len(first), 1, 1, device=first.device)
        view = TokenView(mask, None, True, scale, memory, query_column=self._starts.to(first.device) - 1)
        processor.review(self._states, view)
        return _Judged(processor, memory)


class _Judged(SteeringProcessor):
    """A processor with a precomputed review of a text."""

    def __init__(self, processor: SteeringProcessor, memory: dict[str, Any]) -> None:
        self.processor = processor
        self.memory = memory
        self.reads, self.writes, self.maps = processor.reads, processor.writes, processor.maps
        self.query_pool = processor.query_pool
        self.positions, self.strength, self.lookback = processor.positions, processor.strength, processor.lookback

    def decide(self, queries: QueryStates) -> Decision:
        return self.processor.decide(queries)

    def review(self, states: Mapping[Site, torch.Tensor], view: TokenView) -> None:
        view.state.update(self.memory)

    def transform(self, site: Site, hidden: torch.Tensor, view: TokenView) -> torch.Tensor:
        return self.processor.transform(site, hidden, view)
