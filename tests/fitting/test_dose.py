"""The dose response against one text at a time, steered with a plain hook."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from fitting_toys import random_rows, small_model
from scipy.special import expit
from teacher_forcing import SITE, VECTOR, SignedAnswers, SignedVector, by_hand, of_answer

from finesteer_hf import ConstantVector, SteeredModelForCausalLM, SteeringProcessor
from finesteer_hf.fitting.data.encoding import EncodedRow, Passage
from finesteer_hf.fitting.data.units import clustered_se, mean_over_units, shuffle_units
from finesteer_hf.fitting.dose import (
    CONTINUATION,
    SPOKEN_TOKENS,
    DoseRunner,
)
from finesteer_hf.fitting.own_words import repeated_share
from finesteer_hf.method_api import DosePoint


def least_probability(log_probs: torch.Tensor, passage: Passage) -> float:
    return float(of_answer(log_probs, passage).min().exp())


def said(model: Any, prompt: Passage, strength: float, positions: Any, tokens: int = SPOKEN_TOKENS) -> Passage:
    """What the model says greedily, one whole text a token."""
    ids, ends = list(prompt.ids), model.generation_config.eos_token_id
    for _ in range(tokens):
        text = Passage(tuple(ids), len(prompt.ids))
        ids.append(int(by_hand(model, text, strength, positions)[-1].argmax()))
        if ids[-1] == ends:
            break
    return Passage(tuple(ids), len(prompt.ids))


def divergence(model: Any, prompts: list[Passage], strength: float) -> float:
    """The 95th percentile over general prompts' next tokens and those of what the model says itself."""
    found = []
    for prompt in prompts:
        passage = said(model, prompt, 0.0, "all", CONTINUATION)
        base, steered = (by_hand(model, passage, s)[passage.answer_start - 1 :] for s in (0.0, strength))
        found.append((base.exp() * (base - steered)).sum(-1).clamp(min=0))
    return float(np.percentile(torch.cat(found).numpy(), 95))


def check_point(model: Any, point: DosePoint, rows: list[EncodedRow], positions: Any) -> None:
    """A point's figures of rows of distinct prompts against one text at a time."""

    def rates(strength: float, side: str) -> list[torch.Tensor]:
        return [
            of_answer(by_hand(model, passage, strength, positions), passage).double()
            for passage in (getattr(row, side) for row in rows)
        ]

    def preferences(strength: float, of: Any) -> np.ndarray:
        sides = [np.array([float(of(values)) for values in rates(strength, side)]) for side in ("chosen", "rejected")]
        return expit(sides[0] - sides[1])

    own = preferences(point.strength, torch.mean)
    assert point.preference == pytest.approx(own.mean(), rel=1e-4)
    assert point.preference_summed == pytest.approx(preferences(point.strength, torch.sum).mean(), rel=1e-4)
    rise = own - preferences(0.0, torch.mean)
    assert point.preference_se == pytest.approx(own.std(ddof=1) / np.sqrt(len(rows)), rel=1e-3)
    assert point.preference_rise_se == pytest.approx(rise.std(ddof=1) / np.sqrt(len(rows)), rel=1e-3, abs=1e-9)
    likelihood = np.mean([float(values.mean()) for values in rates(point.strength, "chosen")])
    assert point.likelihood == pytest.approx(likelihood, rel=1e-4)
    spoken = [said(model, row.prompt, point.strength, positions) for row in rows]
    heard = [of_answer(by_hand(model, passage, 0.0), passage) for passage in spoken]
    assert point.own_words == pytest.approx(np.mean([float(values.mean()) for values in heard]), rel=1e-3)
    assert point.own_length == pytest.approx(np.mean([len(values) for values in heard]))
    assert point.repeated == pytest.approx(np.mean([repeated_share(passage) for passage in spoken]))


