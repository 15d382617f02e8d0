"""Which tensors a FineSteer adapter holds, and which run-time function takes them.

The estimators hand over what their run-time function takes by keyword; an adapter's file names it by its part.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from finesteer_hf.errors import AdapterFileError
from finesteer_hf.methods.finesteer.config import FineSteerConfig


# Keyword of the run-time function -> name in the file.
SCORE_TENSORS: dict[str, dict[str, str]] = {
    "ser": {"mean": "gate.mean", "basis": "gate.basis"},
    "t2q": {
        "mean": "gate.mean",
        "basis": "gate.basis",
        "variances": "gate.variances",
        "t2_reference": "gate.t2_reference",
        "q_reference": "gate.q_reference",
    },
    "state": {"weight": "gate.weight", "bias": "gate.bias"},
}
GATE_TENSORS: dict[str, dict[str, str]] = {
    "conformal": {
        "threshold": "gate.threshold",
        "floor": "gate.floor",
        "calibration_scores": "gate.calibration",
        "level": "gate.level",
        "gamma": "gate.gamma",
    },
    "quantile": {
        "threshold": "gate.threshold",
        "calibration_scores": "gate.calibration",
        "epsilon": "gate.level",
        "gamma": "gate.gamma",
    },
    "logistic": {"weight": "gate.slope", "bias": "gate.intercept"},
    "ser": {},
    "always": {},
}
_ROUTER = {"router_weight": "router.weight", "router_bias": "router.bias", "prototypes": "experts.prototypes"}
_LOW_RANK = {"mean": "residual.mean", "down": "residual.down", "up": "residual.up", "bias": "residual.bias"}
EXPERT_TENSORS: dict[str, dict[str, str]] = {
    "reduced_rank": _LOW_RANK,
    "mixture": {**_ROUTER, **_LOW_RANK},
    "paper": {
        **_ROUTER,
        "hidden_weight": "residual.hidden_weight",
        "hidden_bias": "residual.hidden_bias",
        "output_weight": "residual.output_weight",
        "output_bias": "residual.output_bias",
        "residual_basis": "residual.basis",
    },
}

# d: width, k: subspace rank, K: experts, r: residual rank, n and m: rows of calibration and of reference.
_AXES: dict[str, str] = {
    "gate.mean": "d",
    "gate.basis": "dk",
    "gate.variances": "k",
    "gate.t2_reference": "m",
    "gate.q_reference": "m",
    "gate.weight": "d",
    "gate.bias": "",
    "gate.threshold": "",
    "gate.floor": "",
    "gate.calibration": "n",
    "gate.level": "",
    "gate.gamma": "",
    "gate.slope": "",
    "gate.intercept": "",
    "router.weight": "Kd",
    "router.bias": "K",
    "experts.prototypes": "Kd",
    "residual.mean": "d",
    "residual.down": "dr",
    "residual.up": "rd",
    "residual.bias": "d",
    "residual.hidden_weight": "dd",
    "residual.hidden_bias": "d",
    "residual.output_weight": "rd",
    "residual.output_bias": "r",
    "residual.basis": "dr",
}


def score_names(config: FineSteerConfig) -> dict[str, str]:
    """Tensors of the score; none if nothing looks at one."""
    return {} if config.gate == "always" else SCORE_TENSORS[config.gate_score]


def expected_shapes(config: FineSteerConfig) -> dict[str, tuple[int | None, ...]]:
    """Names and shapes that a fitted config calls for; None for a number of calibration rows.

    Raises:
        AdapterFileError: if a setting was left to the data and no fit has chosen it.
    """
    unfitted = config.unfitted()
    if unfitted:
        raise AdapterFileError(
            f"The FINESTEER config leaves {unfitted} to the data; only a fitted adapter can steer. Run `fit_steering`."
        )
    sizes = {
        "d": config.hidden_size,
        "k": config.subspace_rank,
        "K": config.num_experts,
        "r": config.residual_rank,
        "n": None,
        "m": None,
    }
    names = [
        *score_names(config).values(),
        *GATE_TENSORS[config.gate].values(),
        *EXPERT_TENSORS[config.experts].values(),
    ]
    return {name: tuple(_size(sizes[axis]) for axis in _AXES[name]) for name in names}


def _size(value: int | str | None) -> int | None:
    return value if isinstance(value, int) else None


def check_values(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse values that no fit writes and that would make a gate of NaN out of any query.

    Raises:
        AdapterFileError: for reference scores that are empty or not ascending, and for scales that are not positive.
    """
    for name in ("gate.calibration", "gate.t2_reference", "gate.q_reference"):
        values = tensors.get(name)
        if values is not None and (values.numel() == 0 or bool((values.diff() < 0).any())):
            raise AdapterFileError(f"Tensor {name!r} must hold scores in ascending order; the file is damaged.")
    for name in ("gate.level", "gate.gamma", "gate.variances"):
        values = tensors.get(name)
        if values is not None and not bool((values > 0).all()):
            raise AdapterFileError(f"Tensor {name!r} must be positive; the file is damaged.")


def to_file(names: Mapping[str, str], state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What an estimator hands over, by the names of the file.

    A threshold of minus infinity (a gate that always fires) becomes the lowest number: files hold finite numbers.
    """
    lowest = torch.finfo(torch.float32).min
    return {names[keyword]: tensor.float().clamp(min=lowest) for keyword, tensor in state.items()}


def from_file(names: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The keyword arguments of a run-time function."""
    return {keyword: tensors[name] for keyword, name in names.items()}
