"""Dose response: what a strength does to held-out answers, to what the model says itself, and to general prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import compress
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from scipy.special import expit

from finesteer_hf.fitting.answers import QueryRecorder, answer_logits, logit_budget, steered
from finesteer_hf.fitting.capture.jobs import batches
from finesteer_hf.fitting.capture.prompt_cache import PromptCache
from finesteer_hf.fitting.capture.reader import input_device
from finesteer_hf.fitting.data.encoding import EncodedRow, Passage
from finesteer_hf.fitting.data.units import clustered_se, mean_over_units, shuffle_units
from finesteer_hf.fitting.measured import AnswerScores, Measured, RowScores, SideEffects, Words
from finesteer_hf.fitting.own_words import Heard, own_words, repeated_share
from finesteer_hf.method_api import DosePoint
from finesteer_hf.methods._shared.objective import is_sayable
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
        # What is known of a way to steer goes when nobody can ask for it again.
        self._known: WeakKeyDictionary[Any, dict[float, Measured]] = WeakKeyDictionary()
        self._unsteered = Measured(effects=SideEffects(0.0, None))

    def run(
        self,
        build: Callable[[float], SteeringProcessor],
        strengths: Sequence[float],
        advance: Callable[[int], None] = lambda done: None,
        share: float = 1.0,
    ) -> list[DosePoint]:
        """The curve, in the order of the strengths; strength 0 is the model itself.

        What was run for the same `build` before is not run again.

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
        look, known = self._look(share), self._known_of(build, strengths)
        new = {strength: found for strength, found in known.items() if strength and self._lacks(found, look)}
        if new or self._lacks(self._unsteered, look):
            with steered(self.model):
                self._measure({strength: build(strength) for strength in new}, known, look, advance)
        return [self._point(strength, known, look) for strength in map(float, strengths)]

    def texts(
        self, build: Callable[[float], SteeringProcessor], strengths: Sequence[float], share: float = 1.0
    ) -> int:
        """Number of texts that `run` would put through the model, what is generated left out."""
        look = self._look(share)
        known = {0.0: self._unsteered} | self._known_of(build, strengths)
        unknown = {strength: found for strength, found in known.items() if self._lacks(found, look) or not strength}
        answers = sum(len(self._unknown(found, look)) for found in unknown.values())
        return answers + len(self.prompts) * sum(found.effects is None for found in unknown.values())

    # -- what is measured ---------------------------------------------------------------------------------------------

    def _known_of(
        self, build: Callable[[float], SteeringProcessor], strengths: Sequence[float]
    ) -> dict[float, Measured]:
        """What is known of some strengths, to be added to."""
        known = self._known.setdefault(build, {0.0: self._unsteered})
        return {strength: known.setdefault(strength, Measured()) for strength in map(float, strengths)}

    def _unknown(self, found: Measured, look: Look) -> list[Passage]:
        return [passage for passage in self._passages(look) if passage not in found.answers]

    def _lacks(self, found: Measured, look: Look) -> bool:
        return found.effects is None or bool(self._unknown(found, look)) or bool(self._unheard(found, look))

    def _measure(
        self,
        processors: dict[float, SteeringProcessor],
        known: dict[float, Measured],
        look: Look,
        advance: Callable[[int], None],
    ) -> None:
        takes_back = any(processor.lookback for processor in processors.values())
        self._answer(processors, known, look, advance)
        self._affect({s: p for s, p in processors.items() if known[s].effects is None}, known, takes_back, advance)
        self._speak(None, self._unsteered, look)
        for strength, processor in processors.items():
            # Where whole wanted answers come, they are what the model says, and need not be listened to.
            if not is_sayable(self._point(strength, known, look)):
                self._speak(processor, known[strength], look)

    def _point(self, strength: float, known: dict[float, Measured], look: Look) -> DosePoint:
        found = known.get(strength, self._unsteered)
        units, rows, base = (
            self.units[: look.rows],
            self._row_scores(found, look),
            self._row_scores(self._unsteered, look),
        )
        mean, error = partial(mean_over_units, units=units), partial(clustered_se, units=units)
        said = [] if self._unheard(found, look) else [found.words[p] for p in self._asked(look) if found.words]
        effects = found.effects or SideEffects(0.0, None)
        counted = any(other.effects and other.effects.changed is not None for other in known.values())
        return DosePoint(
            strength=strength,
            bottleneck=mean(rows.bottleneck),
            bottleneck_se=error(rows.bottleneck),
            bottleneck_rise_se=error(rows.bottleneck - base.bottleneck),
            kl=effects.kl,
            changed=0.0 if counted and not strength else effects.changed,
            bottleneck_rise=mean(rows.bottleneck - base.bottleneck),
            preference=mean(rows.preference),
            preference_se=error(rows.preference),
            preference_rise_se=error(rows.preference - base.preference),
            preference_summed=mean(rows.preference_summed),
            likelihood=mean(rows.likelihood),
            own_words=float(np.mean([words.log_prob for words in said])) if said else None,
            own_length=float(np.mean([words.tokens for words in said])) if said else None,
            repeated=float(np.mean([words.repeated for words in said])) if said else None,
        )

    def _answer(
        self,
        processors: dict[float, SteeringProcessor],
        known: dict[float, Measured],
        look: Look,
        advance: Callable[[int], None],
    ) -> None:
        """Run the rows' answers at each strength, and unsteered, as far as they are not known."""
        together: dict[tuple[Passage, ...], list[tuple[float, Measured]]] = {}
        for strength, found in (*((s, known[s]) for s in processors), (0.0, self._unsteered)):
            together.setdefault(tuple(self._unknown(found, look)), []).append((strength, found))
        for passages, lacking in together.items():
            for batch in self._batches(passages):
                as_generated = self._as_generated(batch, {s: processors[s] for s, _ in lacking if s})
                for strength, found in lacking:
                    for passage, logits in self._logits(batch, as_generated.get(strength)):
                        found.answers[passage] = _score(passage, logits)
                    advance(len(batch))

    def _row_scores(self, found: Measured, look: Look) -> RowScores:
        chosen = [found.answers[row.chosen] for row in self.rows[: look.rows]]
        rejected = [found.answers[row.rejected] for row in self.rows[: look.rows]]
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

    def _asked(self, look: Look) -> list[Passage]:
        """The first held-out prompts, to which the model's own answers are listened to."""
        return list(dict.fromkeys(row.prompt for row in self.rows[: look.rows]))[: look.spoken]

    def _unheard(self, found: Measured, look: Look) -> list[Passage]:
        """Prompts whose answers are yet to be heard, where anybody listens."""
        return [prompt for prompt in self._asked(look) if found.words and prompt not in found.words]

    def _speak(self, processor: SteeringProcessor | None, found: Measured, look: Look) -> None:
        """Listen to what the model says to prompts, and ask the base how likely it finds that."""
        prompts = [prompt for prompt in self._asked(look) if prompt not in found.words]
        said = own_words(self.model, prompts, SPOKEN_TOKENS, [processor] if processor else [], self.cache)
        scores = {p: _score(p, logits) for batch in self._batches(said) for p, logits in self._logits(batch, None)}
        for prompt, answer in zip(prompts, said, strict=True):
            score = scores[answer]
            found.words[prompt] = Words(score.total / score.tokens, score.tokens, repeated_share(answer))

    def _affect(
        self,
        processors: dict[float, SteeringProcessor],
        known: dict[float, Measured],
        takes_back: bool,
        advance: Callable[[int], None],
    ) -> None:
        """Find what each strength does to general prompts."""
        if not processors:
            return
        length = OWN_TOKENS if takes_back else CONTINUATION
        if length not in self._general:
            self._general[length] = own_words(self.model, self.prompts, length, cache=self.cache)
        divergences: dict[float, list[torch.Tensor]] = {strength: [] for strength in processors}
        changed: dict[float, list[bool]] = {strength: [] for strength in processors}
        for batch in self._batches(self._general[length]):
            queries = QueryRecorder(batch, list(processors.values()))
            base = [logits.log_softmax(-1) for _, logits in self._logits(batch, queries)]
            for strength, processor in processors.items():
                # What a gate is shut on stays as it is, and costs no forward.
                steers = [True] * len(batch) if takes_back else queries.steered_by(processor)
                moved = self._logits(list(compress(batch, steers)), processor)
                for reference, is_steered in zip(base, steers, strict=True):
                    if not is_steered:
                        divergences[strength].append(torch.zeros(len(reference)))
                        continue
                    _, logits = next(moved)
                    kl = (reference.exp() * (reference - logits.log_softmax(-1))).sum(-1)
                    divergences[strength].append(kl.clamp(min=0).cpu())
                    # Greedy, a text stays as it is if each of its tokens is still the likeliest after those before it.
                    differs = reference[:-1].argmax(-1) != logits[:-1].argmax(-1)
                    changed[strength].append(bool(differs.any()))
                advance(len(batch))
        for strength, values in divergences.items():
            known[strength].effects = SideEffects(
                kl=float(np.percentile(torch.cat(values).double().numpy(), 95)) if values else 0.0,
                changed=float(np.mean(changed[strength])) if takes_back and values else None,
            )

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


def draw(items: Sequence[Any], most: int, seed: int) -> list[Any]:
    """At most so many items, drawn at random, in their order."""
    if len(items) <= most:
        return list(items)
    kept = np.sort(np.random.default_rng(seed).choice(len(items), most, replace=False))
    return [items[i] for i in kept]
