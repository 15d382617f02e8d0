"""Caches of states: carried over from an earlier turn, filled in chunks, and under a stack of adapters."""

from __future__ import annotations

import contextlib

import pytest
import torch

from finesteer_hf import SteeredModelForCausalLM
from finesteer_hf.sites import Site
from finesteer_hf.testing.architecture_checks import query_probe
from finesteer_hf.testing.architecture_subject import LAYER, Subject, agree
from finesteer_hf.testing.reference import adding, reading
from finesteer_hf.testing.tiny_models import VOCAB, tiny_model


BOTH = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(5))
FIRST, SECOND = BOTH[:, :7], BOTH[:, 7:]


@pytest.fixture
def subject(request):
    with torch.no_grad():
        yield Subject(SteeredModelForCausalLM.from_model(tiny_model(request.param)), VOCAB)


def stack(subject):
    """Two probes; the second reads after the first's write."""
    early, late = query_probe(subject, Site("resid_post", 0)), query_probe(subject, Site("resid_post", 2))
    late.writes = (Site("resid_post", 3),)
    early.threshold = late.threshold = -1.0
    return early, late


def first_turn(subject):
    """The cache of an unsteered first turn, as an argument of `generate`."""
    out = subject.model(FIRST, use_cache=True)
    name = "past_key_values" if getattr(out, "past_key_values", None) is not None else "cache_params"
    return {name: out[name]}


def need_unsteered(subject, inputs):
    """Skip if the unsteered model's answer differs from that to the whole text."""
    mask = torch.ones_like(BOTH)
    try:
        sound = agree(subject.say(mask=mask, **inputs()), subject.say(BOTH, mask))
    except (KeyError, RuntimeError, ValueError):
        sound = False
    if not sound:
        pytest.skip("the unsteered model cannot do this in this transformers")


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize(
    "subject",
    ["LlamaForCausalLM", "FalconH1ForCausalLM", "Qwen3NextForCausalLM", "Lfm2ForCausalLM", "Mamba2ForCausalLM"],
    indirect=True,
)
def test_a_second_turn_on_a_carried_cache(subject, number):
    need_unsteered(subject, lambda: {"ids": SECOND, **first_turn(subject)})
    probes = stack(subject)[:number]
    with contextlib.ExitStack() as opened:
        seen = [opened.enter_context(reading(subject.blocks[probe.reads[0].layer])) for probe in probes]
        subject.model(BOTH)
    mask, cache = torch.ones_like(BOTH), first_turn(subject)
    with contextlib.ExitStack() as opened:
        for probe, states in zip(probes, seen, strict=True):
            delta = probe.vectors_of(states[0][:, -1])[:, None]
            opened.enter_context(adding(subject.blocks[probe.writes[0].layer], delta))
        expected = subject.say(SECOND, mask, **cache)
    got = subject.say(SECOND, mask, steering_processor=probes, **first_turn(subject))
    assert agree(got, expected)
    assert not agree(got, subject.say(SECOND, mask, **first_turn(subject)))


@pytest.mark.parametrize(
    "subject", ["Gemma3ForCausalLM", "FalconH1ForCausalLM", "Qwen3NextForCausalLM", "Lfm2ForCausalLM"], indirect=True
)
def test_a_prompt_in_chunks(subject):
    need_unsteered(subject, lambda: {"ids": BOTH, "prefill_chunk_size": 5})
    for probes in (stack(subject), stack(subject)[1:]):
        whole = subject.say(BOTH, steering_processor=probes)
        for size in (1, 5, 11):
            assert agree(subject.say(BOTH, steering_processor=probes, prefill_chunk_size=size), whole)


@pytest.mark.parametrize("subject", ["MambaForCausalLM", "FalconH1ForCausalLM", "xLSTMForCausalLM"], indirect=True)
@pytest.mark.parametrize("positions", ["prompt", "generated"])
def test_positions_without_a_count_of_columns(subject, positions):
    (processor,) = subject.constant()["steering_processor"]
    processor.positions = positions
    got = subject.say(BOTH, steering_processor=[processor])
    calls = []

    def delta():
        calls.append(None)
        if len(calls) > 1:
            return subject.vector * (positions == "generated")
        columns = torch.arange(12) >= 11 if positions == "generated" else torch.ones(12, dtype=torch.bool)
        return subject.vector * columns[None, :, None]

    with adding(subject.blocks[LAYER], delta):
        expected = subject.say(BOTH)
    assert agree(got, expected)
