"""ANGULAR: rotations of the stream in one plane, which keep its norm (Angular Steering, arXiv 2510.26243).

The plane is spanned by b1, the direction of the feature to remove, and b2, orthonormal to it. `mode="angular"` turns
every token to one angle in that plane, `mode="adaptive"` only tokens that show the feature, and `mode="selective"`
(Selective Steering, arXiv 2601.19375) turns every token by one angle, at layers that separate the two sides.

The papers rotate the outputs of the normalisation layers. Here the output of the block is rotated: the next
normalisation rescales it, and the stream keeps its norm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from finesteer_hf.adapters.config import SteeringConfig, setting
from finesteer_hf.adapters.registry import register_steering_method
from finesteer_hf.errors import AdapterFileError, DatasetError
from finesteer_hf.method_api import CaptureRequest, FitData, FitResult, ModelInfo, Pool, SteeringMethod
from finesteer_hf.methods._shared.checks import (
    check_layers,
    check_number,
    check_one_of,
    check_strength,
    filled_in,
    layers_of,
    require_fitted,
)
from finesteer_hf.methods._shared.search import settle
from finesteer_hf.methods._shared.trials import Trial
from finesteer_hf.processors import TokenView
from finesteer_hf.sites import Site, resid_post


MODES = ("angular", "adaptive", "selective")
POOLS = ("answer_mean", "answer_last")
# Shares of the whole turn.
SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
MIN_ROWS = 2
ORTHONORMAL = 1e-5


@dataclass(kw_only=True)
class AngularConfig(SteeringConfig):
    """Settings of a rotation.

    Attributes:
        mode: `angular` (to an angle), `adaptive` (to an angle, tokens with the feature only) or `selective` (by an
            angle).
        layers: decoder blocks whose outputs are rotated; `auto` takes those between 20% and 80% of the depth and, for
            `selective`, only those at which the two sides project on b1 with opposite signs.
        angle: degrees: the angle to b1 to turn to, or for `selective` to turn by; `auto` is 180, away from the
            feature, or for `selective` the angle from the rejected answers' mean to the chosen ones'.
        threshold: `adaptive` leaves tokens unchanged whose product with b1 is at most this.
        pool: answer states that the plane is fitted to.
        strength: share of the turn: 1 is the papers' rotation.
    """

    steering_type: ClassVar[str] = "ANGULAR"
    understands: ClassVar[frozenset[str]] = frozenset(f"mode:{name}" for name in MODES)

    strength: float | str = field(default="auto", metadata=setting("Share of the turn: a number, auto or kl:<nats>."))
    mode: Literal["angular", "adaptive", "selective"] = field(
        default="angular", metadata=setting("angular, adaptive or selective.")
    )
    layers: list[int] | str = field(default="auto", metadata=setting("Rotated decoder blocks, or auto."))
    angle: float | str = field(default="auto", metadata=setting("Degrees to turn to, or by; or auto."))
    threshold: float = field(default=0.0, metadata=setting("Product with b1 up to which adaptive leaves a token."))
    pool: Literal["answer_mean", "answer_last"] = field(
        default="answer_mean", metadata=setting("Pooled answer states: answer_mean or answer_last.")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("mode", self.mode, MODES)
        check_one_of("pool", self.pool, POOLS)
        check_layers(self.layers, self.num_hidden_layers)
        check_strength(self.strength, ("kl",))
        check_number("threshold", self.threshold)
        if self.angle != "auto":
            check_number("angle", self.angle)


def rotate(
    hidden: torch.Tensor,
    plane: torch.Tensor,
    angle: float,
    share: torch.Tensor | float = 1.0,
    *,
    mode: str = "angular",
    threshold: float = 0.0,
) -> torch.Tensor:
    """Rotate states in a plane.

    With P the projector on the plane: `angular` gives h - P h + |P h| (cos t b1 + sin t b2) for a share of 1; `selective`
    gives h - P h + [cos t (b1 b1' + b2 b2') + sin t (b2 b1' - b1 b2')] h. A share s turns by that part of the way, so the
    norm is kept at every share.

    Args:
        hidden: `[..., d]`, any floating dtype.
        plane: `[2, d]` float32, orthonormal rows b1 and b2.
        angle: t in radians.
        share: a number, or a tensor that broadcasts against `[...]`.
        mode: `angular`, `adaptive` or `selective`.
        threshold: for `adaptive`.

    Returns:
        `[..., d]` in the dtype of `hidden`; computed in float32, in which the plane is orthonormal.
    """
    state = hidden.float()
    coordinates = state @ plane.T
    x, y = coordinates[..., 0], coordinates[..., 1]
    if mode == "selective":
        turn = angle * share * torch.ones_like(x)
    else:
        # Turn the short way.
        turn = share * (torch.remainder(angle - torch.atan2(y, x) + math.pi, 2 * math.pi) - math.pi)
    if mode == "adaptive":
        turn = torch.where(x > threshold, turn, 0.0)
    cos, sin = torch.cos(turn), torch.sin(turn)
    moved = torch.stack([cos * x - sin * y, sin * x + cos * y], dim=-1) - coordinates
    return (state + moved @ plane).to(hidden.dtype)


class Angular(SteeringMethod[AngularConfig]):
    """Rotate tokens in the plane of b1 and b2, at the outputs of some blocks.

    Args:
        config: a fitted `AngularConfig`.
        tensors: `plane`, `[2, hidden_size]` float32, orthonormal rows.

    Raises:
        AdapterFileError: if the config is not fitted, or the plane is not orthonormal.
    """

    def __init__(self, config: AngularConfig, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(config, tensors)
        require_fitted(config, "layers", "angle")
        plane = tensors.get("plane")
        if plane is None or not torch.allclose(plane @ plane.T, torch.eye(2), atol=ORTHONORMAL):
            raise AdapterFileError(
                "An ANGULAR adapter needs the tensor 'plane' with two orthonormal rows; others would change norms."
            )
        self.maps = tuple(resid_post(layer) for layer in config.layers)
        self.angle = math.radians(float(config.angle))

    def transform(self, site: Site, hidden: torch.Tensor, view: TokenView) -> torch.Tensor:
        """Rotate the selected tokens of `[rows, tokens, hidden_size]` by the row's share of the turn."""
        settings = self.config
        rotated = rotate(
            hidden,
            self.parameters_on(hidden.device)["plane"],
            self.angle,
            view.scale[..., 0] * self.strength,
            mode=settings.mode,
            threshold=settings.threshold,
        )
        steered = view.scale != 0
        if view.mask is not None:
            steered = steered & view.mask[..., None]
        return torch.where(steered, rotated, hidden)

    @classmethod
    def tensor_shapes(cls, config: AngularConfig) -> dict[str, tuple[int | None, ...]]:
        """The plane."""
        require_fitted(config, "layers", "angle")
        return {"plane": (2, config.hidden_size)}

    @classmethod
    def needs(cls, config: AngularConfig, info: ModelInfo) -> CaptureRequest:
        """The outputs of the layers, over the answers.

        Raises:
            ValueError: if a layer is out of range.
        """
        sites = tuple(resid_post(layer) for layer in layers_of(config.layers, info.num_layers))
        pools: tuple[Pool, ...] = ("query", config.pool)
        return CaptureRequest(sites, pools)

    @classmethod
    def fit(cls, data: FitData, config: AngularConfig) -> FitResult:
        """Find the plane, the layers and the angle on the `fit` part, the share of the turn on `validation`.

        Raises:
            DatasetError: for too few rows; if the sides do not differ; if no layer suits `selective`.
        """
        layers = layers_of(config.layers, data.info.num_layers)
        sides = {layer: _sides(data, config, layer) for layer in layers}
        if min(len(side) for pair in sides.values() for side in pair) < MIN_ROWS:
            raise DatasetError(f"ANGULAR needs at least {MIN_ROWS} rows to fit on; hundreds are recommended.")
        plane = find_plane(list(sides.values()))
        projections = {layer: _projections(pair, plane) for layer, pair in sides.items()}
        if config.mode == "selective" and config.layers == "auto":
            layers = [layer for layer in layers if np.prod(np.sign(projections[layer])) < 0]
            if not layers:
                raise DatasetError(
                    "mode='selective' rotates layers at which chosen and rejected answers project on the feature with "
                    f"opposite signs, but there is none among {list(projections)}. Name layers, or use mode='adaptive'."
                )
        angle = _angle(config, [sides[layer] for layer in layers], plane)
        tensors = {"plane": torch.from_numpy(plane.astype(np.float32))}

        def build(strength: float) -> Angular:
            chosen = {"layers": layers, "angle": angle, "strength": strength, "requires": [f"mode:{config.mode}"]}
            return cls(filled_in(config, data.info, **chosen), tensors)

        strength, settled = settle(data, config.strength, Trial.of_factor(build), None, SHARES)
        report: dict[str, Any] = {
            "layers": [
                {"layer": layer, "rejected_projection": rejected, "chosen_projection": chosen}
                for layer, (rejected, chosen) in projections.items()
            ],
            "angle_degrees": angle,
            **settled,
        }
        return FitResult(build(strength).config, tensors, report)


