"""Gradients of answers: how a vector added at a site, from the query on, would change an answer's log-probability.

One backward pass per answer gives the gradients of all sites: at each, a zero vector is added to the last prompt token
and to the answer, and its gradient is read. The prompt before its last token is not changed, so it runs without a
graph, once for all its answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from finesteer_hf.errors import DatasetError, UnsupportedModelError
from finesteer_hf.fitting.answers import answer_logits, frozen, logit_budget, steered
from finesteer_hf.fitting.capture.jobs import batches
from finesteer_hf.fitting.capture.prompt_cache import PromptCache
from finesteer_hf.fitting.capture.reader import CapturedBatch
from finesteer_hf.fitting.data.encoding import Passage
from finesteer_hf.processors import SteeringProcessor, TokenView
from finesteer_hf.sites import Site, TextTower


# Most tokens of a batch with a graph, not counting cached prompts.
GRAPH_TOKENS = 384


class ZeroVectors(SteeringProcessor):
    """Add a zero vector per row at each site, from the query on, to get its gradient.

    Args:
        sites: the sites.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self.maps = tuple(sites)
        self.positions = "generated"
        self.vectors: dict[Site, torch.Tensor] = {}

    def transform(self, site: Site, hidden: torch.Tensor, view: TokenView) -> torch.Tensor:
        zeros = torch.zeros(hidden.shape[0], 1, hidden.shape[2], device=hidden.device, dtype=torch.float32)
        self.vectors[site] = zeros.requires_grad_()
        added = zeros if view.mask is None else zeros * view.mask[..., None]
        return hidden + added.to(hidden.dtype)


class GradientReader:
    """Reads gradients of answers' mean log-probabilities per token.

    Args:
        model: a causal LM, read unsteered. Its parameters are frozen during a read.
        sites: where the vectors are added.
        prompts: caches prompts.
        describe: names the rows of passages, for messages.
    """

    def __init__(
        self,
        model: Any,
        sites: Sequence[Site],
        prompts: PromptCache,
        describe: Callable[[Sequence[Passage]], str] | None = None,
    ) -> None:
        self.model = model
        self.prompts = prompts
        self.describe = describe or (lambda passages: f"{len(passages)} texts")
        tower = TextTower(model)
        for site in sites:
            tower.check(site)
        self.probe = ZeroVectors(sites)

    def read(
        self, answers: Sequence[Passage], advance: Callable[[int], None] = lambda done: None
    ) -> Iterator[CapturedBatch]:
        """Read answers in batches; those of one prompt stay together.

        Yields:
            Batches whose states are `[answers, width]` float32 by `(site, "gradient")`, in nats per token and per unit
            of the stream.

        Raises:
            DatasetError: naming the rows whose gradients are NaN or infinite.
            UnsupportedModelError: if gradients do not pass through the model.
        """
        ordered = sorted(
            answers, key=lambda p: (p.answer_start or 0, p.ids[: p.answer_start], len(p.ids)), reverse=True
        )
        budget = min(GRAPH_TOKENS, logit_budget(self.model))
        for batch in batches(ordered, self._cost, budget):
            yield self._read(batch)
            advance(len(batch))

    def _cost(self, batch: Sequence[Passage]) -> int:
        behind = 1 if self.prompts.serves(batch, [self.probe]) else 0
        return len(batch) * max(len(p.ids) - behind * (int(p.answer_start or 0) - 1) for p in batch)

    def _read(self, batch: Sequence[Passage]) -> CapturedBatch:
        with steered(self.model), frozen(self.model), torch.enable_grad():
            total: Any = 0.0
            logits = answer_logits(self.model, batch, [self.probe], self.prompts)
            for passage, of_answer in zip(batch, logits, strict=True):
                answer = torch.tensor(passage.ids[passage.answer_start :], device=of_answer.device)
                total = total - torch.nn.functional.cross_entropy(of_answer[:-1], answer)
            vectors = [self.probe.vectors[site] for site in self.probe.maps]
            try:
                gradients = torch.autograd.grad(total, vectors)
            except RuntimeError as error:
                raise UnsupportedModelError(
                    f"Gradients do not pass through this model ({error}). Fit with target='difference', or load it in a "
                    "form that supports training (bfloat16, float32, or bitsandbytes)."
                ) from error
            finally:
                self.probe.vectors = {}
        states = {
            (site, "gradient"): gradient[:, 0].float().cpu().numpy()
            for site, gradient in zip(self.probe.maps, gradients, strict=True)
        }
        finite = np.all([np.isfinite(values).all(axis=1) for values in states.values()], axis=0)
        if not finite.all():
            bad = [passage for passage, good in zip(batch, finite, strict=True) if not good]
            raise DatasetError(
                f"{self.describe(bad)}: the gradient of an answer is NaN or infinite. Load the model in bfloat16 or "
                "float32, or drop these rows."
            )
        return CapturedBatch((), tuple(batch), states)  # type: ignore[arg-type]