def test_points_are_those_of_single_texts(rows: list[EncodedRow]) -> None:
    model = small_model("llama")
    prompts = [row.prompt for row in random_rows(5, seed=3)]
    points = DoseRunner(model, rows, prompts).run(SignedVector, [0.0, 0.5, 2.0])
    assert type(model).__mro__[0].__name__ == "LlamaForCausalLM" and not hasattr(model, "set_steering")
    every = {}
    for point in points:
        weakest = np.array([least_probability(by_hand(model, row.chosen, point.strength), row.chosen) for row in rows])
        every[point.strength] = weakest
        assert point.bottleneck == pytest.approx(weakest.mean(), rel=1e-4)
        assert point.kl == pytest.approx(divergence(model, prompts, point.strength), rel=1e-3, abs=1e-5)
        assert point.bottleneck_se == pytest.approx(weakest.std(ddof=1) / np.sqrt(7), rel=1e-3)
    for point in points:
        rise = every[point.strength] - every[0.0]
        assert point.bottleneck_rise == pytest.approx(rise.mean(), rel=1e-3, abs=1e-9)
        assert point.bottleneck_rise_se == pytest.approx(rise.std(ddof=1) / np.sqrt(7), rel=1e-3, abs=1e-9)
    assert points[0].kl == points[0].bottleneck_rise == points[0].preference_rise_se == 0.0


@pytest.mark.parametrize("steering", [SignedVector, SignedAnswers], ids=["all", "generated"])
def test_preferences_and_own_words_are_those_of_single_texts(steering: Any) -> None:
    model, rows = small_model("llama"), [row for row in random_rows(9) if len(row.prompt.ids) > 1]
    # A text that may end: of so few words some do.
    model.generation_config.eos_token_id = 30
    runner = DoseRunner(model, rows, [])
    points = runner.run(steering, [0.0, 1.0, 3.0])
    for point in points:
        check_point(model, point, rows, steering(1.0).positions)
    assert len({point.own_words for point in points}) == len({point.preference for point in points}) == 3
    assert runner.cache.prompts == len(rows), "a prompt is run once, for all strengths"


def test_runs_of_four_tokens_that_came_before_are_repeated() -> None:
    assert repeated_share(Passage((1, 2, 3, 9, 9, 9, 9, 9, 9), 3)) == pytest.approx(2 / 3)
    assert repeated_share(Passage((1, 2, 3, 4, 1, 2, 3, 4), 4)) == 0.0, "the prompt's own words are no repetition"
    assert repeated_share(Passage((1, 5, 6, 7, 8, 5, 6, 7, 8), 1)) == pytest.approx(1 / 5)
    assert repeated_share(Passage((1, 5, 5, 5), 1)) == 0.0


def test_where_wanted_answers_come_nobody_listens_to_own_words(rows: list[EncodedRow]) -> None:
    model = small_model("llama")
    wanted = 41
    short = [
        EncodedRow(row.prompt, Passage((*row.prompt.ids, wanted), len(row.prompt.ids)), row.rejected) for row in rows
    ]
    toward = model.lm_head.weight[wanted].detach()
    build = lambda strength: ConstantVector("resid_post[3]", toward, strength=strength)  # noqa: E731
    base, weak, strong = DoseRunner(model, short, []).run(build, [0.0, 0.01, 30.0])
    assert strong.bottleneck > 0.5 > base.bottleneck and strong.bottleneck_rise > 2 * strong.bottleneck_rise_se
    assert (strong.own_words, strong.own_length, strong.repeated) == (None, None, None)
    assert weak.own_words is not None and base.own_words is not None


def shared_prompts(rows: list[EncodedRow]) -> list[EncodedRow]:
    """The rows, of which the first prompt has four answers and the second two."""

    def onto(prompt: Passage, row: EncodedRow) -> EncodedRow:
        sides = (
            Passage((*prompt.ids, *side.ids[side.answer_start :]), len(prompt.ids))
            for side in (row.chosen, row.rejected)
        )
        return EncodedRow(prompt, *sides)

    first, second = rows[0].prompt, rows[1].prompt
    return [*rows[:3], *(onto(first, row) for row in rows[3:6]), onto(second, rows[6])]


