"""TruthFlow: settings, run time and fit."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch

from finesteer_hf.adapters.config import SteeringConfig, setting
from finesteer_hf.errors import AdapterFileError, DatasetError
from finesteer_hf.estimators import RidgePath, held_out_r2, mean_cosine
from finesteer_hf.estimators.linear_algebra import principal_directions, row_space
from finesteer_hf.method_api import CaptureRequest, FitData, FitResult, ModelInfo, Part, Pool, SteeringMethod
from finesteer_hf.methods._shared.checks import (
    check_count,
    check_layer,
    check_number,
    check_one_of,
    check_strength,
    filled_in,
    require_fitted,
)
from finesteer_hf.methods._shared.search import search
from finesteer_hf.methods._shared.strength import median_norm
from finesteer_hf.methods._shared.trials import Trial, candidate_layers
from finesteer_hf.methods.truthflow.network import FlowNetwork, integrate, train_flow
from finesteer_hf.processors import Decision, QueryStates
from finesteer_hf.sites import resid_post


POOLS = ("answer_mean", "answer_last")
MIN_ROWS = 8
PREFIX = "flow."
# Counts batches in training; not needed afterwards.
_COUNTER = "num_batches_tracked"


@dataclass(kw_only=True)
class TruthFlowConfig(SteeringConfig):
    """Settings of TruthFlow.

    The paper's network starts at half the width of the states and trains for 40 epochs at a rate of 1e-4, see `paper`.
    The default one is narrower, so that an adapter takes a few megabytes, and trains faster.

    Attributes:
        layer: decoder block whose output is read and steered; `auto` takes the one where a ridge regression predicts
            left-out rows' shifts best.
        pool: answer states whose difference is a query's shift.
        rank: number of right singular vectors of the (uncentred) shifts to project vectors on.
        width: width of the network's first level; each of its levels is half as wide as the one above.
        levels: number of levels.
        steps: steps of the midpoint rule, two network calls each; the paper's 16 time points are 15 steps.
        epochs: passes over the rows.
        batch_size: rows per step.
        learning_rate: AdamW's.
    """

    steering_type: ClassVar[str] = "TRUTHFLOW"

    strength: float | str = field(
        default="auto", metadata=setting("Lambda: a number, auto, kl:<nats> or norm:<share>.")
    )
    layer: int | str = field(default="auto", metadata=setting("Steered decoder block, or auto."))
    pool: Literal["answer_mean", "answer_last"] = field(
        default="answer_mean", metadata=setting("Pooled answer states: answer_mean or answer_last.")
    )
    rank: int = field(default=20, metadata=setting("Number of singular vectors to project on.", most=1 << 16))
    width: int = field(default=256, metadata=setting("Width of the network's first level.", most=1 << 16))
    levels: int = field(default=4, metadata=setting("Number of levels of the network.", most=16))
    steps: int = field(default=15, metadata=setting("Steps of the integration.", most=256))
    epochs: int = field(default=200, metadata=setting("Passes over the rows."))
    batch_size: int = field(default=136, metadata=setting("Rows per step."))
    learning_rate: float = field(default=1e-3, metadata=setting("Learning rate of AdamW."))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layer(self.layer, self.num_hidden_layers)
        check_one_of("pool", self.pool, POOLS)
        check_strength(self.strength)
        for name, least in (("rank", 1), ("width", 1), ("levels", 1), ("steps", 1), ("epochs", 1), ("batch_size", 2)):
            check_count(name, getattr(self, name), least)
        check_number("learning_rate", self.learning_rate, above=0)

    @classmethod
    def paper(cls, hidden_size: int, **overrides: Any) -> TruthFlowConfig:
        """The published settings for a model of a given width: first level half of it, 40 epochs, rate 1e-4.

        Args:
            hidden_size: width of the model's residual stream.
            **overrides: fields to change, for example `layer=12, rank=10, strength=1.5`.
        """
        settings: dict[str, Any] = {"width": hidden_size // 2, "epochs": 40, "learning_rate": 1e-4}
        return cls(**{**settings, **overrides})

    def network(self) -> FlowNetwork:
        """A network of these sizes, untrained."""
        return FlowNetwork(int(self.hidden_size or 0), self.width, self.levels)


class TruthFlow(SteeringMethod[TruthFlowConfig]):
    """`H <- H + strength * V V' x_1`, x_1 the end of the flow that starts at the query's state.

    The network sees states in units of their root mean square in the fit, `scale`; paths stay straight, and large
    states do not saturate the network.

    Args:
        config: a fitted `TruthFlowConfig`.
        tensors: `basis` `[rank, hidden_size]`, `scale` `[1]` and the network's, under `flow.`; float32.
    """

    def __init__(self, config: TruthFlowConfig, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(config, tensors)
        missing = sorted(set(self.tensor_shapes(config)) - set(tensors))
        if missing:
            raise AdapterFileError(f"The TRUTHFLOW adapter lacks the tensors {missing}, which its config needs.")
        self.site = resid_post(config.layer)
        self.reads = self.writes = (self.site,)
        with torch.device("meta"):
            # Only the structure; each call provides the parameters, on the device of its states.
            self._network = config.network().eval()

    def decide(self, queries: QueryStates) -> Decision:
        """Integrate the flow from each query's state and project its end, `[rows, hidden_size]`."""
        settings, tensors = self.config, self.parameters_on(queries.device)
        weights = {n.removeprefix(PREFIX): t for n, t in tensors.items() if n.startswith(PREFIX)}
        # `functional_call` swaps the weights inside the module, so threads cannot share it.
        network = copy.deepcopy(self._network)

        def velocity(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(network, weights, (x, time))

        end = integrate(velocity, queries[self.site] / tensors["scale"], settings.steps) * tensors["scale"]
        return Decision(vectors={self.site: (end @ tensors["basis"].T) @ tensors["basis"]})

    @classmethod
    def tensor_shapes(cls, config: TruthFlowConfig) -> dict[str, tuple[int | None, ...]]:
        """The basis, the scale and the network's parameters and running statistics."""
        require_fitted(config, "layer")
        with torch.device("meta"):
            network = config.network().state_dict()
        shapes: dict[str, tuple[int | None, ...]] = {"basis": (config.rank, config.hidden_size), "scale": (1,)}
        return shapes | {PREFIX + n: tuple(t.shape) for n, t in network.items() if not n.endswith(_COUNTER)}

    @classmethod
    def needs(cls, config: TruthFlowConfig, info: ModelInfo) -> CaptureRequest:
        """The outputs of the candidate layers, at the query and over the answers.

        Raises:
            ValueError: if the layer is out of range.
        """
        layers = candidate_layers(config.layer, info.num_layers)
        pools: tuple[Pool, ...] = ("query", config.pool)
        return CaptureRequest(tuple(resid_post(layer) for layer in layers), pools)

    @classmethod
    def fit(cls, data: FitData, config: TruthFlowConfig) -> FitResult:
        """Train the flow on the `fit` and `calibration` parts; choose the strength on `validation`.

        Raises:
            DatasetError: for too few rows, or answers that do not differ.
        """
        parts = cast(tuple[Part, ...], ("fit", "calibration"))
        layers = candidate_layers(config.layer, data.info.num_layers)
        rows = {layer: _rows(data, config, layer, parts) for layer in layers}
        queries, shifts = rows[layers[0]]
        if len(queries) < MIN_ROWS:
            raise DatasetError(f"TRUTHFLOW needs at least {MIN_ROWS} rows to fit on, got {len(queries)}.")
        predicted = {} if len(layers) == 1 else {layer: _ridge_r2(*pair) for layer, pair in rows.items()}
        layer = max(predicted, key=lambda at: predicted[at]) if predicted else layers[0]
        queries, shifts = rows[layer]
        basis = principal_directions(shifts.astype(np.float64), min(config.rank, *shifts.shape))[1]
        if not basis.shape[1]:
            raise DatasetError("Chosen and rejected answers have the same states: there is nothing to flow to.")
        fitted = filled_in(config, data.info, layer=layer, rank=basis.shape[1], strength=0.0)
        flow, losses = _train(fitted, queries, shifts, data)
        tensors = {"basis": torch.from_numpy(np.ascontiguousarray(basis.T, dtype=np.float32)), **flow}

        def build(strength: float) -> TruthFlow:
            return cls(dataclasses.replace(fitted, strength=strength), tensors)

        site = resid_post(layer)
        trial = Trial(build, median_norm(_vectors(build(1.0), queries)), median_norm(data.query(site, "fit")))
        chosen = search(data, config.strength, {layer: trial})
        held_out = _rows(data, config, layer, ("validation",))
        report: dict[str, Any] = {
            "layer": layer,
            "layers": [{"layer": at, "ridge_r2": r2} for at, r2 in predicted.items()],
            "loss": losses[:: max(1, len(losses) // 20)],
            **chosen.report,
            "vector": {**chosen.report["vector"], **_judge(build(1.0), held_out, shifts)},
        }
        return FitResult(build(chosen.strength).config, tensors, report)


Rows = tuple[np.ndarray, np.ndarray]


def _rows(data: FitData, config: TruthFlowConfig, layer: int, parts: tuple[Part, ...]) -> Rows:
    """Queries and shifts, `[rows, d]` float32 each."""
    site = resid_post(layer)
    queries = [data.query(site, part) for part in parts]
    shifts = [data.chosen(site, part, config.pool) - data.rejected(site, part, config.pool) for part in parts]
    return np.concatenate(queries), np.concatenate(shifts)


def _ridge_r2(queries: np.ndarray, shifts: np.ndarray) -> float:
    """R^2 of the best ridge regression of shifts on queries, with leave-one-out predictions."""
    path = RidgePath.of(row_space(queries.astype(np.float64))[0], row_space(shifts.astype(np.float64))[0])
    return max(path.held_out_curve().values())


def _train(
    config: TruthFlowConfig, queries: np.ndarray, shifts: np.ndarray, data: FitData
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Train a network; its tensors under their names in the file, and the loss of each epoch."""
    scale = torch.tensor([float(np.sqrt(np.square(queries, dtype=np.float64).mean()))], dtype=torch.float32)
    every = max(1, config.epochs // 5)

    def advance(epoch: int, loss: float) -> None:
        if (epoch + 1) % every == 0:
            data.note(f"epoch {epoch + 1} of {config.epochs}: loss {loss:.4g}")

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(data.seed)
        network = config.network()
    losses = train_flow(
        network,
        torch.from_numpy(queries) / scale,
        torch.from_numpy(shifts) / scale,
        epochs=config.epochs,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        generator=torch.Generator().manual_seed(data.seed),
        advance=advance,
    )
    found = {PREFIX + n: t.detach().clone() for n, t in network.state_dict().items() if not n.endswith(_COUNTER)}
    return {"scale": scale, **found}, losses


@torch.no_grad()
def _vectors(processor: TruthFlow, queries: np.ndarray) -> np.ndarray:
    states = torch.from_numpy(queries)
    decision = processor.decide(QueryStates({processor.site: states}, len(states), states.device))
    return decision.vectors[processor.site].numpy()


def _judge(processor: TruthFlow, held_out: Rows, fitted_shifts: np.ndarray) -> dict[str, float | None]:
    """R^2 beyond the mean shift and mean cosine on held-out rows; None without any."""
    queries, shifts = held_out
    if not len(queries):
        return {"held_out_r2": None, "held_out_cosine": None}
    predicted = _vectors(processor, queries)
    return {
        "held_out_r2": held_out_r2(shifts, predicted, fitted_shifts.mean(axis=0)),
        "held_out_cosine": mean_cosine(shifts, predicted),
    }