Sides = tuple[NDArray[np.float64], NDArray[np.float64]]


def find_plane(sides: list[Sides]) -> NDArray[np.float64]:
    """The plane of a feature, from states with and without it.

    Every layer has a candidate: the unit difference of means. b1 is the one most similar to the others (by mean
    cosine), b2 the first principal component of the candidates, made orthogonal to b1. With one layer, the candidates
    of b2 are the rows' own unit differences.

    Args:
        sides: for each layer, two tables `[rows, d]` with matching rows.

    Returns:
        `[2, d]`, orthonormal rows.

    Raises:
        DatasetError: if the means do not differ, or nothing varies besides b1.
    """
    candidates = np.stack([with_it.mean(axis=0) - without.mean(axis=0) for with_it, without in sides])
    norms = np.linalg.norm(candidates, axis=1, keepdims=True)
    if not norms.all():
        raise DatasetError("Chosen and rejected answers have the same mean state: there is no direction between them.")
    candidates = candidates / norms
    first = candidates[(candidates @ candidates.T).mean(axis=1).argmax()]
    spread = candidates
    if len(sides) == 1:
        shifts = sides[0][0] - sides[0][1]
        spread = shifts / np.maximum(np.linalg.norm(shifts, axis=1, keepdims=True), 1e-12)
    beside = spread - np.outer(spread @ first, first)
    second = PCA(n_components=1, svd_solver="full").fit(beside).components_[0]
    second = second - (second @ first) * first
    length = np.linalg.norm(second)
    if np.square(beside - beside.mean(axis=0)).sum() < 1e-12 or length < 1e-6:
        raise DatasetError(
            "The answers differ in one direction only, so there is no plane to turn in. Give more rows."
        )
    return np.stack([first, second / length])


