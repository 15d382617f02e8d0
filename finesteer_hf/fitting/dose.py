"""Dose response: what a strength does to held-out answers, to what the model says itself, and to general prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import compress
from operator import not_
from typing import Any

import numpy as np
import torch
from scipy.special import expit

from finesteer_hf.fitting.answers import QueryRecorder, answer_logits, logit_budget, steered
from finesteer_hf.fitting.capture import input_device
from finesteer_hf.fitting.jobs import batches
from finesteer_hf.fitting.own_words import Heard, own_words, repeated_share
from finesteer_hf.fitting.prompt_cache import PromptCache
from finesteer_hf.fitting.templating import EncodedRow, Passage
from finesteer_hf.methods.base import DosePoint
from finesteer_hf.methods.objective import is_sayable
from finesteer_hf.processors import SteeringProcessor


# More rows make the curve no clearer than its standard error shows, and each costs two passes a strength.
MAX_ROWS, MAX_PROMPTS = 200, 64
# Greedy tokens after a general prompt over which the divergence is taken, beside the first.
CONTINUATION = 8
# The same for methods that take tokens back: they judge whole answers, and so does their measure.
OWN_TOKENS = 48
# Held-out prompts whose steered answers are read, and their greedy tokens. What they show, a text that falls apart, shows
# in a few.
SPOKEN_PROMPTS, SPOKEN_TOKENS = 24, 24


@dataclass(frozen=True)
class SideEffects:
    """What a strength does to general prompts; see `DosePoint`."""

    kl: float
    changed: float | None


@dataclass(frozen=True)
class Spoken:
    """What the model says itself, greedily; see `DosePoint`."""

    log_prob: float
    length: float
    repeated: float


@dataclass(frozen=True)
class AnswerScores:
    """An answer under teacher forcing: its summed log-probability, its tokens, and its least likely one's probability."""

    total: float
    tokens: int
    least: float


@dataclass(frozen=True)
class RowScores:
    """What a strength makes of the rows' answers, an entry a row.

    Attributes:
        bottleneck: least probability of a token of the chosen answer.
        preference, preference_summed: of the chosen answer over the rejected one, by log-probability a token and summed.
        likelihood: log-probability a token of the chosen answer, in nats.
    """

    bottleneck: np.ndarray
    preference: np.ndarray
    preference_summed: np.ndarray
    likelihood: np.ndarray


@dataclass(frozen=True)
class Measured:
    """All that is measured of a strength."""

    rows: RowScores
    spoken: Spoken | None
    effects: SideEffects


@dataclass(frozen=True)
class Look:
    """How much of the held-out data is looked at: rows, and prompts that the model answers."""

    rows: int
    spoken: int


