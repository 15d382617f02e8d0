"""TAD: a constant vector where the newest token is uncertain (after "Unconditional Truthfulness", arXiv 2408.10692).

The paper learns an uncertainty of each token that does not hinge on the tokens before it, from the attention to them,
the token's probability and their own uncertainties, in two stages. It scores text; here such a score is a gate:

    u = w . h + b,    g = 1 if u > threshold else 0    (soft: sigmoid((u - threshold) / spread))
    h <- h + strength * g * v    for each token by itself

By default this head is a stand-in for the paper's: linear in the state of the token, and of that token alone. What it
regresses is chosen by `uncertainty`. With `recurrence` = N the paper's regression stands on top of it, see
`finesteer_hf.methods.recurrent_score`: the head's probability is the token's own confidence p_i, and the unconditional u_i
takes in those of the N tokens before, and with `attention` the attention to them. Then the gate is that of 1 - u_i.

The paper's p_i is the probability that the model gave the token. It is no feature here: where the token is steered, it
would have to be known from the logits of the token before, which in a text that is scored in one forward do not exist yet,
and which the steering itself changes. All that is taken comes from blocks that the steering has not reached, so that u_i is
a function of the text alone, whether it is generated, drafted or scored.

The threshold and the spread are those of tokens that can be trusted, the ones of held-out chosen answers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import spearmanr
from sklearn.linear_model import RidgeCV
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from finesteer_hf.config import MOST_HEADS, SteeringConfig, register_steering_method, written_by_fit
from finesteer_hf.errors import AdapterFileError, DatasetError, UnsupportedModelError
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
from finesteer_hf.methods.recurrent_score import (
    AnswerStates,
    FittedScore,
    Recurrence,
    Weights,
    auroc,
    by_neighbour,
    fit_score,
    read_answers,
    unconditional,
)
from finesteer_hf.methods.trials import SHORT_LIST, Trial, candidate_layers, try_each
from finesteer_hf.processors import Positions, TokenView
from finesteer_hf.sites import BACK, Site


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
        recurrence: N, number of tokens before each that its score takes in; 0 judges each by itself. It goes with
            `uncertainty="answers"`, and without beams, whose rows change places.
        attention: whether the score also takes in the attention to these tokens, of all heads up to the block that is
            judged. It needs a model with `attn_implementation="eager"`: no other gives attention weights.
        attention_heads: number of heads of each block, filled in by the fit where attention is taken in.
    """

    steering_type: ClassVar[str] = "TAD"
    understands: ClassVar[frozenset[str]] = frozenset({"gate:soft", "recurrence", "attention"})

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
    recurrence: int = field(default=0, metadata={"help": "Earlier tokens taken in.", "least": 0, "most": BACK})
    attention: bool = field(default=False, metadata={"help": "Whether attention to them is taken in."})
    attention_heads: int | None = field(
        default=None, metadata=written_by_fit("Heads of each block.", least=1, most=MOST_HEADS)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layer(self.layer, self.num_hidden_layers)
        check_strength(self.strength)
        for name, allowed in (("uncertainty", UNCERTAINTIES), ("gate", GATES), ("pool", POOLS)):
            check_one_of(name, getattr(self, name), allowed)
        check_number("quantile", self.quantile, above=0, below=1)
        if self.recurrence and self.uncertainty != "answers":
            raise ValueError(
                f"recurrence={self.recurrence} regresses a confidence, so it goes with uncertainty='answers', not "
                f"{self.uncertainty!r}."
            )
        if self.attention and not self.recurrence:
            raise ValueError("attention=True is attention to earlier tokens: say how many with `recurrence`.")

    @classmethod
    def paper(cls, **overrides: Any) -> TADConfig:
        """The score as the authors' code has it: ten tokens before each, and the attention to them.

        Args:
            **overrides: fields to change.
        """
        return cls(**{"recurrence": 10, "attention": True, "uncertainty": "answers", **overrides})


class TAD(SteeringMethod):
    """`h <- h + strength * g(h) * v` at the output of one block, g from the same token's state, or from u_i.

    Args:
        config: a fitted `TADConfig`.
        tensors: `vector` and `gate.weight`, `[hidden_size]`, and `gate.bias`, `[1]`, float32: g is the step function or
            the sigmoid of weight . h + bias, the threshold and the spread folded in. With a recurrence, p is the sigmoid
            of weight . h + bias; g that of (1 - u - `gate.threshold`) / `gate.spread`, `[1]` each; and the regression is
            `recurrence.bias` and `.own`, `[1]`, `.previous`, `[N, 3]` and, of attention, `.attention`, `[N, weights]`.

    Raises:
        AdapterFileError: if the config is not fitted, or a tensor is missing.
    """

    config_cls = TADConfig

    def __init__(self, config: SteeringConfig, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(config, tensors)
        missing = sorted(set(self.tensor_shapes(config)) - set(tensors))
        if missing:
            raise AdapterFileError(f"The TAD adapter lacks the tensors {missing}.")
        self.settings = settings = cast(TADConfig, config)
        self.remembers = settings.recurrence > 0
        blocks = range(int(settings.layer) + 1) if settings.attention else ()
        self.maps = (*(Site("attention", block) for block in blocks), _site(settings.layer))

    def transform(self, site: Site, hidden: torch.Tensor, view: TokenView) -> torch.Tensor:
        """Judge each token of `[rows, tokens, hidden_size]`, and push the uncertain ones among the named."""
        if site.kind == "attention":
            view.state.setdefault("attention", {})[site] = hidden
            return hidden
        gate = (self._remembering(hidden, view) if self.remembers else self.gate(hidden))[..., None]
        vector = self.parameters_on(hidden.device)["vector"]
        pushed = hidden + (view.scale * self.strength * gate * vector).to(hidden.dtype)
        steered = (view.scale != 0) & (gate > 0)
        if view.mask is not None:
            steered = steered & view.mask[..., None]
        return torch.where(steered, pushed, hidden)

    def gate(self, hidden: torch.Tensor) -> torch.Tensor:
        """g of tokens `[..., hidden_size]`, any floating dtype, each by itself: `[...]` float32 in [0, 1]."""
        told = self._told(hidden)
        return self._open(self._excess(torch.sigmoid(told)) if self.remembers else told)

    def _told(self, hidden: torch.Tensor) -> torch.Tensor:
        own = self.parameters_on(hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            return hidden.float() @ own["gate.weight"] + own["gate.bias"]

    def _excess(self, confidence: torch.Tensor) -> torch.Tensor:
        own = self.parameters_on(confidence.device)
        return (1 - confidence - own["gate.threshold"]) / own["gate.spread"]

    def _open(self, excess: torch.Tensor) -> torch.Tensor:
        return (excess > 0).float() if self.settings.gate == "hard" else torch.sigmoid(excess)

    def _remembering(self, hidden: torch.Tensor, view: TokenView) -> torch.Tensor:
        """g of the named tokens of a forward, `[rows, tokens]`; what it is at others is not used."""
        reach, own = self.settings.recurrence, self.parameters_on(hidden.device)
        judged = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        if view.mask is not None:
            judged = judged & view.mask
        confidence = torch.where(judged, torch.sigmoid(self._told(hidden)), 0.0)
        memory: Recurrence = view.state.setdefault("recurrence", Recurrence(reach))
        past = memory.before(view.first_column, confidence)
        maps = view.state.pop("attention", {})
        attention = by_neighbour([maps[site] for site in self.maps[:-1]], reach) if maps else None
        weights = Weights(
            own["recurrence.bias"],
            own["recurrence.own"],
            own["recurrence.previous"],
            own.get("recurrence.attention", own["recurrence.previous"][:, :0]),
        )
        scores = unconditional(
            confidence, judged, None if attention is None else attention.to(hidden.device), weights, past
        )
        memory.note(confidence, scores, judged)
        return self._open(self._excess(scores))

    @classmethod
    def tensor_shapes(cls, config: SteeringConfig) -> dict[str, tuple[int | None, ...]]:
        """A vector and the head, and what stands on top of it."""
        require_fitted(config, "layer")
        settings = cast(TADConfig, config)
        shapes: dict[str, tuple[int | None, ...]] = {
            "vector": (config.hidden_size,),
            "gate.weight": (config.hidden_size,),
            "gate.bias": (1,),
        }
        if settings.recurrence:
            shapes |= dict.fromkeys(("gate.threshold", "gate.spread", "recurrence.bias", "recurrence.own"), (1,))
            shapes["recurrence.previous"] = (settings.recurrence, 3)
        if settings.attention:
            require_fitted(config, "attention_heads")
            weights = (int(settings.layer) + 1) * cast(int, settings.attention_heads)
            shapes["recurrence.attention"] = (settings.recurrence, weights)
        return shapes

    @classmethod
    def refused_by(cls, config: SteeringConfig) -> Mapping[str, str]:
        """With a recurrence, beams: their rows change places."""
        if not cast(TADConfig, config).recurrence:
            return cls.refuses
        names = ("beams", "mixed_rows_with_beams", "output_steering_of_beams")
        return {**cls.refuses, **dict.fromkeys(names, "what is remembered of a row does not follow its beam")}

    @classmethod
    def needs(cls, config: SteeringConfig, info: ModelInfo) -> CaptureRequest:
        """The outputs of the candidate layers over the answers.

        Raises:
            ValueError: if the layer is out of range.
            UnsupportedModelError: if attention is to be taken in, and the model's gives no weights.
        """
        settings = cast(TADConfig, config)
        if settings.attention and not info.shows_attention:
            raise UnsupportedModelError(
                "attention=True needs attention weights, which only attn_implementation='eager' gives. Load the model with "
                "it, or call `model.set_attn_implementation('eager')` before the fit."
            )
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
        judged = _heads_with_memory(data, settings, layers) if settings.recurrence else _heads(data, settings, layers)
        heads = {layer: of_layer.head for layer, of_layer in judged.items()}
        promising = sorted(layers, key=lambda layer: -heads[layer].quality)[:SHORT_LIST]
        tensors = {
            layer: {**heads[layer].tensors, "vector": _mean_difference(data, settings, layer)} for layer in promising
        }

        def fitted(layer: int, strength: float) -> TADConfig:
            requires = ["gate:soft"] * (settings.gate == "soft") + ["recurrence"] * (settings.recurrence > 0)
            requires += ["attention"] * settings.attention
            heads = data.info.num_heads if settings.attention else None
            return filled_in(
                settings, data.info, layer=layer, strength=strength, requires=requires, attention_heads=heads
            )

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
                **judged[layer].opened(settings),
                "general": _mean_gate(gate, data.general(_site(layer), "calibration")),
            },
            "vector": {"vector_norm": trials[layer].vector_norm, "state_norm": trials[layer].state_norm},
            "strength": why,
            "dose_response": [dataclasses.asdict(point) for point in curve],
        }
        return FitResult(fitted(layer, strength), tensors[layer], report)


@dataclass(frozen=True)
class Judged:
    """A head, and the excess of held-out tokens' uncertainty over the threshold, in units of the spread.

    Attributes:
        head: the head.
        excess: for `chosen` and `rejected` answers, `[tokens]`.
    """

    head: Head
    excess: Mapping[str, NDArray[np.floating]]

    def opened(self, config: TADConfig) -> dict[str, float | None]:
        """Mean gate of either side's tokens; None where there are none."""
        means: dict[str, float | None] = {}
        for side, excess in self.excess.items():
            gate = (excess > 0).astype(float) if config.gate == "hard" else expit(excess)
            means[side] = float(gate.mean()) if len(gate) else None
        return means


def _heads(data: FitData, config: TADConfig, layers: Sequence[int]) -> dict[int, Judged]:
    """Heads that judge each token by itself."""
    parts = {
        part: AnswerTokens.of(data, part, list(map(_site, layers)))
        for part in cast(tuple[Part, ...], ("fit", "calibration"))
    }
    _require_rows(parts["fit"].rows)
    held_out = parts["calibration"] if parts["calibration"].rows else parts["fit"]
    found = {}
    for layer in layers:
        head = fit_head(parts["fit"], held_out, layer, config)
        weight, bias = head.tensors["gate.weight"].numpy(), head.tensors["gate.bias"].numpy()
        excess = {side: held_out.states[side][_site(layer)] @ weight + bias for side in ("chosen", "rejected")}
        found[layer] = Judged(head, excess)
    return found


def _heads_with_memory(data: FitData, config: TADConfig, layers: Sequence[int]) -> dict[int, Judged]:
    """Heads whose score takes in the tokens before."""
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
    """Threshold and spread of a score, from the tokens of held-out chosen answers, and how well it tells them."""
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