def test_rows_of_one_prompt_count_as_one(rows: list[EncodedRow]) -> None:
    model, shared = small_model("llama"), shared_prompts(rows)
    (point,) = DoseRunner(model, shared, []).run(SignedVector, [1.0])
    units: dict[Passage, list[tuple[float, float, float]]] = {}
    for row in shared:
        chosen, rejected = (of_answer(by_hand(model, p, 1.0), p).double() for p in (row.chosen, row.rejected))
        figures = (float(chosen.min().exp()), float(expit(chosen.mean() - rejected.mean())), float(chosen.mean()))
        units.setdefault(row.prompt, []).append(figures)
    means = np.array([np.mean(of_unit, axis=0) for of_unit in units.values()])
    assert len(means) == 3
    found = (point.bottleneck, point.preference, point.likelihood)
    assert found == pytest.approx(tuple(means.mean(axis=0)), rel=1e-4)
    errors = means.std(axis=0, ddof=1) / np.sqrt(3)
    assert (point.bottleneck_se, point.preference_se) == pytest.approx(tuple(errors[:2]), rel=1e-3)


def test_a_share_is_the_first_prompts_and_known_apart_from_all(rows: list[EncodedRow]) -> None:
    model = small_model("llama")
    general = [row.prompt for row in random_rows(5, seed=3)]
    runner, built = DoseRunner(model, rows, general, seed=3), []

    def build(strength: float) -> SteeringProcessor:
        built.append(strength)
        return SignedVector(strength)

    assert {row.prompt for row in runner.rows} == {row.prompt for row in rows} and runner.rows != rows
    base, part = runner.run(build, [0.0, 1.0], share=0.4)
    for point in (base, part):
        check_point(model, point, runner.rows[:3], "all")
    assert runner.texts(build, [0.0, 1.0], share=0.4) == 0
    full = runner.run(build, [0.0, 1.0])
    for point in full:
        check_point(model, point, rows, "all")
    # General prompts are looked at all: a percentile of few is that of the one on which a gate errs.
    for point in (part, full[1]):
        assert point.kl == pytest.approx(divergence(model, general, 1.0), rel=1e-3, abs=1e-5)
    assert built == [1.0, 1.0]
    assert runner.run(build, [0.0, 1.0], share=0.4) == [base, part] and runner.run(build, [1.0]) == full[1:]
    assert built == [1.0, 1.0]
    # However small a share is, something is looked at.
    (least,) = runner.run(build, [1.0], share=1e-6)
    assert least.own_words is not None and least.kl > 0


def test_rows_of_a_prompt_stay_together_where_prompts_are_shuffled(rows: list[EncodedRow]) -> None:
    shared = shared_prompts(rows)
    orders = set()
    for seed in range(8):
        mixed = shuffle_units(shared, seed)
        assert sorted(map(id, mixed)) == sorted(map(id, shared)) and mixed == shuffle_units(shared, seed)
        prompts = [row.prompt for row in mixed]
        assert sum(one != two for one, two in itertools.pairwise(prompts)) == 2
        orders.add(tuple(dict.fromkeys(prompts)))
    assert len(orders) > 2


def test_texts_that_will_be_run_are_counted_as_they_are_told(rows: list[EncodedRow]) -> None:
    runner = DoseRunner(small_model("llama"), rows, [rows[0].prompt, rows[1].prompt])
    for strengths, share in (([0.0, 1.0], 0.4), ([0.0, 1.0, 2.0], 1.0), ([1.0, 3.0], 1.0), ([0.0], 1.0)):
        done: list[int] = []
        expected = runner.texts(SignedVector, strengths, share)
        runner.run(SignedVector, strengths, done.append, share)
        assert sum(done) == expected


def test_strengths_that_are_known_are_not_run_again(rows: list[EncodedRow]) -> None:
    model = small_model("llama")
    runner = DoseRunner(model, rows, [rows[0].prompt])
    built: list[float] = []

    def build(strength: float) -> SteeringProcessor:
        built.append(strength)
        return SignedVector(strength)

    first = runner.run(build, [0.0, 1.0])
    again = runner.run(build, [0.0, 1.0, 3.0])
    assert built == [1.0, 3.0]
    assert [(p.bottleneck, p.kl) for p in again[:2]] == [(p.bottleneck, p.kl) for p in first]
    other = lambda s: SignedVector(-s)  # noqa: E731
    runner.run(other, [0.0, 1.0])
    assert runner.run(build, [1.0])[0].bottleneck == first[1].bottleneck and built == [1.0, 3.0]
    assert len(runner._known) == 2
    del other
    assert len(runner._known) == 1, "what is known of a way to steer goes with it"


