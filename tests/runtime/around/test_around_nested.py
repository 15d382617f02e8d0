"""Calls inside a running `generate`: a judge in the loop is a separate call, a draft is part of the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from steered_tiny import greedy, query_shift, some_prompts, steer_tiny, tiny_llama
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor
from transformers.generation.streamers import BaseStreamer

from finesteer_hf.processors import ConstantVector, Decision, QueryStates
from finesteer_hf.runtime.current import CURRENT


class Judge(LogitsProcessor, StoppingCriteria, BaseStreamer):  # type: ignore[misc]
    """Calls a function at each step, in any of the callbacks of `generate`."""

    def __init__(self, call: Callable[[], torch.Tensor]) -> None:
        self.call = call
        self.said: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any) -> Any:
        self.said.append(self.call())
        return scores if self.place == "logits processor" else torch.zeros(input_ids.shape[0], dtype=torch.bool)

    def put(self, value: torch.Tensor) -> None:
        self.said.append(self.call())

    def end(self) -> None:
        self.said.append(self.call())

    def allowed(self, batch_id: int, input_ids: torch.Tensor) -> list[int]:
        self.said.append(self.call())
        return list(range(3, 96))

    def arguments(self, place: str) -> dict[str, Any]:
        self.place = place
        return {
            "logits processor": {"logits_processor": [self]},
            "stopping criterion": {"stopping_criteria": [self]},
            "streamer": {"streamer": self},
            "prefix function": {"prefix_allowed_tokens_fn": self.allowed},
        }[place]


PLACES = ["logits processor", "stopping criterion", "streamer", "prefix function"]


def opposite_gates(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts, one that opens the gate of adapter `a` and one that does not."""
    found: dict[bool, torch.Tensor] = {}
    for seed in range(20):
        ids = some_prompts(rows=1, seed=seed)
        out = greedy(model, ids, steering="a", output_steering=True, return_dict_in_generate=True, max_new_tokens=1)
        found.setdefault(bool(out.steering["a"]["gate"][0]), ids)
    return found[True], found[False]


@pytest.fixture
def model() -> Any:
    return steer_tiny(tiny_llama(), query_shift(gated=True), query_shift("head_out[2]", seed=2))


@pytest.mark.parametrize("place", PLACES)
def test_a_generation_inside_one_is_a_separate_call(model: Any, place: str) -> None:
    other, ids = opposite_gates(model)
    model.set_steering("b")

    def unsteered() -> torch.Tensor:
        with model.disable_steering():
            assert model.active_steering == {}
            return greedy(model, other, max_new_tokens=4)

    def block() -> torch.Tensor:
        with model.steering("a", scale=-2.0):
            return greedy(model, other, max_new_tokens=4)

    def every_way() -> torch.Tensor:
        return torch.cat([unsteered(), block(), greedy(model, other, max_new_tokens=4)])

    want_inside = every_way()
    assert len(want_inside.unique(dim=0)) == 3
    for outer in ({}, {"steering": "a"}, {"steering": None}):
        want, judge = greedy(model, ids, max_new_tokens=3, **outer), Judge(every_way)
        assert torch.equal(greedy(model, ids, max_new_tokens=3, **outer, **judge.arguments(place)), want)
        assert len(judge.said) >= 3 and all(torch.equal(said, want_inside) for said in judge.said)
    assert CURRENT.get() is None


