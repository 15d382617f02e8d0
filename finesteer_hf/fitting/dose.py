"""Dose response: what a strength does to held-out answers, and to what general prompts say next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from finesteer_hf.fitting.answers import answer_logits, logit_budget, steered
from finesteer_hf.fitting.capture import input_device
from finesteer_hf.fitting.jobs import batches
from finesteer_hf.fitting.own_words import Heard, own_words
from finesteer_hf.fitting.templating import EncodedRow, Passage
from finesteer_hf.methods.base import DosePoint
from finesteer_hf.processors import SteeringProcessor


# More rows make the curve no clearer than its standard error shows, and each costs two passes a strength.
MAX_ROWS, MAX_PROMPTS = 200, 64
# Greedy tokens after a general prompt over which the divergence is taken, beside the first.
CONTINUATION = 8
# The same for methods that take tokens back: they judge whole answers, and so does their measure.
OWN_TOKENS = 48


@dataclass(frozen=True)
class SideEffects:
    """What a strength does to general prompts; see `DosePoint`."""

    kl: float
    changed: float | None


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
        self._general: dict[int, list[Passage]] = {}
        self._said: dict[Passage, Passage] | None = None
        self._build: Callable[[float], SteeringProcessor] | None = None
        self._known: dict[float, tuple[np.ndarray, SideEffects]] = {}

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
            along the unsteered greedy continuation. Methods that take tokens back steer what they would in generation
            (see `Heard`), and it is also counted how many of the continuations they change.
        """
        if build is not self._build:
            self._build, self._known = build, {}
        new = [strength for strength in map(float, strengths) if strength not in self._known]
        if new:
            with steered(self.model):
                processors = {strength: build(strength) for strength in new if strength}
                weakest = self._bottlenecks(processors, advance)
                effects = self._side_effects(processors, advance)
            self._known |= {strength: (weakest[strength], effects[strength]) for strength in {*new, 0.0}}
        curve = {strength: self._known[strength] for strength in map(float, strengths)}
        best = max((weakest for weakest, _ in curve.values()), key=lambda weakest: weakest.mean())
        return [
            DosePoint(
                strength=strength,
                bottleneck=float(weakest.mean()),
                bottleneck_se=clustered_se(weakest, self.units),
                kl=effects.kl,
                gap_se=clustered_se(best - weakest, self.units),
                changed=effects.changed,
            )
            for strength, (weakest, effects) in curve.items()
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
            as_generated = self._as_generated(batch, processors)
            for strength in scores:
                for passage, logits in self._logits(batch, as_generated.get(strength)):
                    answer = torch.tensor(passage.ids[passage.answer_start :], device=logits.device)
                    log_probs = logits[:-1].log_softmax(-1).gather(1, answer[:, None])
                    scores[strength][passage] = float(log_probs.min().exp())
                advance(len(batch))
        weakest = {strength: np.array([found[row.chosen] for row in self.rows]) for strength, found in scores.items()}
        if self._unsteered is None:
            self._unsteered = weakest[0.0]
        return {**weakest, 0.0: self._unsteered}

    def _as_generated(
        self, batch: Sequence[Passage], processors: dict[float, SteeringProcessor]
    ) -> dict[float, SteeringProcessor]:
        """Processors as they steer a batch's answers in generation.

        One that takes tokens back has by then judged what the model said first, and not the answer that is wanted, on
        which it would find nothing to steer.
        """
        sites = next((processor.maps for processor in processors.values() if processor.lookback), ())
        if not sites:
            return processors
        if self._said is None:
            self._said = dict(zip(self._passages, own_words(self.model, self._passages, OWN_TOKENS), strict=True))
        heard = Heard(self.model, [self._said[passage] for passage in batch], sites)
        return {strength: heard.judged_by(processor) for strength, processor in processors.items()}

    def _side_effects(
        self, processors: dict[float, SteeringProcessor], advance: Callable[[int], None]
    ) -> dict[float, SideEffects]:
        """What each strength does to general prompts; strength 0 does nothing."""
        takes_back = any(processor.lookback for processor in processors.values())
        length = OWN_TOKENS if takes_back else CONTINUATION
        if length not in self._general:
            self._general[length] = own_words(self.model, self.prompts, length)
        divergences: dict[float, list[torch.Tensor]] = {strength: [] for strength in processors}
        changed: dict[float, list[bool]] = {strength: [] for strength in processors}
        for batch in self._batches(self._general[length]):
            base = [logits.log_softmax(-1) for _, logits in self._logits(batch, None)]
            for strength, processor in processors.items():
                for reference, (_, logits) in zip(base, self._logits(batch, processor), strict=True):
                    kl = (reference.exp() * (reference - logits.log_softmax(-1))).sum(-1)
                    divergences[strength].append(kl.clamp(min=0).cpu())
                    # Greedy, a text stays as it is if each of its tokens is still the likeliest after those before it.
                    differs = reference[:-1].argmax(-1) != logits[:-1].argmax(-1)
                    changed[strength].append(bool(differs.any()))
                advance(len(batch))
        effects = {
            strength: SideEffects(
                kl=float(np.percentile(torch.cat(values).double().numpy(), 95)) if values else 0.0,
                changed=float(np.mean(changed[strength])) if takes_back and values else None,
            )
            for strength, values in divergences.items()
        }
        return {**effects, 0.0: SideEffects(0.0, 0.0 if takes_back else None)}

    # -- forwards -----------------------------------------------------------------------------------------------------

    def _batches(self, passages: Sequence[Passage]) -> Iterator[list[Passage]]:
        """Passages of similar length whose logits fit."""
        ordered = sorted(passages, key=lambda p: (p.answer_start or 0, len(p.ids)), reverse=True)
        return batches(ordered, lambda batch: len(batch) * max(len(p.ids) for p in batch), logit_budget(self.model))

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
