"""Scores of a token: a linear head on its state, or the recurrent score on top of one, with thresholds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import spearmanr
from sklearn.linear_model import RidgeCV
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from finesteer_hf.errors import DatasetError
from finesteer_hf.estimators import StateScore
from finesteer_hf.method_api import AnswerRun, FitData, Part
from finesteer_hf.methods.tad.confidence_fit import AnswerStates, FittedScore, auroc, fit_score, read_answers
from finesteer_hf.methods.tad.config import TADConfig
from finesteer_hf.sites import Site, resid_post


MIN_ROWS = 4
# Most tokens per side and part to fit the head on: a linear head does not improve with many thousands.
MAX_ROWS, MAX_TOKENS = 200, 1000
RIDGES = np.logspace(0, 6, 13)


@dataclass(frozen=True)
class Judged:
    """A head, and how far held-out tokens' uncertainty exceeds the threshold, in units of the spread.

    Attributes:
        head: the head.
        excess: for `chosen` and `rejected` answers, `[tokens]`.
    """

    head: Head
    excess: Mapping[str, NDArray[np.floating]]

    def opened(self, config: TADConfig) -> dict[str, float | None]:
        """Mean gate of each side's tokens; None if there are none."""
        means: dict[str, float | None] = {}
        for side, excess in self.excess.items():
            gate = (excess > 0).astype(float) if config.gate == "hard" else expit(excess)
            means[side] = float(gate.mean()) if len(gate) else None
        return means


def single_heads(data: FitData, config: TADConfig, layers: Sequence[int]) -> dict[int, Judged]:
    """Heads that judge each token alone."""
    parts = {
        part: AnswerTokens.of(data, part, list(map(resid_post, layers)))
        for part in cast(tuple[Part, ...], ("fit", "calibration"))
    }
    _require_rows(parts["fit"].rows)
    held_out = parts["calibration"] if parts["calibration"].rows else parts["fit"]
    found = {}
    for layer in layers:
        head = fit_head(parts["fit"], held_out, layer, config)
        weight, bias = head.tensors["gate.weight"].numpy(), head.tensors["gate.bias"].numpy()
        excess = {side: held_out.states[side][resid_post(layer)] @ weight + bias for side in ("chosen", "rejected")}
        found[layer] = Judged(head, excess)
    return found


def heads_with_memory(data: FitData, config: TADConfig, layers: Sequence[int]) -> dict[int, Judged]:
    """Heads whose score uses earlier tokens."""
    reach = config.recurrence
    fit, held_out = (
        read_answers(data, part, layers, reach, config.attention)
        for part in cast(tuple[Part, ...], ("fit", "calibration"))
    )
    _require_rows(len(np.unique(fit[layers[0]].group)))
    found = {}
    for layer in layers:
        data.note(f"fitting the score at block {layer}")
        rest = held_out[layer] if len(held_out[layer].real) else fit[layer]
        found[layer] = _judged(fit_score(fit[layer], reach), rest, config)
    return found


def _judged(score: FittedScore, held_out: AnswerStates, config: TADConfig) -> Judged:
    """Threshold and spread of a score, from the tokens of held-out chosen answers, and its quality."""
    told, confidence = held_out.told, score.score(held_out)
    sides = {"chosen": held_out.wanted, "rejected": ~held_out.wanted}
    doubts = {side: 1 - confidence[told & of_side[:, None]] for side, of_side in sides.items()}
    threshold, spread = np.quantile(doubts["chosen"], config.quantile), max(float(doubts["chosen"].std()), 1e-6)
    weights = score.weights
    tensors = {
        "gate.weight": torch.from_numpy(score.state_weight.astype(np.float32)),
        "gate.bias": torch.tensor([score.state_bias], dtype=torch.float32),
        "gate.threshold": torch.tensor([threshold], dtype=torch.float32),
        "gate.spread": torch.tensor([spread], dtype=torch.float32),
        "recurrence.bias": weights.bias,
        "recurrence.own": weights.own,
        "recurrence.previous": weights.previous.contiguous(),
    }
    if config.attention:
        tensors["recurrence.attention"] = weights.attention.contiguous()
    excess = {side: (values - threshold) / spread for side, values in doubts.items()}
    return Judged(Head(tensors, auroc(held_out, confidence)), excess)


def _require_rows(rows: int) -> None:
    if rows < MIN_ROWS:
        raise DatasetError(f"TAD needs at least {MIN_ROWS} rows to fit on, got {rows}.")


