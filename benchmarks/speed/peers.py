"""Other steering libraries, each adding one vector at one block's output, by its own documented way.

A library that is not installed is left out. repeng is taken from a checkout: its release on PyPI needs numpy below 2.

    pip install --no-deps pyvene==0.1.8 nnsight==0.8.1 steering-vectors==0.12.2 greenlet
    PYTHONPATH=<checkout of repeng> python -m benchmarks.speed.generate_overhead
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch


Generate = Callable[..., torch.Tensor]


@contextlib.contextmanager
def reference_hook(model: Any, layers: list[int], vector: torch.Tensor) -> Iterator[Generate]:
    """A plain forward hook: the measure of all."""
    handles = [model.model.layers[i].register_forward_hook(lambda m, a, out: out + vector) for i in layers]
    try:
        yield model.generate
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def finesteer_hf(model: Any, layers: list[int], vector: torch.Tensor) -> Iterator[Generate]:
    """This package."""
    from finesteer_hf import ConstantVector, SteeredModelForCausalLM, SteeringProcessorList

    SteeredModelForCausalLM.from_model(model)
    processors = SteeringProcessorList([ConstantVector(f"resid_post[{i}]", vector) for i in layers])
    try:
        with model.steering_with(processors):
            yield model.generate
    finally:
        model.unload_steering()


@contextlib.contextmanager
def steering_vectors(model: Any, layers: list[int], vector: torch.Tensor) -> Iterator[Generate]:
    """steering-vectors, its context manager."""
    from steering_vectors import SteeringVector

    with SteeringVector(dict.fromkeys(layers, vector), "decoder_block").apply(model, multiplier=1.0):
        yield model.generate


@contextlib.contextmanager
def repeng(model: Any, layers: list[int], vector: torch.Tensor) -> Iterator[Generate]:
    """repeng, its wrapped layers."""
    from repeng import ControlModel, ControlVector

    controlled = ControlModel(model, layers)
    controlled.set_control(ControlVector("llama", {i: vector.float().cpu().numpy() for i in layers}), 1.0)
    try:
        yield controlled.generate
    finally:
        controlled.reset()
        controlled.unwrap()


@contextlib.contextmanager
def pyvene(model: Any, layers: list[int], vector: torch.Tensor) -> Iterator[Generate]:
    """pyvene, steering prompt and generated tokens."""
    import pyvene as pv

    representations = [
        {
            "layer": layer,
            "component": "block_output",
            "source_representation": vector,
            "intervention_type": pv.AdditionIntervention,
        }
        for layer in layers
    ]
    intervenable = pv.IntervenableModel(representations, model=model)

    def generate(input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        return intervenable.generate(inputs, unit_locations=None, intervene_on_prompt=True, **kwargs)[1]

    yield generate


@contextlib.contextmanager
def nnsight(model: Any, layers: list[int], vector: torch.Tensor) -> Iterator[Generate]:
    """nnsight, its bounded iteration over decode steps."""
    from nnsight import LanguageModel

    from finesteer_hf.testing import toy_tokenizer

    # The tokenizer is asked for and, with token ids given, not used.
    traced = LanguageModel(model, tokenizer=toy_tokenizer())

    def generate(input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        inputs, steps = {"input_ids": input_ids, "attention_mask": attention_mask}, kwargs["max_new_tokens"]
        with traced.generate(inputs, **kwargs) as tracer:
            for _step in tracer.iter[:steps]:
                for layer in layers:
                    traced.model.layers[layer].output[:] += vector
            out = tracer.result.save()
        return out

    yield generate


PEERS = {
    "plain hook": reference_hook,
    "finesteer_hf": finesteer_hf,
    "steering-vectors": steering_vectors,
    "repeng": repeng,
    "pyvene": pyvene,
    "nnsight": nnsight,
}
_MODULES = {"steering-vectors": "steering_vectors", "repeng": "repeng", "pyvene": "pyvene", "nnsight": "nnsight"}


def available_peers() -> dict[str, Callable[..., Any]]:
    """The peers that can be imported, the reference and this package first."""
    return {
        name: peer for name, peer in PEERS.items() if name not in _MODULES or importlib.util.find_spec(_MODULES[name])
    }
