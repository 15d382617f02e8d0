"""FLORAIN: a learned low-rank map on all heads of one block, without a probe at run time (arXiv 2502.04043, NAACL 2025).

For a head's output a, f(a) = a + L_a R' a + c with (L_a)_ij = tanh(a_i W_ij + b_ij). It is trained to move the states
of wanted and unwanted answers into the ellipsoid of their question's wanted ones; see `WantedStates.regions`.

Differences from the published code. At run time it drops the "a +" of training; here the map is the trained one. It
maps the output of the attention's projection, cut into pieces of a head's size; here the heads' outputs are mapped
before the projection. For multiple choice it maps all positions from the last token; here each token is mapped
separately. It skips questions with one wanted answer; here such a question's region is a point. Its `delta` is in
units of the activations, 30 in the published script; here it is in units of the head's mean shift.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from finesteer_hf.adapters.config import MOST_HEADS, SteeringConfig, setting, written_by_fit
from finesteer_hf.adapters.registry import register_steering_method
from finesteer_hf.adapters.tensor_files import HEAD_SIZE, Shape
from finesteer_hf.errors import AdapterFileError, DatasetError, UnsupportedModelError
from finesteer_hf.estimators.head_maps import HeadMap, Regions, TrainedMap, WantedStates, region_loss, train_head_maps
from finesteer_hf.estimators.probes import fit_head_probes
from finesteer_hf.method_api import CaptureRequest, FitData, FitResult, ModelInfo, Part, SteeringMethod
from finesteer_hf.methods._shared.checks import (
    check_count,
    check_layer,
    check_number,
    check_strength,
    filled_in,
    require_fitted,
)
from finesteer_hf.methods._shared.search import search
from finesteer_hf.methods._shared.strength import median_norm
from finesteer_hf.methods._shared.trials import SHORT_LIST, Trial, candidate_layers
from finesteer_hf.processors import Positions, TokenView
from finesteer_hf.sites import Site


TENSORS = ("weight", "bias", "readout", "shift")
MIN_ROWS = 4
# Most values of heads x size x rank in memory at a time.
VALUES = 1 << 26


@dataclass(kw_only=True)
class FlorainConfig(SteeringConfig):
    """Settings of FLORAIN.

    The paper's script trains maps of rank 32 for 1000 epochs at a rate of 2e-4, see `paper`. The default is smaller
    and trains faster.

    Attributes:
        layer: block whose heads are mapped; `auto` trains maps for the few blocks between 20% and 80% of the depth
            whose heads' linear probes are most accurate, and takes the best on held-out answers.
        strength: share of the way from a to f(a); 1 in the paper.
        rank: rank r of the maps.
        delta: how far beyond the question's wanted mean the region is, in units of the head's mean shift.
        alpha: share of the question's own shift in delta's direction; the rest is the shift of all questions.
        shrink: divides the region's squared radius.
        epochs: passes over the answers.
        batch_size: answers per step.
        learning_rate: Adam's.
        attention_heads: number of heads of the block, filled in by the fit.
    """

    steering_type: ClassVar[str] = "FLORAIN"

    # The paper maps the last position of every forward.
    positions: Positions = field(default="generated", metadata=setting("Steered tokens: all, prompt or generated."))
    strength: float | str = field(default="auto", metadata=setting("Share of the way: a number, auto or kl:<nats>."))
    layer: int | str = field(default="auto", metadata=setting("Steered decoder block, or auto."))
    rank: int = field(default=8, metadata=setting("Rank of the maps."))
    delta: float = field(default=1.0, metadata=setting("How far beyond the wanted mean to aim."))
    alpha: float = field(default=0.2, metadata=setting("Share of the question's own shift."))
    shrink: float = field(default=1.0, metadata=setting("Divides the region's squared radius."))
    epochs: int = field(default=200, metadata=setting("Passes over the answers."))
    batch_size: int = field(default=100, metadata=setting("Answers per step."))
    learning_rate: float = field(default=2e-3, metadata=setting("Learning rate of Adam."))
    attention_heads: int | None = field(
        default=None, metadata=written_by_fit("Heads of the block.", least=1, most=MOST_HEADS)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layer(self.layer, self.num_hidden_layers)
        check_strength(self.strength, ("kl",))
        for name in ("rank", "epochs", "batch_size"):
            check_count(name, getattr(self, name), 1)
        if self.attention_heads is not None:
            check_count("attention_heads", self.attention_heads, 1)
        check_number("delta", self.delta, above=-1e-12)
        check_number("shrink", self.shrink, above=0)
        check_number("learning_rate", self.learning_rate, above=0)
        check_number("alpha", self.alpha, above=-1e-12, below=1 + 1e-12)

    @classmethod
    def paper(cls, **overrides: Any) -> FlorainConfig:
        """The published script's settings: rank 32, 1000 epochs at a rate of 2e-4, strength 1.

        Args:
            **overrides: fields to change, for example `layer=12`.
        """
        settings: dict[str, Any] = {"rank": 32, "epochs": 1000, "learning_rate": 2e-4, "strength": 1.0}
        return cls(**{**settings, **overrides})


class Florain(SteeringMethod[FlorainConfig]):
    """`a <- a + strength * (f(a) - a)` for the output a of each head of one block.

    Args:
        config: a fitted `FlorainConfig`.
        tensors: `weight`, `bias` and `readout` `[heads, size, rank]`, `shift` `[heads, size]`, float32.

    Raises:
        AdapterFileError: if the config is not fitted, or a tensor is missing.
    """

    def __init__(self, config: FlorainConfig, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(config, tensors)
        require_fitted(config, "layer", "attention_heads")
        missing = sorted(set(TENSORS) - set(tensors))
        if missing:
            raise AdapterFileError(f"The FLORAIN adapter lacks the tensors {missing}.")
        weight = tensors["weight"].shape
        if not weight == tensors["bias"].shape == tensors["readout"].shape or tensors["shift"].shape != weight[:2]:
            found = {name: list(tensors[name].shape) for name in TENSORS}
            raise AdapterFileError(
                f"The tensors of a FLORAIN adapter must agree in the number and size of heads, got {found}."
            )
        self.site = Site("head_out", int(config.layer))
        self.maps = (self.site,)

    def transform(self, site: Site, hidden: torch.Tensor, view: TokenView) -> torch.Tensor:
        """Map the heads of the selected tokens of `[rows, tokens, heads * size]`."""
        maps = HeadMap(**self.parameters_on(hidden.device))
        heads = maps.shift.shape[0]
        # In chunks of tokens, to bound the memory of the rank-r products.
        tokens = max(1, VALUES // (maps.weight.numel() * hidden.shape[0]))
        moved = [
            maps.displacement(part.float().unflatten(-1, (heads, -1))).flatten(-2)
            for part in hidden.split(tokens, dim=1)
        ]
        mapped = hidden + (view.scale * self.strength * torch.cat(moved, dim=1)).to(hidden.dtype)
        steered = view.scale != 0
        if view.mask is not None:
            steered = steered & view.mask[..., None]
        return torch.where(steered, mapped, hidden)

    @classmethod
    def tensor_shapes(cls, config: FlorainConfig) -> dict[str, Shape]:
        """One map per head; the model gives the size of a head.

        Raises:
            AdapterFileError: if the config is not fitted.
        """
        require_fitted(config, "layer", "attention_heads")
        shape: Shape = (config.attention_heads, HEAD_SIZE, config.rank)
        return {name: shape[:2] if name == "shift" else shape for name in TENSORS}

    @classmethod
    def needs(cls, config: FlorainConfig, info: ModelInfo) -> CaptureRequest:
        """The head outputs of the candidate blocks, at the last token of each answer.

        Raises:
            ValueError: if the layer is out of range.
            UnsupportedModelError: if the model has no attention heads.
        """
        if not info.num_heads:
            raise UnsupportedModelError("FLORAIN maps the outputs of attention heads, and the model has none.")
        layers = candidate_layers(config.layer, info.num_layers)
        return CaptureRequest(tuple(Site("head_out", layer) for layer in layers), ("answer_last",))

    @classmethod
    def fit(cls, data: FitData, config: FlorainConfig) -> FitResult:
        """Train on the `fit` part, stop on `calibration`, choose layer and share of the way on `validation`.

        Raises:
            DatasetError: for too few rows, or answers that do not differ.
        """
        if len(data.prompts("fit")) < MIN_ROWS:
            raise DatasetError(f"FLORAIN needs at least {MIN_ROWS} rows to fit on, got {len(data.prompts('fit'))}.")
        layers = candidate_layers(config.layer, data.info.num_layers)
        accuracy = {} if len(layers) == 1 else {layer: _told_apart(data, layer) for layer in layers}
        promising = sorted(layers, key=lambda layer: accuracy.get(layer, (0.0, 0.0)), reverse=True)[:SHORT_LIST]
        fits = {layer: _fit_layer(data, config, layer) for layer in promising}
        trials = {layer: fit.trial for layer, fit in fits.items()}
        chosen = search(data, config.strength, trials)
        layer, found = chosen.key, fits[chosen.key]
        every = max(1, config.epochs // 20)
        report: dict[str, Any] = {
            "layer": layer,
            "layers": [{"layer": at, "probe_accuracy": of[0]} for at, of in accuracy.items()],
            "training_loss": found.trained.training[::every],
            "calibration_loss": found.trained.held_out[::every],
            "validation_loss": _judge(found, _answers(data, layer, "validation"), config),
            **chosen.report,
        }
        fitted = filled_in(
            config, data.info, layer=layer, attention_heads=data.info.num_heads, strength=chosen.strength
        )
        return FitResult(fitted, tensors_of(found.trained.map), report)


@dataclass(frozen=True)
class Answers:
    """Distinct last states of answers.

    Attributes:
        states: `[n, heads, size]` float32.
        wanted: `[n]`.
        questions: `[n]` labels.
    """

    states: NDArray[np.float32]
    wanted: NDArray[np.bool_]
    questions: NDArray[np.intp]


def _answers(data: FitData, layer: int, part: Part) -> Answers:
    site = Site("head_out", layer)
    sides = [data.chosen(site, part, "answer_last"), data.rejected(site, part, "answer_last")]
    states, wanted = np.concatenate(sides), np.repeat([True, False], [len(side) for side in sides])
    questions = np.tile(np.unique(data.prompts(part), return_inverse=True)[1], 2)
    # Rows pair each wanted answer with several unwanted ones, and vice versa.
    keys = np.column_stack([questions, wanted, states])
    first = np.sort(np.unique(keys, axis=0, return_index=True)[1]) if len(keys) else slice(0)
    heads = data.info.num_heads
    return Answers(states[first].reshape(-1, heads, states.shape[1] // heads), wanted[first], questions[first])


def _told_apart(data: FitData, layer: int) -> tuple[float, float]:
    """Means over heads of their probes' held-out accuracy and log-likelihood."""
    fit, held_out = _answers(data, layer, "fit"), _answers(data, layer, "calibration")
    held_out = held_out if len(held_out.states) else fit
    probes = fit_head_probes(fit.states, fit.wanted.astype(int), held_out.states, held_out.wanted.astype(int))
    return float(probes.accuracy.mean()), float(-probes.log_loss.mean())


