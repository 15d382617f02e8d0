"""Inputs and outputs of estimators: checked fp64 arrays in, fp32 tensors out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


ArrayLike = np.ndarray | torch.Tensor
Matrix = NDArray[np.float64]
State = dict[str, torch.Tensor]


def as_float64(values: ArrayLike, name: str) -> Matrix:
    if isinstance(values, torch.Tensor):
        return values.detach().to("cpu", torch.float64).numpy()
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be numbers in a numpy array or a torch tensor: {error}") from error


def _refuse_not_finite(array: Matrix, name: str) -> None:
    finite = np.isfinite(array).reshape(len(array), -1).all(axis=1)
    if not finite.all():
        bad = np.flatnonzero(~finite)
        raise ValueError(
            f"{name}: {bad.size} of {len(array)} rows contain NaN or Inf (the first is row {bad[0]}). "
            "Drop these rows, or capture the states in float32."
        )


def as_matrix(
    values: ArrayLike, name: str, *, min_rows: int = 2, width: int | None = None, width_of: str = ""
) -> Matrix:
    """Check a table of states and return it as fp64.

    Args:
        values: [rows, d], any numeric dtype, numpy or torch on any device.
        name: its name in errors.
        min_rows: fewest rows allowed.
        width: required d; `width_of` names what has it.

    Raises:
        ValueError: if it is not two-dimensional, has too few rows, NaN or Inf (with the number of rows), or the wrong
            width.
    """
    array = as_float64(values, name)
    if array.ndim != 2:
        raise ValueError(f"{name} must be two-dimensional [rows, d], not of shape {list(array.shape)}.")
    if len(array) < min_rows or array.shape[1] == 0:
        raise ValueError(f"{name} has shape {list(array.shape)}: at least {min_rows} rows and 1 column are needed.")
    if width is not None and array.shape[1] != width:
        raise ValueError(f"{name} is {array.shape[1]} wide, but {width_of or 'the fitted data'} is {width} wide.")
    _refuse_not_finite(array, name)
    return array


def as_vector(values: ArrayLike, name: str, *, min_rows: int = 1) -> Matrix:
    """Check a list of scores [n] and return it as fp64; raises ValueError as `as_matrix`."""
    array = as_float64(values, name)
    if array.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional [rows], not of shape {list(array.shape)}.")
    if len(array) < min_rows:
        raise ValueError(f"{name} has {len(array)} rows: at least {min_rows} are needed.")
    _refuse_not_finite(array, name)
    return array


def as_groups(groups: Any, rows: int, name: str = "groups") -> NDArray[Any] | None:
    """Check group labels, one per row; None stays None. Raises ValueError for a wrong number of labels."""
    if groups is None:
        return None
    labels = np.asarray(groups)
    if labels.shape != (rows,):
        raise ValueError(f"{name} has shape {list(labels.shape)}: one label for each of the {rows} rows is needed.")
    return labels


def paired(states: ArrayLike, shifts: ArrayLike, *, min_rows: int = 4) -> tuple[Matrix, Matrix]:
    """Check states h [M, d] against their shifts delta [M, d]; raises ValueError if they do not match."""
    h = as_matrix(states, "states", min_rows=min_rows)
    delta = as_matrix(shifts, "shifts", min_rows=min_rows)
    if len(h) != len(delta):
        raise ValueError(f"states has {len(h)} rows and shifts has {len(delta)}: each state needs one shift.")
    return h, delta


def positive(value: float, name: str) -> float:
    """Return a finite number above zero, or raise ValueError."""
    if not (np.isfinite(value) and value > 0):
        raise ValueError(f"{name}={value!r} must be a positive number.")
    return float(value)


def fraction(value: float, name: str) -> float:
    """Return a number strictly between 0 and 1, or raise ValueError."""
    if not 0.0 < value < 1.0:
        raise ValueError(f"{name}={value!r} must be strictly between 0 and 1.")
    return float(value)


def one_of(value: str, options: Mapping[str, Any] | tuple[str, ...], name: str) -> str:
    """Return a known option, or raise ValueError listing the options."""
    if value not in options:
        raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(map(repr, options))}.")
    return value


def runtime_tensor(values: Any) -> torch.Tensor:
    """Convert a learned array to the contiguous fp32 CPU tensor that an adapter stores."""
    return torch.from_numpy(np.array(values, dtype=np.float32, order="C"))


def run(function: Callable[..., torch.Tensor], inputs: ArrayLike, state: State) -> NDArray[np.float32]:
    """Apply a run-time function to checked inputs, so that estimators predict with the code that steers."""
    tensor = torch.as_tensor(inputs).to("cpu", torch.float32)
    with torch.no_grad():
        return function(tensor, **state).numpy()
