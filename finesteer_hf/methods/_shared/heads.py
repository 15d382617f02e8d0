"""Shared by ITI and FASB: probed attention heads, their directions, and the spread of states along them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from finesteer_hf.errors import DatasetError, UnsupportedModelError
from finesteer_hf.estimators.probes import (
    best_heads,
    centre_directions,
    fit_head_probes,
    spread_along,
    unit_rows,
)
from finesteer_hf.method_api import CaptureRequest, FitData, ModelInfo, Part
from finesteer_hf.methods._shared.checks import filled_in
from finesteer_hf.methods._shared.heads_config import ConfigT, HeadsConfig
from finesteer_hf.methods._shared.search import search
from finesteer_hf.methods._shared.trials import Trial
from finesteer_hf.processors import SteeringProcessor
from finesteer_hf.sites import Site


# Norms of the shifts in units of the chosen heads' outputs: a few heads need large shifts to move the stream.
DOSES = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)
MIN_ROWS = 4
# Both papers use models of 32 blocks of 32 heads; their counts are shares of these.
PUBLISHED_HEADS = 1024
# Numbers that `auto` tries, in units of the published share; the first is taken if no rows are held out.
SHARES = (1.0, 0.5, 2.0, 4.0)


def head_sites(config: HeadsConfig, info: ModelInfo) -> CaptureRequest:
    """The head outputs of the probed blocks, at the last token of each answer.

    Raises:
        ValueError: if a block is out of range.
        UnsupportedModelError: if the model has no attention heads.
    """
    if not info.num_heads:
        raise UnsupportedModelError(f"{config.steering_type} steers attention heads, but the model has none.")
    layers = range(info.num_layers) if isinstance(config.layers, str) else config.layers
    for layer in layers:
        if layer >= info.num_layers:
            raise ValueError(f"layers names block {layer}: the model has layers 0 to {info.num_layers - 1}.")
    return CaptureRequest(tuple(Site("head_out", layer) for layer in layers), ("answer_last",))


def head_counts(config: HeadsConfig, info: ModelInfo, probed: int) -> list[int]:
    """Numbers of heads to try: the published share, fractions and multiples of it, and the published number.

    A small model has few heads, and a share of them may be too few to have an effect.

    Args:
        config: `num_heads` is a number or `auto`.
        info: sizes of the model; `auto` takes a share of its heads.
        probed: number of heads to choose from.
    """
    if not isinstance(config.num_heads, str):
        return [min(config.num_heads, probed)]
    published = config.published_count / PUBLISHED_HEADS * info.num_layers * info.num_heads
    counts = [max(1, round(share * published)) for share in SHARES]
    return list(dict.fromkeys(min(count, probed) for count in (*counts, config.published_count)))


@dataclass(frozen=True)
class HeadFit:
    """Chosen heads with their probes and directions; rows as in `heads`.

    Attributes:
        heads: `[layer, head]` pairs.
        tensors: `probes.weight` and `directions` `[k, size]`, `probes.bias` and `sigma` `[k]`, float32.
        accuracy: held-out accuracies of the chosen heads.
        state_norm: median norm of the chosen heads' joint outputs.
    """

    heads: list[list[int]]
    tensors: dict[str, torch.Tensor]
    accuracy: list[float]
    state_norm: float

    def trial(self, build: Callable[[float], SteeringProcessor]) -> Trial:
        """The trial of a method that steers these heads."""
        return Trial(build, vector_norm=float(self.tensors["sigma"].norm()), state_norm=self.state_norm)

    def filled_in(self, config: ConfigT, info: ModelInfo, strength: float | str) -> ConfigT:
        """The config with the fit's choices."""
        count = len(self.heads) if isinstance(config.num_heads, str) else config.num_heads
        return filled_in(
            config, info, strength=strength, num_heads=count, heads=self.heads, attention_heads=info.num_heads
        )


@dataclass(frozen=True)
class RankedHeads:
    """All probed heads, best held-out accuracy first.

    Attributes:
        heads: the heads in this order.
        all_accuracy: held-out accuracies by layer, heads in the model's order.
    """

    heads: list[ProbedHead]
    all_accuracy: dict[str, list[float]]

    def best(self, count: int) -> HeadFit:
        """The first `count` heads."""
        chosen = self.heads[:count]
        tensors = {
            "probes.weight": np.stack([head.weight for head in chosen]),
            "probes.bias": np.array([head.bias for head in chosen]),
            "directions": np.stack([head.direction for head in chosen]),
            "sigma": np.array([head.sigma for head in chosen]),
        }
        return HeadFit(
            heads=[[head.site.layer, head.number] for head in chosen],
            tensors={name: torch.tensor(values, dtype=torch.float32) for name, values in tensors.items()},
            accuracy=[head.accuracy for head in chosen],
            state_norm=float(np.median(np.sqrt(np.sum([head.squares for head in chosen], axis=0)))),
        )


