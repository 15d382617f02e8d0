"""The gate at run time: a score of the query's state, and its dose."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch

from finesteer_hf.estimators import GATE_FUNCTIONS, SCORE_FUNCTIONS
from finesteer_hf.methods.query_gate.config import QueryGateConfig
from finesteer_hf.methods.query_gate.tensors import GATE_TENSORS, SCORE_TENSORS, from_file


Formula = Callable[..., torch.Tensor]

# Gates that are step functions of the score; they step at scores of calibration rows, threshold and floor.
STEPPED = ("conformal", "quantile")
STEPS = ("gate.calibration", "gate.threshold", "gate.floor")


class QueryGate:
    """`g(s(h))` for the states h of queries, float32 on their device, without branches on values.

    Args:
        config: a fitted config with a gate other than `always`.
    """

    def __init__(self, config: QueryGateConfig) -> None:
        self.score = config.gate_score
        #: As `DecisionFormula` names it.
        self.form = "stepped" if config.gate in STEPPED else str(config.gate)
        self._score = cast("Formula", SCORE_FUNCTIONS[config.gate_score])
        self._gate = GATE_FUNCTIONS[config.gate]
        self._stepped = self.form == "stepped"
        self._score_names, self._gate_names = SCORE_TENSORS[config.gate_score], GATE_TENSORS[config.gate]

    def lay_out(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The gate's lookup table of doses, built once when the adapter is loaded; empty for gates without steps.

        Args:
            tensors: tensors by their names in the adapter's file.

        Returns:
            `gate.steps` `[n]`: the scores at which the gate steps, negated, ascending. `gate.doses` `[n + 1]`: the
            dose of a score that is below as many steps as the index; both float32.
        """
        if not self._stepped:
            return {}
        steps = torch.cat([tensors[name].reshape(-1) for name in STEPS if name in tensors]).float().sort().values
        lowest = steps.new_tensor([-torch.inf])
        doses = self._gate(torch.cat([lowest, steps]), **from_file(self._gate_names, tensors))
        return {"gate.steps": -steps.flip(0), "gate.doses": doses.flip(0).contiguous()}

    def used(self) -> tuple[str, ...]:
        """Names of the tensors that the gate takes, those of `lay_out` in place of what they were made of."""
        own = ("gate.steps", "gate.doses") if self._stepped else self._gate_names.values()
        return (*self._score_names.values(), *own)

    def __call__(self, h: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Score queries and compute the gate from the score.

        Args:
            h: `[rows, hidden_size]` float32, unsteered, at the read site.
            tensors: tensors by their names in the adapter's file, with those of `lay_out`, on the device of `h`.

        Returns:
            The gate in [0, 1] and the score, `[rows]` float32 each.
        """
        score = self._score(h, **from_file(self._score_names, tensors))
        if not self._stepped:
            return self._gate(score, **from_file(self._gate_names, tensors)), score
        # Steps are counted from above: NaN, which sorts above every number, gets the lowest dose.
        return tensors["gate.doses"].take(torch.searchsorted(tensors["gate.steps"], -score)), score
