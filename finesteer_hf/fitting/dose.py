"""Dose response: what a strength does to held-out answers, and to what general prompts say next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from finesteer_hf.fitting.answers import answer_logits, logit_budget, steered
from finesteer_hf.fitting.capture import input_device
from finesteer_hf.fitting.jobs import batches
from finesteer_hf.fitting.templating import EncodedRow, Passage
from finesteer_hf.methods.base import DosePoint
from finesteer_hf.processors import SteeringProcessor


# More rows make the curve no clearer than its standard error shows, and each costs two passes a strength.
MAX_ROWS, MAX_PROMPTS = 200, 64
# Greedy tokens after a general prompt over which the divergence is taken, beside the first.
CONTINUATION = 8


class DoseRunner:
    """Runs a model steered at several strengths on fixed rows; it is steered for the length of a run only.

    Args:
        model: the base model, steered or not; adapters that are active on it play no part.
        rows: held-out preference rows.
        prompts: general prompts.
        seed: of the draw where there are more than `MAX_ROWS` or `MAX_PROMPTS`.
    """

    def __init__(self, model: Any, rows: Sequence[EncodedRow], prompts: Sequence[Passage], seed: int = 0) -> None:
        self.model = model
        self.rows = draw(rows, MAX_ROWS, seed)
        self.prompts = draw(prompts, MAX_PROMPTS, seed)
        self._passages = list(dict.fromkeys(row.chosen for row in self.rows))
        self.units = np.unique([str(row.prompt.ids) for row in self.rows], return_inverse=True)[1]
        self.device = input_device(model)
        self._unsteered: np.ndarray | None = None
        self._general: list[Passage] | None = None
        self._build: Callable[[float], SteeringProcessor] | None = None
        self._known: dict[float, tuple[np.ndarray, np.ndarray]] = {}

    def run(
        self,
        build: Callable[[float], SteeringProcessor],
        strengths: Sequence[float],
        advance: Callable[[int], None] = lambda done: None,
    ) -> list[DosePoint]:
        """The curve, in the order of the strengths; strength 0 is the model itself.

        Strengths that were run for the same `build` before are not run again.

        Args:
            build: makes the processor of a strength.
            strengths: lambdas to try.
            advance: told of each forward's number of texts.

        Returns:
            Rows of one prompt are taken together in the standard errors; divergences are in nats, at the next token and
            along the unsteered greedy continuation.
        """
        if build is not self._build:
            self._build, self._known = build, {}
        new = [strength for strength in map(float, strengths) if strength not in self._known]
        if new:
            with steered(self.model):
                processors = {strength: build(strength) for strength in new if strength}
                weakest = self._bottlenecks(processors, advance)
                divergences = self._divergences(processors, advance)
            self._known |= {strength: (weakest[strength], divergences[strength]) for strength in {*new, 0.0}}
        curve = {strength: self._known[strength] for strength in map(float, strengths)}
        best = max((weakest for weakest, _ in curve.values()), key=lambda weakest: weakest.mean())
        return [
            DosePoint(
                strength=strength,
                bottleneck=float(weakest.mean()),
                bottleneck_se=clustered_se(weakest, self.units),
                kl=float(np.percentile(kl, 95)) if len(kl) else 0.0,
                gap_se=clustered_se(best - weakest, self.units),
            )
            for strength, (weakest, kl) in curve.items()
        ]

    def texts(self, build: Callable[[float], SteeringProcessor], strengths: Sequence[float]) -> int:
        """Number of texts that `run` would put through the model, continuations left out."""
        known = self._known if build is self._build else {}
        new = sum(1 for strength in map(float, strengths) if strength and strength not in known)
        return new * (len(self._passages) + len(self.prompts)) + (self._unsteered is None) * len(self._passages)

    # -- what is measured ---------------------------------------------------------------------------------------------

    def _bottlenecks(
        self, processors: dict[float, SteeringProcessor], advance: Callable[[int], None]
    ) -> dict[float, np.ndarray]:
        """Least probability of a token of each row's chosen answer, `[rows]`, for each strength and for 0."""
        scores: dict[float, dict[Passage, float]] = {strength: {} for strength in processors}
        if self._unsteered is None:
            scores[0.0] = {}
        for batch in self._batches(self._passages):
            for strength in scores:
                for passage, logits in self._logits(batch, processors.get(strength)):
                    answer = torch.tensor(passage.ids[passage.answer_start :], device=logits.device)
                    log_probs = logits[:-1].log_softmax(-1).gather(1, answer[:, None])
                    scores[strength][passage] = float(log_probs.min().exp())
                advance(len(batch))
        weakest = {strength: np.array([found[row.chosen] for row in self.rows]) for strength, found in scores.items()}
        if self._unsteered is None:
            self._unsteered = weakest[0.0]
        return {**weakest, 0.0: self._unsteered}

    def _divergences(
        self, processors: dict[float, SteeringProcessor], advance: Callable[[int], None]
    ) -> dict[float, np.ndarray]:
        """KL(unsteered || steered) in nats of each distribution, for each strength and for 0."""
        if self._general is None:
            self._general = self._continued()
        found: dict[float, list[torch.Tensor]] = {strength: [] for strength in processors}
        for batch in self._batches(self._general):
            base = [logits.log_softmax(-1) for _, logits in self._logits(batch, None)]
            for strength, processor in processors.items():
                for reference, (_, logits) in zip(base, self._logits(batch, processor), strict=True):
                    kl = (reference.exp() * (reference - logits.log_softmax(-1))).sum(-1)
                    found[strength].append(kl.clamp(min=0).cpu())
                advance(len(batch))
        divergences = {
            strength: torch.cat(values).double().numpy() if values else np.zeros(0)
            for strength, values in found.items()
        }
        return {**divergences, 0.0: np.zeros(0)}

    @torch.no_grad()
    def _continued(self) -> list[Passage]:
        """The general prompts with their unsteered greedy continuation."""
        eos = self.model.generation_config.eos_token_id
        ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        settings = GenerationConfig(
            max_new_tokens=CONTINUATION,
            do_sample=False,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
        )
        continued = []
        for batch in self._batches(self.prompts, extra=CONTINUATION):
            width = max(len(p.ids) for p in batch)
            ids = torch.tensor([[0] * (width - len(p.ids)) + list(p.ids) for p in batch], device=self.device)
            mask = torch.tensor([[0] * (width - len(p.ids)) + [1] * len(p.ids) for p in batch], device=self.device)
            with self.model.disable_steering():
                texts = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
            for prompt, said in zip(batch, texts[:, width:].tolist(), strict=True):
                length = next((i + 1 for i, token in enumerate(said) if token in ends), len(said))
                continued.append(Passage((*prompt.ids, *said[:length]), len(prompt.ids)))
        return continued

    # -- forwards -----------------------------------------------------------------------------------------------------

    def _batches(self, passages: Sequence[Passage], extra: int = 0) -> Iterator[list[Passage]]:
        """Passages of similar length whose logits fit."""
        ordered = sorted(passages, key=lambda p: (p.answer_start or 0, len(p.ids)), reverse=True)
        budget = logit_budget(self.model)
        return batches(ordered, lambda batch: len(batch) * (max(len(p.ids) for p in batch) + extra), budget)

    @torch.no_grad()
    def _logits(
        self, batch: Sequence[Passage], processor: SteeringProcessor | None
    ) -> Iterator[tuple[Passage, torch.Tensor]]:
        """For each passage the logits that predict its answer's tokens and the one after, `[answer + 1, vocabulary]`."""
        processors = [] if processor is None else [processor]
        yield from zip(batch, answer_logits(self.model, batch, processors), strict=True)


def clustered_se(values: np.ndarray, units: np.ndarray) -> float:
    """Standard error of a mean over rows of which those of one unit are not independent.

    Args:
        values: `[rows]`.
        units: `[rows]` numbers of the units, from 0.
    """
    count = len(np.unique(units))
    if count < 2:
        return 0.0
    sums = np.bincount(units, weights=values - values.mean())
    return float(np.sqrt((sums**2).sum() * count / (count - 1)) / len(values))


def draw(items: Sequence[Any], most: int, seed: int) -> list[Any]:
    """At most so many items, drawn at random, in their order."""
    if len(items) <= most:
        return list(items)
    kept = np.sort(np.random.default_rng(seed).choice(len(items), most, replace=False))
    return [items[i] for i in kept]
