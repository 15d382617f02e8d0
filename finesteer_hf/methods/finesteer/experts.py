"""Fits the experts: the closed forms, of which the best on held-out rows is kept, or the paper's trained mixture."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch

from finesteer_hf.errors import DatasetError
from finesteer_hf.estimators import (
    MixtureSteering,
    PaperMoSE,
    ReducedRankSteering,
    calibration_slope,
    held_out_r2,
    mean_cosine,
)
from finesteer_hf.methods._shared.rows import ContrastRows
from finesteer_hf.methods.finesteer.config import Experts, FineSteerConfig
from finesteer_hf.methods.finesteer.tensors import EXPERT_TENSORS, to_file


# Largest default size of an adapter, in bytes: 2 MB minus a page of header.
SIZE_LIMIT = 1_990_000
# More directions than this never paid off on held-out rows.
HIGHEST_RANK = 64
PAPER_RANK = 10
# Width of keys and residual network when the paper's mixture is one of several candidates: as good on held-out rows as
# the full width, and within the size limit.
SMALL_WIDTH = 64
MIN_ROWS = 10


@dataclass(frozen=True)
class ExpertFit:
    """Fitted experts.

    Attributes:
        kind: `mixture`, `reduced_rank` or `paper`.
        num_experts, residual_rank: chosen numbers.
        tensors: tensors by their names in the adapter's file.
        estimator: predicts v for states.
        constant: the mean shift of the rows, `[d]`.
        report: the comparison, on rows held out within the fit.
    """

    kind: Experts
    num_experts: int
    residual_rank: int
    tensors: dict[str, torch.Tensor]
    estimator: Any = field(repr=False)
    constant: np.ndarray = field(repr=False)
    report: dict[str, Any]

    def predict(self, states: np.ndarray) -> np.ndarray:
        """v of states `[M, d]`."""
        return np.asarray(self.estimator.predict(states))

    def judge(self, rows: ContrastRows) -> dict[str, Any]:
        """Figures on rows that were not used in the fit."""
        if not len(rows):
            return {"rows": 0}
        vectors, constant = self.predict(rows.queries), np.broadcast_to(self.constant, rows.shifts.shape)
        figures: dict[str, Any] = {
            "rows": len(rows),
            "r2": held_out_r2(rows.shifts, vectors, constant),
            "cosine": mean_cosine(rows.shifts, vectors),
            "cosine_of_constant": mean_cosine(rows.shifts, constant),
            "calibration_slope": calibration_slope(rows.shifts, vectors, constant),
        }
        return figures


def fit_experts(config: FineSteerConfig, rows: ContrastRows, seed: int, spare: int = 0) -> ExpertFit:
    """Fit the experts that the config names.

    Args:
        config: `experts`, `num_experts`, `residual_rank`, `residual`, `key_dim`, `hidden_dim` and `compat` are used.
        rows: queries and shifts.
        seed: seed of folds, K-means and training.
        spare: bytes of the rest of the adapter.

    Raises:
        DatasetError: if there are too few rows for the settings.
    """
    if len(rows) < MIN_ROWS:
        raise DatasetError(
            f"The experts need at least {MIN_ROWS} rows to fit on, got {len(rows)}; hundreds are recommended."
        )
    for name, limit in (("num_experts", len(rows)), ("residual_rank", min(len(rows) - 1, rows.shifts.shape[1]))):
        value = getattr(config, name)
        if value != "auto" and value > limit:
            raise DatasetError(
                f"{name}={value} is more than the {len(rows)} rows of width {rows.shifts.shape[1]} allow ({limit}). Give "
                f"more rows, a lower {name}, or 'auto'."
            )
    if config.experts == "paper":
        return _paper(config, rows, seed)
    if config.experts == "reduced_rank":
        return _reduced_rank(config, rows, seed, spare)
    return _mixture(config, rows, seed, spare)


def highest_rank(width: int, num_experts: int, spare: int) -> int:
    """Highest residual rank that held-out rows may choose: within the size limit, a quarter of the width, and 64."""
    affordable = (SIZE_LIMIT - spare - 4 * width * (2 * num_experts + 2)) // (8 * width)
    return max(1, min(HIGHEST_RANK, width // 4, affordable))


def small_width(width: int, spare: int) -> int:
    """Width of the keys and the residual network of a trained mixture within the size limit."""
    vectors = 2 * max(PaperMoSE.EXPERT_CANDIDATES) + PAPER_RANK
    return max(1, min(SMALL_WIDTH, width, (SIZE_LIMIT - spare) // (4 * width) - vectors))


def _reduced_rank(config: FineSteerConfig, rows: ContrastRows, seed: int, spare: int) -> ExpertFit:
    width = rows.shifts.shape[1]
    fitted = ReducedRankSteering(config.residual_rank, max_rank=highest_rank(width, 0, spare), seed=seed)
    fitted.fit(rows.queries, rows.shifts, rows.groups)
    report = {
        "held_out_r2": fitted.held_out_r2_,
        "held_out_cosine": fitted.held_out_cosine_,
        "slope": fitted.slope_,
        "ridge": fitted.ridge_,
        "ranks": fitted.rank_curve_,
    }
    return _expert_fit("reduced_rank", 1, fitted.rank_, fitted, rows, report)


def _mixture(config: FineSteerConfig, rows: ContrastRows, seed: int, spare: int) -> ExpertFit:
    most = max(MixtureSteering.EXPERT_CANDIDATES) if config.num_experts == "auto" else int(config.num_experts)
    fitted = MixtureSteering(
        config.num_experts,
        residual_rank=config.residual_rank,
        max_rank=highest_rank(rows.shifts.shape[1], most, spare),
        seed=seed,
    )
    fitted.fit(rows.queries, rows.shifts, rows.groups)
    report = {
        "held_out_r2": fitted.held_out_r2_,
        "held_out_cosine": fitted.held_out_cosine_,
        "slope": fitted.slope_,
        "ablations": fitted.ablations_,
        "rows_of_experts": fitted.expert_sizes_,
    }
    found = _expert_fit("mixture", fitted.num_experts_, fitted.residual_rank_, fitted, rows, report)
    return found if config.experts == "mixture" or found.num_experts > 1 else _without_router(found)


def _without_router(found: ExpertFit) -> ExpertFit:
    """One expert needs no routing: its prototype is part of the bias."""
    tensors = {name: found.tensors[name] for name in EXPERT_TENSORS["reduced_rank"].values()}
    tensors["residual.bias"] = tensors["residual.bias"] + found.tensors["experts.prototypes"][0]
    return ExpertFit("reduced_rank", 1, found.residual_rank, tensors, found.estimator, found.constant, found.report)


def _paper(config: FineSteerConfig, rows: ContrastRows, seed: int) -> ExpertFit:
    rank = PAPER_RANK if config.residual_rank == "auto" else int(config.residual_rank)
    if rank == 0:
        raise ValueError("experts='paper' needs a residual of at least rank 1, got residual_rank=0; use 'mixture'.")
    variant = "orthogonal" if config.residual == "orthogonal" else "paper"
    fitted = PaperMoSE(
        config.num_experts,
        residual_rank=rank,
        key_dim=config.key_dim,
        hidden_dim=config.hidden_dim,
        variant=variant,
        compat=config.compat,
        seed=seed,
    )
    fitted.fit(rows.queries, rows.shifts, rows.groups)
    report = {
        "variant": config.residual,
        "epochs": len(fitted.history_),
        "best_epoch": fitted.best_epoch_,
        "validation_error": fitted.validation_error_,
        "calinski_harabasz": [{"num_experts": k, "index": value} for k, value in fitted.expert_curve_.items()],
    }
    return _expert_fit("paper", fitted.num_experts_, rank, fitted, rows, report)


def _expert_fit(
    kind: str, num_experts: int, rank: int, estimator: Any, rows: ContrastRows, report: dict[str, Any]
) -> ExpertFit:
    tensors = to_file(EXPERT_TENSORS[kind], estimator.state())
    constant = rows.shifts.mean(axis=0)
    return ExpertFit(cast(Experts, kind), int(num_experts), int(rank), tensors, estimator, constant, report)
