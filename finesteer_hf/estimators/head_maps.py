"""Low-rank maps that move head states into ellipsoids of wanted ones (FLORAIN, arXiv 2502.04043).

For a state a of one head, f(a) = a + L_a R' a + c with (L_a)_ij = tanh(a_i W_ij + b_ij); W, b and R are `[d, r]`. The
map is trained to move states within a Mahalanobis distance of a centre; the loss is zero inside.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.covariance import LedoitWolf


# Keeps the gradient of the square root finite at zero.
_LEAST_SQUARE = 1e-12


@dataclass(frozen=True)
class HeadMap:
    """The parameters of one map per head.

    Attributes:
        weight, bias, readout: W, b and R, `[heads, d, r]` float32.
        shift: c, `[heads, d]`.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    readout: torch.Tensor
    shift: torch.Tensor

    def displacement(self, states: torch.Tensor) -> torch.Tensor:
        """f(a) - a of states `[..., heads, d]`; allocates `[..., heads, d, r]`."""
        coordinates = torch.einsum("...hd,hdr->...hr", states, self.readout)
        factors = torch.tanh(states[..., None] * self.weight + self.bias)
        return torch.einsum("...hdr,...hr->...hd", factors, coordinates) + self.shift

    def rescaled(self, scale: torch.Tensor) -> HeadMap:
        """This map, trained on states divided by `scale` `[heads]`, converted to the states' own units."""
        return HeadMap(self.weight / scale[:, None, None], self.bias, self.readout, self.shift * scale[:, None])


@dataclass(frozen=True)
class Regions:
    """For each state, the ellipsoid to move it into.

    Attributes:
        centre: `[n, heads, d]`.
        radius: `[n, heads]`, Mahalanobis distances.
    """

    centre: NDArray[np.float64]
    radius: NDArray[np.float64]


@dataclass(frozen=True)
class WantedStates:
    """Statistics of wanted and unwanted states over all questions.

    Attributes:
        direction: unit vectors from the unwanted states' mean to the wanted ones', `[heads, d]`.
        distance: lengths between these means, `[heads]`.
        whitening: `[heads, d, d]`: |whitening x| is the Mahalanobis length of x.
    """

    direction: NDArray[np.float64]
    distance: NDArray[np.float64]
    whitening: NDArray[np.float64]

    @classmethod
    def of(
        cls, states: NDArray[np.floating], wanted: NDArray[np.bool_], questions: NDArray[np.integer]
    ) -> WantedStates:
        """Estimate the means, and the covariance of wanted states within questions (about their common mean if each
        has one).

        Covariances are shrunk (Ledoit-Wolf), so that they are invertible with few states.

        Args:
            states: `[n, heads, d]`.
            wanted: `[n]`.
            questions: `[n]` labels.

        Raises:
            ValueError: if a head's wanted states do not vary.
        """
        states = states.astype(np.float64)
        shift = states[wanted].mean(axis=0) - states[~wanted].mean(axis=0)
        distance = np.linalg.norm(shift, axis=-1)
        groups = [states[wanted & (questions == question)] for question in np.unique(questions[wanted])]
        several = [group - group.mean(axis=0) for group in groups if len(group) > 1]
        spread = np.concatenate(several) if several else states[wanted] - states[wanted].mean(axis=0)
        if not spread.any(axis=(0, 2)).all():
            raise ValueError("The wanted states of a head are all the same, so they span no region.")
        covariance = [LedoitWolf(assume_centered=True).fit(spread[:, head]).covariance_ for head in range(len(shift))]
        whitening = np.linalg.inv(np.linalg.cholesky(np.stack(covariance)))
        return cls(shift / np.maximum(distance, 1e-12)[:, None], distance, whitening)

    def regions(
        self,
        states: NDArray[np.floating],
        wanted: NDArray[np.bool_],
        questions: NDArray[np.integer],
        *,
        delta: float,
        alpha: float,
        shrink: float,
    ) -> Regions:
        """The region of each state's question.

        Its centre is the mean of the question's wanted states, moved by delta times (alpha u_question + (1 - alpha)
        u_all), where u are the unit shifts from unwanted to wanted means. Its squared radius is the largest squared
        distance of these states from their mean, divided by `shrink`.

        Args:
            states: `[n, heads, d]`.
            wanted: `[n]`; each question has both kinds.
            questions: `[n]` labels.
            delta: in units of the head's mean shift.
            alpha: share of the question's own shift.
            shrink: with at least 1 the region stays within the seen states.
        """
        states = states.astype(np.float64)
        centre, radius = np.zeros(states.shape), np.zeros(states.shape[:2])
        for question in np.unique(questions):
            own = questions == question
            good = states[own & wanted]
            mean = good.mean(axis=0)
            move = mean - states[own & ~wanted].mean(axis=0)
            move = move / np.maximum(np.linalg.norm(move, axis=-1, keepdims=True), 1e-12)
            step = alpha * move + (1 - alpha) * self.direction
            centre[own] = mean + delta * self.distance[:, None] * step
            far = np.linalg.norm(np.einsum("hij,nhj->nhi", self.whitening, good - mean), axis=-1).max(axis=0)
            radius[own] = far / math.sqrt(shrink)
        return Regions(centre, radius)


