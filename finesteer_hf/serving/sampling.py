"""How the tokens of one request are chosen: its own temperature, seed and record, whatever else is in the batch.

The engine draws for a whole batch with one generator, so a draw depends on who else is there. Here each token of a
request is drawn with a generator that is seeded by the request's seed, its sequence and the token's place. The same
request gives the same tokens alone, in any batch, and after it was queued again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from finesteer_hf.runtime.arguments import as_number
from finesteer_hf.runtime.plan import Plan


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are chosen.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: smallest set of tokens whose probability reaches it, in (0, 1].
        top_k: number of likeliest tokens to draw from; 0: all.
        seed: of the draws; None: one is drawn when the request is submitted.
        logprobs: number of likeliest tokens that are recorded beside each chosen one; 0: the chosen one alone; None: no
            record. Log-probabilities are the steered model's own, before temperature and cuts.
        logit_bias: what is added to the logits of single tokens.
        presence_penalty: taken from the logit of each token that was generated before.
        frequency_penalty: the same, once for each time.

    Raises:
        ValueError: for values out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "presence_penalty", "frequency_penalty"):
            as_number(getattr(self, name), name)
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}.")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (all tokens) or more, got {self.top_k}.")
        if self.logprobs is not None and self.logprobs < 0:
            raise ValueError(f"logprobs must be 0 or more, got {self.logprobs}.")


@dataclass(frozen=True)
class TokenLogprob:
    """A chosen token with its log-probability in nats, and the likeliest tokens at its place, likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Penalties(LogitsProcessor):
    """OpenAI's presence and frequency penalties: they count generated tokens only, never the prompt's.

    Args:
        presence: taken once from each token that occurs.
        frequency: taken each time.
        prompt_length: number of tokens to leave out.
    """

    supports_continuous_batching = True

    def __init__(self, presence: float, frequency: float, prompt_length: int) -> None:
        self.presence, self.frequency, self.prompt_length = presence, frequency, prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        generated = input_ids[:, self.prompt_length :]
        counts = torch.zeros_like(scores).scatter_add_(1, generated, torch.ones_like(generated, dtype=scores.dtype))
        return scores - self.frequency * counts - self.presence * (counts > 0)  # type: ignore[return-value]


class TokenBias(LogitsProcessor):
    """Adds a number to the logits of single tokens."""

    supports_continuous_batching = True

    def __init__(self, bias: Mapping[int, float]) -> None:
        self.ids, self.values = torch.tensor(list(bias)), torch.tensor(list(bias.values()))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        values = self.values.to(scores).expand(scores.shape[0], -1)
        return scores.index_add(1, self.ids.to(scores.device), values)  # type: ignore[return-value]


class SeededChoice(LogitsProcessor):
    """Chooses the token by itself and leaves no other possible, so that greedy search and sampling take the same one.

    Args:
        seed: of the request; None takes the likeliest token.
        prompt_length: number of tokens before the first generated one.
        sequence: number of the returned sequence; each draws for itself.
    """

    supports_continuous_batching = True

    def __init__(self, seed: int | None, prompt_length: int, sequence: int = 0) -> None:
        self.seed, self.prompt_length, self.sequence = seed, prompt_length, sequence

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.seed is None:
            chosen = scores.argmax(dim=-1, keepdim=True)
        else:
            place = input_ids.shape[1] - self.prompt_length
            digest = hashlib.blake2b(f"{self.seed}/{self.sequence}/{place}".encode(), digest_size=8).digest()
            # On the CPU: a seed gives the same draws on every device.
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            chosen = torch.multinomial(scores.float().softmax(-1).cpu(), 1, generator=generator).to(scores.device)
        # Not -inf everywhere else: the engine's softmax of it stays finite in any case.
        return torch.full_like(scores, float("-inf")).scatter_(1, chosen, 0.0)  # type: ignore[return-value]


def logits_processors_of(
    plan: Plan, sampling: Sampling | None, prompt_length: int, sequence: int = 0
) -> LogitsProcessorList:
    """The processors that choose the tokens of one sequence, in order: adapters, bias and penalties, cuts, the draw.

    Args:
        plan: what steers the request; entries with a number as their scale.
        sampling: None for adapters alone: the engine then chooses.
        prompt_length: number of tokens of its prompt.
        sequence: number of the returned sequence.
    """
    processors = LogitsProcessorList()
    for entry in plan.entries:
        assert isinstance(entry.scale, float)
        processors += entry.processor.logits_processors(entry.scale)
    if sampling is None:
        return processors
    if sampling.logit_bias:
        processors.append(TokenBias(sampling.logit_bias))
    if sampling.presence_penalty or sampling.frequency_penalty:
        processors.append(Penalties(sampling.presence_penalty, sampling.frequency_penalty, prompt_length))
    if not sampling.temperature:
        return LogitsProcessorList([*processors, SeededChoice(None, prompt_length)])
    assert sampling.seed is not None
    if sampling.temperature != 1.0:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        processors.append(TopPLogitsWarper(sampling.top_p))
    return LogitsProcessorList([*processors, SeededChoice(sampling.seed, prompt_length, sequence)])


def token_logprob(scores: torch.Tensor, token: int, alternatives: int) -> TokenLogprob:
    """The record of a chosen token.

    Args:
        scores: the model's logits `[vocabulary]` at its place.
        token: the chosen one.
        alternatives: number of likeliest tokens to name.
    """
    logprobs = scores.float().log_softmax(-1)
    values, ids = logprobs.topk(min(alternatives, len(logprobs)))
    return TokenLogprob(token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
