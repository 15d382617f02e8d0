"""CAA: one constant vector, the mean difference of wanted and unwanted answers (Rimsky et al., ACL 2024).

With `vector="queries"` it is the mean difference of the prompts' states, training minus general ones: a refusal vector
(Arditi et al., NeurIPS 2024) if the former are harmful and the latter harmless. With `vector="gradient"` it is the
mean gradient of the preference for the wanted answer with respect to a vector at the block: it moves the model to give
that answer, while the difference reflects what the answers are about.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from finesteer_hf.adapters.config import SteeringConfig, setting
from finesteer_hf.adapters.registry import register_steering_method
from finesteer_hf.errors import AdapterFileError, DatasetError
from finesteer_hf.method_api import CaptureRequest, FitData, FitResult, ModelInfo, Part, Pool, Side, SteeringMethod
from finesteer_hf.methods._shared.checks import check_layer, check_one_of, check_strength, filled_in, require_fitted
from finesteer_hf.methods._shared.moments import mean_difference, median_query_norm
from finesteer_hf.methods._shared.screening import SCREEN_DOSE, preference_gradients, state_norms
from finesteer_hf.methods._shared.search import OpenPositions, Place, search_places
from finesteer_hf.methods._shared.trials import Trial, candidate_layers
from finesteer_hf.processors import POSITIONS, Decision, QueryStates
from finesteer_hf.sites import Site, resid_post


POOLS = ("answer_mean", "answer_last")
_SIDES: dict[str, tuple[Side, Side]] = {"answers": ("chosen", "rejected"), "queries": ("query", "general")}
VECTORS = (*_SIDES, "gradient")
MIN_ROWS = 2


@dataclass(kw_only=True)
class CAAConfig(SteeringConfig):
    """Settings of a constant vector.

    Attributes:
        positions: steered tokens; `auto` tries `generated`, from the prompt's last token on, as in the paper, `prompt`
            and `all`, and takes what steers held-out rows best.
        layer: decoder block whose output is steered; `auto` tries each and takes the best on held-out rows.
        pool: answer states to average: `answer_mean` over the answer's tokens, or `answer_last`, its last token (the
            answer's letter in the paper's multiple-choice prompts).
        vector: `answers` (chosen minus rejected), `queries` (training prompts minus general ones) or `gradient` (of
            the preference, scaled to a tenth of the state's norm).
    """

    steering_type: ClassVar[str] = "CAA"

    allowed_positions: ClassVar[tuple[str, ...]] = (*POSITIONS, "auto")

    positions: OpenPositions = field(  # type: ignore[assignment]
        default="auto", metadata=setting("Steered tokens: auto, all, prompt or generated.")
    )
    strength: float | str = field(
        default="auto", metadata=setting("Lambda: a number, auto, kl:<nats> or norm:<share>.")
    )
    layer: int | str = field(default="auto", metadata=setting("Steered decoder block, or auto."))
    pool: Literal["answer_mean", "answer_last"] = field(
        default="answer_mean", metadata=setting("Pooled answer states: answer_mean or answer_last.")
    )
    vector: Literal["answers", "queries", "gradient"] = field(
        default="answers", metadata=setting("What the vector is made from: answers, queries or gradient.")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layer(self.layer, self.num_hidden_layers)
        check_one_of("pool", self.pool, POOLS)
        check_one_of("vector", self.vector, VECTORS)
        check_strength(self.strength)

    @classmethod
    def paper(cls, **overrides: Any) -> CAAConfig:
        """The paper's settings: the vector is added after the user's turn, to the prompt's last token and to generated
        tokens. It sweeps layer and strength. The states are those of an answer's letter, so prompts should be multiple
        choice.
        """
        return cls(**{"positions": "generated", "pool": "answer_last", **overrides})


class CAA(SteeringMethod[CAAConfig]):
    """`H <- H + strength * v` at the output of one block, for every query.

    Args:
        config: a fitted `CAAConfig`.
        tensors: `vector`, `[hidden_size]` float32.
    """

    def __init__(self, config: CAAConfig, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(config, tensors)
        require_fitted(config, "layer")
        if "vector" not in tensors:
            raise AdapterFileError("The CAA adapter lacks the tensor 'vector'.")
        self.site = resid_post(config.layer)
        self.writes = (self.site,)

    def decide(self, queries: QueryStates) -> Decision:
        """The vector, `[1, hidden_size]`."""
        return Decision(vectors={self.site: self.parameters_on(queries.device)["vector"][None]})

    @classmethod
    def tensor_shapes(cls, config: CAAConfig) -> dict[str, tuple[int | None, ...]]:
        """One vector of the residual stream.

        Raises:
            AdapterFileError: if the config is not fitted.
        """
        require_fitted(config, "layer")
        return {"vector": (config.hidden_size,)}

    @classmethod
    def needs(cls, config: CAAConfig, info: ModelInfo) -> CaptureRequest:
        """The outputs of the candidate layers.

        Raises:
            ValueError: if the layer is out of range.
        """
        layers = candidate_layers(config.layer, info.num_layers)
        pools: dict[str, tuple[Pool, ...]] = {"answers": (config.pool,), "queries": (), "gradient": ("gradient",)}
        sites = tuple(resid_post(layer) for layer in layers)
        return CaptureRequest(sites, ("query", *pools[config.vector]))

    @classmethod
    def fit(cls, data: FitData, config: CAAConfig) -> FitResult:
        """Average the differences of the `fit` and `calibration` parts; choose layer and strength on `validation`.

        Raises:
            DatasetError: for too few rows, or for `vector="queries"` without general prompts.
        """
        layers = candidate_layers(config.layer, data.info.num_layers)
        vectors = {layer: _mean_difference(data, config, resid_post(layer)) for layer in layers}

        def fitted(place: Place, strength: float) -> CAAConfig:
            (layer,) = place.layers
            return filled_in(config, data.info, layer=layer, positions=place.positions, strength=strength)

        def trial_of(place: Place) -> Trial:
            (layer,) = place.layers
            return Trial(
                build=lambda strength: cls(fitted(place, strength), {"vector": vectors[layer]}),
                vector_norm=float(vectors[layer].norm()),
                state_norm=median_query_norm(data, resid_post(layer)),
            )

        found = search_places(data, config.strength, layers, trial_of, positions=config.positions, several=False)
        (layer,) = found.key.layers
        report = {"layer": layer, **found.report}
        return FitResult(fitted(found.key, found.strength), {"vector": vectors[layer]}, report)


def _mean_difference(data: FitData, config: CAAConfig, site: Site) -> torch.Tensor:
    """The vector at a site, `[d]` float32; averaged in float64."""
    parts: tuple[Part, ...] = ("fit", "calibration")
    if config.vector == "gradient":
        gradient = preference_gradients(data, [site], parts)[site]
        if len(gradient) < MIN_ROWS:
            raise DatasetError(f"CAA averages the gradients of {len(gradient)} rows, but needs at least {MIN_ROWS}.")
        mean = gradient.mean(axis=0)
        length = SCREEN_DOSE * state_norms(data, [site])[site] / max(float(np.linalg.norm(mean)), 1e-12)
        return torch.from_numpy((mean * length).astype(np.float32))
    vector, counts = mean_difference(data, _SIDES[config.vector], site, parts, config.pool)
    if min(counts) < MIN_ROWS:
        what = "general prompts (general_dataset)" if config.vector == "queries" else "rows"
        raise DatasetError(
            f"CAA with vector={config.vector!r} averages {counts[0]} states against {counts[1]}, but needs at "
            f"least {MIN_ROWS} of each: give more {what}."
        )
    return torch.from_numpy(vector.astype(np.float32))


register_steering_method(CAA)
