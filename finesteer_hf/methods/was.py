"""WAS: a small controller decides at each token how much to steer, and at which layers (Guiding Giants, arXiv
2505.20309).

From the states x of some early blocks, side by side, a network with one hidden layer computes a magnitude m and a
weight for each steered block:

    (a, b_1, ..., b_L) = W2 relu(W1 x + c1) + c2,    m = sigmoid(a),    w_l = sigmoid(b_l)
    h_l <- h_l + strength * m * w_l * r_l

It is trained to separate prompts to steer (the rows') from general ones by a, with w held near 1/2. The paper reads
and steers the last position of every forward: with a cache these are the positions `generated`.

Differences from the published code. It trains a by cross-entropy, as a logit, but steers with the logit itself, which
is negative for harmless prompts and pushes them the other way; `compat="official"` does this. It reads the last four
blocks and steers all, so that within a forward a push can only reach the last block; here all reads come before the
first write. It trains on prompts without the generation prompt but generates with it; here both have it. In both, only
the pull to 1/2 trains the layers' weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import nn

from finesteer_hf.adapters.config import SteeringConfig, setting
from finesteer_hf.adapters.registry import register_steering_method
from finesteer_hf.errors import AdapterFileError, DatasetError
from finesteer_hf.method_api import CaptureRequest, FitData, FitResult, ModelInfo, Part, SteeringMethod
from finesteer_hf.methods._shared.checks import (
    check_count,
    check_layers,
    check_number,
    check_one_of,
    check_strength,
    filled_in,
    layers_of,
    require_fitted,
)
from finesteer_hf.methods._shared.moments import mean_difference
from finesteer_hf.methods._shared.search import settle
from finesteer_hf.methods._shared.strength import median_norm
from finesteer_hf.methods._shared.trials import Trial
from finesteer_hf.processors import Positions, TokenView
from finesteer_hf.sites import Site, resid_post


DIRECTIONS = ("embeddings", "answers")
MIN_ROWS = 4
# Number of blocks that the published code reads.
READ_BLOCKS = 4
EMBEDDINGS = Site("resid_pre", 0)


@dataclass(kw_only=True)
class WASConfig(SteeringConfig):
    """Settings of a learned controller.

    The default controller is narrower than the paper's, so that an adapter takes a few megabytes, and trains faster;
    see `paper`.

    Attributes:
        read_layers: decoder blocks whose outputs the controller reads, all before the first steered one; `auto` takes up
            to four right before it.
        layers: decoder blocks whose outputs are steered; `auto` takes the upper half of those between 20% and 80% of the
            depth.
        direction: r: `embeddings` (the paper's: mean input embedding of the chosen answers' tokens minus that of the
            rejected ones', the same at all layers) or `answers` (mean difference of the answers' states at each
            layer); of length 1.
        width: hidden units of the controller.
        weight_pull: factor of the mean of (w - 1/2)^2 in the loss.
        epochs: passes over the prompts.
        batch_size: prompts per step.
        learning_rate: AdamW's.
        compat: `official` steers with the logit a instead of m.
    """

    steering_type: ClassVar[str] = "WAS"
    understands: ClassVar[frozenset[str]] = frozenset({"compat:official"})

    positions: Positions = field(default="generated", metadata=setting("Steered tokens: all, prompt or generated."))
    strength: float | str = field(
        default="auto", metadata=setting("Kappa: a number, auto, kl:<nats> or norm:<share>.")
    )
    read_layers: list[int] | str = field(default="auto", metadata=setting("Read decoder blocks, or auto."))
    layers: list[int] | str = field(default="auto", metadata=setting("Steered decoder blocks, or auto."))
    direction: Literal["embeddings", "answers"] = field(
        default="embeddings", metadata=setting("Direction of the push: embeddings or answers.")
    )
    width: int = field(default=64, metadata=setting("Hidden units of the controller."))
    weight_pull: float = field(default=0.1, metadata=setting("How strongly layer weights are held near 1/2."))
    epochs: int = field(default=60, metadata=setting("Passes over the prompts."))
    batch_size: int = field(default=32, metadata=setting("Prompts per step."))
    learning_rate: float = field(default=1e-3, metadata=setting("Learning rate of AdamW."))
    compat: Literal["official"] | None = field(default=None, metadata=setting("official: steer with the raw logit."))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers(self.read_layers, self.num_hidden_layers, name="read_layers")
        check_layers(self.layers, self.num_hidden_layers)
        check_strength(self.strength)
        check_one_of("direction", self.direction, DIRECTIONS)
        check_one_of("compat", self.compat, (None, "official"))
        for name, least in (("width", 1), ("epochs", 1), ("batch_size", 2)):
            check_count(name, getattr(self, name), least)
        check_number("learning_rate", self.learning_rate, above=0)
        if not self.weight_pull >= 0:
            raise ValueError(f"weight_pull must be at least 0, got {self.weight_pull!r}.")
        if isinstance(self.read_layers, list) and isinstance(self.layers, list):
            _check_order(self.read_layers, self.layers)

    @classmethod
    def paper(cls, **overrides: Any) -> WASConfig:
        """The published settings: 1024 hidden units, 20 epochs at 5e-5, kappa 4."""
        settings: dict[str, Any] = {"width": 1024, "epochs": 20, "learning_rate": 5e-5, "strength": 4.0}
        return cls(**{**settings, **overrides})


class WAS(SteeringMethod[WASConfig]):
    """`h_l <- h_l + strength * m * w_l * r_l`, with m and w_l from the same token's states at earlier blocks.

    Args:
        config: a fitted `WASConfig`.
        tensors: the controller's `hidden.weight` `[width, reads * hidden_size]`, `hidden.bias` `[width]`, `out.weight`
            `[1 + layers, width]`, `out.bias` `[1 + layers]`, and `directions` `[layers, hidden_size]`, float32.

    Raises:
        AdapterFileError: if the config is not fitted, or a tensor is missing.
    """

    def __init__(self, config: WASConfig, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(config, tensors)
        missing = sorted(set(self.tensor_shapes(config)) - set(tensors))
        if missing:
            raise AdapterFileError(f"The WAS adapter lacks the tensors {missing}.")
        self.settings = config
        self.read_sites = tuple(resid_post(layer) for layer in self.settings.read_layers)
        self.write_sites = tuple(resid_post(layer) for layer in self.settings.layers)
        self.maps = (*self.read_sites, *self.write_sites)

    def transform(self, site: Site, hidden: torch.Tensor, view: TokenView) -> torch.Tensor:
        """Keep the read states of `[rows, tokens, hidden_size]`, and push the selected tokens."""
        if site in self.read_sites:
            view.state[str(site)] = hidden
            return hidden
        number = self.write_sites.index(site)
        if number == 0:
            view.state["pushes"] = self._pushes(hidden.device, view)
        push = view.state["pushes"][..., number : number + 1].to(hidden.device)
        direction = self.parameters_on(hidden.device)["directions"][number]
        pushed = hidden + (view.scale * self.strength * push * direction).to(hidden.dtype)
        steered = view.scale != 0
        if view.mask is not None:
            steered = steered & view.mask[..., None]
        return torch.where(steered, pushed, hidden)

    def _pushes(self, device: torch.device, view: TokenView) -> torch.Tensor:
        read = torch.cat([view.state.pop(str(site)).to(device).float() for site in self.read_sites], dim=-1)
        with torch.autocast(device.type, enabled=False):
            return self.pushes(read)

    def pushes(self, states: torch.Tensor) -> torch.Tensor:
        """m w_l of each steered block: `[..., reads * hidden_size]` float32 to `[..., layers]`."""
        own = self.parameters_on(states.device)
        hidden = torch.relu(nn.functional.linear(states, own["hidden.weight"], own["hidden.bias"]))
        out = nn.functional.linear(hidden, own["out.weight"], own["out.bias"])
        magnitude = out[..., :1] if self.settings.compat == "official" else torch.sigmoid(out[..., :1])
        return magnitude * torch.sigmoid(out[..., 1:])

    @classmethod
    def tensor_shapes(cls, config: WASConfig) -> dict[str, tuple[int | None, ...]]:
        """The controller, and a direction per steered layer."""
        require_fitted(config, "read_layers", "layers")
        width, writes, size = config.width, len(config.layers), int(config.hidden_size or 0)
        return {
            "hidden.weight": (width, len(config.read_layers) * size),
            "hidden.bias": (width,),
            "out.weight": (1 + writes, width),
            "out.bias": (1 + writes,),
            "directions": (writes, size),
        }

    @classmethod
    def needs(cls, config: WASConfig, info: ModelInfo) -> CaptureRequest:
        """The outputs of the read and of the steered blocks, and for `embeddings` the input of the first.

        Raises:
            ValueError: if a layer is out of range, or reads do not come before writes.
        """
        reads, writes = split_layers(config, info.num_layers)
        first = (EMBEDDINGS,) if config.direction == "embeddings" else ()
        return CaptureRequest((*first, *map(resid_post, reads), *map(resid_post, writes)), ("query", "answer_mean"))

    @classmethod
    def fit(cls, data: FitData, config: WASConfig) -> FitResult:
        """Train the controller on the prompts of `fit` and `calibration`; choose the strength on `validation`.

        Raises:
            DatasetError: for too few rows, or no general prompts.
        """
        reads, writes = split_layers(config, data.info.num_layers)
        states, wanted = _prompts(data, reads, ("fit", "calibration"))
        if min(wanted.sum(), (1 - wanted).sum()) < MIN_ROWS:
            raise DatasetError(
                f"WAS needs at least {MIN_ROWS} rows and {MIN_ROWS} general prompts (general_dataset) to separate, got "
                f"{int(wanted.sum())} and {int((1 - wanted).sum())}."
            )
        data.note("training the controller")
        tensors = train_controller(states, wanted, len(writes), config, data.seed)
        tensors["directions"] = torch.stack([_direction(data, config, layer) for layer in writes])
        requires = [f"compat:{config.compat}"] if config.compat else []

        def build(strength: float) -> WAS:
            chosen = {"read_layers": reads, "layers": writes, "strength": strength, "requires": requires}
            return cls(filled_in(config, data.info, **chosen), tensors)

        pushes = build(0.0).pushes(torch.from_numpy(states))
        trial = Trial(
            build=build,
            vector_norm=float(pushes[torch.from_numpy(wanted) > 0].median()),
            state_norm=float(np.median([median_norm(data.query(resid_post(layer), "fit")) for layer in writes])),
        )
        strength, settled = settle(data, config.strength, trial, None)
        report: dict[str, Any] = {
            "read_layers": reads,
            "layers": writes,
            "controller": _judge(data, build(0.0)),
            **settled,
        }
        return FitResult(build(strength).config, tensors, report)


def split_layers(config: WASConfig, num_layers: int) -> tuple[list[int], list[int]]:
    """The read blocks and the steered blocks.

    Raises:
        ValueError: if a block is out of range, or one is steered at or before a read one.
    """
    candidates = layers_of("auto", num_layers)
    half = max(1, len(candidates) // 2)
    given = {name: getattr(config, name) for name in ("read_layers", "layers")}
    reads, writes = ([] if value == "auto" else layers_of(value, num_layers) for value in given.values())
    if not writes:
        first = reads[-1] + 1 if reads else candidates[min(half, len(candidates) - 1)]
        writes = [layer for layer in candidates if layer >= first] or list(range(first, min(first + 1, num_layers)))
    if writes and not reads:
        reads = list(range(max(0, writes[0] - READ_BLOCKS), writes[0]))
    if not reads or not writes:
        raise ValueError(
            f"WAS reads blocks before the first that it steers; read_layers={given['read_layers']!r} and "
            f"layers={given['layers']!r} leave none of the {num_layers} blocks for one of the two."
        )
    _check_order(reads, writes)
    return reads, writes


def train_controller(
    states: NDArray[np.float32], wanted: NDArray[np.float32], layers: int, config: WASConfig, seed: int
) -> dict[str, torch.Tensor]:
    """Train by cross-entropy of the magnitude's logit, with equal weight for both kinds of prompts.

    Args:
        states: `[n, reads * hidden_size]`; standardised for training; the first layer then absorbs this.
        wanted: `[n]`, 1 for prompts to steer, else 0.
        layers: number of steered blocks.
        config: sizes and training settings.
        seed: seed of the weights and the order.

    Returns:
        The four tensors of the controller, float32.
    """
    x, y = torch.from_numpy(states), torch.from_numpy(wanted)
    mean, scale = x.mean(dim=0), x.std(dim=0).clamp(min=1e-6)
    x = (x - mean) / scale
    weight = torch.where(y > 0, len(y) / (2 * y.sum()), len(y) / (2 * (1 - y).sum()))
    # Its own generator, so that a fit does not change the caller's random state.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, last = nn.Linear(x.shape[1], config.width), nn.Linear(config.width, 1 + layers)
        optimiser = torch.optim.AdamW([*first.parameters(), *last.parameters()], lr=config.learning_rate)
        for _ in range(config.epochs):
            for batch in torch.randperm(len(x)).split(config.batch_size):
                out = last(torch.relu(first(x[batch])))
                loss = nn.functional.binary_cross_entropy_with_logits(out[:, 0], y[batch], weight[batch])
                loss = loss + config.weight_pull * (torch.sigmoid(out[:, 1:]) - 0.5).square().mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
    folded = first.weight.detach() / scale
    return {
        "hidden.weight": folded,
        "hidden.bias": first.bias.detach() - folded @ mean,
        "out.weight": last.weight.detach().clone(),
        "out.bias": last.bias.detach().clone(),
    }


def _check_order(reads: list[int], writes: list[int]) -> None:
    if reads[-1] >= writes[0]:
        raise ValueError(
            f"read_layers={reads} must come before layers={writes}: the steering of a block must be known when the "
            "forward gets there."
        )


def _prompts(
    data: FitData, reads: list[int], parts: tuple[Part, ...]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """States of the rows' prompts and of the general ones, `[n, reads * d]`, and 1 for the rows', 0 for the others."""
    sides = [
        np.concatenate([np.concatenate([side(resid_post(layer), part) for layer in reads], axis=1) for part in parts])
        for side in (data.query, data.general)
    ]
    labels = np.repeat(np.array([1, 0], dtype=np.float32), [len(side) for side in sides])
    return np.concatenate(sides).astype(np.float32), labels


def _direction(data: FitData, config: WASConfig, layer: int) -> torch.Tensor:
    site = EMBEDDINGS if config.direction == "embeddings" else resid_post(layer)
    parts = cast(tuple[Part, ...], ("fit", "calibration"))
    difference, _ = mean_difference(data, ("chosen", "rejected"), site, parts)
    length = np.linalg.norm(difference)
    if not length > 0:
        raise DatasetError(f"Chosen and rejected answers have the same mean at {site}: there is no direction.")
    return torch.from_numpy((difference / length).astype(np.float32))


def _judge(data: FitData, processor: WAS) -> dict[str, float | None]:
    """How well the push separates held-out prompts, and its size for each kind; None if a side is missing."""
    states, wanted = _prompts(data, list(cast(list[int], processor.settings.read_layers)), ("validation",))
    pushes = processor.pushes(torch.from_numpy(states)).mean(dim=-1).numpy()
    both = len(np.unique(wanted)) == 2
    sides = [pushes[wanted == label] for label in (1, 0)]
    return {
        "auroc": float(roc_auc_score(wanted, pushes)) if both else None,
        "queries_mean": float(sides[0].mean()) if len(sides[0]) else None,
        "general_mean": float(sides[1].mean()) if len(sides[1]) else None,
    }


register_steering_method(WAS)
