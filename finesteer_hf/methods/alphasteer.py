"""ALPHASTEER: a linear map of the query that ignores the directions of benign queries (arXiv 2506.07022, ICLR 2026).

Per layer h' = h + lambda D P h, with P the projector on the directions in which benign states have almost no energy,
and D the ridge solution of D P h_m = r over malicious queries h_m, r the refusal direction. All targets are the same
r, so D P has exactly rank one: D P = r w', with w the ridge regression of the constant 1 on the projected malicious
states. Each layer stores two vectors instead of a d x d matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray

from finesteer_hf.adapters.config import SteeringConfig, setting
from finesteer_hf.adapters.registry import register_steering_method
from finesteer_hf.errors import AdapterFileError, DatasetError
from finesteer_hf.estimators.linear_algebra import gram_eigen
from finesteer_hf.method_api import CaptureRequest, FitData, FitResult, ModelInfo, Part, Pool, SteeringMethod
from finesteer_hf.methods._shared.checks import (
    check_layers,
    check_number,
    check_one_of,
    check_strength,
    filled_in,
    layers_of,
    require_fitted,
)
from finesteer_hf.methods._shared.moments import mean_difference
from finesteer_hf.methods._shared.search import Place, search_layers
from finesteer_hf.methods._shared.strength import median_norm
from finesteer_hf.methods._shared.trials import Trial
from finesteer_hf.processors import Decision, Positions, QueryStates
from finesteer_hf.sites import Site


POOLS = ("answer_mean", "answer_last")
MIN_ROWS = 4
# The input of the first block is the last token's embedding; with a chat template it is the same for all queries.
FIRST_LAYER = 1


@dataclass(kw_only=True)
class AlphaSteerConfig(SteeringConfig):
    """Settings of AlphaSteer.

    Attributes:
        layers: decoder blocks whose inputs are read and steered; `auto` compares single blocks between 20% and 80% of the
            depth, the best of them together, and all of them, on held-out rows.
        null_space: share of the directions, those with the least benign energy, that form the null space.
        ridge: penalty on |D P|^2, against squared errors summed over the malicious queries.
        pool: answer states whose difference of means is the refusal direction.
    """

    steering_type: ClassVar[str] = "ALPHASTEER"

    # The published code steers in the prefill only.
    positions: Positions = field(default="prompt", metadata=setting("Steered tokens: all, prompt or generated."))
    strength: float | str = field(
        default="auto", metadata=setting("Lambda: a number, auto, kl:<nats> or norm:<share>.")
    )
    layers: list[int] | str = field(default="auto", metadata=setting("Steered decoder blocks, or auto."))
    null_space: float = field(default=0.5, metadata=setting("Share of directions in the null space."))
    ridge: float = field(default=10.0, metadata=setting("Penalty on the map."))
    pool: Literal["answer_mean", "answer_last"] = field(
        default="answer_mean", metadata=setting("Pooled answer states: answer_mean or answer_last.")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("pool", self.pool, POOLS)
        check_layers(self.layers, self.num_hidden_layers, FIRST_LAYER)
        check_strength(self.strength)
        check_number("null_space", self.null_space, above=0, below=1)
        check_number("ridge", self.ridge, above=0)


class AlphaSteer(SteeringMethod[AlphaSteerConfig]):
    """`H_l <- H_l + strength * r_l (w_l . h_l)` at the inputs of some blocks, h_l the query's unsteered state there.

    The published code reads each layer after earlier ones have written. Here all are read from the unsteered prompt,
    as every decision is, so a layer's map sees the kind of states that it was fitted on.

    Args:
        config: a fitted `AlphaSteerConfig`.
        tensors: `refusal` and `probe`, `[layers, hidden_size]` float32: r and w of each layer.
    """

    def __init__(self, config: AlphaSteerConfig, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(config, tensors)
        require_fitted(config, "layers")
        if not {"refusal", "probe"} <= set(tensors):
            raise AdapterFileError("An ALPHASTEER adapter needs the tensors 'refusal' and 'probe'.")
        self.reads = self.writes = tuple(_site(layer) for layer in config.layers)

    def decide(self, queries: QueryStates) -> Decision:
        """The map's value at each layer, `[rows, hidden_size]`; records `score`, the mean over layers of w . h."""
        tensors = self.parameters_on(queries.device)
        scores = [queries[site] @ probe for site, probe in zip(self.reads, tensors["probe"], strict=True)]
        vectors = {
            site: score[:, None] * refusal
            for site, score, refusal in zip(self.writes, scores, tensors["refusal"], strict=True)
        }
        return Decision(vectors=vectors, record={"score": torch.stack(scores).mean(dim=0)})

    @classmethod
    def tensor_shapes(cls, config: AlphaSteerConfig) -> dict[str, tuple[int | None, ...]]:
        """Two vectors per layer."""
        require_fitted(config, "layers")
        shape = (len(config.layers), config.hidden_size)
        return {"refusal": shape, "probe": shape}

    @classmethod
    def needs(cls, config: AlphaSteerConfig, info: ModelInfo) -> CaptureRequest:
        """The inputs of the layers, at the query and over the answers.

        Raises:
            ValueError: if a layer is out of range.
        """
        sites = tuple(_site(layer) for layer in layers_of(config.layers, info.num_layers, FIRST_LAYER))
        pools: tuple[Pool, ...] = ("query", config.pool)
        return CaptureRequest(sites, pools)

    @classmethod
    def fit(cls, data: FitData, config: AlphaSteerConfig) -> FitResult:
        """Fit each layer on the `fit` and `calibration` parts; choose layers and strength on `validation`.

        The rows' prompts are the malicious queries, the general prompts the benign ones.

        Raises:
            DatasetError: for too few rows, or no general prompts.
        """
        layers = layers_of(config.layers, data.info.num_layers, FIRST_LAYER)
        vectors, figures = {}, []
        for layer in layers:
            data.note(f"fitting layer {layer}")
            vectors[layer] = _fit_layer(data, config, layer)
            figures.append({"layer": layer, **_judge(data, layer, vectors[layer][1])})
        norms = {layer: median_norm(_queries(data, layer, ("fit",))) for layer in layers}
        pushes = {
            layer: float(np.median(np.abs(_queries(data, layer, ("fit",)) @ probe)) * np.linalg.norm(refusal))
            for layer, (refusal, probe) in vectors.items()
        }

        def processor(place: Place, strength: float) -> AlphaSteer:
            chosen = {"layers": list(place.layers), "positions": place.positions, "strength": strength}
            pairs = zip(*(vectors[layer] for layer in place.layers), strict=True)
            tensors = {
                name: torch.from_numpy(np.stack(values).astype(np.float32))
                for name, values in zip(("refusal", "probe"), pairs, strict=True)
            }
            return cls(filled_in(config, data.info, **chosen), tensors)

        def trial_of(place: Place) -> Trial:
            first = norms[place.layers[0]]
            share = float(np.linalg.norm([pushes[layer] / max(norms[layer], 1e-12) for layer in place.layers]))
            return Trial(lambda strength: processor(place, strength), share * first, first)

        found = search_layers(data, config, layers, trial_of)
        steered = processor(found.key, found.strength)
        report: dict[str, Any] = {"layers": figures, **found.report}
        return FitResult(steered.config, steered.tensors, report)


