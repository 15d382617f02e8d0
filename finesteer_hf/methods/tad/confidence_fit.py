"""Fit the score of a token that uses earlier tokens; the score itself is in `recurrence`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold

from finesteer_hf.estimators import StateScore
from finesteer_hf.method_api import AnswerRun, FitData, Part
from finesteer_hf.methods.tad.recurrence import Weights, unconditional
from finesteer_hf.sites import BACK, Site, resid_post


ALPHAS = (1e1, 1e0, 1e-1, 1e-2, 1e-3, 1e-4)
FOLDS = 5
# Most answers per side and part, and most of their tokens in total, to fit a score on.
MAX_ROWS, MAX_TOKENS = 200, 2000


@dataclass(frozen=True)
class AnswerStates:
    """Right-padded answers for the recurrence.

    Attributes:
        states: `[answers, tokens, d]` float32; the first is the query's.
        attention: `[answers, tokens, N, weights]` float32, or None.
        real: bool `[answers, tokens]`.
        wanted: bool `[answers]`: whether an answer is a chosen one.
        group: int64 `[answers]`: the row of an answer.
    """

    states: NDArray[np.float32]
    attention: NDArray[np.float32] | None
    real: NDArray[np.bool_]
    wanted: NDArray[np.bool_]
    group: NDArray[np.int64]

    @property
    def told(self) -> NDArray[np.bool_]:
        """Training tokens, `[answers, tokens]`: all but the first, which is the same for every answer."""
        told = self.real.copy()
        told[:, 0] = False
        return told

    def target(self) -> NDArray[np.float64]:
        """1 at tokens of chosen answers, 0 at those of rejected ones, `[answers, tokens]`."""
        return np.repeat(self.wanted[:, None], self.real.shape[1], axis=1).astype(np.float64)


def read_answers(
    data: FitData, part: Part, layers: Sequence[int], reach: int, attention: bool
) -> dict[int, AnswerStates]:
    """Run the answers of a part through the model: for each layer, the beginning of each answer, chosen ones first.

    Args:
        data: runs the model.
        part: part of the rows.
        layers: blocks whose outputs are judged.
        reach: N.
        attention: whether to return the attention weights of a layer's heads and of earlier layers' heads.
    """
    size = len(data.prompts(part))
    rows = np.random.default_rng(data.seed).choice(size, min(size, MAX_ROWS), replace=False).tolist()
    most = max(reach + 1, MAX_TOKENS // max(len(rows), 1))
    posts = [resid_post(layer) for layer in layers]
    maps = [Site("attention", block) for block in range(max(layers) + 1)] if attention else []
    runs: list[AnswerRun] = []
    for side in cast(tuple[Literal["chosen", "rejected"], ...], ("chosen", "rejected")):
        runs += [_beginning(run, most) for run in data.answers(side, part, rows, sites=[*posts, *maps])]
    length = max((len(run.ids) for run in runs), default=1)
    real = np.array([np.arange(length) < len(run.ids) for run in runs], dtype=bool).reshape(len(runs), length)
    weights = {site: by_neighbour([_padded(runs, site, length)], reach) for site in maps}
    return {
        layer: AnswerStates(
            states=_padded(runs, post, length).numpy(),
            attention=torch.cat([weights[site] for site in maps[: layer + 1]], dim=-1).numpy() if maps else None,
            real=real,
            wanted=np.repeat([True, False], len(rows)),
            group=np.tile(np.arange(len(rows)), 2),
        )
        for layer, post in zip(layers, posts, strict=True)
    }


def by_neighbour(states: Sequence[torch.Tensor], reach: int) -> torch.Tensor:
    """A, nearest token first, from the `attention` sites of some blocks, `[rows, tokens, heads * BACK]` each.

    Returns:
        `[rows, tokens, N, weights]` float32.
    """
    shaped = [state.float().unflatten(-1, (-1, BACK))[..., :reach].mT.to(states[0].device) for state in states]
    return torch.cat(shaped, dim=-1)


def _beginning(run: AnswerRun, most: int) -> AnswerRun:
    states = {site: state[:most].float().cpu() for site, state in run.states.items()}
    return AnswerRun(run.ids[:most], run.logits[:0], states)


def _padded(runs: Sequence[AnswerRun], site: Site, length: int) -> torch.Tensor:
    if not runs:
        return torch.zeros(0, length, BACK)
    return torch.stack([torch.nn.functional.pad(r.states[site], (0, 0, 0, length - len(r.ids))) for r in runs])


@dataclass(frozen=True)
class FittedScore:
    """A fitted score.

    Attributes:
        state_weight, state_bias: p = sigmoid(state_weight . h + state_bias), `[d]` and a number.
        weights: the regression on top.
        alpha: its ridge strength.
    """

    state_weight: NDArray[np.float64]
    state_bias: float
    weights: Weights
    alpha: float

    def own(self, states: NDArray[np.float32]) -> NDArray[np.float64]:
        """p of states `[..., d]`."""
        result: NDArray[np.float64] = _sigmoid(states @ self.state_weight + self.state_bias)
        return result

    def score(self, answers: AnswerStates) -> NDArray[np.float64]:
        """u of answers' tokens, `[answers, tokens]`."""
        return _run(self.own(answers.states), answers, self.weights)