@dataclass(frozen=True)
class AnswerTokens:
    """States of single tokens within answers, and how uncertain the model is after them.

    Attributes:
        rows: number of their rows.
        states: for `chosen` and `rejected`, by site, `[tokens, d]` float32.
        entropy: for each side, entropy of the next-token distribution, `[tokens]` in nats.
    """

    rows: int
    states: dict[str, dict[Site, NDArray[np.float32]]]
    entropy: dict[str, NDArray[np.floating]]

    @classmethod
    def of(cls, data: FitData, part: Part, sites: Sequence[Site]) -> AnswerTokens:
        """Run the answers of a part through the model and keep evenly spaced tokens of each."""
        size = len(data.prompts(part))
        rows = np.random.default_rng(data.seed).choice(size, min(size, MAX_ROWS), replace=False).tolist()
        most = max(1, MAX_TOKENS // max(len(rows), 1))
        found = cls(len(rows), {}, {})
        for side in cast(tuple[Literal["chosen", "rejected"], ...], ("chosen", "rejected")):
            kept = [_tokens_of(run, most) for run in data.answers(side, part, rows, sites=sites)]
            found.states[side] = {
                site: np.concatenate([states[site] for states, _ in kept] or [np.zeros((0, 1), np.float32)])
                for site in sites
            }
            found.entropy[side] = np.concatenate([entropy for _, entropy in kept] or [np.zeros(0)])
        return found

    def target(self, name: str) -> NDArray[np.floating]:
        """A head's targets for the tokens of both sides, the chosen ones first."""
        if name == "answers":
            return np.repeat([0.0, 1.0], [len(self.entropy[side]) for side in ("chosen", "rejected")])
        return np.concatenate([self.entropy[side] for side in ("chosen", "rejected")])

    def both(self, site: Site) -> NDArray[np.float32]:
        """States of both sides, the chosen ones first."""
        return np.concatenate([self.states[side][site] for side in ("chosen", "rejected")])


def _tokens_of(run: AnswerRun, most: int) -> tuple[dict[Site, NDArray[np.float32]], NDArray[np.floating]]:
    """States and entropies of at most so many tokens of an answer."""
    # The first state is the query's, which is the same for every answer; an answer of one token has no other.
    first = min(1, len(run.ids) - 1)
    columns = np.unique(np.linspace(first, len(run.ids) - 1, most).round().astype(int))
    at = torch.from_numpy(columns)
    probabilities = run.logits[at.to(run.logits.device)].softmax(-1)
    states = {site: state[at.to(state.device)].float().cpu().numpy() for site, state in run.states.items()}
    return states, torch.special.entr(probabilities).sum(-1).cpu().numpy()


@dataclass(frozen=True)
class Head:
    """A fitted head: `gate.weight` and `gate.bias`, and its quality on held-out tokens."""

    tensors: dict[str, torch.Tensor]
    quality: float


def fit_head(fit: AnswerTokens, held_out: AnswerTokens, layer: int, config: TADConfig) -> Head:
    """Fit a head at a layer, with the threshold and spread of the held-out chosen answers' tokens folded in.

    Its quality is the area under the curve for `answers`, the rank correlation for `entropy`.
    """
    site, name = resid_post(layer), config.uncertainty
    states, target = fit.both(site).astype(np.float64), fit.target(name)
    if name == "answers":
        head = StateScore(C=1.0).fit(states[target == 1], states[target == 0])
        weight, bias = head.weight_.astype(np.float64), head.bias_
    else:
        scaler, ridge = make_pipeline(StandardScaler(), RidgeCV(RIDGES)).fit(states, target).named_steps.values()
        weight = ridge.coef_ / scaler.scale_
        bias = float(ridge.intercept_ - scaler.mean_ @ weight)
    told = held_out.both(site) @ weight + bias
    truth = held_out.target(name)
    quality = roc_auc_score(truth, told) if name == "answers" else spearmanr(truth, told).statistic
    trusted = held_out.states["chosen"][site] @ weight + bias
    threshold, spread = np.quantile(trusted, config.quantile), max(float(trusted.std()), 1e-12)
    tensors = {
        "gate.weight": torch.from_numpy((weight / spread).astype(np.float32)),
        "gate.bias": torch.tensor([(bias - threshold) / spread], dtype=torch.float32),
    }
    return Head(tensors, float(np.nan_to_num(quality)))