class DoseRunner:
    """Runs a model steered at several strengths on fixed rows; it is steered for the length of a run only.

    Args:
        model: the base model, steered or not; adapters that are active on it play no part.
        rows: held-out preference rows.
        prompts: general prompts.
        seed: of the draw where there are more than `MAX_ROWS` or `MAX_PROMPTS`.
        cache: keeps what the prompts become; None makes one.
    """

    def __init__(
        self,
        model: Any,
        rows: Sequence[EncodedRow],
        prompts: Sequence[Passage],
        seed: int = 0,
        cache: PromptCache | None = None,
    ) -> None:
        self.model = model
        self.rows = shuffle_units(draw(rows, MAX_ROWS, seed), seed)
        self.prompts = draw(prompts, MAX_PROMPTS, seed)
        self.units = np.unique([str(row.prompt.ids) for row in self.rows], return_inverse=True)[1]
        self.device = input_device(model)
        self.cache = PromptCache(model) if cache is None else cache
        self._general: dict[int, list[Passage]] = {}
        self._said: dict[Passage, Passage] = {}
        self._build: Callable[[float], SteeringProcessor] | None = None
        self._known: dict[tuple[float, Look], Measured] = {}
        self._unsteered: dict[Look, Measured] = {}

    def run(
        self,
        build: Callable[[float], SteeringProcessor],
        strengths: Sequence[float],
        advance: Callable[[int], None] = lambda done: None,
        share: float = 1.0,
    ) -> list[DosePoint]:
        """The curve, in the order of the strengths; strength 0 is the model itself.

        Strengths that were run for the same `build` before are not run again.

        Args:
            build: makes the processor of a strength.
            strengths: lambdas to try.
            advance: told of each forward's number of texts.
            share: of the held-out prompts that are looked at.

        Returns:
            Rows of one prompt are taken together in means and standard errors; divergences are in nats, at the next
            token and along the unsteered greedy continuation. Methods that take tokens back steer what they would in
            generation (see `Heard`), and it is also counted how many of the continuations they change.
        """
        if build is not self._build:
            self._build, self._known = build, {}
        look = self._look(share)
        new = [strength for strength in map(float, strengths) if strength and (strength, look) not in self._known]
        if new or look not in self._unsteered:
            with steered(self.model):
                processors = {strength: build(strength) for strength in new}
                self._measure(processors, look, advance)
        curve = {strength: self._of(strength, look) for strength in map(float, strengths)}
        return [self._point(strength, found, look) for strength, found in curve.items()]

    def texts(
        self, build: Callable[[float], SteeringProcessor], strengths: Sequence[float], share: float = 1.0
    ) -> int:
        """Number of texts that `run` would put through the model, what is generated left out."""
        look = self._look(share)
        known = self._known if build is self._build else {}
        new = sum(1 for strength in map(float, strengths) if strength and (strength, look) not in known)
        answers = len(self._passages(look))
        return new * (answers + len(self.prompts)) + (look not in self._unsteered) * answers

    # -- what is measured ---------------------------------------------------------------------------------------------

    def _measure(self, processors: dict[float, SteeringProcessor], look: Look, advance: Callable[[int], None]) -> None:
        takes_back = any(processor.lookback for processor in processors.values())
        scores = self._answers(processors, look, advance)
        effects = self._side_effects(processors, takes_back, advance)
        if look not in self._unsteered:
            spoken = self._speak([], look)
            self._unsteered[look] = Measured(scores[0.0], spoken, SideEffects(0.0, None))
        for strength, processor in processors.items():
            # Where whole wanted answers come, they are what the model says, and need not be listened to.
            comes = is_sayable(self._point(strength, Measured(scores[strength], None, effects[strength]), look))
            spoken = None if comes else self._speak([processor], look)
            self._known[strength, look] = Measured(scores[strength], spoken, effects[strength])

    def _of(self, strength: float, look: Look) -> Measured:
        if strength:
            return self._known[strength, look]
        counted = any(found.effects.changed is not None for found in self._known.values())
        unsteered = self._unsteered[look]
        return Measured(unsteered.rows, unsteered.spoken, SideEffects(0.0, 0.0 if counted else None))

    def _point(self, strength: float, found: Measured, look: Look) -> DosePoint:
        units, base = self.units[: look.rows], self._unsteered[look].rows
        mean, error = partial(mean_over_units, units=units), partial(clustered_se, units=units)
        rows, spoken = found.rows, found.spoken
        return DosePoint(
            strength=strength,
            bottleneck=mean(rows.bottleneck),
            bottleneck_se=error(rows.bottleneck),
            bottleneck_rise_se=error(rows.bottleneck - base.bottleneck),
            kl=found.effects.kl,
            changed=found.effects.changed,
            bottleneck_rise=mean(rows.bottleneck - base.bottleneck),
            preference=mean(rows.preference),
            preference_se=error(rows.preference),
            preference_rise_se=error(rows.preference - base.preference),
            preference_summed=mean(rows.preference_summed),
            likelihood=mean(rows.likelihood),
            own_words=None if spoken is None else spoken.log_prob,
            own_length=None if spoken is None else spoken.length,
            repeated=None if spoken is None else spoken.repeated,
        )

    def _answers(
        self, processors: dict[float, SteeringProcessor], look: Look, advance: Callable[[int], None]
    ) -> dict[float, RowScores]:
        """The rows' answers at each strength, and at 0 where that is not known."""
        found: dict[float, dict[Passage, AnswerScores]] = {strength: {} for strength in processors}
        if look not in self._unsteered:
            found[0.0] = {}
        for batch in self._batches(self._passages(look)):
            as_generated = self._as_generated(batch, processors)
            for strength in found:
                for passage, logits in self._logits(batch, as_generated.get(strength)):
                    found[strength][passage] = _score(passage, logits)
                advance(len(batch))
        return {strength: self._row_scores(scores, look) for strength, scores in found.items()}

    def _row_scores(self, scores: dict[Passage, AnswerScores], look: Look) -> RowScores:
        chosen = [scores[row.chosen] for row in self.rows[: look.rows]]
        rejected = [scores[row.rejected] for row in self.rows[: look.rows]]
        rate, other = (np.array([s.total / s.tokens for s in side]) for side in (chosen, rejected))
        summed = np.array([c.total - r.total for c, r in zip(chosen, rejected, strict=True)])
        return RowScores(
            bottleneck=np.array([s.least for s in chosen]),
            preference=expit(rate - other),
            preference_summed=expit(summed),
            likelihood=rate,
        )

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
        new = [passage for passage in batch if passage not in self._said]
        self._said |= dict(zip(new, own_words(self.model, new, OWN_TOKENS), strict=True))
        heard = Heard(self.model, [self._said[passage] for passage in batch], sites)
        return {strength: heard.judged_by(processor) for strength, processor in processors.items()}

    def _speak(self, processors: Sequence[SteeringProcessor], look: Look) -> Spoken | None:
        """What the model says to the first held-out prompts, and how likely the base finds that."""
        prompts = list(dict.fromkeys(row.prompt for row in self.rows[: look.rows]))[: look.spoken]
        if not prompts:
            return None
        said = own_words(self.model, prompts, SPOKEN_TOKENS, processors, self.cache)
        scores = [_score(p, logits) for batch in self._batches(said) for p, logits in self._logits(batch, None)]
        return Spoken(
            log_prob=float(np.mean([score.total / score.tokens for score in scores])),
            length=float(np.mean([score.tokens for score in scores])),
            repeated=float(np.mean([repeated_share(passage) for passage in said])),
        )

    def _side_effects(
        self, processors: dict[float, SteeringProcessor], takes_back: bool, advance: Callable[[int], None]
    ) -> dict[float, SideEffects]:
        """What each strength does to general prompts."""
        if not processors:
            return {}
        length = OWN_TOKENS if takes_back else CONTINUATION
        if length not in self._general:
            self._general[length] = own_words(self.model, self.prompts, length, cache=self.cache)
        divergences: dict[float, list[torch.Tensor]] = {strength: [] for strength in processors}
        changed: dict[float, list[bool]] = {strength: [] for strength in processors}
        for batch in self._batches(self._general[length]):
            queries = QueryRecorder(batch, {site for processor in processors.values() for site in processor.reads})
            base = [logits.log_softmax(-1) for _, logits in self._logits(batch, queries)]
            for strength, processor in processors.items():
                # What a gate is shut on stays as it is, and costs no forward.
                steers = [True] * len(batch) if takes_back else queries.steered_by(processor)
                divergences[strength].append(torch.zeros(sum(map(len, compress(base, map(not_, steers))))))
                moved = self._logits(list(compress(batch, steers)), processor)
                for reference, (_, logits) in zip(compress(base, steers), moved, strict=True):
                    kl = (reference.exp() * (reference - logits.log_softmax(-1))).sum(-1)
                    divergences[strength].append(kl.clamp(min=0).cpu())
                    # Greedy, a text stays as it is if each of its tokens is still the likeliest after those before it.
                    differs = reference[:-1].argmax(-1) != logits[:-1].argmax(-1)
                    changed[strength].append(bool(differs.any()))
                advance(len(batch))
        return {
            strength: SideEffects(
                kl=float(np.percentile(torch.cat(values).double().numpy(), 95)) if values else 0.0,
                changed=float(np.mean(changed[strength])) if takes_back and values else None,
            )
            for strength, values in divergences.items()
        }

    # -- forwards -----------------------------------------------------------------------------------------------------

    def _look(self, share: float) -> Look:
        rows = len(self.rows)
        # But all general prompts: a percentile of few is that of the one on which a gate errs.
        return Look(min(rows, max(1, round(share * rows))), math.ceil(share * SPOKEN_PROMPTS))

    def _passages(self, look: Look) -> list[Passage]:
        return list(dict.fromkeys(answer for row in self.rows[: look.rows] for answer in (row.chosen, row.rejected)))

    def _batches(self, passages: Sequence[Passage]) -> Iterator[list[Passage]]:
        """Passages of similar length whose logits fit."""
        ordered = sorted(passages, key=lambda p: (p.answer_start or 0, len(p.ids)), reverse=True)
        return batches(ordered, lambda batch: len(batch) * max(len(p.ids) for p in batch), logit_budget(self.model))

    @torch.no_grad()
    def _logits(
        self, batch: Sequence[Passage], processor: SteeringProcessor | None
    ) -> Iterator[tuple[Passage, torch.Tensor]]:
        """For each passage the logits that predict its answer's tokens and the one after, `[answer + 1, vocabulary]`."""
        if not batch:
            return
        processors = [] if processor is None else [processor]
        yield from zip(batch, answer_logits(self.model, batch, processors, self.cache), strict=True)


