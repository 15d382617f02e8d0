"""Fitting FineSteer: where to act, when, how, and how strongly, each chosen on rows that were held out of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from finesteer_hf.errors import DatasetError
from finesteer_hf.estimators import expert_weights
from finesteer_hf.methods.base import FitData, FitResult, ModelInfo, Part
from finesteer_hf.methods.finesteer.config import FineSteerConfig, sites_of
from finesteer_hf.methods.finesteer.experts import MIN_ROWS, ExpertFit, fit_experts, small_width
from finesteer_hf.methods.finesteer.layers import shift_site, sweep_layers
from finesteer_hf.methods.query_gate import GateFit, fit_gate
from finesteer_hf.methods.rows import ContrastRows, contrast_rows, json_ready
from finesteer_hf.methods.strength import median_norm
from finesteer_hf.methods.trials import RELATIVE_DOSES, SHORT_LIST, Trial, try_each
from finesteer_hf.sites import Site


if TYPE_CHECKING:
    from finesteer_hf.methods.finesteer.method import FineSteer


# Ranks of the residual map that are tried steered, below the one that predicts the shifts best; 0 is a constant vector.
LOW_RANKS = (0, 1, 4, 8, 16)
# A tenth of fewer rows tells little of when to stop training.
MIN_ROWS_TO_TRAIN = 60
# Multiples of the dose that was best at the layer, at which they are tried.
NEAR_DOSES = (0.75, 1.0, 1.33)


@dataclass(frozen=True)
class LayerFit:
    """Gate and experts of a layer, fitted by some settings, without a strength."""

    settings: FineSteerConfig
    layer: int
    read: Site
    write: Site
    gate: GateFit
    experts: ExpertFit

    def config(self, info: ModelInfo, strength: float) -> FineSteerConfig:
        """The settings with everything that was left open filled in."""
        settings = self.settings
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

    Of the layers that tell the queries apart, those whose shifts are best predicted are tried: a gate and the quickest
    experts are fitted at each, and the model is run steered on held-out rows. So are maps of lower rank at the layer
    that is taken: the rank that predicts shifts best is not always the one that steers best, for a strength well above
    1 multiplies the error of every direction. With `experts="auto"`, a small mixture that is trained as published is tried
    beside the best of them. The experts learn from the `fit` and `calibration` parts (`fit_gate` says
    what the gate learns from); layer, rank, experts and strength are chosen on `validation`.

    Raises:
        DatasetError: for too few rows, or a gate that needs general prompts where there are none.
    """
    rows = len(data.prompts("fit"))
    if rows < MIN_ROWS:
        raise DatasetError(f"FINESTEER needs at least {MIN_ROWS} rows to fit on, got {rows}; hundreds are advised.")
    promising, sweep = sweep_layers(data, config)
    promising = promising[:SHORT_LIST]
    gates = {layer: _fit_gate(data, config, layer) for layer in promising}

    def fit_at(layer: int, settings: FineSteerConfig) -> LayerFit:
        data.note(f"fitting experts at layer {layer}")
        rows = _rows(data, config, layer, ("fit", "calibration"))
        experts = fit_experts(settings, rows, data.seed, gates[layer].size)
        return LayerFit(settings, layer, *sites_of(config, layer), gates[layer], experts)

    def trial(fit: LayerFit) -> Trial:
        tensors = {**fit.gate.tensors, **fit.experts.tensors}
        return Trial(
            build=lambda strength: method_cls(fit.config(data.info, strength), tensors),
            vector_norm=median_norm(fit.experts.predict(data.query(fit.read, "fit"))),
            state_norm=median_norm(data.query(fit.write, "fit")),
        )

    layer, tried = promising[0], None
    if len(promising) > 1:
        quick = dataclasses.replace(config, experts="reduced_rank", num_experts="auto", residual_rank="auto")
        layer, tried = try_each(data, {at: trial(fit_at(at, quick)) for at in promising}, config.strength)
    chosen, experts_tried = fit_at(layer, config), None
    lower: dict[str, LayerFit] = {}
    if config.experts in ("auto", "reduced_rank") and (config.num_experts, config.residual_rank) == ("auto", "auto"):
        best_fitting = chosen.experts.residual_rank
        lower = {f"rank {rank}": fit_at(layer, _of_rank(config, rank)) for rank in LOW_RANKS if rank < best_fitting}
        fits = {f"rank {best_fitting}": chosen, **lower}
        if config.experts == "auto" and rows >= MIN_ROWS_TO_TRAIN:
            fits |= _trained(config, partial(fit_at, layer), data.info.hidden_size, gates[layer].size)
        trials = {name: trial(fit) for name, fit in fits.items()}
        doses = RELATIVE_DOSES if tried is None else _doses_near(tried, layer, trials[f"rank {best_fitting}"])
        name, experts_tried = try_each(data, trials, config.strength, what="experts", doses=doses)
        chosen = fits[name]
    steering = trial(chosen)
    strength, curve, why = steering.choose_strength(config.strength, data)
    data.note(f"layer {layer}, strength {strength:g}: {why}")
    baselines = None
    if curve:
        constant = lower.get("rank 0") or fit_at(layer, _of_rank(config, 0))
        dose = strength / steering.strength_of(1.0)
        others = {"constant": trial(constant), "random direction": trial(_random(constant, data.seed))}
        baselines = _best_of(data, others, [near * dose for near in NEAR_DOSES])
    norms = {"vector_norm": steering.vector_norm, "state_norm": steering.state_norm}
    report = {
        "layer": layer,
        "layers": sweep,
        "layers_tried": tried,
        "experts_tried": experts_tried,
        "vector": chosen.experts.judge(_rows(data, config, layer, ("validation",))) | norms,
        "experts": chosen.experts.report,
        "expert_use": _expert_use(chosen.experts, data.query(chosen.read, "fit")),
        "gate": chosen.gate.report,
        "gate_scores": chosen.gate.scores,
        "strength": why,
        "baselines": baselines,
        "dose_response": [dataclasses.asdict(point) for point in curve],
    }
    tensors = {**chosen.gate.tensors, **chosen.experts.tensors}
    return FitResult(chosen.config(data.info, strength), tensors, json_ready(report))


