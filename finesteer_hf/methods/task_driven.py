"""TASKDRIVEN: shifts of one layer's heads, learned from a few prompts by the task loss (arXiv 2502.06115, NAACL 2025).

With the model frozen, shifts u_h of the outputs of one block's heads minimise

    mean over prompts of -log p(answer | prompt; u) + l1 |u|_1 + group sum_h sqrt(size) |u_h|_2

so that few heads, and few coordinates in them, are steered. The shifts do not depend on the query.

The objective follows the paper's abstract: task loss, few prompts, additive shifts at a layer, sparse in heads. Its
penalties, step sizes and steered positions do not: here penalties are shares of the smallest ones at which nothing is
steered, so that they mean the same for every model, and steps are those of proximal descent, which makes zeros exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import numpy as np
import torch

from finesteer_hf.adapters.config import MOST_HEADS, SteeringConfig, setting, written_by_fit
from finesteer_hf.adapters.registry import register_steering_method
from finesteer_hf.adapters.tensor_files import HEAD_SIZE, Shape
from finesteer_hf.errors import AdapterFileError, DatasetError, UnsupportedModelError
from finesteer_hf.estimators.sparse_group import proximal_descent
from finesteer_hf.method_api import CaptureRequest, FitData, FitResult, ModelInfo, Part, SteeringMethod
from finesteer_hf.methods._shared.checks import (
    check_count,
    check_layer,
    check_number,
    check_strength,
    filled_in,
    require_fitted,
)
from finesteer_hf.methods._shared.moments import median_query_norm
from finesteer_hf.methods._shared.search import search
from finesteer_hf.methods._shared.trials import SHORT_LIST, Trial, candidate_layers
from finesteer_hf.processors import Decision, Positions, QueryStates, SteeringProcessor, TokenView
from finesteer_hf.sites import Site


MIN_ROWS = 2
# Most rows with a graph in memory.
ROWS_A_GRAPH = 8
# Norm of the first step, as a share of the state's.
FIRST_STEP = 0.1


@dataclass(kw_only=True)
class TaskDrivenConfig(SteeringConfig):
    """Settings of task-driven shifts.

    Attributes:
        layer: decoder block whose heads are shifted; `auto` fits the four where a shift of equal size lowers the loss
            most, to first order, and takes the one with the best held-out effect.
        num_rows: number of training prompts.
        l1: penalty on single coordinates, as a share of the smallest one that alone makes all shifts zero.
        group: penalty on heads, as a share likewise.
        iterations: most steps of the descent; the best one on held-out prompts is kept.
        attention_heads: number of heads of the block, filled in by the fit.
    """

    steering_type: ClassVar[str] = "TASKDRIVEN"

    positions: Positions = field(default="generated", metadata=setting("Steered tokens: all, prompt or generated."))
    strength: float | str = field(
        default="auto", metadata=setting("Lambda: a number, auto, kl:<nats> or norm:<share>.")
    )
    layer: int | str = field(default="auto", metadata=setting("Steered decoder block, or auto."))
    num_rows: int = field(default=32, metadata=setting("Number of training prompts."))
    l1: float = field(default=0.02, metadata=setting("Penalty on coordinates, as a share of the largest useful one."))
    group: float = field(default=0.1, metadata=setting("Penalty on heads, as a share of the largest useful one."))
    iterations: int = field(default=30, metadata=setting("Most steps of the descent."))
    attention_heads: int | None = field(
        default=None, metadata=written_by_fit("Heads of the block.", least=1, most=MOST_HEADS)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layer(self.layer, self.num_hidden_layers)
        check_strength(self.strength)
        check_count("num_rows", self.num_rows, MIN_ROWS)
        check_count("iterations", self.iterations, 1)
        for name in ("l1", "group"):
            value = getattr(self, name)
            check_number(name, value)
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be at least 0 and less than 1 (at 1 nothing is steered), got {value}.")


class TaskDriven(SteeringMethod[TaskDrivenConfig]):
    """`x^{l,h} <- x^{l,h} + strength * u_h` at the outputs of one block's heads, for every query.

    Args:
        config: a fitted `TaskDrivenConfig`.
        tensors: `shifts`, `[heads, head size]` float32; rows of unsteered heads are zero.

    Raises:
        AdapterFileError: if the config is not fitted, or `shifts` does not have one row per head.
    """

    def __init__(self, config: TaskDrivenConfig, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(config, tensors)
        require_fitted(config, "layer", "attention_heads")
        shifts = tensors.get("shifts")
        if shifts is None or shifts.ndim != 2 or len(shifts) != config.attention_heads:
            raise AdapterFileError(
                f"A TASKDRIVEN adapter for {config.attention_heads} heads needs the tensor 'shifts' with one row per head, "
                f"got {None if shifts is None else list(shifts.shape)}."
            )
        self.site = _site(config.layer)
        self.writes = (self.site,)

    def decide(self, queries: QueryStates) -> Decision:
        """The shifts side by side, `[1, heads * head size]`."""
        return Decision(vectors={self.site: self.parameters_on(queries.device)["shifts"].reshape(1, -1)})

    @classmethod
    def tensor_shapes(cls, config: TaskDrivenConfig) -> dict[str, Shape]:
        """One row per head."""
        require_fitted(config, "layer", "attention_heads")
        return {"shifts": (config.attention_heads, HEAD_SIZE)}

    @classmethod
    def needs(cls, config: TaskDrivenConfig, info: ModelInfo) -> CaptureRequest:
        """The head outputs of the candidate blocks, for the size of their states.

        Raises:
            ValueError: if the layer is out of range.
            UnsupportedModelError: if the model has no attention heads.
        """
        if not info.num_heads:
            raise UnsupportedModelError("TASKDRIVEN steers attention heads, and the model has none.")
        layers = candidate_layers(config.layer, info.num_layers)
        return CaptureRequest(tuple(_site(layer) for layer in layers), ("query",))

    @classmethod
    def fit(cls, data: FitData, config: TaskDrivenConfig) -> FitResult:
        """Learn from a few rows of `fit`, stop on `calibration`, choose layer and strength on `validation`.

        Raises:
            DatasetError: for too few rows; if the loss does not depend on the shifts, or they do not lower it.
        """
        loss = TaskLoss.of(data, config)
        sites = [_site(layer) for layer in candidate_layers(config.layer, data.info.num_layers)]
        norms = {site: median_query_norm(data, site) for site in sites}
        slopes = first_order(loss, sites, data.info.num_heads)
        promising = sorted(sites, key=lambda site: -norms[site] * float(slopes[site].norm()))[:SHORT_LIST]
        learned = {}
        for site in promising:
            data.note(f"learning shifts of layer {site.layer}")
            learned[site.layer] = learn(loss, site, slopes[site], norms[site], config)

        def fitted(layer: int, strength: float) -> TaskDrivenConfig:
            return filled_in(config, data.info, layer=layer, strength=strength, attention_heads=data.info.num_heads)

        trials = {
            layer: Trial(
                build=lambda strength, at=layer: cls(fitted(at, strength), {"shifts": learned[at].shifts}),  # type: ignore[misc]
                vector_norm=float(found.shifts.norm()),
                state_norm=norms[_site(layer)],
            )
            for layer, found in learned.items()
            if found.shifts.any()
        }
        if not trials:
            raise DatasetError(
                f"No shift of a head at the layers {list(learned)} makes held-out prompts' answers more likely. "
                "Give more rows (num_rows), smaller penalties (l1, group), or another layer."
            )
        found = search(data, config.strength, trials)
        layer = found.key
        report: dict[str, Any] = {
            "layer": layer,
            **learned[layer].report,
            **found.report,
        }
        return FitResult(fitted(layer, found.strength), {"shifts": learned[layer].shifts}, report)


# -- the loss ---------------------------------------------------------------------------------------------------------


class ShiftedHeads(SteeringProcessor):
    """Adds shifts with gradients.

    Args:
        shifts: by site `[heads, head size]` float32.
        positions: tokens that are steered.
    """

    def __init__(self, shifts: Mapping[Site, torch.Tensor], positions: Positions) -> None:
        self.shifts = shifts
        self.maps = tuple(sorted(shifts))
        self.positions = positions

    def transform(self, site: Site, hidden: torch.Tensor, view: TokenView) -> torch.Tensor:
        shift = self.shifts[site].flatten().to(hidden.device, hidden.dtype)
        return hidden + (shift if view.mask is None else view.mask[..., None] * shift)


@dataclass(frozen=True)
class TaskLoss:
    """Mean over rows of the chosen answer's negative log-likelihood, in nats per token, under given shifts.

    Attributes:
        data: runs the model.
        positions: tokens that are steered.
        rows: training rows of the `fit` part.
        held_out: rows of the `calibration` part.
    """

    data: FitData
    positions: Positions
    rows: Sequence[int]
    held_out: Sequence[int]

    @classmethod
    def of(cls, data: FitData, config: TaskDrivenConfig) -> TaskLoss:
        """Draw the rows.

        Raises:
            DatasetError: for too few rows.
        """
        rng = np.random.default_rng(data.seed)
        sizes = {part: len(data.prompts(part)) for part in cast(tuple[Part, ...], ("fit", "calibration"))}
        if sizes["fit"] < MIN_ROWS:
            raise DatasetError(f"TASKDRIVEN needs at least {MIN_ROWS} rows to fit on, got {sizes['fit']}.")
        rows, held_out = (
            rng.choice(size, min(size, config.num_rows), replace=False).tolist() for size in sizes.values()
        )
        return cls(data, config.positions, rows, held_out)

    def __call__(self, shifts: Mapping[Site, torch.Tensor]) -> tuple[float, dict[Site, torch.Tensor]]:
        """The loss and its gradients on the training rows."""
        leaves = {site: shift.detach().clone().requires_grad_(True) for site, shift in shifts.items()}
        gradients = {site: torch.zeros_like(shift) for site, shift in shifts.items()}
        value = 0.0
        for start in range(0, len(self.rows), ROWS_A_GRAPH):
            few = self.rows[start : start + ROWS_A_GRAPH]
            steering = ShiftedHeads(leaves, self.positions)
            runs = self.data.answers("chosen", "fit", few, steering=steering)
            part = torch.stack([run.nll.cpu() for run in runs]).sum() / len(self.rows)
            value += float(part.detach())
            for site, gradient in zip(leaves, torch.autograd.grad(part, list(leaves.values())), strict=True):
                gradients[site] += gradient
        return value, gradients

    def judged(self, shifts: Mapping[Site, torch.Tensor]) -> float | None:
        """The loss on the held-out rows; None if there are none."""
        if not self.held_out:
            return None
        steering = ShiftedHeads(shifts, self.positions)
        runs = self.data.answers("chosen", "calibration", self.held_out, steering=steering)
        return float(np.mean([float(run.nll) for run in runs]))


def first_order(loss: TaskLoss, sites: Sequence[Site], heads: int) -> dict[Site, torch.Tensor]:
    """Gradients of the loss at zero shifts, all sites in one pass: `[heads, head size]` float32 each."""
    zeros = {site: torch.zeros(heads, loss.data.query(site, "fit").shape[1] // heads) for site in sites}
    return loss(zeros)[1]


# -- the descent ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Learned:
    """Shifts `[heads, head size]` float32, and their report."""

    shifts: torch.Tensor
    report: dict[str, Any]


def learn(loss: TaskLoss, site: Site, slope: torch.Tensor, state_norm: float, config: TaskDrivenConfig) -> Learned:
    """Descend from zero, and keep the step that is best on the held-out rows (without any, the last).

    Args:
        loss: loss of shifts.
        site: where they are added.
        slope: its gradient at zero, `[heads, head size]`.
        state_norm: norm of the states at the site.
        config: penalties and steps.

    Raises:
        DatasetError: if the loss does not depend on the shifts.
    """
    steepness = float(slope.norm())
    if not steepness > 0:
        raise DatasetError(
            f"Answers do not depend on the heads at {site}; with positions={config.positions!r} they cannot."
        )
    l1, group = penalties(slope, config.l1, config.group)

    def smooth(shifts: torch.Tensor) -> tuple[float, torch.Tensor]:
        value, gradients = loss({site: shifts})
        return value, gradients[site]

    before = loss.judged({site: torch.zeros_like(slope)})
    best, best_loss, path = torch.zeros_like(slope), before, []
    for shifts, fitted in proximal_descent(
        smooth, torch.zeros_like(slope), l1, group, FIRST_STEP * state_norm / steepness, config.iterations
    ):
        held_out = loss.judged({site: shifts})
        path.append({"fit": fitted, "held_out": held_out})
        if held_out is None or best_loss is None or held_out < best_loss:
            best, best_loss = shifts, held_out
    report = {
        "loss": {"unsteered_held_out": before, "held_out": best_loss, "rows": len(loss.rows), "path": path},
        "heads": best.norm(dim=1).nonzero().flatten().tolist(),
        "coordinates": int((best != 0).sum()),
    }
    return Learned(best, report)


def penalties(slope: torch.Tensor, l1: float, group: float) -> tuple[float, float]:
    """Penalties as shares of those at which each alone keeps the descent at zero.

    Args:
        slope: gradient at zero, `[heads, head size]`.
        l1: share for coordinates.
        group: share for heads.

    Returns:
        Factors of |u|_1 and of sum_h sqrt(size) |u_h|_2.
    """
    size = slope.shape[1]
    return l1 * float(slope.abs().max()), group * float(slope.norm(dim=1).max()) / size**0.5


def _site(layer: int | str) -> Site:
    return Site("head_out", int(layer))


register_steering_method(TaskDriven)
