"""A model with adapters of several methods, each at each of the positions, and the engines that serve them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from finesteer_hf import (
    AlphaSteerConfig,
    CAAConfig,
    FineSteerConfig,
    ITIConfig,
    SteeredModelForCausalLM,
    SteeringAdapter,
)
from finesteer_hf.methods.constant import ConstantConfig
from finesteer_hf.serving.contract import problems
from finesteer_hf.serving.manager import SteeredManager
from finesteer_hf.testing.conformance import fit_on_toy
from finesteer_hf.testing.toy import toy_general_prompts, toy_model, toy_preferences, toy_tokenizer


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/serving" in str(item.path) and problems():
            item.add_marker(pytest.mark.skip(reason=f"the installed transformers lacks {problems()}"))


POSITIONS = ("all", "prompt", "generated")
NEW_TOKENS = 6


@functools.cache
def fitted(name: str) -> SteeringAdapter:
    configs = {
        # Gated, and dependent on the query; read and written at one block.
        "finesteer": FineSteerConfig(
            layer=1,
            gate_score="state",
            gate_epsilon=0.3,
            experts="mixture",
            num_experts=2,
            residual_rank=2,
            strength=4.0,
        ),
        # At two blocks.
        "several": FineSteerConfig(
            layer=0,
            write_site=["resid_post[0]", "resid_post[2]"],
            target="gradient",
            gate_score="state",
            gate_epsilon=0.3,
            experts="reduced_rank",
            residual_rank=2,
            refine=0,
            strength=12.0,
        ),
        "caa": CAAConfig(layer=1, strength=4.0),
        "alphasteer": AlphaSteerConfig(layers=[1], strength=4.0),
        # At heads, before they are mixed.
        "iti": ITIConfig(num_heads=4, strength=30.0),
    }
    return fit_on_toy(configs[name])[2]


def constant(layer: int = 2, scale: float = 3.0) -> SteeringAdapter:
    config = ConstantConfig(strength=1.0, hidden_size=32, num_hidden_layers=3, layers=[layer])
    vector = torch.randn(32, generator=torch.Generator().manual_seed(layer)) * scale
    return SteeringAdapter(config, {f"vectors.{layer}": vector})


def at(adapter: SteeringAdapter, positions: str) -> SteeringAdapter:
    return dataclasses.replace(adapter, config=dataclasses.replace(adapter.config, positions=positions))


METHODS = ("finesteer", "several", "caa", "alphasteer", "constant")
# The first writes before the second reads, so the prompt is run ahead.
STACK = {"early-all": 1.0, "finesteer-generated": 1.0}


@pytest.fixture(scope="session")
def model():
    model = SteeredModelForCausalLM.from_model(toy_model())
    for name in METHODS:
        adapter = constant() if name == "constant" else fitted(name)
        for positions in POSITIONS:
            model.load_steering(at(adapter, positions), f"{name}-{positions}", strict=False)
    model.load_steering(fitted("iti"), "iti-generated")
    model.load_steering(at(constant(layer=0), "all"), "early-all")
    model.set_steering(None)
    return model


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Of the adapters' own kind, general ones and others, of 6 to 30 tokens; some begin alike."""
    tokenizer = toy_tokenizer()
    own = [tokenizer(row["prompt"])["input_ids"] for row in toy_preferences(12)]
    generator = torch.Generator().manual_seed(3)
    other = [torch.randint(6, 54, (n,), generator=generator).tolist() for n in (7, 12, 21, 30)]
    stem = torch.randint(6, 54, (17,), generator=generator).tolist()
    general = [tokenizer(row["prompt"])["input_ids"] for row in toy_general_prompts(3)]
    return [*own[:4], *general, *other[1:], [*stem, 9, 10], [*stem, 11, 12, 13]]


@pytest.fixture(scope="session")
def alone(model, prompts):
    """What `generate` answers to a prompt by itself."""

    known: dict[str, list[int]] = {}

    def answer(index: int, steering: str | dict[str, float] | None, scale: float = 1.0) -> list[int]:
        if (key := f"{index} {steering} {scale}") not in known:
            known[key] = generated(index, steering, scale)
        return known[key]

    def generated(index, steering, scale):
        ids = torch.tensor([prompts[index]])
        out = model.generate(ids, steering=steering, steering_scale=scale, max_new_tokens=NEW_TOKENS, do_sample=False)
        return out[0, ids.shape[1] :].tolist()

    return answer


def engine_config(**settings) -> ContinuousBatchingConfig:
    """Pages of 8 tokens, room for all, prompts in chunks of at most 24 tokens a step."""
    return ContinuousBatchingConfig(**{"num_blocks": 96, "page_size": 8, "max_batch_tokens": 24} | settings)


@contextlib.contextmanager
def engine(model, generation: dict | None = None, **settings) -> Iterator[SteeredManager]:
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, eos_token_id=-1, **{"do_sample": False} | (generation or {}))
    with model.continuous_batching_context_manager(
        config, continuous_batching_config=engine_config(**settings), timeout=10
    ) as manager:
        yield manager


def results(manager: SteeredManager, ids: list[str], timeout: float = 60.0) -> dict[str, object]:
    """The last output of each request, by id."""
    found: dict[str, object] = {}
    end = time.monotonic() + timeout
    while len(found) < len(ids):
        assert time.monotonic() < end, f"no answer for {sorted(set(ids) - set(found))}"
        output = manager.get_result(timeout=0.2)
        if output is not None and output.is_finished():
            found[output.request_id] = output
    return found