def _of_rank(config: FineSteerConfig, rank: int) -> FineSteerConfig:
    """The closed form of one rank; rank 0 is a constant vector."""
    if rank:
        return dataclasses.replace(config, experts="reduced_rank", num_experts="auto", residual_rank=rank)
    return dataclasses.replace(config, experts="auto", num_experts=1, residual_rank=0)


def _trained(
    config: FineSteerConfig, fit: Callable[[FineSteerConfig], LayerFit], width: int, spare: int
) -> dict[str, LayerFit]:
    """The paper's mixture at a size that an adapter may take by default; nothing where the shifts form no clusters."""
    small = small_width(width, spare)
    settings = dataclasses.replace(config, experts="paper", key_dim=small, hidden_dim=small)
    try:
        return {"trained mixture": fit(settings)}
    except ValueError:
        return {}


def _random(constant: LayerFit, seed: int) -> LayerFit:
    """A constant vector of the same norm in a random direction, under the same gate."""
    bias = constant.experts.tensors["residual.bias"]
    drawn = torch.randn(bias.shape, generator=torch.Generator().manual_seed(seed))
    tensors = {**constant.experts.tensors, "residual.bias": drawn * (bias.norm() / drawn.norm())}
    return dataclasses.replace(constant, experts=dataclasses.replace(constant.experts, tensors=tensors))


def _best_of(data: FitData, trials: dict[str, Trial], doses: list[float]) -> dict[str, dict[str, float]]:
    """What simpler vectors reach on held-out rows at their best of some doses, to hold the curve against."""
    found = {}
    for name, trial in trials.items():
        points = data.dose_response(trial.build, (0.0, *(trial.strength_of(dose) for dose in doses)))[1:]
        best = max(points, key=lambda point: point.bottleneck)
        found[name] = {"bottleneck": best.bottleneck, "bottleneck_se": best.bottleneck_se, "kl": best.kl}
    return found


def _doses_near(tried: list[dict[str, Any]], layer: int, trial: Trial) -> list[float]:
    """Doses around the one that was best at a layer."""
    strength = next(row["strength"] for row in tried if row["layer"] == layer)
    return [near * strength / trial.strength_of(1.0) for near in NEAR_DOSES]


def _fit_gate(data: FitData, config: FineSteerConfig, layer: int) -> GateFit:
    read, _ = sites_of(config, layer)
    if not _rows(data, config, layer, ("fit",)).vary:
        raise DatasetError(
            f"All queries have the same state at {read}, so neither gate nor experts can tell them apart. Choose a later "
            "layer."
        )
    data.note(f"fitting the gate at layer {layer}")
    return fit_gate(config, data, read)


def _rows(data: FitData, config: FineSteerConfig, layer: int, parts: tuple[Part, ...]) -> ContrastRows:
    read, write = sites_of(config, layer)
    return contrast_rows(data, read, shift_site(config, read, write), parts)


def _expert_use(experts: ExpertFit, queries: np.ndarray) -> list[float] | None:
    """Mean routing weight of each expert over the rows; None without routing."""
    if "router.weight" not in experts.tensors:
        return None
    weights = expert_weights(
        torch.from_numpy(queries), experts.tensors["router.weight"], experts.tensors["router.bias"]
    )
    use: list[float] = weights.mean(dim=0).tolist()
    return use
