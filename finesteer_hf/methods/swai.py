"""SWAI: word statistics, added to the logits of the most likely tokens (arXiv 2601.10960).

For each token, the log-odds of wanted against unwanted answers, with an informative Dirichlet prior (Monroe, Colaresi
and Quinn 2008), in units of its standard deviation:

    z_w = [log((n_w + a_w) / (N + A - n_w - a_w)) - log((m_w + a_w) / (M + A - m_w - a_w))]
          / sqrt(1 / (n_w + a_w) + 1 / (m_w + a_w))

with n, m the counts in chosen and rejected answers, N, M their sums, a_w a prior proportional to the token's share of
all text in the fit, including general prompts, and A its sum. At each step lambda z is added to candidates among the
top K.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LogitsProcessor

from finesteer_hf.adapters.config import SteeringConfig, setting
from finesteer_hf.adapters.registry import register_steering_method
from finesteer_hf.adapters.tensor_files import Free, Indices, Shape
from finesteer_hf.errors import AdapterFileError, DatasetError
from finesteer_hf.method_api import CaptureRequest, FitData, FitResult, ModelInfo, Part, SteeringMethod
from finesteer_hf.methods._shared.checks import check_count, check_number, check_strength, filled_in
from finesteer_hf.methods._shared.search import settle
from finesteer_hf.methods._shared.trials import Trial
from finesteer_hf.processors import Positions


STRENGTHS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5)
# Tokens with less evidence than this are left out of the file.
LEAST_SCORE = 1e-3


@dataclass(kw_only=True)
class SWAIConfig(SteeringConfig):
    """Settings of logit-level steering by token statistics.

    Attributes:
        top_k: number of candidates: the tokens with the largest logits; no other logit changes.
        top_m: number of candidates to raise, those with the largest scores z; None for all, which also lowers those
            with negative scores.
        prior: sum A of the prior counts: the weight of a token's overall share, in tokens of evidence.
    """

    steering_type: ClassVar[str] = "SWAI"

    # Logits choose generated tokens; the prompt has none to steer.
    positions: Positions = field(default="generated", metadata=setting("Steered tokens: generated."))
    strength: float | str = field(default="auto", metadata=setting("Lambda: a number, auto or kl:<nats>."))
    top_k: int = field(default=50, metadata=setting("Number of candidates, those with the largest logits."))
    top_m: int | None = field(default=None, metadata=setting("Number of candidates to raise; None for all."))
    prior: float = field(default=1000.0, metadata=setting("Sum of the prior counts."))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions != "generated":
            raise ValueError(f"SWAI steers generated tokens; positions={self.positions!r} is not possible.")
        check_count("top_k", self.top_k, 1)
        if self.top_m is not None:
            check_count("top_m", self.top_m, 1)
        check_number("prior", self.prior, above=0)
        check_strength(self.strength, ("kl",))


class TokenScores(LogitsProcessor):
    """Add scores of tokens to the largest logits.

    Args:
        token_ids: `[n]` int64.
        scores: `[n]` float32; 0 for all other tokens.
        coefficient: lambda: a number, or `[rows]` float32. Rows of 0 stay as they are.
        top_k: number of candidates.
        top_m: number of candidates to raise, those with the largest scores; None for all.
    """

    def __init__(
        self,
        token_ids: torch.Tensor,
        scores: torch.Tensor,
        coefficient: torch.Tensor | float,
        top_k: int,
        top_m: int | None = None,
    ) -> None:
        self.token_ids, self.scores = token_ids, scores
        self.coefficient = coefficient
        self.top_k, self.top_m = top_k, top_m
        self._table: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Raise the logits `scores` `[rows, vocabulary]`; `input_ids` is not used."""
        candidates = scores.topk(min(self.top_k, scores.shape[-1]), dim=-1).indices
        raised = self._table_for(scores)[candidates]
        if self.top_m is not None and self.top_m < raised.shape[-1]:
            least = raised.topk(self.top_m, dim=-1).values[:, -1:]
            raised = torch.where(raised >= least, raised, 0.0)
        values = scores.gather(-1, candidates)
        coefficient = torch.as_tensor(self.coefficient, dtype=torch.float32, device=scores.device).reshape(-1, 1)
        moved = (values + coefficient * raised).to(scores.dtype)
        return scores.scatter(-1, candidates, torch.where((coefficient == 0) | (raised == 0), values, moved))

    def _table_for(self, scores: torch.Tensor) -> torch.Tensor:
        if self._table is None or self._table.shape[0] != scores.shape[-1] or self._table.device != scores.device:
            known = self.token_ids < scores.shape[-1]
            self._table = torch.zeros(scores.shape[-1], device=scores.device)
            self._table[self.token_ids[known].to(scores.device)] = self.scores[known].to(scores.device)
        return self._table


