"""Dose response: what a strength does to held-out answers, and to general prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from finesteer_hf.auto import SteeredModelForCausalLM
from finesteer_hf.evaluation.likelihood import batches_by_length, model_device, pad_right, token_log_probs
from finesteer_hf.fitting.templating import EncodedRow, Passage
from finesteer_hf.methods.base import DosePoint
from finesteer_hf.mixin import SteeringMixin
from finesteer_hf.processors import SteeringProcessor, SteeringProcessorList


# More rows make the curve no clearer than its standard error shows, and each costs two passes a strength.
MAX_ROWS, MAX_PROMPTS = 128, 64


class DoseRunner:
    """Runs a model steered at several strengths.

    Args:
        model: the base model; it is steered for the length of a run if it is not already.
        rows: held-out preference rows.
        prompts: general prompts.
        advance: told of each strength that is done.
    """

    def __init__(self, model: Any, rows: Sequence[EncodedRow], prompts: Sequence[Passage]) -> None:
        self.model = model
        self.rows = [row for row in rows if row.chosen.answer_start and row.rejected.answer_start][:MAX_ROWS]
        self.prompts = list(prompts)[:MAX_PROMPTS]

    def run(self, build: Callable[[float], SteeringProcessor], strengths: Sequence[float]) -> list[DosePoint]:
        """The curve, one point a strength, ascending.

        Margins are mean log p(chosen) - log p(rejected) in nats a token. Divergence is KL(unsteered || steered) of the
        distribution after each prompt.
        """
        already = isinstance(self.model, SteeringMixin)
        SteeredModelForCausalLM.from_model(self.model)
        try:
            with self.model.disable_steering():
                base = self._next_token()
            margins, divergences = [], []
            for strength in strengths:
                with self.model.steering_with(SteeringProcessorList([build(strength)])):
                    margins.append(self._margins())
                    divergences.append(self._divergence(base, self._next_token()))
            return [self._point(*found, margins) for found in zip(strengths, margins, divergences, strict=True)]
        finally:
            if not already:
                self.model.unload_steering()

    @staticmethod
    def _point(strength: float, own: np.ndarray, kl: float, curve: Sequence[np.ndarray]) -> DosePoint:
        best = max(curve, key=lambda margins: margins.mean()) if len(own) else own
        many = len(own) > 1
        return DosePoint(
            strength=float(strength),
            margin=float(own.mean()) if len(own) else float("nan"),
            margin_se=float(own.std(ddof=1) / np.sqrt(len(own))) if many else 0.0,
            kl=kl,
            accuracy=float((own > 0).mean()) if len(own) else float("nan"),
            gap_se=float((best - own).std(ddof=1) / np.sqrt(len(own))) if many else 0.0,
        )

    def _margins(self) -> np.ndarray:
        def score(side: str) -> np.ndarray:
            passages: list[Passage] = [getattr(row, side) for row in self.rows]
            prompts = [p.ids[: p.answer_start] for p in passages]
            answers = [p.ids[p.answer_start :] for p in passages]
            return token_log_probs(self.model, prompts, answers, per_token=True)

        return score("chosen") - score("rejected")

    @torch.inference_mode()
    def _next_token(self) -> torch.Tensor:
        device = model_device(self.model)
        found: list[torch.Tensor] = [torch.empty(0)] * len(self.prompts)
        for rows in batches_by_length([len(p.ids) for p in self.prompts], 4096):
            ids, mask = pad_right([self.prompts[i].ids for i in rows])
            logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
            last = logits[torch.arange(len(rows)), mask.sum(1) - 1].float().log_softmax(-1).cpu()
            for i, values in zip(rows, last, strict=True):
                found[i] = values
        return torch.stack(found) if found else torch.zeros(0, 1)

    @staticmethod
    def _divergence(base: torch.Tensor, steered: torch.Tensor) -> float:
        if not len(base):
            return 0.0
        kl = (base.exp() * (base - steered)).sum(-1).clamp(min=0)
        return float(np.percentile(kl.numpy(), 95))
