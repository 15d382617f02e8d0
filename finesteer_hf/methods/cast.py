"""CAST: add a behaviour vector when conditions on the query are met (Lee et al., ICLR 2025, arXiv 2409.05907).

A condition at a layer is a direction c and a threshold: met where cos(h, tanh(P_c h)) with P_c = c c' / (c' c) lies on its
side of the threshold. Several conditions are joined by OR or by AND.

Differences from the published code. Its comparator `larger` says that the *threshold* is larger than the similarity;
here a condition is met `above` or `below` its threshold. It tests the first row of a batch for all rows; here each row
has its own answer. It takes vectors at block outputs and tests them at block inputs; here both are the output. The mean
over a prompt's tokens is not offered as h: a query is read at its last token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import f1_score, precision_recall_curve

from finesteer_hf.config import SteeringConfig, register_steering_method, written_by_fit
from finesteer_hf.errors import AdapterFileError, DatasetError
from finesteer_hf.estimators.linear_algebra import principal_directions
from finesteer_hf.methods.base import CaptureRequest, FitData, FitResult, ModelInfo, Part, Pool, SteeringMethod
from finesteer_hf.methods.checks import (
    check_count,
    check_layers,
    check_number,
    check_one_of,
    check_strength,
    filled_in,
    layers_of,
    require_fitted,
)
from finesteer_hf.methods.strength import median_norm
from finesteer_hf.methods.trials import Trial
from finesteer_hf.processors import Decision, Positions, QueryStates
from finesteer_hf.sites import Site


POOLS = ("answer_mean", "answer_last")
VECTORS = ("pca", "mean")
RULES = ("or", "and")
COMPARATORS = ("above", "below")
MIN_ROWS = 4


@dataclass(kw_only=True)
class CASTConfig(SteeringConfig):
    """Settings of conditional activation steering.

    Attributes:
        layers: decoder blocks whose outputs are steered; `auto` takes those between 20% and 80% of the depth.
        vector: behaviour vector: `pca` (first principal direction of the pairs' centred states, with the sign and the
            length of the mean difference along it) or `mean` (the mean difference).
        pool: answer states that the behaviour vector is fitted to.
        condition_layers: blocks whose outputs are tested; `auto` tries those between 20% and 80% of the depth and keeps
            `num_conditions` of them.
        num_conditions: how many layers `auto` keeps, those with the best F1.
        rule: whether one condition has to be met (`or`) or all (`and`).
        thresholds: of each condition; fitted.
        comparators: `above` or `below`, of each condition; fitted.
    """

    steering_type: ClassVar[str] = "CAST"

    # The published code steers every forward after the one that tests the prompt.
    positions: Positions = field(default="generated", metadata={"help": "Steered tokens: all, prompt or generated."})
    strength: float | str = field(
        default="auto", metadata={"help": "Lambda: a number, auto, kl:<nats> or norm:<share>."}
    )
    layers: list[int] | str = field(default="auto", metadata={"help": "Steered decoder blocks, or auto."})
    vector: Literal["pca", "mean"] = field(default="pca", metadata={"help": "Behaviour vector: pca or mean."})
    pool: Literal["answer_mean", "answer_last"] = field(
        default="answer_mean", metadata={"help": "Pooled answer states: answer_mean or answer_last."}
    )
    condition_layers: list[int] | str = field(default="auto", metadata={"help": "Tested decoder blocks, or auto."})
    num_conditions: int = field(default=1, metadata={"help": "Number of tested blocks that auto keeps."})
    rule: Literal["or", "and"] = field(default="or", metadata={"help": "Joins conditions: or, and."})
    thresholds: list[float] = field(default_factory=list, metadata=written_by_fit("Threshold of each condition."))
    comparators: list[str] = field(default_factory=list, metadata=written_by_fit("above or below, of each condition."))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers(self.layers, self.num_hidden_layers)
        check_layers(self.condition_layers, self.num_hidden_layers, name="condition_layers")
        check_strength(self.strength)
        for name, allowed in (("vector", VECTORS), ("pool", POOLS), ("rule", RULES)):
            check_one_of(name, getattr(self, name), allowed)
        check_count("num_conditions", self.num_conditions, 1)
        for threshold in self.thresholds:
            check_number("thresholds", threshold)
        for comparator in self.comparators:
            check_one_of("comparators", comparator, COMPARATORS)


def similarity(h: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    """cos(h, tanh(P_c h)).

    Args:
        h: `[rows, d]` float32.
        condition: c, `[d]` float32, of any length.

    Returns:
        `[rows]` in [-1, 1]: how much of the state's own length lies along c, never less than 0 up to the tanh.
    """
    along = (h @ condition) / (condition @ condition)
    return torch.cosine_similarity(h, torch.tanh(along[:, None] * condition), dim=-1)


class CAST(SteeringMethod):
    """`H_l <- H_l + strength * b_l` where the query meets the conditions; each row of a batch has its own answer.

    Args:
        config: a fitted `CASTConfig`.
        tensors: `behaviors`, `[layers, hidden_size]`, and `conditions`, `[condition_layers, hidden_size]`, float32.

    Raises:
        AdapterFileError: if the config is not fitted.
    """

    config_cls = CASTConfig

    def __init__(self, config: SteeringConfig, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(config, tensors)
        settings = cast(CASTConfig, config)
        require_fitted(settings, "layers", "condition_layers")
        if not {"behaviors", "conditions"} <= set(tensors):
            raise AdapterFileError("A CAST adapter needs the tensors 'behaviors' and 'conditions'.")
        count = len(settings.condition_layers)
        if not len(settings.thresholds) == len(settings.comparators) == count:
            raise AdapterFileError(
                f"The CAST config tests {count} layers, but has {len(settings.thresholds)} thresholds and "
                f"{len(settings.comparators)} comparators."
            )
        self.reads = tuple(_site(layer) for layer in settings.condition_layers)
        self.writes = tuple(_site(layer) for layer in settings.layers)
        self._signs = [1.0 if comparator == "above" else -1.0 for comparator in settings.comparators]

    def decide(self, queries: QueryStates) -> Decision:
        """Test each row; recorded is `score` `[rows]`: how far the deciding condition is on its side of the threshold."""
        settings, tensors = cast(CASTConfig, self.config), self.parameters_on(queries.device)
        margins = torch.stack(
            [
                sign * (similarity(queries[site], condition) - threshold)
                for site, condition, threshold, sign in zip(
                    self.reads, tensors["conditions"], settings.thresholds, self._signs, strict=True
                )
            ]
        )
        score = margins.amax(dim=0) if settings.rule == "or" else margins.amin(dim=0)
        vectors = {site: vector[None] for site, vector in zip(self.writes, tensors["behaviors"], strict=True)}
        return Decision(vectors=vectors, gate=(score >= 0).float(), record={"score": score})

    @classmethod
    def tensor_shapes(cls, config: SteeringConfig) -> dict[str, tuple[int | None, ...]]:
        """One behaviour vector a steered layer, one direction a tested layer."""
        require_fitted(config, "layers", "condition_layers")
        settings = cast(CASTConfig, config)
        return {
            "behaviors": (len(settings.layers), settings.hidden_size),
            "conditions": (len(settings.condition_layers), settings.hidden_size),
        }

    @classmethod
    def needs(cls, config: SteeringConfig, info: ModelInfo) -> CaptureRequest:
        """The outputs of the layers, at the query and over the answers.

        Raises:
            ValueError: if a layer is out of range.
        """
        settings = cast(CASTConfig, config)
        layers = {*layers_of(settings.layers, info.num_layers), *layers_of(settings.condition_layers, info.num_layers)}
        pools: tuple[Pool, ...] = ("query", settings.pool)
        return CaptureRequest(tuple(_site(layer) for layer in sorted(layers)), pools)

    @classmethod
    def fit(cls, data: FitData, config: SteeringConfig) -> FitResult:
        """Find directions on `fit`, thresholds on `calibration`, the strength on `validation`.

        The rows' prompts are to meet the conditions, the general prompts are not.

        Raises:
            DatasetError: for too few rows, or no general prompts.
        """
        settings = cast(CASTConfig, config)
        layers = layers_of(settings.layers, data.info.num_layers)
        tested = layers_of(settings.condition_layers, data.info.num_layers)
        conditions = [fit_condition(data, layer) for layer in tested]
        if settings.condition_layers == "auto":
            best = sorted(conditions, key=lambda condition: -condition.f1)[: settings.num_conditions]
            conditions = sorted(best, key=lambda condition: condition.layer)
        behaviors = [_behavior(data, settings, layer) for layer in layers]
        tensors = {
            "behaviors": torch.from_numpy(np.stack(behaviors).astype(np.float32)),
            "conditions": torch.from_numpy(np.stack([c.direction for c in conditions]).astype(np.float32)),
        }
        chosen: dict[str, Any] = {
            "layers": layers,
            "condition_layers": [condition.layer for condition in conditions],
            "thresholds": [condition.threshold for condition in conditions],
            "comparators": [condition.comparator for condition in conditions],
        }

        def build(strength: float) -> CAST:
            return cls(filled_in(settings, data.info, strength=strength, **chosen), tensors)

        trial = Trial(
            build=build,
            vector_norm=float(np.median(np.linalg.norm(behaviors, axis=1))),
            state_norm=float(np.median([median_norm(data.query(_site(layer), "fit")) for layer in layers])),
        )
        strength, curve, why = trial.choose_strength(settings.strength, data)
        report: dict[str, Any] = {
            "conditions": [
                {"layer": c.layer, "f1": c.f1, "threshold": c.threshold, "comparator": c.comparator}
                for c in conditions
            ],
            "held_out_f1": _held_out_f1(data, build(0.0)),
            "vector": {"vector_norm": trial.vector_norm, "state_norm": trial.state_norm},
            "strength": why,
            "dose_response": [dataclasses.asdict(point) for point in curve],
        }
        return FitResult(build(strength).config, tensors, report)


@dataclass(frozen=True)
class Condition:
    """A fitted condition: direction `[d]`, threshold on the similarity, `above` or `below`, and its F1."""

    layer: int
    direction: NDArray[np.float64]
    threshold: float
    comparator: str
    f1: float


def fit_condition(data: FitData, layer: int) -> Condition:
    """The direction between the rows' prompts and the general ones at a layer, with the threshold of the best F1."""
    site = _site(layer)
    wanted, general = data.query(site, "fit"), data.general(site, "fit")
    if min(len(wanted), len(general)) < MIN_ROWS:
        raise DatasetError(
            f"CAST needs at least {MIN_ROWS} rows and {MIN_ROWS} general prompts (general_dataset) to tell apart, got "
            f"{len(wanted)} and {len(general)}."
        )
    pairs = max(len(wanted), len(general))
    rng = np.random.default_rng(data.seed)
    order = [rng.permutation(pairs) % len(side) for side in (wanted, general)]
    direction = first_direction(wanted[order[0]].astype(np.float64), general[order[1]].astype(np.float64))
    scores, labels = _scores(data, site, "calibration", direction)
    if len(np.unique(labels)) < 2:
        scores, labels = _scores(data, site, "fit", direction)
    return Condition(layer, direction, *best_threshold(scores, labels))


