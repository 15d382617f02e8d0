"""CAST at run time, and its fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from finesteer_hf.errors import AdapterFileError, DatasetError
from finesteer_hf.method_api import CaptureRequest, FitData, FitResult, ModelInfo, Part, Pool, SteeringMethod
from finesteer_hf.methods._shared.checks import filled_in, layers_of, require_fitted
from finesteer_hf.methods._shared.screening import relative_norm, state_norms
from finesteer_hf.methods._shared.search import Place, search_layers
from finesteer_hf.methods._shared.trials import Trial
from finesteer_hf.methods.cast.conditions import (
    MIN_ROWS,
    Condition,
    first_direction,
    fit_condition,
    held_out_f1,
    rows_named,
    sides_of,
    similarity,
)
from finesteer_hf.methods.cast.config import CASTConfig
from finesteer_hf.processors import Decision, QueryStates
from finesteer_hf.sites import resid_post


# Pool of prompts that a fit captures for a condition.
POOL_OF: dict[str, Pool] = {"last": "query", "mean": "query_mean"}


class CAST(SteeringMethod[CASTConfig]):
    """`H_l <- H_l + strength * sum of b_l` over the behaviours that the rules trigger, row by row.

    Args:
        config: a fitted `CASTConfig`.
        tensors: `behaviors`, `[behaviors * layers, hidden_size]`, and `conditions`, `[tested layers, hidden_size]`,
            float32; the layers of the first behaviour or condition come first.

    Raises:
        AdapterFileError: if the config is not fitted.
    """

    def __init__(self, config: CASTConfig, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(config, tensors)
        require_fitted(config, "layers", "condition_layers")
        if not {"behaviors", "conditions"} <= set(tensors):
            raise AdapterFileError("A CAST adapter needs the tensors 'behaviors' and 'conditions'.")
        tested = [(number, layer) for number, layers in enumerate(config.tested_layers()) for layer in layers]
        if not len(config.thresholds) == len(config.comparators) == len(tested):
            raise AdapterFileError(
                f"The CAST config tests {len(tested)} layers, but has {len(config.thresholds)} thresholds and "
                f"{len(config.comparators)} comparators."
            )
        self._sites = [resid_post(layer) for _, layer in tested]
        self._condition_of = [number for number, _ in tested]
        self._signs = [1.0 if comparator == "above" else -1.0 for comparator in config.comparators]
        self._rules = config.parsed_rules()
        if config.condition_pool == "mean":
            self.query_pool = "mean"
        self.reads = tuple(sorted(set(self._sites)))
        self.writes = tuple(resid_post(layer) for layer in config.layers)

    @classmethod
    def refused_by(cls, config: CASTConfig) -> Mapping[str, str]:
        """A prompt mean is not available if part of the prompt was run in an earlier call."""
        mean = config.condition_pool == "mean"
        return {"carried_cache": "its states are gone"} if mean else {}

    def decide(self, queries: QueryStates) -> Decision:
        """Test each row.

        Records `score` `[rows]`: margin of the rule that is closest to holding, at least 0 if a behaviour is added.
        With several conditions or behaviours, also `conditions` `[rows, conditions]`, their margins, and `behaviors`
        `[rows, behaviors]`, 1 where one is added.
        """
        settings, tensors = self.config, self.parameters_on(queries.device)
        margins = self.margins(queries)
        met = margins >= 0
        called = [
            torch.stack([rule.holds(met) for rule in self._rules if rule.behavior == number]).any(dim=0)
            for number in range(len(settings.behaviors))
        ]
        added = torch.stack(called, dim=1).float()
        strengths = torch.tensor(settings.behavior_strengths or [1.0] * len(called), dtype=torch.float32)
        # By layer, without a matrix product, which is rounded on some devices.
        behaviors = (
            tensors["behaviors"].unflatten(0, (len(called), -1)).transpose(0, 1)
            * strengths.to(queries.device)[:, None]
        )
        vectors = {
            site: (added[:, :, None] * of_layer).sum(dim=1)
            for site, of_layer in zip(self.writes, behaviors, strict=True)
        }
        record = {"score": torch.stack([rule.margin(margins) for rule in self._rules]).amax(dim=0)}
        if len(settings.conditions) > 1 or len(called) > 1:
            record |= {"conditions": margins, "behaviors": added}
        return Decision(vectors=vectors, gate=added.amax(dim=1), record=record)

    def margins(self, queries: QueryStates) -> torch.Tensor:
        """Margin of each condition to its thresholds, `[rows, conditions]`; it is met from 0 on."""
        settings, tensors = self.config, self.parameters_on(queries.device)
        of_conditions: list[list[torch.Tensor]] = [[] for _ in settings.conditions]
        for number, site, direction, threshold, sign in zip(
            self._condition_of, self._sites, tensors["conditions"], settings.thresholds, self._signs, strict=True
        ):
            of_conditions[number].append(sign * (similarity(queries[site], direction) - threshold))
        tests = [torch.stack(of_condition) for of_condition in of_conditions]
        return torch.stack([t.amax(dim=0) if settings.rule == "or" else t.amin(dim=0) for t in tests], dim=1)

    @classmethod
    def tensor_shapes(cls, config: CASTConfig) -> dict[str, tuple[int | None, ...]]:
        """One vector per behaviour and steered layer, one direction per condition and tested layer."""
        require_fitted(config, "layers", "condition_layers")
        return {
            "behaviors": (len(config.behaviors) * len(config.layers), config.hidden_size),
            "conditions": (sum(map(len, config.tested_layers())), config.hidden_size),
        }

    @classmethod
    def needs(cls, config: CASTConfig, info: ModelInfo) -> CaptureRequest:
        """The outputs of the layers, at the query and over the answers.

        Raises:
            ValueError: if a layer is out of range.
        """
        layers = {*layers_of(config.layers, info.num_layers)}.union(*_candidates(config, info.num_layers))
        # Strengths are in units of the states at the prompt's last token.
        pools: tuple[Pool, ...] = tuple(dict.fromkeys(("query", POOL_OF[config.condition_pool], config.pool)))
        return CaptureRequest(tuple(resid_post(layer) for layer in sorted(layers)), pools)

    @classmethod
    def fit(cls, data: FitData, config: CASTConfig) -> FitResult:
        """Find directions on `fit`, thresholds on `calibration`, layers and strength on `validation`.

        Raises:
            DatasetError: for too few rows, no general prompts if all rows are on one side of a condition, or an
                unknown category.
        """
        layers = layers_of(config.layers, data.info.num_layers)
        candidates = _candidates(config, data.info.num_layers)
        conditions = [
            _fitted_condition(data, config, name, of_condition)
            for name, of_condition in zip(config.conditions, candidates, strict=True)
        ]
        flat = [condition for of_condition in conditions for condition in of_condition]
        directions = torch.from_numpy(np.stack([c.direction for c in flat]).astype(np.float32))
        tested = [[condition.layer for condition in of_condition] for of_condition in conditions]
        behaviors = {
            (name, layer): _behavior(data, config, name, layer) for name in config.behaviors for layer in layers
        }
        factors = config.behavior_strengths or [1.0] * len(config.behaviors)
        norms = state_norms(data, [resid_post(layer) for layer in layers])
        chosen: dict[str, Any] = {
            "condition_layers": tested if len(tested) > 1 else tested[0],
            "thresholds": [condition.threshold for condition in flat],
            "comparators": [condition.comparator for condition in flat],
            "requires": config.features(),
        }

        def processor(place: Place, strength: float) -> CAST:
            vectors = [behaviors[name, layer] for name in config.behaviors for layer in place.layers]
            tensors = {"behaviors": torch.from_numpy(np.stack(vectors).astype(np.float32)), "conditions": directions}
            own = {**chosen, "layers": list(place.layers), "positions": place.positions, "strength": strength}
            return cls(filled_in(config, data.info, **own), tensors)

        def trial_of(place: Place) -> Trial:
            first = norms[resid_post(place.layers[0])]
            # With several behaviours the strongest counts.
            shares = [
                relative_norm({resid_post(at): factor * behaviors[name, at][None] for at in place.layers}, norms)
                for name, factor in zip(config.behaviors, factors, strict=True)
            ]
            return Trial(lambda strength: processor(place, strength), max(shares) * first, first)

        found = search_layers(data, config, layers, trial_of)
        steered = processor(found.key, found.strength)
        report: dict[str, Any] = {
            "layers": list(found.key.layers),
            "conditions": [
                {"name": name, "layer": c.layer, "f1": c.f1, "threshold": c.threshold, "comparator": c.comparator}
                for name, of_condition in zip(config.conditions, conditions, strict=True)
                for c in of_condition
            ],
            "held_out_f1": _held_out_f1(data, steered),
            **found.report,
        }
        return FitResult(steered.config, steered.tensors, report)


def _candidates(config: CASTConfig, num_layers: int) -> list[list[int]]:
    """For each condition, the layers to try."""
    if isinstance(config.condition_layers, str):
        return [layers_of("auto", num_layers)] * len(config.conditions)
    return [layers_of(layers, num_layers) for layers in config.tested_layers()]


def _fitted_condition(data: FitData, config: CASTConfig, name: str, layers: list[int]) -> list[Condition]:
    """A condition at its tested layers: with `auto`, those with the best F1."""
    found = [fit_condition(data, layer, name, POOL_OF[config.condition_pool]) for layer in layers]
    if config.condition_layers == "auto":
        found = sorted(found, key=lambda condition: -condition.f1)[: config.num_conditions]
    return sorted(found, key=lambda condition: condition.layer)


def _behavior(data: FitData, config: CASTConfig, name: str, layer: int) -> NDArray[np.float64]:
    """A behaviour's vector at a layer, `[d]`."""
    parts: tuple[Part, ...] = ("fit", "calibration")
    rows = [rows_named(data, part, name) for part in parts]
    chosen, rejected = (
        np.concatenate(
            [side(resid_post(layer), part, config.pool)[own] for part, own in zip(parts, rows, strict=True)]
        )
        for side in (data.chosen, data.rejected)
    )
    if len(chosen) < MIN_ROWS:
        raise DatasetError(f"CAST needs at least {MIN_ROWS} rows for the behaviour {name!r}, got {len(chosen)}.")
    differences = chosen.astype(np.float64) - rejected
    mean = differences.mean(axis=0)
    direction = first_direction(chosen.astype(np.float64), rejected.astype(np.float64))
    if config.vector == "mean":
        direction = mean / max(float(np.linalg.norm(mean)), 1e-12)
    if config.length == "mean":
        return direction * float(mean @ direction)
    if config.length == "variance":
        return direction * explained_share(differences, direction)
    return direction


def explained_share(differences: NDArray[np.float64], direction: NDArray[np.float64]) -> float:
    """Share of the variance of pairwise centred states along a unit direction `[d]`.

    Args:
        differences: differences of the pairs, `[rows, d]`; centred, the states of a pair are plus and minus half of
            it.
        direction: `[d]`.
    """
    return float(((differences @ direction) ** 2).sum() / (differences**2).sum())


def _held_out_f1(data: FitData, processor: CAST) -> float | dict[str, float | None] | None:
    """F1 of the condition on the `validation` part, by name for several; None if there is only one side."""
    config = processor.config
    names, pool = config.conditions, POOL_OF[config.condition_pool]
    found: dict[str, float | None] = {}
    for number, name in enumerate(names):
        sides = {site: sides_of(data, site, "validation", name, pool) for site in processor.reads}
        sizes = [len(side) for side in next(iter(sides.values()))]
        states = {site: torch.from_numpy(np.concatenate(pair)) for site, pair in sides.items()}
        margins = processor.margins(QueryStates(states, sum(sizes), torch.device("cpu")))
        found[name] = held_out_f1(np.repeat([1, 0], sizes), margins[:, number].numpy() >= 0)
    return found if len(names) > 1 else found[names[0]]
