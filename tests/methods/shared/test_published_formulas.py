"""Methods against the formulas of their published code, or of the paper without one, in numpy under a plain hook.

Fitted tensors come from a fit on the toy model. The reference is the bare model with a hook that turns each state to
float64, applies the formula and returns the result; it uses no function of the package.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from finesteer_hf import FineSteerConfig, SteeredModelForCausalLM
from finesteer_hf.adapters.config import SteeringConfig
from finesteer_hf.methods.alphasteer import AlphaSteerConfig
from finesteer_hf.methods.angular import AngularConfig
from finesteer_hf.methods.inferaligner import InferAlignerConfig
from finesteer_hf.testing import toy_model
from finesteer_hf.testing.conformance import fit_on_toy


# A map of a state [tokens, d] at a layer, given the states [tokens, d] of the unsteered prompt at all layers' inputs.
Formula = Callable[[int, np.ndarray, list[np.ndarray]], np.ndarray]
PROMPTS = torch.randint(6, 54, (12, 7), generator=torch.Generator().manual_seed(3))
TOLERANCE = 1e-5


@functools.cache
def fitted(config_cls: type[SteeringConfig] | Callable[..., SteeringConfig], **settings: object) -> tuple:
    """An adapter's config and its tensors in float64."""
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    adapter = fit_on_toy(config_cls(**settings))[2]
    return adapter, {name: tensor.double().numpy() for name, tensor in adapter.tensors.items()}


def states_of(ids: torch.Tensor) -> list[np.ndarray]:
    """The inputs of all blocks, and the output of the last, of the unsteered model."""
    model, seen = toy_model(), []
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda m, args: seen.append(args[0][0].double().numpy()))
    model.model.norm.register_forward_pre_hook(lambda m, args: seen.append(args[0][0].double().numpy()))
    with torch.no_grad():
        model(ids[None])
    return seen


def largest_difference(adapter: object, formula: Formula, layers: list[int], *, at_input: bool = False) -> float:
    """Of the logits of all prompts: the library's steered forward less the bare model's under the formula."""
    steered, differences, changes = SteeredModelForCausalLM.from_model(toy_model(), steering=adapter), [], []
    for ids in PROMPTS:
        plain, states = toy_model(), states_of(ids)
        with torch.no_grad():
            unsteered = plain(ids[None]).logits

        def mapped(layer: int, hidden: torch.Tensor, states: list[np.ndarray] = states) -> torch.Tensor:
            return torch.from_numpy(formula(layer, hidden[0].double().numpy(), states)).float()[None]

        for layer in layers:
            block = plain.model.layers[layer]
            if at_input:
                block.register_forward_pre_hook(lambda m, args, at=layer: (mapped(at, args[0]), *args[1:]))
            else:
                block.register_forward_hook(lambda m, args, out, at=layer: mapped(at, out))
        with torch.no_grad():
            theirs, ours = plain(ids[None]).logits, steered(ids[None]).logits
        differences.append(float((theirs - ours).abs().max()))
        changes.append(float((theirs - unsteered).abs().max()))
    assert max(changes) > 0.01, "nothing was steered"
    return max(differences)


@pytest.mark.parametrize("compat", [None, "official"])
def test_finesteer(compat: str | None) -> None:
    """Energy ratio (Eq. 6-7), quantile gate (Eq. 8) and mixture (Eq. 11-14); read a block earlier by the code."""
    adapter, t = fitted(FineSteerConfig.paper, layer=1, subspace_rank=6, residual_rank=4, strength=0.5, compat=compat)
    gates = set()

    def formula(layer: int, hidden: np.ndarray, states: list[np.ndarray]) -> np.ndarray:
        h = states[1 if compat else 2][-1]
        score = np.square(t["gate.basis"].T @ (h - t["gate.mean"])).sum() / np.square(h - t["gate.mean"]).sum()
        own = t["gate.calibration"]
        tau = own[int(np.ceil(0.1 * len(own))) - 1]
        gate = 1.0 if score >= tau else ((own <= score).mean() / 0.1) ** 2
        alpha = np.exp(t["router.weight"] @ h + t["router.bias"])
        relu = np.maximum(t["residual.hidden_weight"] @ h + t["residual.hidden_bias"], 0)
        beta = t["residual.output_weight"] @ relu + t["residual.output_bias"]
        gates.add(round(gate, 3))
        return hidden + 0.5 * gate * (alpha / alpha.sum() @ t["experts.prototypes"] + t["residual.basis"] @ beta)

    assert largest_difference(adapter, formula, [1]) < TOLERANCE
    assert len(gates) > 1, "prompts must differ in their gate"
    assert bool(t["router.bias"].any()) == (compat == "official"), "only the code's W_Q has a bias"


def test_alphasteer() -> None:
    """The query's state times a d x d matrix, added to all prompt tokens at the block's input."""
    adapter, t = fitted(AlphaSteerConfig, layers=(1, 2), strength=0.3)
    matrices = {layer: np.outer(t["probe"][row], t["refusal"][row]) for row, layer in enumerate((1, 2))}

    def formula(layer: int, hidden: np.ndarray, states: list[np.ndarray]) -> np.ndarray:
        return hidden + states[layer][-1] @ matrices[layer] * 0.3

    assert largest_difference(adapter, formula, [1, 2], at_input=True) < TOLERANCE


@pytest.mark.parametrize("mode", ["angular", "adaptive", "selective"])
def test_angular(mode: str) -> None:
    """h - P h + |P h| v, masked where adaptive; h - P h + V h where selective."""
    adapter, t = fitted(AngularConfig, layers=(0, 1), mode=mode, angle=130.0, threshold=0.1, strength=1.0)
    (b1, b2), angle = t["plane"], np.radians(130.0)
    layers = adapter.config.layers

    def formula(layer: int, hidden: np.ndarray, states: list[np.ndarray]) -> np.ndarray:
        inside = hidden @ (np.outer(b1, b1) + np.outer(b2, b2))
        if mode == "selective":
            turn = np.cos(angle) * (np.outer(b1, b1) + np.outer(b2, b2))
            return hidden - inside + hidden @ (turn + np.sin(angle) * (np.outer(b2, b1) - np.outer(b1, b2))).T
        target = np.linalg.norm(inside, axis=1, keepdims=True) * (np.cos(angle) * b1 + np.sin(angle) * b2)
        mask = (hidden @ b1 > 0.1)[:, None] if mode == "adaptive" else 1.0
        return hidden + mask * (target - inside)

    assert largest_difference(adapter, formula, layers) < TOLERANCE


@pytest.mark.parametrize("guard", [None, 1])
def test_inferaligner(guard: int | None) -> None:
    """1[<h, s> + b > 0] theta at all tokens of a layer; one layer's gate for all where there is a guard."""
    adapter, t = fitted(InferAlignerConfig, layers=(1, 2), guard_layer=guard, strength=0.3)
    gates = set()

    def formula(layer: int, hidden: np.ndarray, states: list[np.ndarray]) -> np.ndarray:
        row = layer - 1
        asked = row if guard is None else 0
        h = states[(layer if guard is None else guard) + 1][-1]
        gate = float(h @ t["srv"][asked] + t["bias"][asked] > 0)
        gates.add(gate)
        return hidden + 0.3 * gate * t["ssv"][row]

    assert largest_difference(adapter, formula, [1, 2]) < TOLERANCE
    assert gates == {0.0, 1.0}
