"""Dose response: the effect of a strength on held-out answers, the model's own answers and general prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import compress
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from scipy.special import expit

from finesteer_hf.fitting.answer_judge import DEPTH, EXAMPLES, AnswerJudge
from finesteer_hf.fitting.answers import QueryRecorder, StateRecorder, answer_logits, logit_budget, steered
from finesteer_hf.fitting.capture.jobs import batches
from finesteer_hf.fitting.capture.prompt_cache import PromptCache
from finesteer_hf.fitting.capture.reader import input_device
from finesteer_hf.fitting.data.encoding import EncodedRow, Passage
from finesteer_hf.fitting.data.units import clustered_se, draw, mean_over_units, shuffle_units
from finesteer_hf.fitting.measured import AnswerScores, Measured, RowScores, SideEffects, Words
from finesteer_hf.fitting.own_words import Heard, own_words, repeated_share
from finesteer_hf.method_api import DosePoint
from finesteer_hf.methods._shared.objective import is_sayable
from finesteer_hf.processors import SteeringProcessor
from finesteer_hf.sites import resid_post


# More rows barely reduce the curve's standard error, and each costs two passes per strength.
MAX_ROWS, MAX_PROMPTS = 200, 64
# Greedy tokens after a general prompt over which the divergence is measured, besides the first.
CONTINUATION = 8
# The same for backtracking methods: they judge whole answers, so more tokens are measured.
OWN_TOKENS = 48
# Held-out prompts whose steered answers are generated, and their greedy tokens. A few are enough to show text that
# breaks.
SPOKEN_PROMPTS, SPOKEN_TOKENS = 24, 24


@dataclass(frozen=True)
class Look:
    """How much of the held-out data to use: rows, and prompts that the model answers."""

    rows: int
    spoken: int


class DoseRunner:
    """Runs a model steered at several strengths on fixed rows; it is steered only during a run.

    Args:
        model: the base model, steered or not; its active adapters are ignored.
        rows: held-out preference rows.
        prompts: general prompts.
        seed: seed of the draw if there are more than `MAX_ROWS` or `MAX_PROMPTS`.
        cache: caches the prompts; None creates a cache.
        examples: rows of other prompts, for the judge of the model's own answers; none leaves them unjudged.
    """

    def __init__(
        self,
        model: Any,
        rows: Sequence[EncodedRow],
        prompts: Sequence[Passage],
        seed: int = 0,
        cache: PromptCache | None = None,
        examples: Sequence[EncodedRow] = (),
    ) -> None:
        self.model = model
        self.rows = shuffle_units(draw(rows, MAX_ROWS, seed), seed)
        self.prompts = draw(prompts, MAX_PROMPTS, seed)
        self.units = np.unique([str(row.prompt.ids) for row in self.rows], return_inverse=True)[1]
        self.device = input_device(model)
        self.cache = PromptCache(model) if cache is None else cache
        self.examples = draw(examples, EXAMPLES, seed)
        self._general: dict[int, list[Passage]] = {}
        self._said: dict[Passage, Passage] = {}
        # Results for a `build` are freed when the `build` is.
        self._known: WeakKeyDictionary[Any, dict[float, Measured]] = WeakKeyDictionary()
        self._unsteered = Measured(effects=SideEffects(0.0, None))

    def run(
        self,
        build: Callable[[float], SteeringProcessor],
        strengths: Sequence[float],
        advance: Callable[[int], None] = lambda done: None,
        share: float = 1.0,
    ) -> list[DosePoint]:
        """The curve, in the order of the strengths; strength 0 is the unsteered model.

        Earlier runs of the same `build` are reused.

        Args:
            build: makes the processor of a strength.
            strengths: lambdas to try.
            advance: called with each forward's number of texts.
            share: share of the held-out prompts to use.

        Returns:
            The points. Rows of one prompt count as one in means and standard errors; divergences are in nats, at the
            next token and along the unsteered greedy continuation. Backtracking methods steer as in generation (see
            `Heard`), and the points also count how many continuations they change.
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
        """Number of texts that `run` would run, without generated ones."""
        look = self._look(share)
        known = {0.0: self._unsteered} | self._known_of(build, strengths)
        unknown = {strength: found for strength, found in known.items() if self._lacks(found, look) or not strength}
        answers = sum(len(self._unknown(found, look)) for found in unknown.values())
        return answers + len(self.prompts) * sum(found.effects is None for found in unknown.values())

    # -- what is measured ---------------------------------------------------------------------------------------------

    def _known_of(
        self, build: Callable[[float], SteeringProcessor], strengths: Sequence[float]
    ) -> dict[float, Measured]:
        """The results of some strengths, to be extended."""
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
            # If the model gives the wanted answers, its own answers need not be generated.
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
            **(self._wanted(found, look) if said else {}),
        )

    def _wanted(self, found: Measured, look: Look) -> dict[str, float]:
        """How far own answers are of the wanted kind; nothing if they are not judged."""
        pairs = [(found.words[prompt].wanted, self._unsteered.words[prompt].wanted) for prompt in self._asked(look)]
        if any(None in pair for pair in pairs):
            return {}
        own, base = np.array(pairs, dtype=np.float64).T
        error = partial(clustered_se, units=np.arange(len(own)))
        return {"wanted": float(own.mean()), "wanted_se": error(own), "wanted_rise_se": error(own - base)}

    def _answer(
        self,
        processors: dict[float, SteeringProcessor],
        known: dict[float, Measured],
        look: Look,
        advance: Callable[[int], None],
    ) -> None:
        """Run the rows' missing answers at each strength and unsteered."""
        together: dict[tuple[Passage, ...], list[tuple[float, Measured]]] = {}
        for strength, found in (*((s, known[s]) for s in processors), (0.0, self._unsteered)):
            together.setdefault(tuple(self._unknown(found, look)), []).append((strength, found))
        for passages, lacking in together.items():
            for batch in self._batches(passages):
                as_generated = self._as_generated(batch, {s: processors[s] for s, _ in lacking if s})
                for strength, found in lacking:
                    for passage, logits in self._logits(batch, as_generated.get(strength)):
                        found.answers[passage] = AnswerScores.of(passage, logits)
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
        """Processors in the state in which they steer a batch's answers in generation.

        In generation a backtracking processor judges the model's first answer, not the wanted one, in which it would
        find nothing to steer.
        """
        sites = next((processor.maps for processor in processors.values() if processor.lookback), ())
        if not sites:
            return processors
        new = [passage for passage in batch if passage not in self._said]
        self._said |= dict(zip(new, own_words(self.model, new, OWN_TOKENS), strict=True))
        heard = Heard(self.model, [self._said[passage] for passage in batch], sites)
        return {strength: heard.judged_by(processor) for strength, processor in processors.items()}

    def _asked(self, look: Look) -> list[Passage]:
        """The first held-out prompts, for the model's own answers."""
        return list(dict.fromkeys(row.prompt for row in self.rows[: look.rows]))[: look.spoken]

    def _unheard(self, found: Measured, look: Look) -> list[Passage]:
        """Prompts whose own answers are missing, if they are needed."""
        return [prompt for prompt in self._asked(look) if found.words and prompt not in found.words]

    def _speak(self, processor: SteeringProcessor | None, found: Measured, look: Look) -> None:
        """Generate the model's own answers to prompts and compute their likelihood under the base."""
        prompts = [prompt for prompt in self._asked(look) if prompt not in found.words]
        said = own_words(self.model, prompts, SPOKEN_TOKENS, [processor] if processor else [], self.cache)
        scores, states = self._read(said)
        judged = [None] * len(said) if self.judge is None or not said else self.judge.probability(states).tolist()
        for prompt, answer, score, wanted in zip(prompts, said, scores, judged, strict=True):
            found.words[prompt] = Words(score.total / score.tokens, score.tokens, repeated_share(answer), wanted)

    @cached_property
    def judge(self) -> AnswerJudge | None:
        """The judge of the model's own answers; None if it cannot tell answers apart that it was not fitted on."""
        if not self.examples:
            return None
        chosen, rejected = (
            self._read([getattr(row, side) for row in self.examples])[1] for side in ("chosen", "rejected")
        )
        judge = AnswerJudge(chosen, rejected)
        return judge if judge.trusted else None

    def _read(self, answers: Sequence[Passage]) -> tuple[list[AnswerScores], np.ndarray]:
        """Answers under the unsteered model: their scores, and the means of their states at the judge's block, `[answers,
        d]`.
        """
        recorder = StateRecorder([resid_post(round(DEPTH * (self.cache.tower.num_layers - 1)))])
        found: dict[Passage, tuple[AnswerScores, np.ndarray]] = {}
        for batch in self._batches(list(dict.fromkeys(answers))):
            scores = [AnswerScores.of(passage, logits) for passage, logits in self._logits(batch, recorder)]
            (hidden,) = recorder.states.values()
            for row, (passage, score) in enumerate(zip(batch, scores, strict=True)):
                start = 1 if recorder.behind else int(passage.answer_start or 0)
                end = start + len(passage.ids) - int(passage.answer_start or 0)
                found[passage] = score, hidden[row, start:end].float().mean(dim=0).cpu().numpy()
        return [found[answer][0] for answer in answers], np.array([found[answer][1] for answer in answers])

    def _affect(
        self,
        processors: dict[float, SteeringProcessor],
        known: dict[float, Measured],
        takes_back: bool,
        advance: Callable[[int], None],
    ) -> None:
        """Measure each strength's effect on general prompts."""
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
                # Prompts with a shut gate do not change and cost no forward.
                steers = [True] * len(batch) if takes_back else queries.steered_by(processor)
                moved = self._logits(list(compress(batch, steers)), processor)
                for reference, is_steered in zip(base, steers, strict=True):
                    if not is_steered:
                        divergences[strength].append(torch.zeros(len(reference)))
                        continue
                    _, logits = next(moved)
                    kl = (reference.exp() * (reference - logits.log_softmax(-1))).sum(-1)
                    divergences[strength].append(kl.clamp(min=0).cpu())
                    # A greedy text does not change if each of its tokens is still the most likely after the earlier
                    # ones.
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
        # But all general prompts: a percentile over few is decided by a single gate error.
        return Look(min(rows, max(1, round(share * rows))), math.ceil(share * SPOKEN_PROMPTS))

    def _passages(self, look: Look) -> list[Passage]:
        return list(dict.fromkeys(answer for row in self.rows[: look.rows] for answer in (row.chosen, row.rejected)))

    def _batches(self, passages: Sequence[Passage]) -> Iterator[list[Passage]]:
        """Batches of passages of similar length whose logits fit in memory."""
        ordered = sorted(passages, key=lambda p: (p.answer_start or 0, len(p.ids)), reverse=True)
        return batches(ordered, lambda batch: len(batch) * max(len(p.ids) for p in batch), logit_budget(self.model))

    @torch.no_grad()
    def _logits(
        self, batch: Sequence[Passage], processor: SteeringProcessor | None
    ) -> Iterator[tuple[Passage, torch.Tensor]]:
        """For each passage, the logits of its answer's tokens and the next one, `[answer + 1, vocabulary]`."""
        if not batch:
            return
        processors = [] if processor is None else [processor]
        yield from zip(batch, answer_logits(self.model, batch, processors, self.cache), strict=True)