@dataclass(frozen=True)
class ProbedHead:
    """A head with its probe and direction.

    Attributes:
        site: the outputs of its block's heads.
        number: index of the head in its block.
        accuracy: share of held-out answers that its probe classifies correctly.
        log_loss: mean negative log-likelihood of their labels, in nats.
        weight: the probe's, `[size]`.
        bias: the probe's.
        direction: unit vector, `[size]`.
        sigma: standard deviation of states along it.
        squares: squared norms of its outputs at the chosen answers of `fit`, `[rows]`.
    """

    site: Site
    number: int
    accuracy: float
    log_loss: float
    weight: np.ndarray
    bias: float
    direction: np.ndarray
    sigma: float
    squares: np.ndarray


def rank_heads(data: FitData, config: HeadsConfig) -> RankedHeads:
    """Probe all heads on the `fit` part and rank them by their accuracy on the `calibration` part.

    Means and spreads use both parts.

    Raises:
        DatasetError: for too few rows.
        UnsupportedModelError: if blocks have heads of different sizes.
    """
    sites = head_sites(config, data.info).sites
    rows = len(data.prompts("fit"))
    if rows < MIN_ROWS:
        raise DatasetError(f"{config.steering_type} needs at least {MIN_ROWS} rows to fit on, got {rows}.")
    found: list[ProbedHead] = []
    for site in sites:
        data.note(f"probing the heads of block {site.layer}")
        found += _probed(data, config, site)
    if len({head.weight.shape for head in found}) > 1:
        raise UnsupportedModelError("The blocks have heads of different sizes; name blocks of one kind in `layers`.")
    order = best_heads(np.array([h.accuracy for h in found]), np.array([h.log_loss for h in found]), len(found))
    return RankedHeads(
        heads=[found[index] for index in order],
        all_accuracy={str(s.layer): [round(h.accuracy, 4) for h in found if h.site == s] for s in sites},
    )


def fit_heads(
    data: FitData, config: HeadsConfig, build: Callable[[HeadFit, float], SteeringProcessor]
) -> tuple[HeadFit, float, dict[str, Any]]:
    """Choose the heads on the `calibration` part, their number and the strength by steering on `validation`.

    Args:
        data: the states.
        config: the settings.
        build: makes a processor of chosen heads and a strength.

    Returns:
        The heads, the strength, and held-out figures.

    Raises:
        DatasetError: for too few rows.
        UnsupportedModelError: if blocks have heads of different sizes.
    """
    ranked = rank_heads(data, config)
    fits = {count: ranked.best(count) for count in head_counts(config, data.info, len(ranked.heads))}
    trials = {
        count: fit.trial(lambda strength, fit=fit: build(fit, strength))  # type: ignore[misc]
        for count, fit in fits.items()
    }
    found = search(data, config.strength, trials, what="count", doses=DOSES)
    chosen = fits[found.key]
    report = {
        "heads": chosen.heads,
        "accuracy": chosen.accuracy,
        "all_accuracy": ranked.all_accuracy,
        **found.report,
    }
    return chosen, found.strength, report


def _probed(data: FitData, config: HeadsConfig, site: Site) -> list[ProbedHead]:
    states, labels = _labelled(data, site, "fit")
    held_out, held_out_labels = _labelled(data, site, "calibration")
    if not len(held_out):
        held_out, held_out_labels = states, labels
    probes = fit_head_probes(states, labels, held_out, held_out_labels)
    both, both_labels = np.concatenate([states, held_out]), np.concatenate([labels, held_out_labels])
    if config.direction == "centre":
        directions = centre_directions(both, both_labels)
    else:
        directions = unit_rows(probes.weight)
    spread = spread_along(both, directions)
    squares = np.square(states[labels == 1], dtype=np.float64).sum(axis=-1)
    return [
        ProbedHead(
            site,
            number,
            float(probes.accuracy[number]),
            float(probes.log_loss[number]),
            probes.weight[number],
            float(probes.bias[number]),
            directions[number],
            float(spread[number]),
            squares[:, number],
        )
        for number in range(data.info.num_heads)
    ]


def _labelled(data: FitData, site: Site, part: Part) -> tuple[np.ndarray, np.ndarray]:
    """Answers' last states by head, `[2 rows, heads, size]`, and 1 for chosen, 0 for rejected."""
    chosen, rejected = data.chosen(site, part, "answer_last"), data.rejected(site, part, "answer_last")
    labels = np.repeat([1, 0], [len(chosen), len(rejected)])
    return _by_head(np.concatenate([chosen, rejected]), data.info), labels


def _by_head(states: np.ndarray, info: ModelInfo) -> np.ndarray:
    return states.reshape(len(states), info.num_heads, -1) if states.size else states.reshape(0, info.num_heads, 1)