def _sides(data: FitData, config: AngularConfig, layer: int) -> Sides:
    """The states that show the feature (rejected) and those that do not (chosen), `[rows, d]` each."""
    site = resid_post(layer)
    rejected, chosen = data.rejected(site, "fit", config.pool), data.chosen(site, "fit", config.pool)
    return rejected.astype(np.float64), chosen.astype(np.float64)


def _projections(sides: Sides, plane: NDArray[np.float64]) -> tuple[float, float]:
    """Mean products of b1 with the unit states of each side."""
    units = [side / np.maximum(np.linalg.norm(side, axis=1, keepdims=True), 1e-12) for side in sides]
    return float((units[0] @ plane[0]).mean()), float((units[1] @ plane[0]).mean())


def _angle(config: AngularConfig, sides: list[Sides], plane: NDArray[np.float64]) -> float:
    """Degrees to turn to, or by."""
    if not isinstance(config.angle, str):
        return float(config.angle)
    if config.mode != "selective":
        return 180.0
    turns = []
    for rejected, chosen in sides:
        start, end = plane @ rejected.mean(axis=0), plane @ chosen.mean(axis=0)
        turns.append(np.arctan2(end[1], end[0]) - np.arctan2(start[1], start[0]))
    # Angles are averaged as directions.
    return float(np.degrees(np.angle(np.exp(1j * np.array(turns)).mean())))


register_steering_method(Angular)
