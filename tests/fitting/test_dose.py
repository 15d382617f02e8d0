"""The dose response against one text at a time, steered with a plain hook."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fitting_toys import random_rows, small_model
from transformers import LogitsProcessor

from finesteer_hf import ConstantVector, SteeredModelForCausalLM, SteeringProcessor
from finesteer_hf.fitting.dose import CONTINUATION, DoseRunner, clustered_se
from finesteer_hf.fitting.templating import EncodedRow, Passage
from finesteer_hf.processors import Decision, QueryStates
from finesteer_hf.sites import Site


SITE = Site("resid_post", 1)
VECTOR = torch.linspace(-1, 1, 32)


class SignedVector(SteeringProcessor):
    """The vector, with a sign that each query decides."""

    reads = writes = (SITE,)

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def decide(self, queries: QueryStates) -> Decision:
        return Decision({SITE: queries[SITE][:, :1].sign() * VECTOR})


def by_hand(model: Any, passage: Passage, strength: float) -> torch.Tensor:
    """Log-probabilities after each token of one text, steered with a hook: `[tokens, vocabulary]`."""

    def steer(module: Any, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        moved = hidden + strength * hidden[:, passage.answer_start - 1, :1, None].sign() * VECTOR
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    handle = model.model.layers[1].register_forward_hook(steer)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([passage.ids])).logits[0]
    handle.remove()
    return logits.log_softmax(-1)


def least_probability(log_probs: torch.Tensor, passage: Passage) -> float:
    return float(min(log_probs[i - 1, passage.ids[i]].exp() for i in range(passage.answer_start, len(passage.ids))))


@pytest.fixture
def rows() -> list[EncodedRow]:
    return random_rows(7)


def test_points_are_those_of_single_texts(rows: list[EncodedRow]) -> None:
    model = small_model("llama")
    prompts = [row.prompt for row in random_rows(5, seed=3)]
    points = DoseRunner(model, rows, prompts).run(SignedVector, [0.0, 0.5, 2.0])
    assert type(model).__mro__[0].__name__ == "LlamaForCausalLM" and not hasattr(model, "set_steering")
    continued = []
    for prompt in prompts:
        ids = list(prompt.ids)
        for _ in range(CONTINUATION):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        continued.append(Passage(tuple(ids), len(prompt.ids)))
    every = {}
    for point in points:
        divergences = []
        for passage in continued:
            base, steered = (by_hand(model, passage, s)[passage.answer_start - 1 :] for s in (0.0, point.strength))
            divergences.append((base.exp() * (base - steered)).sum(-1).clamp(min=0))
        weakest = np.array([least_probability(by_hand(model, row.chosen, point.strength), row.chosen) for row in rows])
        every[point.strength] = weakest
        assert point.bottleneck == pytest.approx(weakest.mean(), rel=1e-4)
        assert point.kl == pytest.approx(np.percentile(torch.cat(divergences).numpy(), 95), rel=1e-3, abs=1e-5)
        assert point.bottleneck_se == pytest.approx(weakest.std(ddof=1) / np.sqrt(7), rel=1e-3)
    best = max(every.values(), key=np.mean)
    for point in points:
        gap = (best - every[point.strength]).std(ddof=1) / np.sqrt(7)
        assert point.gap_se == pytest.approx(gap, rel=1e-3, abs=1e-9)
    assert points[0].kl == 0.0


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
    runner.run(lambda s: SignedVector(-s), [0.0, 1.0])
    assert runner.run(build, [1.0])[0].bottleneck == first[1].bottleneck and built == [1.0, 3.0, 1.0]


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


class Favour(LogitsProcessor):
    """Adds to the logit of a token that depends on the text so far."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[torch.arange(len(scores)), input_ids.sum(1) % scores.shape[1]] += self.scale
        return scores


class OnLogits(SteeringProcessor):
    def __init__(self, strength: float) -> None:
        self.strength = strength

    def logits_processors(self, scale: Any) -> list[Any]:
        return [Favour(self.strength * scale)]


def test_methods_on_logits_are_measured_too(rows: list[EncodedRow]) -> None:
    model = small_model("llama")
    base, point = DoseRunner(model, rows, [rows[0].prompt]).run(OnLogits, [0.0, 4.0])

    def score(passage: Passage) -> float:
        log_probs = by_hand(model, passage, 0.0)
        values = []
        for i in range(passage.answer_start, len(passage.ids)):
            scores = Favour(4.0)(torch.tensor([passage.ids[:i]]), log_probs[i - 1][None])[0]
            values.append(float(scores.softmax(-1)[passage.ids[i]]))
        return min(values)

    assert point.bottleneck == pytest.approx(np.mean([score(row.chosen) for row in rows]), rel=1e-4)
    assert point.kl > 0 and base.kl == 0


def test_the_continuation_ends_with_the_text(rows: list[EncodedRow]) -> None:
    model = small_model("llama")
    prompt = rows[0].prompt
    with torch.no_grad():
        said = int(model(input_ids=torch.tensor([prompt.ids])).logits[0, -1].argmax())
    model.generation_config.eos_token_id = said
    runner = DoseRunner(model, rows, [prompt])
    runner.run(SignedVector, [1.0])
    assert runner._general[CONTINUATION] == [Passage((*prompt.ids, said), len(prompt.ids))]


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
