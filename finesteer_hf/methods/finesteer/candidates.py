"""Candidates that a fit compares: place, target, experts and gate."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from finesteer_hf.errors import DatasetError
from finesteer_hf.method_api import FitData, ModelInfo, Part
from finesteer_hf.methods._shared.rows import ContrastRows, contrast_rows, rows_vary
from finesteer_hf.methods._shared.screening import (
    SCREEN_DOSE,
    first_order_gain,
    preference_gradients,
    relative_norm,
    state_norms,
)
from finesteer_hf.methods._shared.trials import Trial
from finesteer_hf.methods.finesteer.config import SEVERAL_SITES, FineSteerConfig, Target, sites_of
from finesteer_hf.methods.finesteer.experts import ExpertFit, fit_experts
from finesteer_hf.methods.finesteer.layers import shift_sites
from finesteer_hf.methods.query_gate import GateFit, fit_gate
from finesteer_hf.processors import Positions
from finesteer_hf.sites import Site, resid_post


if TYPE_CHECKING:
    from finesteer_hf.methods.finesteer.method import FineSteer

PARTS: tuple[Part, ...] = ("fit", "calibration")


@dataclass(frozen=True)
class Place:
    """Where the query is read, where vectors are added, and their target.

    Attributes:
        read: site of the query's state.
        writes: steered sites.
        target: `difference` or `gradient`.
    """

    read: Site
    writes: tuple[Site, ...]
    target: Target

    def __str__(self) -> str:
        layers = [site.layer for site in self.writes]
        where = f"block {layers[0]}" if len(layers) == 1 else f"blocks {', '.join(map(str, layers))}"
        return f"{self.target}, {where}"


@dataclass(frozen=True, eq=False)
class CandidateFit:
    """Gate and experts at a place, fitted with some settings, without a strength. Compared by identity."""

    settings: FineSteerConfig
    place: Place
    gate: GateFit
    experts: ExpertFit
    positions: Positions
    refined: int = 0

    def config(self, info: ModelInfo, strength: float) -> FineSteerConfig:
        """The settings with every open choice filled in."""
        settings, writes = self.settings, [str(site) for site in self.place.writes]
        requires = [f"gate:{settings.gate}", f"experts:{self.experts.kind}"]
        requires += [] if settings.gate == "always" else [f"score:{self.gate.score}"]
        requires += [SEVERAL_SITES] if len(writes) > 1 else []
        return dataclasses.replace(
            settings,
            layer=self.place.writes[0].layer,
            read_site=str(self.place.read),
            write_site=writes[0] if len(writes) == 1 else writes,
            target=self.place.target,
            refine=self.refined,
            positions=self.positions,
            gate_score=self.gate.score,
            gate_calibration=self.gate.report.get("calibration", settings.gate_calibration),
            subspace_rank=self.gate.subspace_rank,
            experts=self.experts.kind,
            num_experts=self.experts.num_experts,
            residual_rank=self.experts.residual_rank,
            strength=strength,
            hidden_size=info.hidden_size,
            num_hidden_layers=info.num_layers,
            requires=requires,
        )


class CandidateFits:
    """Fits gates and experts at places; a gate is fitted once per read site.

    Args:
        data: captured states.
        config: the settings of the fit.
        method_cls: class that candidates are built with.
    """

    def __init__(self, data: FitData, config: FineSteerConfig, method_cls: type[FineSteer]) -> None:
        self.data = data
        self.config = config
        self.method_cls = method_cls
        self._gates: dict[Site, GateFit] = {}
        self._norms: dict[Site, float] = {}
        self._trials: dict[CandidateFit, Trial] = {}

    def place(self, layers: list[int], target: Target) -> Place:
        """A place by its layers; sites named in the config take precedence."""
        read, writes = sites_of(self.config, layers[0])
        if len(layers) > 1:
            writes = tuple(resid_post(layer) for layer in layers)
        return Place(read, writes, target)

    def fit(self, place: Place, settings: FineSteerConfig, positions: Positions) -> CandidateFit:
        """Fit the experts of some settings at a place.

        Raises:
            DatasetError: for too few rows, or a gate that needs general prompts when there are none.
        """
        gate = self.gate(place.read)
        self.data.note(f"fitting experts: {place}")
        experts = fit_experts(settings, self.rows(place, PARTS), self.data.seed, gate.size)
        return CandidateFit(settings, place, gate, experts, positions)

    def gate(self, read: Site) -> GateFit:
        """The gate that reads a site."""
        if read not in self._gates:
            if not rows_vary(self.data.query(read, "fit")):
                raise DatasetError(
                    f"All queries have the same state at {read}, so neither gate nor experts can separate them. Choose a "
                    "later layer."
                )
            self.data.note(f"fitting the gate at {read}")
            self._gates[read] = fit_gate(self.config, self.data, read)
        return self._gates[read]

    def rows(self, place: Place, parts: tuple[Part, ...]) -> ContrastRows:
        """Queries and the shifts that the experts are fitted to, all write sites side by side.

        Gradients give a direction, not a length: at each site they are scaled to a mean shift of the same share of the
        state's norm, `SCREEN_DOSE` over all sites.
        """
        if place.target == "difference":
            return contrast_rows(self.data, place.read, shift_sites(self.config, place.read, place.writes), parts)
        means = {
            site: np.linalg.norm(gradients.mean(axis=0))
            for site, gradients in preference_gradients(self.data, place.writes, PARTS).items()
        }
        share = SCREEN_DOSE / np.sqrt(len(place.writes))
        scales = [share * norm / max(float(means[site]), 1e-12) for site, norm in self.norms(place.writes).items()]
        return contrast_rows(self.data, place.read, place.writes, parts, "gradient", scales)

    def norms(self, sites: tuple[Site, ...]) -> dict[Site, float]:
        """Median norms of the queries' states at sites."""
        self._norms |= state_norms(self.data, [site for site in sites if site not in self._norms])
        return {site: self._norms[site] for site in sites}

    def vectors(self, fit: CandidateFit, part: Part) -> dict[Site, np.ndarray]:
        """A candidate's vectors for the queries of a part, by site, `[rows, d]`."""
        sites = fit.place.writes
        together = fit.experts.predict(self.data.query(fit.place.read, part))
        return dict(zip(sites, np.split(together, len(sites), axis=1), strict=True))

    def trial(self, fit: CandidateFit) -> Trial:
        """The trial of a candidate; one each, because measurements are cached by its `build`."""
        if fit not in self._trials:
            self._trials[fit] = self._new_trial(fit)
        return self._trials[fit]

    def _new_trial(self, fit: CandidateFit) -> Trial:
        tensors = {**fit.gate.tensors, **fit.experts.tensors}
        norms = self.norms(fit.place.writes)
        state_norm = norms[fit.place.writes[0]]
        return Trial(
            build=lambda strength: self.method_cls(fit.config(self.data.info, strength), tensors),
            vector_norm=relative_norm(self.vectors(fit, "fit"), norms) * state_norm,
            state_norm=state_norm,
        )

    def gain(self, fit: CandidateFit) -> float | None:
        """A candidate's first-order gain on held-out rows, in nats per token at a dose of `SCREEN_DOSE`."""
        sites = fit.place.writes
        if not len(self.data.prompts("validation")):
            return None
        gradients = preference_gradients(self.data, sites, ("validation",))
        return float(first_order_gain(gradients, self.vectors(fit, "validation"), self.norms(sites)).mean())

    def random(self, constant: CandidateFit) -> CandidateFit:
        """A constant vector of the same norm in a random direction, under the same gate."""
        bias = constant.experts.tensors["residual.bias"]
        drawn = torch.randn(bias.shape, generator=torch.Generator().manual_seed(self.data.seed))
        tensors = {**constant.experts.tensors, "residual.bias": drawn * (bias.norm() / drawn.norm())}
        return dataclasses.replace(constant, experts=dataclasses.replace(constant.experts, tensors=tensors))


def has_open_experts(config: FineSteerConfig) -> bool:
    """Whether the rank of the closed form is left to the fit."""
    return config.experts in ("auto", "reduced_rank") and config.num_experts == config.residual_rank == "auto"


def of_rank(config: FineSteerConfig, rank: int) -> FineSteerConfig:
    """Settings of the closed form with one rank; rank 0 is a constant vector."""
    if rank:
        return dataclasses.replace(config, experts="reduced_rank", num_experts="auto", residual_rank=rank)
    return dataclasses.replace(config, experts="auto", num_experts=1, residual_rank=0)
