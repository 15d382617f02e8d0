"""Continuous batching is refused while steering is active: nothing silently runs unsteered."""

from __future__ import annotations

import pytest
import torch
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from finesteer_hf import ConstantVector, SteeringAdapter
from finesteer_hf.errors import UnsupportedModelError
from finesteer_hf.methods.constant import ConstantConfig
from finesteer_hf.testing.toy import toy_model


PROMPTS = [[7, 8, 9], [10, 11, 12, 13]]


@pytest.fixture
def steered(model):
    config = ConstantConfig(strength=1.0, hidden_size=32, num_hidden_layers=3, layers=[1])
    model.load_steering(SteeringAdapter(config, {"vectors.1": torch.ones(32)}), "a")
    return model


@pytest.mark.parametrize(
    "arguments",
    [
        {"steering": "a"},
        {"steering": None},
        {"steering_scale": 2.0},
        {"steering_processor": []},
        {"output_steering": True},
    ],
    ids=str,
)
def test_generate_batch_ignores_no_argument_of_generate(steered, arguments):
    steered.set_steering(None)
    with pytest.raises(UnsupportedModelError, match=rf"{next(iter(arguments))}.*Use `generate`"):
        steered.generate_batch(PROMPTS, max_new_tokens=2, **arguments)


def entry_points(model):
    yield lambda: model.generate_batch(PROMPTS, max_new_tokens=2)
    yield lambda: model.init_continuous_batching()
    yield lambda: model.continuous_batching_context_manager().__enter__()
    yield lambda: model.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=2, cache_implementation="paged")


@pytest.mark.parametrize("entry", range(4))
def test_every_entry_is_refused_while_anything_is_active(steered, entry):
    call = list(entry_points(steered))[entry]
    with pytest.raises(UnsupportedModelError, match=r"Continuous batching.*set_steering\(None\)"):
        call()
    with steered.disable_steering(), pytest.raises(UnsupportedModelError, match="Continuous batching"):
        # The manager's thread stands in no block: there the adapter is active.
        call()
    steered.set_steering(None)
    for block in (steered.steering("a"), steered.steering_with([ConstantVector("resid_post[1]", torch.ones(32))])):
        with block, pytest.raises(UnsupportedModelError, match="Continuous batching"):
            call()


def test_an_unsteered_manager_runs_and_refuses_requests_while_anything_is_active(steered):
    steered.set_steering(None)
    # Left alone it takes most of the machine's memory.
    small = {"continuous_batching_config": ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=32)}
    want = toy_model().generate_batch(PROMPTS, max_new_tokens=3, **small)
    got = steered.generate_batch(PROMPTS, max_new_tokens=3, **small)
    assert [out.generated_tokens for out in got.values()] == [out.generated_tokens for out in want.values()]
    assert all(len(out.generated_tokens) == 3 for out in got.values())
    with steered.continuous_batching_context_manager(timeout=5, **small) as manager:
        with steered.steering("a"), pytest.raises(UnsupportedModelError, match="Continuous batching"):
            manager.add_request(PROMPTS[0], max_new_tokens=2)
        with steered.steering("a"), pytest.raises(UnsupportedModelError, match="Continuous batching"):
            manager.add_requests(PROMPTS, max_new_tokens=2)
        request = manager.add_request(PROMPTS[0], max_new_tokens=3)
        first = next(iter(manager.request_id_iter(request)))
        assert first.generated_tokens == next(iter(want.values())).generated_tokens