def first_direction(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """First principal direction of pairs `[rows, d]`, each centred at its own middle; unit, pointing from b to a."""
    # Centred at their middle, the two of a pair are plus and minus half of their difference.
    direction = principal_directions((a - b) / 2, 1)[1]
    if direction.shape[1] == 0:
        raise DatasetError("The two sides of all pairs have the same states: there is no direction between them.")
    first = direction[:, 0]
    return first if float((a - b).mean(axis=0) @ first) >= 0 else -first


def best_threshold(scores: NDArray[np.float64], labels: NDArray[np.int64]) -> tuple[float, str, float]:
    """The threshold and comparator of the best F1; every cut between two scores is tried, where the paper has a grid.

    Args:
        scores: `[n]`.
        labels: `[n]`, 1 where the condition is to be met, and 0.

    Returns:
        Threshold (halfway to the next score on the other side), `above` or `below`, F1.
    """
    found = []
    for comparator, sign in (("above", 1.0), ("below", -1.0)):
        precision, recall, cuts = precision_recall_curve(labels, sign * scores)
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        best = int(f1[:-1].argmax())
        others = (sign * scores)[sign * scores < cuts[best]]
        threshold = (cuts[best] + others.max()) / 2 if len(others) else cuts[best]
        found.append((float(sign * threshold), comparator, float(f1[best])))
    return max(found, key=lambda candidate: candidate[2])


def _site(layer: int | str) -> Site:
    return Site("resid_post", int(layer))


def _scores(
    data: FitData, site: Site, part: Part, direction: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    sides = [data.general(site, part), data.query(site, part)]
    states = torch.from_numpy(np.concatenate(sides))
    condition = torch.from_numpy(direction.astype(np.float32))
    return similarity(states, condition).double().numpy(), np.repeat([0, 1], [len(side) for side in sides])


def _behavior(data: FitData, config: CASTConfig, layer: int) -> NDArray[np.float64]:
    parts = cast(tuple[Part, ...], ("fit", "calibration"))
    chosen, rejected = (
        np.concatenate([side(_site(layer), part, config.pool) for part in parts]).astype(np.float64)
        for side in (data.chosen, data.rejected)
    )
    mean = (chosen - rejected).mean(axis=0)
    if config.vector == "mean":
        return mean
    first = first_direction(chosen, rejected)
    return first * float(mean @ first)


def _held_out_f1(data: FitData, processor: CAST) -> float | None:
    """F1 of the joined conditions on the `validation` part; None if it has one side only."""
    sides = {site: (data.general(site, "validation"), data.query(site, "validation")) for site in processor.reads}
    sizes = [len(side) for side in next(iter(sides.values()))]
    if not all(sizes):
        return None
    states = {site: torch.from_numpy(np.concatenate(pair)) for site, pair in sides.items()}
    gate = processor.decide(QueryStates(states, sum(sizes), torch.device("cpu"))).gate
    assert gate is not None
    return float(f1_score(np.repeat([0, 1], sizes), gate.numpy() > 0))


register_steering_method("CAST", config_cls=CASTConfig, method_cls=CAST)