class SWAI(SteeringMethod[SWAIConfig]):
    """Add `strength * z` to the logits of likely tokens.

    In `generate` this comes after the repetition penalty and before temperature and top-p; the softmax renormalises.

    Args:
        config: a fitted `SWAIConfig`.
        tensors: `token_ids`, `[n]` int64, and `scores`, `[n]` float32.
    """

    def __init__(self, config: SWAIConfig, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(config, tensors)
        ids, scores = tensors.get("token_ids"), tensors.get("scores")
        if ids is None or scores is None or ids.shape != scores.shape:
            raise AdapterFileError("A SWAI adapter needs the tensors 'token_ids' and 'scores', of equal length.")
        if len(ids) and int(ids.min()) < 0:
            raise AdapterFileError("'token_ids' of the SWAI adapter holds negative numbers.")

    def logits_processors(self, scale: torch.Tensor | float) -> list[Any]:
        """The processor for a call's rows."""
        settings = self.config
        ids, scores = self.tensors["token_ids"], self.tensors["scores"]
        return [TokenScores(ids, scores, scale * self.strength, settings.top_k, settings.top_m)]

    @classmethod
    def tensor_shapes(cls, config: SWAIConfig) -> dict[str, Shape]:
        """Tokens and their scores, one each per stored token."""
        tokens = Free("tokens")
        return {"token_ids": Indices((tokens,)), "scores": (tokens,)}

    @classmethod
    def needs(cls, config: SWAIConfig, info: ModelInfo) -> CaptureRequest:
        """No states: tokens are counted."""
        return CaptureRequest(sites=(), pools=())

    @classmethod
    def fit(cls, data: FitData, config: SWAIConfig) -> FitResult:
        """Count the tokens of the `fit` and `calibration` parts; choose the strength on `validation`.

        A token that ends every answer, such as a template's end of turn, is not counted: it carries no information.

        Raises:
            DatasetError: if the two sides do not differ in any token.
        """
        parts = cast(tuple[Part, ...], ("fit", "calibration"))
        chosen, rejected = (
            [ids for part in parts for ids in data.tokens(side, part)] for side in ("chosen", "rejected")
        )
        ends = {int(ids[-1]) for ids in chosen + rejected if len(ids)}
        if len(ends) == 1:
            chosen, rejected = [ids[:-1] for ids in chosen], [ids[:-1] for ids in rejected]
        general = [ids for part in parts for ids in data.tokens("general", part)]
        counts = [_count(texts, data.info.vocab_size) for texts in (chosen, rejected, general)]
        scores = log_odds(counts[0], counts[1], sum(counts[1:], counts[0]), config.prior)
        ids = np.flatnonzero(np.abs(scores) >= LEAST_SCORE)
        if not len(ids):
            raise DatasetError("Chosen and rejected answers use every token equally, so there is nothing to prefer.")
        tensors = {
            "token_ids": torch.from_numpy(ids.astype(np.int64)),
            "scores": torch.from_numpy(scores[ids].astype(np.float32)),
        }

        def build(strength: float) -> SWAI:
            return cls(filled_in(config, data.info, strength=strength), tensors)

        strength, settled = settle(data, config.strength, Trial.of_factor(build), None, STRENGTHS)
        ranked = ids[np.argsort(-scores[ids])]
        report: dict[str, Any] = {
            "tokens": len(ids),
            "counted": {"chosen": int(counts[0].sum()), "rejected": int(counts[1].sum())},
            "most_wanted": [{"token": int(t), "z": float(scores[t])} for t in ranked[:20]],
            "least_wanted": [{"token": int(t), "z": float(scores[t])} for t in ranked[::-1][:20]],
            **settled,
        }
        return FitResult(build(strength).config, tensors, report)


def log_odds(
    target: NDArray[np.int64], rest: NDArray[np.int64], background: NDArray[np.int64], prior: float
) -> NDArray[np.float64]:
    """Log-odds ratios with an informative Dirichlet prior, in standard deviations (Monroe et al. 2008, Eqs. 16-22).

    Args:
        target: counts `[vocabulary]`.
        rest: counts `[vocabulary]`.
        background: counts `[vocabulary]` that the prior is proportional to; covers all tokens of target and rest.
        prior: sum of the prior counts.

    Returns:
        z `[vocabulary]`; 0 for tokens without background or evidence.
    """
    known = background > 0
    alpha = prior * background[known] / background.sum()
    n, m = target[known] + alpha, rest[known] + alpha
    # If there is only one token, it has no odds.
    others = [np.maximum(side.sum() - side, np.finfo(float).tiny) for side in (n, m)]
    z = np.zeros(len(target))
    z[known] = (np.log(n / others[0]) - np.log(m / others[1])) / np.sqrt(1 / n + 1 / m)
    return z


def _count(texts: list[NDArray[np.int64]], vocabulary: int) -> NDArray[np.int64]:
    ids = np.concatenate([*texts, np.zeros(0, dtype=np.int64)])
    return np.bincount(ids, minlength=vocabulary)[: max(vocabulary, int(ids.max(initial=0)) + 1)]


register_steering_method(SWAI)