def fit_score(answers: AnswerStates, reach: int) -> FittedScore:
    """Fit in two stages, as the authors' code does.

    In the first stage, the confidences of earlier tokens are their targets; in the second they are predictions of
    first-stage models on answers that those have not seen, so that the regression is fitted on the same kind of input
    as at run time. Each ridge strength is the one whose scores, run through whole answers, separate held-out tokens
    best (in the authors' code: reject bad answers best). p is cross-fitted too.

    Args:
        answers: answers of both kinds, from at least two rows.
        reach: N.
    """
    folds = list(_folds(answers))
    own = np.zeros(answers.real.shape)
    for learn, rest in folds:
        weight, bias = _state_head(answers, learn)
        own[rest] = _sigmoid(answers.states[rest] @ weight + bias)
    target = answers.target()
    first = np.where(answers.real, target, 0.0)
    alpha = _best_alpha(own, first, answers, reach, folds)
    second = np.zeros_like(first)
    for learn, rest in folds:
        model = _regress(own, first, answers, reach, alpha, learn)
        second[rest] = _run(own, answers, model)[rest]
    alpha = _best_alpha(own, second, answers, reach, folds)
    everything = np.arange(len(answers.real))
    weights = _regress(own, second, answers, reach, alpha, everything)
    return FittedScore(*_state_head(answers, everything), weights, alpha)


def features(
    own: NDArray[np.float64], scores: NDArray[np.float64], answers: AnswerStates, reach: int
) -> NDArray[np.float64]:
    """The regression's features of each token: its p, then for each n A(i, i - n), p_(i-n), u_(i-n) and p_i u_(i-n).

    Tokens before the first are zeros.

    Returns:
        `[answers, tokens, 1 + N (weights + 3)]`.
    """
    columns = [own[..., None]]
    for n in range(1, reach + 1):
        p, u = (np.pad(values, ((0, 0), (n, 0)))[:, : values.shape[1]] for values in (own, scores))
        here = np.stack([p, np.clip(u, 0, 1), own * np.clip(u, 0, 1)], axis=-1)
        if answers.attention is not None:
            here = np.concatenate([answers.attention[:, :, n - 1], here], axis=-1)
        here[:, :n] = 0.0
        columns.append(here)
    return np.concatenate(columns, axis=-1)


def auroc(answers: AnswerStates, scores: NDArray[np.float64], rows: NDArray[np.integer] | None = None) -> float:
    """AUROC of scores for tokens of chosen against rejected answers; 0.5 if there is only one kind."""
    chosen = answers.told if rows is None else answers.told & np.isin(np.arange(len(answers.real)), rows)[:, None]
    target = answers.target()[chosen]
    return float(roc_auc_score(target, scores[chosen])) if len(set(target)) == 2 else 0.5


def _folds(answers: AnswerStates) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    count = min(FOLDS, len(np.unique(answers.group)))
    yield from GroupKFold(count).split(answers.group, groups=answers.group)


def _state_head(answers: AnswerStates, rows: NDArray[np.integer]) -> tuple[NDArray[np.float64], float]:
    told, wanted = answers.told[rows], answers.wanted[rows][:, None]
    states = answers.states[rows].astype(np.float64)
    head = StateScore(C=1.0).fit(states[told & wanted], states[told & ~wanted])
    return head.weight_.astype(np.float64), float(head.bias_)


def _regress(
    own: NDArray[np.float64],
    scores: NDArray[np.float64],
    answers: AnswerStates,
    reach: int,
    alpha: float,
    rows: NDArray[np.integer],
) -> Weights:
    told = answers.told[rows]
    model = Ridge(alpha=alpha).fit(features(own, scores, answers, reach)[rows][told], answers.target()[rows][told])
    by_token = model.coef_[1:].reshape(reach, -1)

    def tensor(values: Any) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32)

    return Weights(
        bias=tensor([float(model.intercept_)]),
        own=tensor(model.coef_[:1]),
        previous=tensor(by_token[:, -3:]),
        attention=tensor(by_token[:, :-3]),
    )


def _best_alpha(
    own: NDArray[np.float64],
    scores: NDArray[np.float64],
    answers: AnswerStates,
    reach: int,
    folds: list[tuple[NDArray[np.intp], NDArray[np.intp]]],
) -> float:
    found = {}
    for alpha in ALPHAS:
        held_out = np.zeros_like(scores)
        for learn, rest in folds:
            held_out[rest] = _run(own, answers, _regress(own, scores, answers, reach, alpha, learn))[rest]
        found[alpha] = auroc(answers, held_out)
    return max(found, key=lambda alpha: found[alpha])


def _run(own: NDArray[np.float64], answers: AnswerStates, weights: Weights) -> NDArray[np.float64]:
    attention = None if answers.attention is None else torch.from_numpy(answers.attention)
    scores = unconditional(
        torch.from_numpy(own.astype(np.float32)), torch.from_numpy(answers.real), attention, weights
    )
    return scores.numpy().astype(np.float64)


def _sigmoid(values: Any) -> Any:
    return 1.0 / (1.0 + np.exp(-values))
