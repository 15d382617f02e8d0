"""The network of a flow between two clouds of states, its training by flow matching, and its integration."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn


TIME_WIDTH = 128
# Frequencies of the time embedding go from one turn to this many per unit of time.
MAX_FREQUENCY = 1000.0


class Level(nn.Module):
    """Linear layer plus time embedding, batch norm, SiLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.time = nn.Linear(TIME_WIDTH, outputs)
        self.norm = nn.BatchNorm1d(outputs)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(self.norm(self.linear(x) + self.time(time)))


class FlowNetwork(nn.Module):
    """A U-Net of linear layers: each level is half as wide as the one above, and joined to it on the way back.

    Args:
        width: width d of the states.
        top: width of the first level.
        levels: number of levels.
    """

    def __init__(self, width: int, top: int, levels: int) -> None:
        super().__init__()
        sizes = [max(1, top >> level) for level in range(levels)]
        self.down = nn.ModuleList(Level(a, b) for a, b in zip([width, *sizes], sizes, strict=False))
        back = sizes[-2::-1]
        self.up = nn.ModuleList(Level(a + b, b) for a, b in zip(sizes[:0:-1], back, strict=True))
        self.out = nn.Linear(sizes[0], width)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """Velocity at x `[rows, d]` at times `[rows]` in [0, 1]: `[rows, d]`."""
        embedding = time_embedding(time)
        passed = []
        for level in self.down:
            x = level(x, embedding)
            passed.append(x)
        passed.pop()
        for level in self.up:
            x = level(torch.cat([x, passed.pop()], dim=-1), embedding)
        return self.out(x)


def time_embedding(time: torch.Tensor) -> torch.Tensor:
    """Sines and cosines of times `[rows]`: `[rows, 128]`."""
    steps = torch.arange(TIME_WIDTH // 2, device=time.device, dtype=torch.float32) / (TIME_WIDTH // 2)
    angles = time[:, None] * torch.exp(math.log(MAX_FREQUENCY) * steps)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def train_flow(
    network: FlowNetwork,
    start: torch.Tensor,
    end: torch.Tensor,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
    advance: Callable[[int, float], None] = lambda epoch, loss: None,
) -> list[float]:
    """Train the velocity of the straight paths x_t = (1 - t) start + t end, whose velocity is end - start.

    Args:
        network: trained in place, and left in evaluation mode.
        start: `[rows, d]` float32, at t = 0.
        end: `[rows, d]` float32, at t = 1.
        epochs: passes over the rows.
        batch_size: rows per step.
        learning_rate: AdamW's.
        generator: for the order and the times.
        advance: called with each epoch's number and mean loss.

    Returns:
        Mean squared error of the velocity in each epoch.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate)
    network.train()
    losses = []
    for epoch in range(epochs):
        order = torch.randperm(len(start), generator=generator)
        # Batches of equal size: batch norm does not accept a single row.
        batches = order.tensor_split(max(1, round(len(order) / batch_size)))
        total = 0.0
        for rows in batches:
            time = torch.rand(len(rows), generator=generator)
            path = torch.lerp(start[rows], end[rows], time[:, None])
            loss = nn.functional.mse_loss(network(path, time), end[rows] - start[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(rows)
        losses.append(total / len(order))
        advance(epoch, losses[-1])
    network.eval()
    return losses


def integrate(
    velocity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], start: torch.Tensor, steps: int
) -> torch.Tensor:
    """Integrate states from t = 0 to t = 1 by the midpoint rule, two calls per step.

    Args:
        velocity: velocity of states `[rows, d]` at times `[rows]`.
        start: `[rows, d]`.
        steps: number of steps; the paper's 16 points are 15 steps.
    """
    x, size = start, 1.0 / steps
    for step in range(steps):
        time = torch.full((len(x),), step * size, device=x.device)
        middle = x + 0.5 * size * velocity(x, time)
        x = x + size * velocity(middle, time + 0.5 * size)
    return x