def region_loss(
    states: torch.Tensor, centre: torch.Tensor, radius: torch.Tensor, whitening: torch.Tensor
) -> torch.Tensor:
    """Mean over states of the squared distance beyond the radius, `[heads]`.

    Args:
        states: `[n, heads, d]`.
        centre: `[n, heads, d]`.
        radius: `[n, heads]`.
        whitening: `[heads, d, d]`.
    """
    whitened = torch.einsum("hij,nhj->nhi", whitening, states - centre)
    distance = whitened.square().sum(dim=-1).clamp(min=_LEAST_SQUARE).sqrt()
    return (distance - radius).clamp(min=0).square().mean(dim=0)


@dataclass(frozen=True)
class TrainedMap:
    """A map, and its losses of each epoch as means over heads: `training` and `held_out`."""

    map: HeadMap
    training: list[float]
    held_out: list[float]


def train_head_maps(
    states: NDArray[np.floating],
    regions: Regions,
    held_out: NDArray[np.floating],
    held_out_regions: Regions,
    whitening: NDArray[np.float64],
    *,
    rank: int,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
    advance: Callable[[int, float], None] = lambda epoch, loss: None,
) -> TrainedMap:
    """Train one map per head with Adam; each head keeps the epoch with its best held-out loss.

    States are scaled by their root mean square per head for training, and the map is converted back.

    Args:
        states: `[n, heads, d]`.
        regions: their regions.
        held_out: `[m, heads, d]`.
        held_out_regions: their regions.
        whitening: `[heads, d, d]`.
        rank: r.
        epochs: passes over the states.
        batch_size: states per step.
        learning_rate: Adam's.
        generator: for the initial map and the order.
        advance: called with each epoch's number and held-out loss.
    """
    heads, width = states.shape[1:]
    scale = np.sqrt(np.square(states, dtype=np.float64).mean(axis=(0, 2))).clip(1e-12)

    def scaled(values: NDArray[np.floating]) -> torch.Tensor:
        return torch.from_numpy((values / scale[:, None]).astype(np.float32))

    white = torch.from_numpy((whitening * scale[:, None, None]).astype(np.float32))
    train = (scaled(states), scaled(regions.centre), torch.from_numpy(regions.radius).float())
    check = (scaled(held_out), scaled(held_out_regions.centre), torch.from_numpy(held_out_regions.radius).float())
    # Kaiming's bound for a linear layer of r inputs, as published; the map starts near the identity, not at it.
    bound = 1 / math.sqrt(rank)
    shape = (heads, width, rank)
    initial = [(2 * torch.rand(shape, generator=generator) - 1) * bound for _ in range(2)]
    parameters = [initial[0], torch.zeros(shape), initial[1], torch.zeros(heads, width)]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    best, best_loss = [p.detach().clone() for p in parameters], torch.full((heads,), math.inf)
    training, judged = [], []
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(states), generator=generator).split(batch_size):
            a, centre, radius = (part[rows] for part in train)
            loss = region_loss(a + HeadMap(*parameters).displacement(a), centre, radius, white)
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
            total += float(loss.detach().mean()) * len(rows)
        with torch.no_grad():
            loss = region_loss(check[0] + HeadMap(*parameters).displacement(check[0]), *check[1:], white)
            better = loss < best_loss
            best_loss = torch.where(better, loss, best_loss)
            best = [
                torch.where(better.view(-1, *[1] * (new.ndim - 1)), new, old)
                for new, old in zip(parameters, best, strict=True)
            ]
        training.append(total / len(states))
        judged.append(float(loss.mean()))
        advance(epoch, judged[-1])
    return TrainedMap(HeadMap(*best).rescaled(torch.from_numpy(scale).float()), training, judged)