def _score(passage: Passage, logits: torch.Tensor) -> AnswerScores:
    answer = torch.tensor(passage.ids[passage.answer_start :], device=logits.device)
    log_probs = logits[:-1].log_softmax(-1).gather(1, answer[:, None])[:, 0]
    return AnswerScores(float(log_probs.double().sum()), len(answer), float(log_probs.min().exp()))


def mean_over_units(values: np.ndarray, units: np.ndarray) -> float:
    """Mean over units of the mean over each one's rows; NaN without rows.

    Args:
        values: `[rows]`.
        units: `[rows]` numbers of the units.
    """
    if not len(values):
        return float("nan")
    _, numbers = np.unique(units, return_inverse=True)
    return float((np.bincount(numbers, weights=values) / np.bincount(numbers)).mean())


def clustered_se(values: np.ndarray, units: np.ndarray) -> float:
    """Standard error of `mean_over_units`; 0 with fewer than two units."""
    _, numbers = np.unique(units, return_inverse=True)
    if not len(numbers) or numbers.max() < 1:
        return 0.0
    means = np.bincount(numbers, weights=values) / np.bincount(numbers)
    return float(means.std(ddof=1) / np.sqrt(len(means)))


def shuffle_units(rows: Sequence[EncodedRow], seed: int) -> list[EncodedRow]:
    """Rows with their prompts in random order, so that the first ones are like the others."""
    prompts = list(dict.fromkeys(row.prompt for row in rows))
    rank = dict(zip(prompts, np.random.default_rng(seed).permutation(len(prompts)), strict=True))
    return sorted(rows, key=lambda row: rank[row.prompt])


def draw(items: Sequence[Any], most: int, seed: int) -> list[Any]:
    """At most so many items, drawn at random, in their order."""
    if len(items) <= most:
        return list(items)
    kept = np.sort(np.random.default_rng(seed).choice(len(items), most, replace=False))
    return [items[i] for i in kept]
