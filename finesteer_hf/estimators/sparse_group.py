"""Descent under a sparse group penalty: few rows of a matrix, and few entries in them, are non-zero."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch


# A step is accepted if the objective falls by this share of what its length predicts (Wright et al. 2009, Eq. 22).
SUFFICIENT = 1e-2
MAX_HALVINGS = 20


def sparse_group_prox(values: torch.Tensor, l1: float, group: float) -> torch.Tensor:
    """Minimiser of `|x - values|^2 / 2 + l1 |x|_1 + group sum_g sqrt(size) |x_g|_2` (Simon et al. 2013).

    Args:
        values: `[groups, size]`.
        l1: penalty on coordinates.
        group: penalty on rows.
    """
    shrunk = values.sign() * (values.abs() - l1).clamp(min=0)
    norms = shrunk.norm(dim=1, keepdim=True)
    return shrunk * (1 - group * values.shape[1] ** 0.5 / norms.clamp(min=1e-30)).clamp(min=0)


def proximal_descent(
    smooth: Callable[[torch.Tensor], tuple[float, torch.Tensor]],
    start: torch.Tensor,
    l1: float,
    group: float,
    step: float,
    iterations: int,
    tolerance: float = 1e-4,
) -> Iterator[tuple[torch.Tensor, float]]:
    """Proximal gradient descent with Barzilai-Borwein steps, halved until the objective falls (SpaRSA, monotone).

    Args:
        smooth: returns value and gradient of the part without penalties.
        start: `[groups, size]`.
        l1: penalty on coordinates.
        group: penalty on rows.
        step: length of the first step in units of the gradient.
        iterations: most steps.
        tolerance: relative change of the iterate at which it stops.

    Yields:
        Each accepted iterate, and the smooth part's value there.
    """
    size = start.shape[1]

    def penalty(x: torch.Tensor) -> float:
        return float(l1 * x.abs().sum() + group * size**0.5 * x.norm(dim=1).sum())

    x, (value, gradient) = start, smooth(start)
    for _ in range(iterations):
        for _ in range(MAX_HALVINGS):
            trial = sparse_group_prox(x - step * gradient, step * l1, step * group)
            moved = trial - x
            length = float(moved.square().sum())
            if length == 0:
                return
            new_value, new_gradient = smooth(trial)
            promised = SUFFICIENT / (2 * step) * length
            if new_value + penalty(trial) <= value + penalty(x) - promised:
                break
            step /= 2
        else:
            return
        curvature = float((moved * (new_gradient - gradient)).sum())
        x, value, gradient = trial, new_value, new_gradient
        yield x, value
        if length <= (tolerance * float(x.norm())) ** 2:
            return
        step = length / curvature if curvature > 0 else 2 * step
