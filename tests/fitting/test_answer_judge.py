"""The judge of the model's own answers, on states with known kinds and through a real model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fitting_toys import random_rows, small_model

from finesteer_hf import ConstantVector, SteeredModelForCausalLM
from finesteer_hf.fitting.answer_judge import DEPTH, ENOUGH_PAIRS, AnswerJudge
from finesteer_hf.fitting.data.encoding import EncodedRow, Passage
from finesteer_hf.fitting.dose import DoseRunner
from finesteer_hf.fitting.own_words import own_words


def states(rows: int, apart: float, seed: int, width: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """States of two kinds, so many standard deviations apart along the first axis."""
    rng = np.random.default_rng(seed)
    chosen, rejected = rng.standard_normal((2, rows, width)).astype(np.float32)
    chosen[:, 0] += apart
    return chosen, rejected


def test_kinds_that_lie_apart_are_told_apart() -> None:
    judge = AnswerJudge(*states(64, 6.0, 0))
    chosen, rejected = states(40, 6.0, 1)
    assert judge.trusted
    assert judge.probability(chosen).mean() > 0.6 > 0.4 > judge.probability(rejected).mean()
    # Half way between the kinds it does not know.
    assert judge.probability((chosen + rejected) / 2).mean() == pytest.approx(0.5, abs=0.1)


def test_kinds_that_lie_in_each_other_are_not() -> None:
    assert not AnswerJudge(*states(64, 0.5, 0)).trusted
    # With more columns than rows every fit separates its own rows; what counts are rows without which it was fitted.
    assert not AnswerJudge(*states(64, 0.0, 0, width=500)).trusted


def test_a_few_pairs_are_no_evidence() -> None:
    assert AnswerJudge(*states(ENOUGH_PAIRS, 6.0, 1)).trusted
    assert not AnswerJudge(*states(ENOUGH_PAIRS - 1, 6.0, 1)).trusted


# -- through a model --------------------------------------------------------------------------------------------------

WANTED, UNWANTED = range(5, 7), range(20, 22)


def rows_of_kinds(count: int, seed: int) -> list[EncodedRow]:
    """Rows whose chosen answers are of some words, and whose rejected ones are of others."""
    rng, found = np.random.default_rng(seed), []
    for row in random_rows(count, seed=seed):
        sides = [
            Passage((*row.prompt.ids, *map(int, rng.choice(words, 6))), len(row.prompt.ids))
            for words in (WANTED, UNWANTED)
        ]
        found.append(EncodedRow(row.prompt, *sides))
    return found


def mean_state(model: Any, passage: Passage) -> np.ndarray:
    """The mean state of an answer at the judge's block, in a plain forward."""
    layer = round(DEPTH * (model.config.num_hidden_layers - 1))
    with torch.no_grad():
        hidden = model(torch.tensor([passage.ids]), output_hidden_states=True).hidden_states[layer + 1]
    mean: np.ndarray = hidden[0, passage.answer_start :].float().mean(0).numpy()
    return mean


@pytest.fixture
def runner() -> DoseRunner:
    return DoseRunner(small_model("llama"), rows_of_kinds(20, 1), [], examples=rows_of_kinds(60, 2))


def test_own_answers_are_judged_by_their_unsteered_states(runner: DoseRunner) -> None:
    model = runner.model
    # Towards the words of the wanted answers.
    direction = (
        model.lm_head.weight[list(WANTED)].mean(0).detach() - model.lm_head.weight[list(UNWANTED)].mean(0).detach()
    )
    build = lambda strength: ConstantVector("resid_post[3]", direction, strength=strength)  # noqa: E731
    points = runner.run(build, [0.0, 0.3, 30.0])
    examples, asked = runner.examples, [row.prompt for row in runner.rows]
    judge = AnswerJudge(
        *(np.array([mean_state(model, getattr(row, side)) for row in examples]) for side in ("chosen", "rejected"))
    )
    probabilities = {}
    SteeredModelForCausalLM.from_model(model)
    for point in points:
        said = own_words(model, asked, 24, [build(point.strength)] if point.strength else [])
        probabilities[point.strength] = judge.probability(np.array([mean_state(model, answer) for answer in said]))
        assert point.wanted == pytest.approx(probabilities[point.strength].mean(), abs=5e-3)
        rise = probabilities[point.strength] - probabilities[0.0]
        assert point.wanted_rise_se == pytest.approx(rise.std(ddof=1) / np.sqrt(len(rise)), abs=5e-3)
    assert points[2].wanted is not None and points[0].wanted is not None and points[2].wanted > points[0].wanted + 0.03


def test_without_examples_or_with_kinds_that_are_alike_nothing_is_judged(runner: DoseRunner) -> None:
    build = lambda strength: ConstantVector("resid_post[3]", torch.ones(32), strength=strength)  # noqa: E731
    alike = [EncodedRow(row.prompt, row.rejected, row.chosen) for row in runner.examples[::2]] + runner.examples[1::2]
    for examples in ([], alike, runner.examples[:4]):
        point = DoseRunner(runner.model, runner.rows, [], examples=examples).run(build, [1.0])[0]
        assert point.wanted is None and point.own_words is not None