def test_a_longer_look_runs_what_a_shorter_one_has_not(rows: list[EncodedRow]) -> None:
    runner = DoseRunner(small_model("llama"), rows, [rows[0].prompt])
    done: list[int] = []
    runner.run(SignedVector, [0.0, 1.0], done.append, 0.4)
    for point in runner.run(SignedVector, [0.0, 1.0], done.append):
        check_point(runner.model, point, rows, "all")
    assert sum(done) == 2 * len({answer for row in rows for answer in (row.chosen, row.rejected)}) + 1


def test_active_adapters_play_no_part_and_are_back_afterwards(rows: list[EncodedRow]) -> None:
    expected = DoseRunner(small_model("llama"), rows, []).run(SignedVector, [0.0, 1.0])
    model = SteeredModelForCausalLM.from_model(small_model("llama"))
    with model.steering_with([ConstantVector(SITE, 5 * VECTOR)]):
        ids = torch.tensor([rows[0].prompt.ids])
        before = model(input_ids=ids).logits
        found = DoseRunner(model, rows, []).run(SignedVector, [0.0, 1.0])
        assert torch.equal(model(input_ids=ids).logits, before)
    assert [p.bottleneck for p in found] == pytest.approx([p.bottleneck for p in expected], rel=1e-4)
    assert [p.kl for p in found] == [0.0, 0.0]


def test_the_continuation_ends_with_the_text(rows: list[EncodedRow]) -> None:
    model = small_model("llama")
    prompt = rows[0].prompt
    with torch.no_grad():
        said = int(model(input_ids=torch.tensor([prompt.ids])).logits[0, -1].argmax())
    model.generation_config.eos_token_id = said
    runner = DoseRunner(model, rows, [prompt])
    runner.run(SignedVector, [1.0])
    assert list(runner._general.values()) == [[Passage((*prompt.ids, said), len(prompt.ids))]]


def test_more_rows_than_needed_are_drawn_across_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finesteer_hf.fitting.dose.MAX_ROWS", 10)
    rows = random_rows(40)
    drawn = DoseRunner(small_model("llama"), rows, []).rows
    assert len(drawn) == 10 and drawn != rows[:10]
    assert drawn == DoseRunner(small_model("llama"), rows, []).rows


def test_standard_errors_count_prompts_not_rows() -> None:
    values = np.random.default_rng(0).normal(size=30)
    alone = values.std(ddof=1) / np.sqrt(30)
    assert clustered_se(values, np.arange(30)) == pytest.approx(alone)
    twice = clustered_se(np.repeat(values, 5), np.repeat(np.arange(30), 5))
    assert twice == pytest.approx(alone)
    assert clustered_se(values, np.zeros(30, dtype=int)) == 0.0
    uneven = np.array([1.0, 2.0, 3.0, 10.0])
    assert mean_over_units(uneven, np.array([7, 7, 7, 3])) == pytest.approx((2.0 + 10.0) / 2)
    assert np.isnan(mean_over_units(uneven[:0], np.zeros(0, dtype=int)))


def test_what_was_heard_on_a_shorter_look_does_not_stand_for_a_longer_one(rows: list[EncodedRow]) -> None:
    model, wanted = small_model("llama"), 41
    unlikely = {row.prompt for row in shuffle_units(rows, 0)[:2]}

    def chosen(row: EncodedRow) -> Passage:
        token = int(model.lm_head.weight[wanted].mul(-1).matmul(model.lm_head.weight.T).argmax())
        return Passage((*row.prompt.ids, token if row.prompt in unlikely else wanted), len(row.prompt.ids))

    mixed = [EncodedRow(row.prompt, chosen(row), row.rejected) for row in rows]
    toward = model.lm_head.weight[wanted].detach()
    build = lambda strength: ConstantVector("resid_post[3]", toward, strength=strength)  # noqa: E731
    runner = DoseRunner(model, mixed, [])
    assert runner.run(build, [30.0], share=0.3)[0].own_words is not None
    point = runner.run(build, [30.0])[0]
    assert point.bottleneck_rise > 2 * point.bottleneck_rise_se > 0
    assert (point.own_words, point.own_length, point.repeated) == (None, None, None)
    assert runner.run(build, [30.0], share=0.3)[0].own_words is not None
