"""Which blocks to steer: how well each separates the queries and predicts the shifts, and its first-order gain."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from finesteer_hf.estimators import RidgePath
from finesteer_hf.estimators.linear_algebra import row_space
from finesteer_hf.estimators.ridge import group_blocks
from finesteer_hf.method_api import FitData, ModelInfo
from finesteer_hf.methods._shared.rows import ContrastRows, contrast_rows, general_rows, query_rows
from finesteer_hf.methods._shared.screening import first_order_gain, preference_gradients, state_norms
from finesteer_hf.methods._shared.trials import candidate_layers, evenly
from finesteer_hf.methods.finesteer.config import FineSteerConfig, sites_of
from finesteer_hf.methods.query_gate import separability
from finesteer_hf.methods.query_gate.read_site import BLUNT, SWEEP_ROWS
from finesteer_hf.sites import Site


# Blocks are steered together if their gain is at least this share of the best one's; they are spaced so that there are
# at most so many, since neighbours see nearly the same gradient.
WORTH_STEERING, MOST_BLOCKS = 0.5, 8


@dataclass(frozen=True)
class LayerFigures:
    """Results of the sweep at a layer.

    Attributes:
        layer: index of the block.
        r2: exact held-out R^2 of ridge regression of shifts on states, against the constant predictor, on the fit
            part; None if the fit does not use differences.
        separability: held-out AUROC of a ridge classifier of the queries against general prompts; None without them.
        gain: first-order gain on the calibration part of the fit part's mean gradient, in nats per token; None if the
            fit does not use gradients.
    """

    layer: int
    r2: float | None
    separability: float | None
    gain: float | None = None


@dataclass(frozen=True)
class Sweep:
    """The layers that separate the queries about as well as the best one.

    Attributes:
        by_fit: layers by descending R^2 of the shifts.
        by_gain: layers by descending first-order gain; empty without gradients.
        several: the layers worth steering together, ascending; empty if fewer than two.
        table: all results.
    """

    by_fit: list[int]
    by_gain: list[int]
    several: list[int]
    table: list[dict[str, Any]]


def wants_gradients(config: FineSteerConfig) -> bool:
    """Whether a fit learns from gradients; the published code and its trained mixture learn from differences."""
    published = config.compat == "official" or config.experts == "paper"
    return config.target == "gradient" or (config.target == "auto" and not published)


def candidate_sites(config: FineSteerConfig, info: ModelInfo) -> dict[int, tuple[Site, tuple[Site, ...]]]:
    """Read and write sites of each layer that the config leaves open.

    Raises:
        ValueError: if a layer or site is out of the model's range.
    """
    pairs = {layer: sites_of(config, layer) for layer in candidate_layers(config.layer, info.num_layers)}
    for read, writes in pairs.values():
        for site in (read, *writes):
            if site.layer >= info.num_layers:
                raise ValueError(f"{site} is out of range: the model has layers 0 to {info.num_layers - 1}.")
    return pairs


def shift_sites(config: FineSteerConfig, read: Site, writes: tuple[Site, ...]) -> tuple[Site, ...]:
    """Sites of the shifts: the write sites; the published code takes them where it reads."""
    return (read,) if config.compat == "official" else writes


def sweep_layers(data: FitData, config: FineSteerConfig) -> Sweep:
    """Compare the candidate layers on the fit and calibration parts, so that validation rows stay unseen."""
    sites = candidate_sites(config, data.info)
    gains = _gains(data, {layer: writes for layer, (_, writes) in sites.items()}) if wants_gradients(config) else {}
    figures = []
    for layer, (read, writes) in sites.items():
        general = general_rows(data, read, ("fit",))[:SWEEP_ROWS] if config.gate != "always" else None
        if config.target == "gradient":
            told = None if general is None else separability(query_rows(data, read, ("fit",))[:SWEEP_ROWS], general)
            figures.append(LayerFigures(layer, None, told, gains[layer]))
            continue
        rows = contrast_rows(data, read, shift_sites(config, read, writes), ("fit",))
        figures.append(layer_figures(layer, rows.sample(SWEEP_ROWS, data.seed), general, gains.get(layer)))
    sharpest = max((found.separability for found in figures if found.separability is not None), default=0.0)
    sharp = [found for found in figures if (found.separability or 0.0) >= sharpest - BLUNT]
    by_gain = sorted(sharp, key=lambda found: -(found.gain or 0.0)) if gains else []
    return Sweep(
        by_fit=[found.layer for found in sorted(sharp, key=lambda found: -(found.r2 or 0.0))],
        by_gain=[found.layer for found in by_gain],
        several=_several(sharp) if gains and config.layer == "auto" else [],
        table=[asdict(found) for found in figures],
    )


def layer_figures(
    layer: int, rows: ContrastRows, general: np.ndarray | None, gain: float | None = None
) -> LayerFigures:
    """Judge one layer by two ridge regressions with exact leave-one-out residuals."""
    if not rows.vary:
        return LayerFigures(layer, 0.0, None if general is None else 0.5, gain)
    blocks = group_blocks(rows.groups)
    path = RidgePath.of(row_space(rows.queries)[0], row_space(rows.shifts)[0])
    r2 = max(path.held_out_curve(blocks).values())
    return LayerFigures(layer, r2, None if general is None else separability(rows.queries, general), gain)


def _gains(data: FitData, writes: dict[int, tuple[Site, ...]]) -> dict[int, float]:
    sites = tuple(dict.fromkeys(site for own in writes.values() for site in own))
    learned, held_out = (preference_gradients(data, sites, (part,)) for part in ("fit", "calibration"))
    norms = state_norms(data, sites)
    return {
        layer: float(first_order_gain(held_out, {s: learned[s].mean(axis=0)[None] for s in own}, norms).mean())
        for layer, own in writes.items()
    }


def _several(sharp: list[LayerFigures]) -> list[int]:
    best = max(found.gain or 0.0 for found in sharp)
    worth = sorted(found.layer for found in sharp if best > 0 and (found.gain or 0.0) >= WORTH_STEERING * best)
    chosen = evenly(worth[::-1], MOST_BLOCKS)[::-1]
    return chosen if len(chosen) > 1 else []