def test_a_streamer_given_by_position_is_outside_of_the_call_too(model: Any) -> None:
    other, ids = opposite_gates(model)

    def generate(streamer: Any) -> torch.Tensor:
        # Everything that stands before the streamer, by position.
        between = (None,) * 6
        return model.generate(ids, *between, streamer, steering="b", max_new_tokens=3, do_sample=False)

    judge = Judge(lambda: greedy(model, other, max_new_tokens=4))
    want_inside, want = judge.call(), generate(None)
    assert not torch.equal(want_inside, greedy(model, other, steering="b", max_new_tokens=4))
    assert torch.equal(generate(judge), want)
    assert len(judge.said) >= 3 and all(torch.equal(said, want_inside) for said in judge.said)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_a_plain_forward_inside_a_generation_reads_its_own_query(model: Any, place: str, use_cache: bool) -> None:
    opens, shut = opposite_gates(model)
    assert opens.shape == shut.shape

    @torch.no_grad()
    def logits(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids).logits

    def unsteered(ids: torch.Tensor) -> torch.Tensor:
        with model.disable_steering():
            return logits(ids)

    assert not torch.equal(logits(opens), unsteered(opens)) and torch.equal(logits(shut), unsteered(shut))
    for running, asked, how in ((opens, shut, logits), (shut, opens, logits), (opens, opens, unsteered)):
        judge, want = Judge(lambda how=how, asked=asked: how(asked)), how(asked)  # type: ignore[misc]
        expected = greedy(model, running, use_cache=use_cache)
        assert torch.equal(greedy(model, running, use_cache=use_cache, **judge.arguments(place)), expected)
        assert len(judge.said) >= 8 and all(torch.equal(said, want) for said in judge.said)


class Counting(ConstantVector):
    """A constant vector that counts its decisions."""

    decisions = 0

    def decide(self, queries: QueryStates) -> Decision:
        self.decisions += 1
        return super().decide(queries)


@pytest.mark.parametrize("draft", ["itself", "early exit"])
def test_a_draft_steers_as_the_call_that_it_drafts_for(model: Any, draft: str) -> None:
    ids = some_prompts(rows=1)
    counting = Counting("resid_post[0]", torch.full((32,), 0.5))
    want = greedy(model, ids, steering=None, steering_processor=[counting])
    assert counting.decisions == 1
    kwargs = {"assistant_model": model} if draft == "itself" else {"assistant_early_exit": 2}
    got = greedy(model, ids, steering=None, steering_processor=[counting], **kwargs)
    assert torch.equal(got, want)
    assert counting.decisions > 2, "the draft has decided as well"


def test_a_judge_of_drafts_is_not_a_draft(model: Any) -> None:
    other, ids = opposite_gates(model)
    want = greedy(model, other, max_new_tokens=2)
    judge = Judge(lambda: greedy(model, other, max_new_tokens=2))
    greedy(model, ids, steering="b", max_new_tokens=4, assistant_model=model, **judge.arguments("logits processor"))
    assert all(torch.equal(said, want) for said in judge.said)


def test_a_block_inside_a_users_decoding_loop_applies(model: Any) -> None:
    other, ids = opposite_gates(model)
    model.set_steering("b")
    with model.disable_steering(), torch.no_grad():
        want, want_logits = greedy(model, other), model(input_ids=other).logits

    def loop(model: Any, input_ids: torch.Tensor, generation_config: Any, **kwargs: Any) -> torch.Tensor:
        with model.disable_steering(), torch.no_grad():
            assert torch.equal(greedy(model, other), want)
            assert torch.equal(model(input_ids=other).logits, want_logits)
        inner = greedy(model, input_ids)
        with model.disable_steering():
            pass
        assert torch.equal(greedy(model, input_ids), inner), "the loop is part of the call again"
        return inner

    assert torch.equal(greedy(model, ids, steering="a", custom_generate=loop), greedy(model, ids, steering="a"))


def test_a_guidance_processor_of_the_users_takes_part_in_each_call(model: Any) -> None:
    ids, negative = some_prompts(rows=1), some_prompts(rows=1, tokens=3, seed=7)
    want = greedy(model, ids, guidance_scale=2.0, negative_prompt_ids=negative)
    assert not torch.equal(want, greedy(model, ids))

    def guidance() -> Any:
        return UnbatchedClassifierFreeGuidanceLogitsProcessor(2.0, model, unconditional_ids=negative)

    for _ in range(2):
        given = guidance()
        assert torch.equal(greedy(model, ids, logits_processor=[given]), want)
        assert given.model is model
