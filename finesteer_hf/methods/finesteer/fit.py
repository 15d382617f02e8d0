"""Fitting FineSteer: where to act, when, how, and how strongly, each chosen on rows that were held out of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from finesteer_hf.errors import DatasetError
from finesteer_hf.estimators import expert_weights
from finesteer_hf.methods.base import FitData, FitResult, ModelInfo
from finesteer_hf.methods.finesteer.config import FineSteerConfig, sites_of
from finesteer_hf.methods.finesteer.experts import MIN_ROWS, ExpertFit, fit_experts
from finesteer_hf.methods.finesteer.gate import GateFit, fit_gate
from finesteer_hf.methods.finesteer.layers import shift_site, sweep_layers
from finesteer_hf.methods.finesteer.rows import contrast_rows, json_ready
from finesteer_hf.methods.layers import SHORT_LIST, try_layers
from finesteer_hf.methods.strength import choose_strength, median_norm
from finesteer_hf.sites import Site


if TYPE_CHECKING:
    from finesteer_hf.methods.finesteer.method import FineSteer


@dataclass(frozen=True)
class LayerFit:
    """Gate and experts of a layer, without a strength."""

    layer: int
    read: Site
    write: Site
    gate: GateFit
    experts: ExpertFit

    def config(self, settings: FineSteerConfig, info: ModelInfo, strength: float) -> FineSteerConfig:
        """The settings with everything that was left open filled in."""
        score = [] if settings.gate == "always" else [f"score:{self.gate.score}"]
        return dataclasses.replace(
            settings,
            layer=self.layer,
            read_site=str(self.read),
            write_site=str(self.write),
            gate_score=self.gate.score,
            subspace_rank=self.gate.subspace_rank,
            experts=self.experts.kind,
            num_experts=self.experts.num_experts,
            residual_rank=self.experts.residual_rank,
            strength=strength,
            hidden_size=info.hidden_size,
            num_hidden_layers=info.num_layers,
            requires=[f"gate:{settings.gate}", *score, f"experts:{self.experts.kind}"],
        )


def fit_finesteer(data: FitData, config: FineSteerConfig, method_cls: type[FineSteer]) -> FitResult:
    """Fit gate, experts, layer and strength.

    Of the layers that tell the queries apart, those whose shifts are best predicted are tried: gate and experts are
    fitted at each, and the model is run steered on held-out rows. The experts learn from the `fit` and `calibration`
    parts (`fit_gate` says what the gate learns from); layer and strength are chosen on `validation`.

    Raises:
        DatasetError: for too few rows, or a gate that needs general prompts where there are none.
    """
    rows = len(data.prompts("fit"))
    if rows < MIN_ROWS:
        raise DatasetError(f"FINESTEER needs at least {MIN_ROWS} rows to fit on, got {rows}; hundreds are advised.")
    promising, sweep = sweep_layers(data, config)
    fits = {layer: _fit_layer(data, config, layer) for layer in promising[:SHORT_LIST]}

    def builder(fit: LayerFit) -> Callable[[float], FineSteer]:
        tensors = {**fit.gate.tensors, **fit.experts.tensors}
        return lambda strength: method_cls(fit.config(config, data.info, strength), tensors)

    layer, tried = try_layers(data, {layer: builder(fit) for layer, fit in fits.items()}, config.strength)
    chosen = fits[layer]
    train = contrast_rows(data, chosen.read, shift_site(config, chosen.read, chosen.write), ("fit", "calibration"))
    vector_norm = median_norm(chosen.experts.predict(train.queries))
    state_norm = median_norm(data.query(chosen.write, "fit"))
    strength, curve, why = choose_strength(
        config.strength, data, builder(chosen), vector_norm=vector_norm, state_norm=state_norm
    )
    norms = {"vector_norm": vector_norm, "state_norm": state_norm}
    data.note(f"layer {layer}, strength {strength:g}: {why}")
    return FitResult(
        config=chosen.config(config, data.info, strength),
        tensors={**chosen.gate.tensors, **chosen.experts.tensors},
        report=json_ready(
            {
                "layer": layer,
                "layers": sweep,
                "layers_tried": tried,
                "vector": chosen.experts.judge(_validation(data, config, chosen)) | norms,
                "experts": chosen.experts.report,
                "expert_use": _expert_use(chosen.experts, train.queries),
                "gate": chosen.gate.report,
                "gate_scores": chosen.gate.scores,
                "strength": why,
                "dose_response": [dataclasses.asdict(point) for point in curve],
            }
        ),
    )


def _fit_layer(data: FitData, config: FineSteerConfig, layer: int) -> LayerFit:
    data.note(f"fitting gate and experts at layer {layer}")
    read, write = sites_of(config, layer)
    rows = contrast_rows(data, read, shift_site(config, read, write), ("fit", "calibration"))
    if not rows.vary:
        raise DatasetError(
            f"All {len(rows)} queries have the same state at {read}, so neither gate nor experts can tell them apart. "
            "Choose a later layer."
        )
    gate = fit_gate(config, data, read)
    return LayerFit(layer, read, write, gate, fit_experts(config, rows, data.seed, gate.size))


def _validation(data: FitData, config: FineSteerConfig, fit: LayerFit) -> Any:
    return contrast_rows(data, fit.read, shift_site(config, fit.read, fit.write), ("validation",))


def _expert_use(experts: ExpertFit, queries: np.ndarray) -> list[float] | None:
    """Mean routing weight of each expert over the rows; None without routing."""
    if "router.weight" not in experts.tensors:
        return None
    weights = expert_weights(
        torch.from_numpy(queries), experts.tensors["router.weight"], experts.tensors["router.bias"]
    )
    use: list[float] = weights.mean(dim=0).tolist()
    return use
