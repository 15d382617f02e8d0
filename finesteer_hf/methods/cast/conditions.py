"""Conditions: how similar a query is to a direction, and the threshold on that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import f1_score, precision_recall_curve

from finesteer_hf.errors import DatasetError
from finesteer_hf.estimators.linear_algebra import principal_directions
from finesteer_hf.method_api import FitData, Part, Pool
from finesteer_hf.methods.cast.config import ALL_ROWS
from finesteer_hf.sites import Site, resid_post


MIN_ROWS = 4
PARTS: tuple[Part, ...] = ("fit", "calibration", "validation")


def similarity(h: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    """cos(h, tanh(P_c h)).

    Args:
        h: `[rows, d]` float32.
        condition: c, `[d]` float32, of any length.

    Returns:
        `[rows]` in [-1, 1]: the share of the state's length along c, never below 0 except for the tanh.
    """
    along = (h @ condition) / (condition @ condition)
    return torch.cosine_similarity(h, torch.tanh(along[:, None] * condition), dim=-1)


@dataclass(frozen=True)
class Condition:
    """A condition fitted at a layer: direction `[d]`, threshold on the similarity, `above` or `below`, and its F1."""

    layer: int
    direction: NDArray[np.float64]
    threshold: float
    comparator: str
    f1: float


def fit_condition(data: FitData, layer: int, name: str = ALL_ROWS, pool: Pool = "query") -> Condition:
    """The direction between a category's prompts and all others at a layer, with the best F1's threshold.

    Directions come from the `fit` part, thresholds from `calibration`.

    Args:
        data: captured states.
        layer: block whose output is read.
        name: name of the category, or `*` for all rows.
        pool: `query` or `query_mean`.

    Raises:
        DatasetError: for too few prompts on a side.
    """
    site = resid_post(layer)
    wanted, others = sides_of(data, site, "fit", name, pool)
    if min(len(wanted), len(others)) < MIN_ROWS:
        raise DatasetError(
            f"CAST needs at least {MIN_ROWS} rows of {name!r} and {MIN_ROWS} other prompts (general_dataset, or rows of "
            f"other categories) to separate, got {len(wanted)} and {len(others)}."
        )
    pairs = max(len(wanted), len(others))
    rng = np.random.default_rng(data.seed)
    order = [rng.permutation(pairs) % len(side) for side in (wanted, others)]
    direction = first_direction(wanted[order[0]].astype(np.float64), others[order[1]].astype(np.float64))
    scores, labels = _scores(data, site, "calibration", name, pool, direction)
    if len(np.unique(labels)) < 2:
        scores, labels = _scores(data, site, "fit", name, pool, direction)
    return Condition(layer, direction, *best_threshold(scores, labels))


def sides_of(data: FitData, site: Site, part: Part, name: str, pool: Pool = "query") -> tuple[np.ndarray, np.ndarray]:
    """States of the prompts that should meet a condition, and of the others, `[prompts, d]` float32 each."""
    queries, general = data.query(site, part, pool), data.general(site, part, pool)
    own = rows_named(data, part, name)
    return queries[own], np.concatenate([queries[~own], general])


def rows_named(data: FitData, part: Part, name: str) -> NDArray[np.bool_]:
    """Which rows of a part are in a category, bool `[rows]`; all for `*`.

    Raises:
        DatasetError: if the data set has no such category.
    """
    if name == ALL_ROWS:
        return np.ones(len(data.prompts(part)), dtype=bool)
    kinds: dict[Part, Any] = {each: data.kinds(each) for each in PARTS}
    known = sorted({str(kind) for of_part in kinds.values() if of_part is not None for kind in of_part})
    if name not in known:
        raise DatasetError(
            f"CAST got the category {name!r}, but the rows have {known[:50] or 'no category'}. Name one of them in "
            "`conditions` and `behaviors`, or '*' for all rows; categories are in the column `category`."
        )
    return np.asarray(kinds[part]) == name


def first_direction(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """First principal direction of pairs `[rows, d]`, each centred at its midpoint; unit, from b to a for most.

    Raises:
        DatasetError: if no pair differs.
    """
    # Centred at their midpoint, the two states of a pair are plus and minus half of their difference.
    direction = principal_directions((a - b) / 2, 1)[1]
    if direction.shape[1] == 0:
        raise DatasetError("The two sides of all pairs have the same states: there is no direction between them.")
    first = direction[:, 0]
    along = (a - b) @ first
    return first if (along > 0).sum() >= (along < 0).sum() else -first


def best_threshold(scores: NDArray[np.float64], labels: NDArray[np.int64]) -> tuple[float, str, float]:
    """The threshold and comparator of the best F1; tries every cut between two scores, where the paper uses a grid.

    Args:
        scores: `[n]`.
        labels: `[n]`, 1 if the condition should be met, else 0.

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


def held_out_f1(labels: NDArray[np.int64], met: NDArray[np.bool_]) -> float | None:
    """F1 of a condition from whether it should be met and whether it is, `[n]` each; None if all labels are equal."""
    return float(f1_score(labels, met)) if len(np.unique(labels)) == 2 else None


def _scores(
    data: FitData, site: Site, part: Part, name: str, pool: Pool, direction: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    wanted, others = sides_of(data, site, part, name, pool)
    states = torch.from_numpy(np.concatenate([others, wanted]))
    condition = torch.from_numpy(direction.astype(np.float32))
    return similarity(states, condition).double().numpy(), np.repeat([0, 1], [len(others), len(wanted)])
