"""TAD: a constant vector at tokens that are uncertain (after "Unconditional Truthfulness", arXiv 2408.10692).

The paper learns an uncertainty of each token that is not conditional on earlier tokens, from the attention to them,
the token's probability and their uncertainties, in two stages. It scores text; here such a score is a gate:

    u = w . h + b,    g = 1 if u > threshold else 0    (soft: sigmoid((u - threshold) / spread))
    h <- h + strength * g * v    for each token separately

By default this head is a substitute for the paper's: linear in the state of this token only. `uncertainty` chooses its
target. With `recurrence` = N the paper's regression is added on top, see `finesteer_hf.methods.tad.recurrence`: the
head's probability is the token's own confidence p_i, and the unconditional u_i uses those of the N earlier tokens and,
with `attention`, the attention to them. The gate is then that of 1 - u_i.

The paper's p_i is the token's probability under the model. It is not a feature here: it needs the logits of the
previous token, which do not exist yet when a text is scored in one forward, and which the steering itself changes. All
features come from blocks that the steering has not reached, so u_i depends only on the text, whether it is generated,
drafted or scored.

The threshold and the spread are those of trusted tokens: the tokens of held-out chosen answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from finesteer_hf.errors import AdapterFileError, UnsupportedModelError
from finesteer_hf.method_api import CaptureRequest, FitData, FitResult, ModelInfo, Part, Pool, SteeringMethod
from finesteer_hf.methods._shared.checks import filled_in, require_fitted
from finesteer_hf.methods._shared.moments import mean_difference, median_query_norm
from finesteer_hf.methods._shared.search import search
from finesteer_hf.methods._shared.trials import SHORT_LIST, Trial, candidate_layers
from finesteer_hf.methods.tad.confidence_fit import by_neighbour
from finesteer_hf.methods.tad.config import TADConfig
from finesteer_hf.methods.tad.heads import heads_with_memory, single_heads
from finesteer_hf.methods.tad.recurrence import Recurrence, Weights, unconditional
from finesteer_hf.processors import TokenView
from finesteer_hf.sites import Site, resid_post


class TAD(SteeringMethod[TADConfig]):
    """`h <- h + strength * g(h) * v` at the output of one block, g from the same token's state, or from u_i.

    Args:
        config: a fitted `TADConfig`.
        tensors: `vector` and `gate.weight`, `[hidden_size]`, and `gate.bias`, `[1]`, float32: g is the step function
            or the sigmoid of weight . h + bias, with threshold and spread folded in. With a recurrence, p is the
            sigmoid of weight . h + bias; g that of (1 - u - `gate.threshold`) / `gate.spread`, `[1]` each; and the
            regression is `recurrence.bias` and `.own`, `[1]`, `.previous`, `[N, 3]` and, of attention, `.attention`,
            `[N, weights]`.

    Raises:
        AdapterFileError: if the config is not fitted, or a tensor is missing.
    """

    def __init__(self, config: TADConfig, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(config, tensors)
        missing = sorted(set(self.tensor_shapes(config)) - set(tensors))
        if missing:
            raise AdapterFileError(f"The TAD adapter lacks the tensors {missing}.")
        self.settings = settings = config
        self.remembers = settings.recurrence > 0
        blocks = range(int(settings.layer) + 1) if settings.attention else ()
        self.maps = (*(Site("attention", block) for block in blocks), resid_post(settings.layer))

    def transform(self, site: Site, hidden: torch.Tensor, view: TokenView) -> torch.Tensor:
        """Judge each token of `[rows, tokens, hidden_size]`, and steer the uncertain ones among those selected."""
        if site.kind == "attention":
            view.state.setdefault("attention", {})[site] = hidden
            return hidden
        gate = (self._remembering(hidden, view) if self.remembers else self.gate(hidden))[..., None]
        vector = self.parameters_on(hidden.device)["vector"]
        pushed = hidden + (view.scale * self.strength * gate * vector).to(hidden.dtype)
        steered = (view.scale != 0) & (gate > 0)
        if view.mask is not None:
            steered = steered & view.mask[..., None]
        return torch.where(steered, pushed, hidden)

    def gate(self, hidden: torch.Tensor) -> torch.Tensor:
        """g of tokens `[..., hidden_size]`, any floating dtype, each alone: `[...]` float32 in [0, 1]."""
        told = self._told(hidden)
        return self._open(self._excess(torch.sigmoid(told)) if self.remembers else told)

    def _told(self, hidden: torch.Tensor) -> torch.Tensor:
        own = self.parameters_on(hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            return hidden.float() @ own["gate.weight"] + own["gate.bias"]

    def _excess(self, confidence: torch.Tensor) -> torch.Tensor:
        own = self.parameters_on(confidence.device)
        return (1 - confidence - own["gate.threshold"]) / own["gate.spread"]

    def _open(self, excess: torch.Tensor) -> torch.Tensor:
        return (excess > 0).float() if self.settings.gate == "hard" else torch.sigmoid(excess)

    def _remembering(self, hidden: torch.Tensor, view: TokenView) -> torch.Tensor:
        """g of the selected tokens of a forward, `[rows, tokens]`; values at others are not used."""
        reach, own = self.settings.recurrence, self.parameters_on(hidden.device)
        judged = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        if view.mask is not None:
            judged = judged & view.mask
        confidence = torch.where(judged, torch.sigmoid(self._told(hidden)), 0.0)
        memory: Recurrence = view.state.setdefault("recurrence", Recurrence(reach))
        past = memory.before(view.first_column, confidence)
        maps = view.state.pop("attention", {})
        attention = by_neighbour([maps[site] for site in self.maps[:-1]], reach) if maps else None
        weights = Weights(
            own["recurrence.bias"],
            own["recurrence.own"],
            own["recurrence.previous"],
            own.get("recurrence.attention", own["recurrence.previous"][:, :0]),
        )
        # Only the query is judged among a prompt's tokens, so the others need not be stepped through.
        start = 0
        if self.positions == "generated" and isinstance(view.query_column, int):
            start = min(max(view.query_column - view.first_column, 0), hidden.shape[1] - 1)
        scores = unconditional(
            confidence[:, start:],
            judged[:, start:],
            None if attention is None else attention[:, start:].to(hidden.device),
            weights,
            past if start == 0 else None,
        )
        scores = torch.nn.functional.pad(scores, (start, 0))
        memory.note(confidence, scores, judged)
        return self._open(self._excess(scores))

    @classmethod
    def tensor_shapes(cls, config: TADConfig) -> dict[str, tuple[int | None, ...]]:
        """A vector, the head, and the regression on top of it."""
        require_fitted(config, "layer")
        shapes: dict[str, tuple[int | None, ...]] = {
            "vector": (config.hidden_size,),
            "gate.weight": (config.hidden_size,),
            "gate.bias": (1,),
        }
        if config.recurrence:
            shapes |= dict.fromkeys(("gate.threshold", "gate.spread", "recurrence.bias", "recurrence.own"), (1,))
            shapes["recurrence.previous"] = (config.recurrence, 3)
        if config.attention:
            require_fitted(config, "attention_heads")
            weights = (int(config.layer) + 1) * cast(int, config.attention_heads)
            shapes["recurrence.attention"] = (config.recurrence, weights)
        return shapes

    @classmethod
    def refused_by(cls, config: TADConfig) -> Mapping[str, str]:
        """With a recurrence, beams, which reorder rows."""
        if not config.recurrence:
            return cls.refuses
        names = ("beams", "mixed_rows_with_beams", "output_steering_of_beams")
        return {**cls.refuses, **dict.fromkeys(names, "the memory of a row does not follow its beam")}

    @classmethod
    def needs(cls, config: TADConfig, info: ModelInfo) -> CaptureRequest:
        """The outputs of the candidate layers over the answers.

        Raises:
            ValueError: if the layer is out of range.
            UnsupportedModelError: if attention is used and the model returns no attention weights.
        """
        if config.attention and not info.shows_attention:
            raise UnsupportedModelError(
                "attention=True needs attention weights, which only attn_implementation='eager' has. Load the model with "
                "it, or call `model.set_attn_implementation('eager')` before the fit."
            )
        pools: tuple[Pool, ...] = ("query", config.pool)
        return CaptureRequest(tuple(map(resid_post, candidate_layers(config.layer, info.num_layers))), pools)

    @classmethod
    def fit(cls, data: FitData, config: TADConfig) -> FitResult:
        """Fit the head on tokens of `fit`, its threshold on `calibration`; choose layer and strength on `validation`.

        Raises:
            DatasetError: for too few rows.
        """
        layers = candidate_layers(config.layer, data.info.num_layers)
        data.note("reading tokens")
        judged = heads_with_memory(data, config, layers) if config.recurrence else single_heads(data, config, layers)
        heads = {layer: of_layer.head for layer, of_layer in judged.items()}
        promising = sorted(layers, key=lambda layer: -heads[layer].quality)[:SHORT_LIST]
        tensors = {
            layer: {**heads[layer].tensors, "vector": _mean_difference(data, config, layer)} for layer in promising
        }

        def fitted(layer: int, strength: float) -> TADConfig:
            requires = ["gate:soft"] * (config.gate == "soft") + ["recurrence"] * (config.recurrence > 0)
            requires += ["attention"] * config.attention
            heads = data.info.num_heads if config.attention else None
            return filled_in(
                config, data.info, layer=layer, strength=strength, requires=requires, attention_heads=heads
            )

        trials = {
            layer: Trial(
                build=lambda strength, at=layer: cls(fitted(at, strength), tensors[at]),  # type: ignore[misc]
                vector_norm=float(tensors[layer]["vector"].norm()),
                state_norm=median_query_norm(data, resid_post(layer)),
            )
            for layer in promising
        }
        found = search(data, config.strength, trials)
        layer = found.key
        gate = cls(fitted(layer, 0.0), tensors[layer]).gate
        report: dict[str, Any] = {
            "layer": layer,
            "layers": [{"layer": at, "quality": heads[at].quality} for at in layers],
            "open": {
                **judged[layer].opened(config),
                "general": _mean_gate(gate, data.general(resid_post(layer), "calibration")),
            },
            **found.report,
        }
        return FitResult(fitted(layer, found.strength), tensors[layer], report)


def _mean_difference(data: FitData, config: TADConfig, layer: int) -> torch.Tensor:
    parts = cast(tuple[Part, ...], ("fit", "calibration"))
    vector, _ = mean_difference(data, ("chosen", "rejected"), resid_post(layer), parts, config.pool)
    return torch.from_numpy(vector.astype(np.float32))


def _mean_gate(gate: Any, states: NDArray[np.float32]) -> float | None:
    return float(gate(torch.from_numpy(states)).mean()) if len(states) else None
