"""The dose response of processors that act on logits, or whose gate is shut on some prompts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fitting_toys import random_rows, small_model
from teacher_forcing import SITE, VECTOR, by_hand
from transformers import LogitsProcessor

from finesteer_hf import SteeringProcessor
from finesteer_hf.fitting.answers import QueryRecorder
from finesteer_hf.fitting.data.encoding import EncodedRow, Passage
from finesteer_hf.fitting.dose import (
    DoseRunner,
)
from finesteer_hf.processors import Decision, QueryStates
from finesteer_hf.sites import Site


CPU = torch.device("cpu")


class Favour(LogitsProcessor):
    """Adds to the logit of a token that depends on the text so far."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[torch.arange(len(scores)), input_ids.sum(1) % scores.shape[1]] += self.scale
        return scores


class OnLogits(SteeringProcessor):
    def __init__(self, strength: float) -> None:
        self.strength = strength

    def logits_processors(self, scale: Any) -> list[Any]:
        return [Favour(self.strength * scale)]


def test_methods_on_logits_are_measured_too(rows: list[EncodedRow]) -> None:
    model = small_model("llama")
    base, point = DoseRunner(model, rows, [rows[0].prompt]).run(OnLogits, [0.0, 4.0])

    def score(passage: Passage) -> float:
        log_probs = by_hand(model, passage, 0.0)
        values = []
        for i in range(passage.answer_start, len(passage.ids)):
            scores = Favour(4.0)(torch.tensor([passage.ids[:i]]), log_probs[i - 1][None])[0]
            values.append(float(scores.softmax(-1)[passage.ids[i]]))
        return min(values)

    assert point.bottleneck == pytest.approx(np.mean([score(row.chosen) for row in rows]), rel=1e-4)
    assert point.kl > 0 and base.kl == 0


class GatedVector(SteeringProcessor):
    """The vector for queries of one sign, and nothing for the others."""

    reads = writes = (SITE,)

    def __init__(self, strength: float, positions: Any = "all") -> None:
        self.strength, self.positions = strength, positions

    def decide(self, queries: QueryStates) -> Decision:
        return Decision({SITE: VECTOR.expand(queries.rows, -1)}, gate=(queries[SITE][:, 0] > 0).float())


@pytest.mark.parametrize("positions", ["all", "generated"])
def test_prompts_on_which_a_gate_is_shut_cost_no_forward(
    rows: list[EncodedRow], positions: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model("llama")
    prompts = list({row.prompt: row for row in random_rows(12, seed=3) if len(row.prompt.ids) > 1})
    shut = [p for p in prompts if not GatedVector(1.0).decide(QueryStates(states_of(model, p), 1, CPU)).gate.item()]
    assert 2 < len(shut) < len(prompts) - 2
    build = lambda strength: GatedVector(strength, positions)  # noqa: E731
    run: list[int] = []
    logits = DoseRunner._logits

    def counted(self: DoseRunner, batch: Any, processor: Any) -> Any:
        run.extend([len(batch)] if isinstance(processor, GatedVector) else [])
        return logits(self, batch, processor)

    monkeypatch.setattr(DoseRunner, "_logits", counted)
    point = DoseRunner(model, [], prompts).run(build, [4.0])[0]
    assert sum(run) == len(prompts) - len(shut)
    monkeypatch.setattr(QueryRecorder, "steered_by", lambda self, processor: [True] * len(self.batch))
    assert point.kl == pytest.approx(DoseRunner(model, [], prompts).run(build, [4.0])[0].kl, rel=1e-4)
    assert point.kl > 0


def states_of(model: Any, prompt: Passage) -> dict[Site, torch.Tensor]:
    hidden = model(input_ids=torch.tensor([prompt.ids]), output_hidden_states=True).hidden_states[SITE.layer + 1]
    return {SITE: hidden[:, -1]}