def null_space_probe(
    benign: NDArray[np.float64], malicious: NDArray[np.float64], null_space: float, ridge: float
) -> NDArray[np.float64]:
    """The vector w with D P = r w': ridge regression of 1 on malicious states inside the benign null space.

    P projects on the eigenvectors of the uncentred H_b' H_b with the smallest eigenvalues. With fewer benign queries
    than directions to remove, the null space is exact and larger than requested: directions that no benign query has
    are all kept.

    Args:
        benign: `[N, d]`.
        malicious: `[M, d]`.
        null_space: share of the d directions that P keeps.
        ridge: penalty a of `sum_m |D P h_m - r|^2 + a |D P|^2`.

    Returns:
        `[d]`, inside the null space.
    """
    width = benign.shape[1]
    removed = gram_eigen(benign, width - round(null_space * width))[2]
    # Twice, to remove the remainder of directions with large energy.
    projected = malicious - (malicious @ removed) @ removed.T
    projected = projected - (projected @ removed) @ removed.T
    gram = projected @ projected.T
    gram[np.diag_indices_from(gram)] += ridge
    return projected.T @ scipy.linalg.solve(gram, np.ones(len(gram)), assume_a="pos")


def _site(layer: int | str) -> Site:
    return Site("resid_pre", int(layer))


def _queries(data: FitData, layer: int, parts: tuple[Part, ...]) -> NDArray[np.float64]:
    return np.concatenate([data.query(_site(layer), part) for part in parts]).astype(np.float64)


def _fit_layer(data: FitData, config: AlphaSteerConfig, layer: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    site, parts = _site(layer), cast(tuple[Part, ...], ("fit", "calibration"))
    benign = np.concatenate([data.general(site, part) for part in parts]).astype(np.float64)
    malicious = _queries(data, layer, parts)
    if min(len(benign), len(malicious)) < MIN_ROWS:
        raise DatasetError(
            f"ALPHASTEER needs at least {MIN_ROWS} rows and {MIN_ROWS} general prompts (general_dataset), got "
            f"{len(malicious)} and {len(benign)}; the paper uses thousands of general prompts."
        )
    refusal, _ = mean_difference(data, ("chosen", "rejected"), site, parts, config.pool)
    return refusal, null_space_probe(benign, malicious, config.null_space, config.ridge)


def _judge(data: FitData, layer: int, probe: NDArray[np.float64]) -> dict[str, float | None]:
    """Mean share of r for held-out queries, and a high quantile of its size for general ones."""
    general = data.general(_site(layer), "validation").astype(np.float64) @ probe
    queries = _queries(data, layer, ("validation",)) @ probe
    return {
        "queries_mean": float(queries.mean()) if len(queries) else None,
        "general_mean_abs": float(np.abs(general).mean()) if len(general) else None,
    }


register_steering_method(AlphaSteer)
