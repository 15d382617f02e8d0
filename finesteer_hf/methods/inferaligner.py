"""INFERALIGNER: a safety vector of an aligned sibling, added if a query looks harmful (arXiv 2401.11206, EMNLP 2024).

Per layer, s_l is the mean state of harmful queries minus that of harmless ones in the model itself (the safety-related
vector, SRV), and theta_l the same difference in an aligned sibling of the same base (the safety steering vector, SSV).
A query sets the gate g_l = 1[<h_l, s_l> + b_l > 0]; all its tokens become h_l + alpha g_l theta_l.

An SSV comes from another model, so it is fitted there first: an INFERALIGNER adapter of the sibling, fitted on the
same data, has it as its own SRV, and `sibling` names that adapter. Without a sibling the model's own vectors are used.
No code was published; b_l puts the boundary halfway between the two means.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from finesteer_hf.adapters.adapter import SteeringAdapter
from finesteer_hf.adapters.config import SteeringConfig, setting
from finesteer_hf.adapters.registry import register_steering_method
from finesteer_hf.errors import AdapterFileError, AdapterMismatchError, DatasetError
from finesteer_hf.method_api import CaptureRequest, FitData, FitResult, ModelInfo, Part, Pool, Side, SteeringMethod
from finesteer_hf.methods._shared.checks import (
    check_count,
    check_layer,
    check_layers,
    check_one_of,
    check_strength,
    filled_in,
    layers_of,
    require_fitted,
)
from finesteer_hf.methods._shared.moments import mean_difference
from finesteer_hf.methods._shared.screening import relative_norm, state_norms
from finesteer_hf.methods._shared.search import Place, search_layers
from finesteer_hf.methods._shared.trials import Trial, candidate_layers
from finesteer_hf.processors import Decision, Positions, QueryStates
from finesteer_hf.sites import resid_post


VECTORS = ("answers", "queries", "sibling")
POOLS = ("answer_mean", "answer_last")
MIN_ROWS = 2


@dataclass(kw_only=True)
class InferAlignerConfig(SteeringConfig):
    """Settings of InferAligner.

    Attributes:
        layers: decoder blocks whose outputs are steered; `auto` compares single blocks between 20% and 80% of the depth,
            the best of them together, and all of them, on held-out rows.
        guard_layer: block whose gate decides for all layers; None: each layer decides for itself, as in the paper.
        vector: what is added: `sibling` (as in the paper: the SRV of the adapter named in `sibling`), `answers` (the
            model's own chosen minus rejected answers) or `queries` (its own SRV).
        sibling: folder or Hub id of an INFERALIGNER adapter fitted on the aligned sibling, on the same data.
        pool: answer states that `vector="answers"` averages.
    """

    steering_type: ClassVar[str] = "INFERALIGNER"

    positions: Positions = field(default="all", metadata=setting("Steered tokens: all, prompt or generated."))
    strength: float | str = field(
        default="auto", metadata=setting("Alpha: a number, auto, kl:<nats> or norm:<share>.")
    )
    layers: list[int] | str = field(default="auto", metadata=setting("Steered decoder blocks, or auto."))
    guard_layer: int | None = field(default=None, metadata=setting("Block whose gate decides for all layers."))
    vector: Literal["answers", "queries", "sibling"] = field(
        default="answers", metadata=setting("What is added: answers, queries or sibling.")
    )
    sibling: str | None = field(
        default=None, metadata=setting("INFERALIGNER adapter of the aligned sibling.", may_be_path=True)
    )
    pool: Literal["answer_mean", "answer_last"] = field(
        default="answer_mean", metadata=setting("Pooled answer states: answer_mean or answer_last.")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers(self.layers, self.num_hidden_layers)
        if self.guard_layer is not None:
            check_count("guard_layer", self.guard_layer, 0)
            check_layer(self.guard_layer, self.num_hidden_layers, name="guard_layer")
        check_one_of("vector", self.vector, VECTORS)
        check_one_of("pool", self.pool, POOLS)
        check_strength(self.strength)
        if (self.vector == "sibling") != (self.sibling is not None):
            raise ValueError(
                f"vector='sibling' and `sibling` must be given together, got vector={self.vector!r} and "
                f"sibling={self.sibling!r}. Name the folder or Hub id of the adapter fitted on the aligned sibling."
            )

    @property
    def gate_layers(self) -> list[int]:
        """The blocks whose states decide, for a config with fitted `layers`."""
        return [int(layer) for layer in self.layers] if self.guard_layer is None else [self.guard_layer]


class InferAligner(SteeringMethod[InferAlignerConfig]):
    """`H_l <- H_l + strength * 1[<h_l, s_l> + b_l > 0] * theta_l`, h_l the query's unsteered state at the layer.

    Args:
        config: a fitted `InferAlignerConfig`.
        tensors: `srv` `[gate layers, hidden_size]`, `bias` `[gate layers]` and `ssv` `[layers, hidden_size]`, float32.

    Raises:
        AdapterFileError: if the config is not fitted, or a tensor is missing.
    """

    def __init__(self, config: InferAlignerConfig, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(config, tensors)
        missing = sorted(set(self.tensor_shapes(config)) - set(tensors))
        if missing:
            raise AdapterFileError(f"The INFERALIGNER adapter lacks the tensors {missing}.")
        self.reads = tuple(resid_post(layer) for layer in config.gate_layers)
        self.writes = tuple(resid_post(layer) for layer in config.layers)

    def decide(self, queries: QueryStates) -> Decision:
        """Compute the layers' gates; records `score` `[rows]`, the highest <h, s> + b, and the share `open_layers`."""
        tensors = self.parameters_on(queries.device)
        scores = torch.stack([queries[site] @ srv for site, srv in zip(self.reads, tensors["srv"], strict=True)])
        scores = scores + tensors["bias"][:, None]
        is_open = (scores > 0).expand(len(self.writes), -1)
        vectors = {
            # -0.0 leaves the stream bit-identical at layers with a closed gate.
            site: torch.where(opened[:, None], vector, -0.0)
            for site, opened, vector in zip(self.writes, is_open, tensors["ssv"], strict=True)
        }
        record = {"score": scores.amax(dim=0), "open_layers": is_open.float().mean(dim=0)}
        return Decision(vectors=vectors, gate=is_open.any(dim=0).float(), record=record)

    @classmethod
    def tensor_shapes(cls, config: InferAlignerConfig) -> dict[str, tuple[int | None, ...]]:
        """A vector and a bias per gate, a vector per steered layer.

        Raises:
            AdapterFileError: if the config is not fitted.
        """
        require_fitted(config, "layers")
        gates = len(config.gate_layers)
        width = config.hidden_size
        return {"srv": (gates, width), "bias": (gates,), "ssv": (len(config.layers), width)}

    @classmethod
    def needs(cls, config: InferAlignerConfig, info: ModelInfo) -> CaptureRequest:
        """The outputs of the layers, at the query and, for `vector="answers"`, over the answers.

        Raises:
            ValueError: if a layer is out of range, or the sibling's adapter does not fit the model.
        """
        settings, _ = _resolved(config, info)
        layers = sorted({*map(int, settings.layers), *settings.gate_layers})
        pools: tuple[Pool, ...] = ("query", settings.pool) if settings.vector == "answers" else ("query",)
        return CaptureRequest(tuple(resid_post(layer) for layer in layers), pools)

    @classmethod
    def fit(cls, data: FitData, config: InferAlignerConfig) -> FitResult:
        """Average on the `fit` and `calibration` parts; choose layers and strength on `validation`.

        The rows' prompts are the harmful queries, the general prompts the harmless ones.

        Raises:
            DatasetError: for too few rows, or no general prompts.
        """
        settings, theirs = _resolved(config, data.info)
        layers = [int(layer) for layer in settings.layers]
        gates = {layer: safety_gate(*_queries(data, layer)) for layer in sorted({*layers, *settings.gate_layers})}
        vectors = _own_vectors(data, settings, layers, gates) if theirs is None else theirs
        norms = state_norms(data, [resid_post(layer) for layer in layers])

        def fitted(place: Place, strength: float) -> InferAlignerConfig:
            chosen = dataclasses.replace(settings, layers=list(place.layers), positions=place.positions)
            return filled_in(chosen, data.info, strength=strength)

        def tensors_of(place: Place) -> dict[str, torch.Tensor]:
            opened = [gates[layer] for layer in fitted(place, 0.0).gate_layers]
            found = {
                "srv": np.stack([direction for direction, _ in opened]),
                "bias": np.array([bias for _, bias in opened]),
                "ssv": np.stack([vectors[layer] for layer in place.layers]),
            }
            return {name: torch.from_numpy(values.astype(np.float32)) for name, values in found.items()}

        def trial_of(place: Place) -> Trial:
            tensors = tensors_of(place)
            added = {resid_post(layer): vectors[layer][None] for layer in place.layers}
            first = norms[resid_post(place.layers[0])]
            return Trial(
                build=lambda strength: cls(fitted(place, strength), tensors),
                vector_norm=relative_norm(added, norms) * first,
                state_norm=first,
            )

        found = search_layers(data, config, layers, trial_of)
        config = fitted(found.key, found.strength)
        report: dict[str, Any] = {
            "layers": list(found.key.layers),
            "gates": [{"layer": layer, **_held_out(data, layer, *gates[layer])} for layer in config.gate_layers],
            **found.report,
        }
        return FitResult(config, tensors_of(found.key), report)


def safety_gate(harmful: NDArray[np.floating], harmless: NDArray[np.floating]) -> tuple[NDArray[np.float64], float]:
    """The difference of means s, and the bias b with <h, s> + b > 0 if h is nearer to the harmful mean.

    Args:
        harmful: `[n, d]`.
        harmless: `[m, d]`.

    Raises:
        DatasetError: for too few rows of either kind.
    """
    if min(len(harmful), len(harmless)) < MIN_ROWS:
        raise DatasetError(
            f"INFERALIGNER needs at least {MIN_ROWS} rows and {MIN_ROWS} general prompts (general_dataset) to "
            f"separate, got {len(harmful)} and {len(harmless)}."
        )
    means = [side.mean(axis=0, dtype=np.float64) for side in (harmful, harmless)]
    direction = means[0] - means[1]
    return direction, float(-direction @ (means[0] + means[1]) / 2)


def _own_vectors(
    data: FitData,
    config: InferAlignerConfig,
    layers: list[int],
    gates: Mapping[int, tuple[NDArray[np.float64], float]],
) -> dict[int, NDArray[np.float64]]:
    """The model's own vector at each layer, `[hidden_size]`."""
    if config.vector == "queries":
        return {layer: gates[layer][0] for layer in layers}
    parts: tuple[Part, ...] = ("fit", "calibration")
    sides: tuple[Side, Side] = ("chosen", "rejected")
    return {layer: mean_difference(data, sides, resid_post(layer), parts, config.pool)[0] for layer in layers}


def _resolved(
    config: InferAlignerConfig, info: ModelInfo
) -> tuple[InferAlignerConfig, dict[int, NDArray[np.float64]] | None]:
    """The config with the layers that may be steered, and the sibling's vectors `[hidden_size]`, None without one.

    Raises:
        ValueError: if a layer is out of range.
        AdapterMismatchError: if the sibling's adapter is of another method or shape, or lacks a layer.
    """
    if config.guard_layer is not None:
        candidate_layers(config.guard_layer, info.num_layers)
    layers = layers_of(config.layers, info.num_layers)
    if config.sibling is None:
        return dataclasses.replace(config, layers=layers), None
    theirs, srv = _sibling(config.sibling)
    if config.layers == "auto":
        # Only layers for which the sibling has a vector can be steered.
        layers = layers_of(theirs.gate_layers, info.num_layers)
    if (
        theirs.hidden_size != info.hidden_size
        or theirs.num_hidden_layers != info.num_layers
        or not {*layers} <= {*theirs.gate_layers}
    ):
        raise AdapterMismatchError(
            f"sibling={config.sibling!r} was fitted for hidden size {theirs.hidden_size}, {theirs.num_hidden_layers} "
            f"layers, at {theirs.gate_layers}; this model has {info.hidden_size} and {info.num_layers}, and is steered at "
            f"{layers}. The sibling must share the base, and have a vector for each of these layers."
        )
    vectors = {layer: srv[theirs.gate_layers.index(layer)].double().numpy() for layer in layers}
    return dataclasses.replace(config, layers=layers), vectors


def _sibling(name: str) -> tuple[InferAlignerConfig, torch.Tensor]:
    """Config of the sibling's adapter, and its SRVs `[gate layers, hidden_size]`."""
    adapter = SteeringAdapter.from_pretrained(name)
    if not isinstance(adapter.config, InferAlignerConfig):
        raise AdapterMismatchError(
            f"sibling={name!r} is a {adapter.config.steering_type} adapter. Fit an INFERALIGNER adapter on the "
            "aligned sibling, on the same data, and name that."
        )
    return adapter.config, adapter.tensors["srv"]


def _queries(data: FitData, layer: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    parts: tuple[Part, ...] = ("fit", "calibration")
    site = resid_post(layer)
    harmful, harmless = (np.concatenate([side(site, part) for part in parts]) for side in (data.query, data.general))
    return harmful, harmless


def _held_out(data: FitData, layer: int, srv: NDArray[np.float64], bias: float) -> dict[str, float | None]:
    """Shares of held-out rows and held-out general prompts that open a gate; None without any."""
    sides = {
        "opened": data.query(resid_post(layer), "validation"),
        "false_alarms": data.general(resid_post(layer), "validation"),
    }
    return {
        name: float((states.astype(np.float64) @ srv + bias > 0).mean()) if len(states) else None
        for name, states in sides.items()
    }


register_steering_method(InferAligner)
