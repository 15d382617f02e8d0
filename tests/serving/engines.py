"""Adapters of several methods, and the engines that serve them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from finesteer_hf import (
    AlphaSteerConfig,
    CAAConfig,
    FineSteerConfig,
    ITIConfig,
    SteeringAdapter,
)
from finesteer_hf.methods.constant import ConstantConfig
from finesteer_hf.serving.manager import SteeredManager
from finesteer_hf.testing.conformance import fit_on_toy


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


def engine_config(**settings) -> ContinuousBatchingConfig:
    """Pages of 8 tokens, room for all, prompts in chunks of at most 24 tokens a step."""
    return ContinuousBatchingConfig(**{"num_blocks": 96, "page_size": 8, "max_batch_tokens": 24} | settings)


@contextlib.contextmanager
def engine(model, generation: dict | None = None, **settings) -> Iterator[SteeredManager]:
    config = GenerationConfig(
        eos_token_id=-1, **{"do_sample": False, "max_new_tokens": NEW_TOKENS} | (generation or {})
    )
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
