"""The tensors of a gate in an adapter's file, and the run-time functions that take them.

Estimators return the keyword arguments of their run-time function; an adapter's file has its own names for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from finesteer_hf.adapters.tensor_files import Free, Shape
from finesteer_hf.errors import AdapterFileError
from finesteer_hf.methods.query_gate.config import QueryGateConfig


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

# d: width, k: subspace rank, n and m: calibration and reference rows.
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
}


def gate_shapes(config: QueryGateConfig) -> dict[str, Shape]:
    """Names and shapes of a fitted gate's tensors; none for `always`.

    Raises:
        AdapterFileError: if a setting of the gate is open and no fit has chosen it.
    """
    if config.gate == "always":
        return {}
    unfitted = config.unfitted_gate()
    if unfitted:
        raise AdapterFileError(
            f"The {config.steering_type} config has gate={config.gate!r} and leaves {unfitted} to the fit; only a fitted "
            "adapter can steer. Run `fit_steering`."
        )
    names = [*SCORE_TENSORS[config.gate_score].values(), *GATE_TENSORS[config.gate].values()]
    return shapes_of(names, _AXES, {"d": config.hidden_size, "k": config.subspace_rank})


def shapes_of(
    names: Iterable[str], axes: Mapping[str, str], sizes: Mapping[str, int | str | None]
) -> dict[str, Shape]:
    """Shapes of tensors.

    Args:
        names: names of the tensors.
        axes: for each name, one letter per axis.
        sizes: sizes of the letters; an axis whose size is not a number is free, and equal for all with its letter.
    """
    known = {letter: size for letter, size in sizes.items() if isinstance(size, int)}
    return {name: tuple(known.get(axis, Free(axis)) for axis in axes[name]) for name in names}


def check_values(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse values that no fit writes and that would make every gate NaN.

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
    """An estimator's state under the names of the file.

    A threshold of minus infinity (a gate that always fires) becomes the lowest number: files hold finite numbers.
    """
    lowest = torch.finfo(torch.float32).min
    return {names[keyword]: tensor.float().clamp(min=lowest) for keyword, tensor in state.items()}


def from_file(names: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The keyword arguments of a run-time function."""
    return {keyword: tensors[name] for keyword, name in names.items()}