@dataclass(frozen=True)
class LayerFit:
    """The maps of a block: its wanted states' statistics, the training, and the trial of a strength."""

    common: WantedStates
    trained: TrainedMap
    trial: Trial


def tensors_of(maps: HeadMap) -> dict[str, torch.Tensor]:
    """The parameters of the maps under their names in the file."""
    return {name: getattr(maps, name) for name in TENSORS}


def _fit_layer(data: FitData, config: FlorainConfig, layer: int) -> LayerFit:
    train, held_out = _answers(data, layer, "fit"), _answers(data, layer, "calibration")
    try:
        common = WantedStates.of(train.states, train.wanted, train.questions)
    except ValueError as error:
        raise DatasetError(f"FLORAIN cannot find the region of wanted answers: {error} Give other rows.") from error
    trained = _train(data, config, layer, train, held_out if len(held_out.states) else train, common)
    fitted = filled_in(config, data.info, layer=layer, attention_heads=data.info.num_heads)
    tensors = tensors_of(trained.map)
    moved = trained.map.displacement(torch.from_numpy(train.states).float()).flatten(1)
    trial = Trial(
        build=lambda strength: Florain(dataclasses.replace(fitted, strength=strength), tensors),
        vector_norm=median_norm(moved.numpy()),
        state_norm=median_norm(train.states.reshape(len(train.states), -1)),
    )
    return LayerFit(common, trained, trial)


