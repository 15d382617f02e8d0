"""The run-time functions: keyword-compatible with `state()`, traceable, free of host syncs, fp32."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from finesteer_hf.estimators import (
    GATE_FUNCTIONS,
    GATES,
    SCORE_FUNCTIONS,
    SCORES,
    VECTOR_FUNCTIONS,
    AutoScore,
    MixtureSteering,
    PaperMoSE,
    ReducedRankSteering,
)


WIDTH = 16


def _cases() -> dict[str, tuple[Callable[..., torch.Tensor], dict[str, torch.Tensor], bool]]:
    rng = np.random.default_rng(0)
    ir, general = rng.normal(size=(60, WIDTH)) + 1, rng.normal(size=(60, WIDTH))
    shifts = ir @ rng.normal(size=(WIDTH, WIDTH)) + rng.normal(size=(60, WIDTH))
    cases = {}
    for name, score in SCORES.items():
        cases[f"score-{name}"] = (SCORE_FUNCTIONS[name], score().fit(ir, general).state(), True)
    for name, gate in GATES.items():
        fitted = gate().fit(rng.uniform(0.5, 1, 60), rng.uniform(0, 0.6, 60))
        cases[f"gate-{name}"] = (GATE_FUNCTIONS[name], fitted.state(), False)
    vectors = {
        "mixture": MixtureSteering(2, residual_rank=3, folds=3),
        "reduced_rank": ReducedRankSteering(),
        "paper": PaperMoSE(4, residual_rank=2, epochs=2),
    }
    assert set(vectors) == set(VECTOR_FUNCTIONS)
    for name, vector in vectors.items():
        cases[f"vector-{name}"] = (VECTOR_FUNCTIONS[name], vector.fit(ir, shifts).state(), True)
    return cases


CASES = _cases()


@pytest.mark.parametrize("name", CASES)
def test_states_are_contiguous_fp32_and_the_function_takes_them(name: str) -> None:
    function, state, of_states = CASES[name]
    assert all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in state.values())
    inputs = torch.rand(5, WIDTH) if of_states else torch.rand(5)
    result = function(inputs, **state)
    assert result.dtype == torch.float32
    assert result.shape == ((5, WIDTH) if name.startswith("vector") else (5,))
    rows = torch.stack([function(row[None], **state)[0] for row in inputs])
    torch.testing.assert_close(result, rows, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_no_value_reaches_the_host(name: str) -> None:
    """On the meta device there is no data: any branch on a value, item() or copy to the host raises."""
    function, state, of_states = CASES[name]
    on_meta = {key: tensor.to("meta") for key, tensor in state.items()}
    inputs = torch.empty((5, WIDTH) if of_states else (5,), device="meta")
    assert function(inputs, **on_meta).device.type == "meta"


@pytest.mark.parametrize("name", CASES)
def test_compiles_to_one_graph(name: str) -> None:
    function, state, of_states = CASES[name]
    inputs = torch.rand(5, WIDTH) if of_states else torch.rand(5)
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(inputs, **state), function(inputs, **state))
    torch._dynamo.reset()


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][2]])
def test_half_precision_states_are_read_in_fp32(name: str) -> None:
    function, state, _ = CASES[name]
    half = torch.rand(5, WIDTH).half()
    torch.testing.assert_close(function(half, **state), function(half.float(), **state), rtol=0, atol=0)


@pytest.mark.parametrize(
    "kind", [*SCORES.values(), AutoScore, *GATES.values(), ReducedRankSteering, MixtureSteering, PaperMoSE]
)
def test_estimators_clone_and_refuse_to_predict_unfitted(kind: type) -> None:
    estimator = clone(kind())
    assert estimator.get_params() == kind().get_params()
    if estimator.get_params():
        with pytest.raises(NotFittedError):
            estimator.state()
