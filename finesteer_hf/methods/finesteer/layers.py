"""Which block to steer: how well each predicts the shifts, and how well it tells the queries apart."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from finesteer_hf.estimators import RidgePath
from finesteer_hf.estimators.linear_algebra import row_space
from finesteer_hf.estimators.ridge import group_blocks
from finesteer_hf.methods.base import FitData, ModelInfo
from finesteer_hf.methods.finesteer.config import FineSteerConfig, sites_of
from finesteer_hf.methods.query_gate import separability
from finesteer_hf.methods.query_gate.read_site import BLUNT, SWEEP_ROWS
from finesteer_hf.methods.rows import ContrastRows, contrast_rows, general_rows
from finesteer_hf.methods.trials import candidate_layers
from finesteer_hf.sites import Site


@dataclass(frozen=True)
class LayerFigures:
    """What the sweep found at a layer, on the fit part.

    Attributes:
        layer: index of the block.
        r2: exact held-out R^2 of ridge regression of shifts on states, against the constant predictor.
        separability: held-out AUROC of a ridge classifier of the queries against general prompts; None without them.
    """

    layer: int
    r2: float
    separability: float | None


def candidate_sites(config: FineSteerConfig, info: ModelInfo) -> dict[int, tuple[Site, Site]]:
    """Read and write site of each layer that the config leaves open.

    Raises:
        ValueError: if a layer or site is out of the model's range.
    """
    pairs = {layer: sites_of(config, layer) for layer in candidate_layers(config.layer, info.num_layers)}
    for read, write in pairs.values():
        for site in (read, write):
            if site.layer >= info.num_layers:
                raise ValueError(f"{site} is out of range: the model has layers 0 to {info.num_layers - 1}.")
    return pairs


def shift_site(config: FineSteerConfig, read: Site, write: Site) -> Site:
    """Where the shifts are taken: at the write site; the published code takes them where it reads."""
    return read if config.compat == "official" else write


def sweep_layers(data: FitData, config: FineSteerConfig) -> tuple[list[int], list[dict[str, Any]]]:
    """Compare the candidate layers on the fit part, so that calibration and validation rows stay unseen.

    Returns:
        The layers that separate the queries about as well as the best does, by falling R^2; and the table.
    """
    figures = []
    for layer, (read, write) in candidate_sites(config, data.info).items():
        rows = contrast_rows(data, read, shift_site(config, read, write), ("fit",))
        general = general_rows(data, read, ("fit",))[:SWEEP_ROWS] if config.gate != "always" else None
        figures.append(layer_figures(layer, rows.sample(SWEEP_ROWS, data.seed), general))
    sharpest = max((found.separability for found in figures if found.separability is not None), default=0.0)
    sharp = [found for found in figures if (found.separability or 0.0) >= sharpest - BLUNT]
    return [found.layer for found in sorted(sharp, key=lambda found: -found.r2)], [asdict(found) for found in figures]


def layer_figures(layer: int, rows: ContrastRows, general: np.ndarray | None) -> LayerFigures:
    """Judge one layer by two ridge regressions whose leave-one-out residuals are exact."""
    if not rows.vary:
        return LayerFigures(layer, 0.0, None if general is None else 0.5)
    blocks = group_blocks(rows.groups)
    path = RidgePath.of(row_space(rows.queries)[0], row_space(rows.shifts)[0])
    r2 = max(path.held_out_curve(blocks).values())
    return LayerFigures(layer, r2, None if general is None else separability(rows.queries, general))
