"""The gate at run time: a score of the query's state, and the dose that it opens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch

from finesteer_hf.estimators import GATE_FUNCTIONS, SCORE_FUNCTIONS
from finesteer_hf.methods.query_gate.config import QueryGateConfig
from finesteer_hf.methods.query_gate.tensors import GATE_TENSORS, SCORE_TENSORS, from_file


Formula = Callable[..., torch.Tensor]


class QueryGate:
    """`g(s(h))` for the states h of queries, float32 on their device, without a branch on a value.

    Args:
        config: fitted, with a gate other than `always`.
    """

    def __init__(self, config: QueryGateConfig) -> None:
        self._score = cast("Formula", SCORE_FUNCTIONS[config.gate_score])
        self._gate = GATE_FUNCTIONS[config.gate]
        self._score_names, self._gate_names = SCORE_TENSORS[config.gate_score], GATE_TENSORS[config.gate]

    def __call__(self, h: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Score queries and open the gate by the score.

        Args:
            h: `[rows, hidden_size]` float32, unsteered, at the read site.
            tensors: by the names of the adapter's file, on the device of `h`.

        Returns:
            The gate in [0, 1] and the score, `[rows]` float32 each.
        """
        score = self._score(h, **from_file(self._score_names, tensors))
        return self._gate(score, **from_file(self._gate_names, tensors)), score
