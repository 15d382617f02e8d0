"""Each request of a packed batch says what it says alone: five methods and none, three position modes, every engine."""

from __future__ import annotations

import itertools

import pytest
from engines import METHODS, POSITIONS, STACK, engine, results
from transformers.generation.continuous_batching.requests import RequestState

from finesteer_hf.serving.prefix import SteeredCache
from finesteer_hf.serving.table import SteeringTable


# Chunks of 24 tokens, room for all; a cache so small that requests are queued again; other orders; shared beginnings.
ENGINES = {
    "fifo": {},
    "prefill_first": {"scheduler_type": "prefill_first"},
    "scarce": {"num_blocks": 10, "allow_block_sharing": False},
    "scarce_and_shared": {"num_blocks": 10},
    "small_chunks": {"max_batch_tokens": 9},
}
STEERINGS = [None, STACK, "iti-generated", *(f"{m}-{p}" for m, p in itertools.product(METHODS, POSITIONS))]


@pytest.fixture
def requeued(monkeypatch):
    """Ids of requests that were queued again with their own answer."""
    again: list[str] = []
    original = RequestState.create_equivalent_initial_request

    def noted(self):
        if self.generated_tokens:
            again.append(self.request_id)
        return original(self)

    monkeypatch.setattr(RequestState, "create_equivalent_initial_request", noted)
    return again


def served(model, prompts, asked, setting):
    """The answers of an engine to (prompt, steering) pairs, its counts, and the gates that stayed shut."""
    with engine(model, **ENGINES[setting]) as manager:
        ids = [manager.add_request(prompts[index], steering=steering) for index, steering in asked]
        got = results(manager, ids)
        assert not manager.session.requests and not manager.session.table.in_use
        stats = manager.stats
    shut = [bool(got[i].steering) and not any(v["fired"] for v in got[i].steering.values()) for i in ids]
    return [got[i].generated_tokens for i in ids], stats, shut


def pairs(prompts, rounds):
    return [
        (index, STEERINGS[(index + 3 * r + r // 6) % len(STEERINGS)])
        for r in range(rounds)
        for index in range(len(prompts))
    ]


@pytest.mark.parametrize("setting", ENGINES)
def test_requests_say_what_they_say_alone(model, prompts, alone, setting, requeued):
    asked = pairs(prompts, rounds=9)
    got, stats, shut = served(model, prompts, asked, setting)
    wrong = [(*pair, answer) for pair, answer in zip(asked, got, strict=True) if answer != alone(*pair)]
    assert not wrong, f"{len(wrong)} of {len(asked)}: {wrong[:3]}"
    # The engines do what they are here for, and steering changes what is said.
    steered = [pair for pair in asked if pair[1] is not None]
    assert len(asked) >= 100 and sum(alone(*pair) != alone(pair[0], None) for pair in steered) > len(steered) / 2
    assert sum(shut) >= 5
    assert stats.decisions == len(steered)
    assert stats.probes > 0 and (len(requeued) > 10) == setting.startswith("scarce")
    assert (stats.matched > 0) == (setting != "scarce")


def test_one_gather_and_one_add_a_site_and_step(model, prompts, monkeypatch):
    calls: list[str] = []
    original = SteeringTable.add
    monkeypatch.setattr(
        SteeringTable, "add", lambda self, site, *a: calls.append(str(site)) or original(self, site, *a)
    )
    asked = [(index, f"constant-{POSITIONS[index % 3]}") for index in range(len(prompts))]
    with engine(model, max_batch_tokens=256) as manager:
        with manager.pause():
            ids = [manager.add_request(prompts[index], steering=steering) for index, steering in asked]
        results(manager, ids)
        stats = manager.stats
    # All in one batch: one step for the prompts, one for each later token.
    assert calls == ["resid_post[2]"] * len(calls) and len(calls) == stats.adds == stats.steps
    assert stats.probes == 0 and stats.decisions == len(asked)


def test_only_prompts_that_are_split_or_written_before_they_are_read_are_run_ahead(model, prompts):
    long = [index for index, prompt in enumerate(prompts) if len(prompt) > 16]
    with engine(model, max_batch_tokens=16, allow_block_sharing=False) as manager:
        for positions, probes in (("generated", 0), ("all", len(long)), ("prompt", len(long))):
            before = manager.stats.probes
            for index in long:
                # One at a time: prompts that share a step are split at other places.
                results(manager, [manager.add_request(prompts[index], steering=f"finesteer-{positions}")])
            assert manager.stats.probes - before == probes


def unguarded_match(self, request_id, prompt_ids):
    return super(SteeredCache, self).search_prefix_match(request_id, prompt_ids)


def unguarded_mark(self, state, complete_blocks):
    return super(SteeredCache, self).mark_complete_blocks(state, complete_blocks)


MUTANTS = {
    "unguarded_sharing": lambda patch: (
        patch.setattr(SteeredCache, "search_prefix_match", unguarded_match),
        patch.setattr(SteeredCache, "mark_complete_blocks", unguarded_mark),
    ),
    "another_requests_scale": lambda patch: patch.setattr(
        SteeringTable, "_take_row", lambda self, take=SteeringTable._take_row: take(self) and 1
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_suite_sees_what_it_is_here_to_see(model, prompts, alone, mutant, monkeypatch):
    MUTANTS[mutant](monkeypatch)
    asked = pairs(prompts, rounds=9)
    with engine(model, **ENGINES["fifo"]) as manager:
        ids = [manager.add_request(prompts[index], steering=steering) for index, steering in asked]
        got = results(manager, ids)
    assert any(got[i].generated_tokens != alone(*pair) for i, pair in zip(ids, asked, strict=True))


def test_the_suite_sees_a_query_that_moves_when_a_request_is_queued_again(
    model, prompts, alone, monkeypatch, requeued
):
    original = RequestState.create_equivalent_initial_request

    def moved(self):
        state = original(self)
        # As if the prompt ended where the answer so far does: decided anew from there.
        asked = state.logit_processor_kwargs.get("steering")
        if asked is not None and asked.selection and self.generated_tokens:
            request = model_session[0].requests[asked.ticket]
            request.prompt, request.decided = tuple(state.initial_tokens), False
            model_session[0].table.take_back(request)
            request.rows = {}
        return state

    monkeypatch.setattr(RequestState, "create_equivalent_initial_request", moved)
    queries = ("finesteer-generated", "several-generated", "alphasteer-generated")
    asked = [(index, steering) for steering in queries for index in range(len(prompts))]
    with engine(model, **ENGINES["scarce"]) as manager:
        model_session = [manager.session]
        ids = [manager.add_request(prompts[index], steering=steering) for index, steering in asked]
        got = results(manager, ids)
    assert any(got[i].generated_tokens != alone(*pair) for i, pair in zip(ids, asked, strict=True))
