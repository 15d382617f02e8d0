"""TAD: a constant vector where the newest token is uncertain (after "Unconditional Truthfulness", arXiv 2408.10692).

The paper learns an uncertainty of each token that does not hinge on the tokens before it, from the attention to them,
the token's probability and their own uncertainties, in two stages. It scores text; here such a score is a gate:

    u = w . h + b,    g = 1 if u > threshold else 0    (soft: sigmoid((u - threshold) / spread))
    h <- h + strength * g * v    for each token by itself

This head is a stand-in for the paper's: linear in the state of the token, without attention maps, which only eager
attention gives, and without recurrence, which would make a token's gate hinge on the path by which it was reached. What it
regresses is chosen by `uncertainty`. The threshold and the spread are those of tokens that can be trusted, the ones of
held-out chosen answers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sklearn.linear_model import RidgeCV
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from finesteer_hf.config import SteeringConfig, register_steering_method
from finesteer_hf.errors import AdapterFileError, DatasetError
from finesteer_hf.estimators import StateScore
from finesteer_hf.methods.base import (
    AnswerRun,
    CaptureRequest,
    FitData,
    FitResult,
    ModelInfo,
    Part,
    Pool,
    SteeringMethod,
)
from finesteer_hf.methods.checks import (
    check_layer,
    check_number,
    check_one_of,
    check_strength,
    filled_in,
    require_fitted,
)
from finesteer_hf.methods.moments import mean_difference, median_query_norm
from finesteer_hf.methods.trials import SHORT_LIST, Trial, candidate_layers, try_each
from finesteer_hf.processors import Positions, TokenView
from finesteer_hf.sites import Site


UNCERTAINTIES = ("answers", "entropy")
GATES = ("hard", "soft")
POOLS = ("answer_mean", "answer_last")
MIN_ROWS = 4
# Tokens of a side and a part that the head is fitted to: a linear head learns no more from many thousands.
MAX_ROWS, MAX_TOKENS = 200, 1000
RIDGES = np.logspace(0, 6, 13)


@dataclass(kw_only=True)
class TADConfig(SteeringConfig):
    """Settings of a token-level gate by uncertainty.

    Attributes:
        layer: decoder block whose output is judged and steered; `auto` takes, of the three at which the head does best on
            held-out tokens, the one with the best held-out effect.
        uncertainty: what the head tells: `answers` (log-odds that the token belongs to a rejected answer, not to a chosen
            one) or `entropy` (of the model's next-token distribution after it, in nats).
        gate: `hard` steers a token or leaves it bit-identical; `soft` weighs.
        quantile: share of trusted tokens whose uncertainty is below the threshold.
        pool: answer states whose mean difference is the vector.
    """

    steering_type: ClassVar[str] = "TAD"
    understands: ClassVar[frozenset[str]] = frozenset({"gate:soft"})

    positions: Positions = field(default="generated", metadata={"help": "Steered tokens: all, prompt or generated."})
    strength: float | str = field(
        default="auto", metadata={"help": "Lambda: a number, auto, kl:<nats> or norm:<share>."}
    )
    layer: int | str = field(default="auto", metadata={"help": "Judged and steered decoder block, or auto."})
    uncertainty: Literal["answers", "entropy"] = field(
        default="answers", metadata={"help": "What the head tells: answers or entropy."}
    )
    gate: Literal["hard", "soft"] = field(default="hard", metadata={"help": "hard or soft."})
    quantile: float = field(default=0.5, metadata={"help": "Share of trusted tokens below the threshold."})
    pool: Literal["answer_mean", "answer_last"] = field(
        default="answer_mean", metadata={"help": "Pooled answer states: answer_mean or answer_last."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layer(self.layer, self.num_hidden_layers)
        check_strength(self.strength)
        for name, allowed in (("uncertainty", UNCERTAINTIES), ("gate", GATES), ("pool", POOLS)):
            check_one_of(name, getattr(self, name), allowed)
        check_number("quantile", self.quantile, above=0, below=1)


class TAD(SteeringMethod):
    """`h <- h + strength * g(h) * v` at the output of one block, g from the same token's state.

    Args:
        config: a fitted `TADConfig`.
        tensors: `vector` and `gate.weight`, `[hidden_size]`, and `gate.bias`, `[1]`, float32: g is the step function or
            the sigmoid of weight . h + bias, the threshold and the spread folded in.

    Raises:
        AdapterFileError: if the config is not fitted, or a tensor is missing.
    """

    config_cls = TADConfig

    def __init__(self, config: SteeringConfig, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(config, tensors)
        missing = sorted(set(self.tensor_shapes(config)) - set(tensors))
        if missing:
            raise AdapterFileError(f"The TAD adapter lacks the tensors {missing}.")
        self.settings = cast(TADConfig, config)
        self.maps = (_site(self.settings.layer),)

    def transform(self, site: Site, hidden: torch.Tensor, view: TokenView) -> torch.Tensor:
        """Judge each token of `[rows, tokens, hidden_size]`, and push the uncertain ones among the named."""
        gate = self.gate(hidden)[..., None]
        vector = self.parameters_on(hidden.device)["vector"]
        pushed = hidden + (view.scale * self.strength * gate * vector).to(hidden.dtype)
        steered = (view.scale != 0) & (gate > 0)
        if view.mask is not None:
            steered = steered & view.mask[..., None]
        return torch.where(steered, pushed, hidden)

    def gate(self, hidden: torch.Tensor) -> torch.Tensor:
        """g of tokens `[..., hidden_size]`, any floating dtype: `[...]` float32 in [0, 1]."""
        own = self.parameters_on(hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            excess = hidden.float() @ own["gate.weight"] + own["gate.bias"]
        return (excess > 0).float() if self.settings.gate == "hard" else torch.sigmoid(excess)

    @classmethod
    def tensor_shapes(cls, config: SteeringConfig) -> dict[str, tuple[int | None, ...]]:
        """A vector and the head."""
        require_fitted(config, "layer")
        return {"vector": (config.hidden_size,), "gate.weight": (config.hidden_size,), "gate.bias": (1,)}

    @classmethod
    def needs(cls, config: SteeringConfig, info: ModelInfo) -> CaptureRequest:
        """The outputs of the candidate layers over the answers.

        Raises:
            ValueError: if the layer is out of range.
        """
        settings = cast(TADConfig, config)
        pools: tuple[Pool, ...] = ("query", settings.pool)
        return CaptureRequest(tuple(map(_site, candidate_layers(settings.layer, info.num_layers))), pools)

    @classmethod
    def fit(cls, data: FitData, config: SteeringConfig) -> FitResult:
        """Fit the head on tokens of `fit`, its threshold on `calibration`; choose layer and strength on `validation`.

        Raises:
            DatasetError: for too few rows.
        """
        settings = cast(TADConfig, config)
        layers = candidate_layers(settings.layer, data.info.num_layers)
        data.note("reading tokens")
        parts = {
            part: AnswerTokens.of(data, part, list(map(_site, layers)))
            for part in cast(tuple[Part, ...], ("fit", "calibration"))
        }
        if parts["fit"].rows < MIN_ROWS:
            raise DatasetError(f"TAD needs at least {MIN_ROWS} rows to fit on, got {parts['fit'].rows}.")
        held_out = parts["calibration"] if parts["calibration"].rows else parts["fit"]
        heads = {layer: fit_head(parts["fit"], held_out, layer, settings) for layer in layers}
        promising = sorted(layers, key=lambda layer: -heads[layer].quality)[:SHORT_LIST]
        tensors = {
            layer: {**heads[layer].tensors, "vector": _mean_difference(data, settings, layer)} for layer in promising
        }

        def fitted(layer: int, strength: float) -> TADConfig:
            requires = ["gate:soft"] if settings.gate == "soft" else []
            return filled_in(settings, data.info, layer=layer, strength=strength, requires=requires)

        trials = {
            layer: Trial(
                build=lambda strength, at=layer: cls(fitted(at, strength), tensors[at]),  # type: ignore[misc]
                vector_norm=float(tensors[layer]["vector"].norm()),
                state_norm=median_query_norm(data, _site(layer)),
            )
            for layer in promising
        }
        layer, tried = promising[0], None
        if len(promising) > 1:
            layer, tried = try_each(data, trials, settings.strength)
        strength, curve, why = trials[layer].choose_strength(settings.strength, data)
        gate = cls(fitted(layer, 0.0), tensors[layer]).gate
        report: dict[str, Any] = {
            "layer": layer,
            "layers": [{"layer": at, "quality": heads[at].quality} for at in layers],
            "layers_tried": tried,
            "open": {
                **{side: _mean_gate(gate, held_out.states[side][_site(layer)]) for side in ("chosen", "rejected")},
                "general": _mean_gate(gate, data.general(_site(layer), "calibration")),
            },
            "vector": {"vector_norm": trials[layer].vector_norm, "state_norm": trials[layer].state_norm},
            "strength": why,
            "dose_response": [dataclasses.asdict(point) for point in curve],
        }
        return FitResult(fitted(layer, strength), tensors[layer], report)


@dataclass(frozen=True)
class AnswerTokens:
    """States of single tokens within answers, and how uncertain the model is after them.

    Attributes:
        rows: number of rows that they are of.
        states: for `chosen` and `rejected`, by site, `[tokens, d]` float32.
        entropy: for either side, of the next-token distribution, `[tokens]` in nats.
    """

    rows: int
    states: dict[str, dict[Site, NDArray[np.float32]]]
    entropy: dict[str, NDArray[np.floating]]

    @classmethod
    def of(cls, data: FitData, part: Part, sites: Sequence[Site]) -> AnswerTokens:
        """Run the answers of a part through the model; of each, evenly spaced tokens are kept."""
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
        """What a head is to tell of the tokens of both sides, the chosen ones first."""
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
    """A fitted head: `gate.weight` and `gate.bias`, and how well it tells held-out tokens."""

    tensors: dict[str, torch.Tensor]
    quality: float


def fit_head(fit: AnswerTokens, held_out: AnswerTokens, layer: int, config: TADConfig) -> Head:
    """Fit a head at a layer, with threshold and spread of the held-out chosen answers' tokens folded in.

    Its quality is the area under the curve for `answers`, the rank correlation for `entropy`.
    """
    site, name = _site(layer), config.uncertainty
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


def _site(layer: int | str) -> Site:
    return Site("resid_post", int(layer))


def _mean_difference(data: FitData, config: TADConfig, layer: int) -> torch.Tensor:
    parts = cast(tuple[Part, ...], ("fit", "calibration"))
    vector, _ = mean_difference(data, ("chosen", "rejected"), _site(layer), parts, config.pool)
    return torch.from_numpy(vector.astype(np.float32))


def _mean_gate(gate: Any, states: NDArray[np.float32]) -> float | None:
    return float(gate(torch.from_numpy(states)).mean()) if len(states) else None


register_steering_method("TAD", config_cls=TADConfig, method_cls=TAD)
