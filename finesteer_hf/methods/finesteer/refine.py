"""Trains the closed form further through the frozen model, with a preference loss that preserves the model's own
words.

The map keeps the adapter's form, `v(h) = bias + up^T down^T (h - mean)`, with `down` the whitened principal directions
of the queries, and starts at the closed form. For each row the loss is

    -logsigmoid(BETA (c - r)) SCALE - ANCHOR c + DRIFT KL(steered || base) + NORM relu(|v| / dose - 1)^2

with c and r the log-probabilities per token of the chosen and the rejected answer, both steered (the reference-free,
length-normalised margin of SimPO and CPO, with CPO's likelihood term), the divergence per token along both answers,
which measures how unlikely a steered model's own words become under the base, and |v| the norm of all sites' vectors
in units of the states'. Without the last three terms the margin grows by making everything unlikely and the text
breaks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import logsigmoid, relu

from finesteer_hf.estimators.closed_form import low_rank_vector
from finesteer_hf.method_api import AnswerRun
from finesteer_hf.methods._shared.preference_training import TrainedShift, Training, train
from finesteer_hf.methods.finesteer.candidates import CandidateFit, CandidateFits


BETA, SCALE, ANCHOR, DRIFT, NORM = 4.0, 1.0, 0.2, 1.0, 1.0
# Number of the queries' principal directions that the map reads, if its rank is open.
RANK = 16
# Passes over the rows if the data decide whether they help.
AUTO_EPOCHS = 2
# Learning rate of parameters in units of the dose.
LEARNING_RATE = 2e-3


class AffineExperts:
    """The map's tensors, with the `predict` of the closed forms."""

    def __init__(self, mean: torch.Tensor, down: torch.Tensor, up: torch.Tensor, bias: torch.Tensor) -> None:
        self.tensors = {"mean": mean, "down": down, "up": up, "bias": bias}

    def predict(self, states: np.ndarray) -> np.ndarray:
        """v of states `[rows, d]`: `[rows, w]` float32."""
        return low_rank_vector(torch.from_numpy(np.asarray(states)), **self.tensors).numpy()


def refine(fits: CandidateFits, start: CandidateFit, epochs: int, dose: float) -> CandidateFit:
    """Train a closed form further on the `fit` part.

    Args:
        fits: fits of the data.
        start: a `reduced_rank` candidate.
        epochs: passes over the rows.
        dose: norm of the vectors, in units of the states', above which it is penalised.

    Returns:
        The candidate, with the same place and gate; its vectors at strength 1 are the trained ones.
    """
    data, place = fits.data, start.place
    queries = data.query(place.read, "fit").astype(np.float64)
    norms = torch.tensor(list(fits.norms(place.writes).values()), dtype=torch.float32)
    width = queries.shape[1]
    per_site = norms.repeat_interleave(width)
    rank = RANK if fits.config.residual_rank == "auto" else int(fits.config.residual_rank)
    mean, down = _principal_directions(queries, rank)
    features = torch.from_numpy((queries - mean.numpy()) @ down.double().numpy()).float()
    trial = fits.trial(start)
    begun = torch.from_numpy(start.experts.predict(data.query(place.read, "fit"))) * trial.strength_of(dose)
    # Parameters are in units of the dose at each site, so that one rate works for all.
    unit = per_site * dose / np.sqrt(len(place.writes))
    bias = (begun.mean(dim=0) / unit).requires_grad_()
    up = (torch.linalg.pinv(features) @ ((begun - begun.mean(dim=0)) / unit)).requires_grad_()

    def vectors(rows: Sequence[int]) -> torch.Tensor:
        return (bias + features[list(rows)] @ up) * unit

    def losses(rows: Sequence[int], rng: np.random.Generator) -> torch.Tensor:
        together = vectors(rows)
        shifts = dict(zip(place.writes, together.chunk(len(place.writes), dim=-1), strict=True))
        steering = TrainedShift(shifts, positions=start.positions)
        chosen, rejected = (_runs(fits, text, rows, steering) for text in ("chosen", "rejected"))
        c, r = (torch.stack([-run.nll.cpu() for run, _ in side]) for side in (chosen, rejected))
        drift = (torch.stack([d for _, d in chosen]) + torch.stack([d for _, d in rejected])) / 2
        relative = (together.view(len(together), len(place.writes), width).norm(dim=-1) / norms).norm(dim=-1)
        excess = relu(relative / dose - 1) ** 2
        return -SCALE * logsigmoid(BETA * (c - r)) - ANCHOR * c + DRIFT * drift + NORM * excess

    training = Training(epochs=epochs, learning_rate=LEARNING_RATE)
    history = train([bias, up], losses, len(queries), training, seed=data.seed, note=data.note)
    with torch.no_grad():
        tensors = {"mean": mean, "down": down, "up": up * unit, "bias": bias * unit}
    estimator = AffineExperts(**{name: tensor.detach().contiguous() for name, tensor in tensors.items()})
    experts = dataclasses.replace(
        start.experts,
        residual_rank=down.shape[1],
        tensors={f"residual.{name}": tensor for name, tensor in estimator.tensors.items()},
        estimator=estimator,
        report={"closed_form": start.experts.report, "training": history.report()},
    )
    return dataclasses.replace(start, experts=experts, refined=epochs)


def _runs(
    fits: CandidateFits, text: Any, rows: Sequence[int], steering: TrainedShift
) -> list[tuple[AnswerRun, torch.Tensor]]:
    """Steered answers, each with its divergence from the base in nats per token, on the CPU like the parameters."""
    with torch.no_grad():
        base = [run.logits.log_softmax(-1) for run in fits.data.answers(text, "fit", rows)]
    found = []
    for run, reference in zip(fits.data.answers(text, "fit", rows, steering=steering), base, strict=True):
        steered = run.logits.log_softmax(-1)
        found.append((run, (steered.exp() * (steered - reference)).sum(-1).mean().cpu()))
    return found


def _principal_directions(queries: np.ndarray, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean `[d]` and whitened principal directions `[d, r]` of queries, float32."""
    mean = queries.mean(axis=0)
    _, values, directions = np.linalg.svd(queries - mean, full_matrices=False)
    kept = min(rank, int((values > 1e-6 * values[0]).sum()), max(1, len(queries) // 8))
    down = directions[:kept].T / (values[:kept] / np.sqrt(len(queries)))
    return torch.from_numpy(mean).float(), torch.from_numpy(np.ascontiguousarray(down)).float()