def _train(
    data: FitData, config: FlorainConfig, layer: int, train: Answers, held_out: Answers, common: WantedStates
) -> TrainedMap:
    every = max(1, config.epochs // 5)

    def advance(epoch: int, loss: float) -> None:
        if (epoch + 1) % every == 0:
            data.note(f"layer {layer}, epoch {epoch + 1} of {config.epochs}: loss {loss:.4g}")

    return train_head_maps(
        train.states,
        _regions(train, common, config),
        held_out.states,
        _regions(held_out, common, config),
        common.whitening,
        rank=config.rank,
        epochs=config.epochs,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        generator=torch.Generator().manual_seed(data.seed),
        advance=advance,
    )


def _regions(answers: Answers, common: WantedStates, config: FlorainConfig) -> Regions:
    settings = {"delta": config.delta, "alpha": config.alpha, "shrink": config.shrink}
    return common.regions(answers.states, answers.wanted, answers.questions, **settings)


def _judge(found: LayerFit, answers: Answers, config: FlorainConfig) -> dict[str, float] | None:
    """Mean loss over heads of held-out answers, unmapped and mapped; None without any."""
    if not len(answers.states):
        return None
    regions = _regions(answers, found.common, config)
    parts = (answers.states, regions.centre, regions.radius, found.common.whitening)
    states, centre, radius, whitening = (torch.from_numpy(part).float() for part in parts)
    losses = {"unsteered": states, "steered": states + found.trained.map.displacement(states)}
    return {name: float(region_loss(at, centre, radius, whitening).mean()) for name, at in losses.items()}


register_steering_method(Florain)
