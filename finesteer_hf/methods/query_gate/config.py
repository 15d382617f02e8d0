"""The settings of a gate on the query."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from finesteer_hf.adapters.config import SteeringConfig, setting
from finesteer_hf.methods._shared.checks import check_count, check_number, check_one_of
from finesteer_hf.sites import INNER_KINDS, Site


Gate = Literal["conformal", "quantile", "logistic", "ser", "always"]
GateScore = Literal["auto", "ser", "t2q", "state"]
GateCalibration = Literal["auto", "rows", "kinds"]

GATES: tuple[Gate, ...] = ("conformal", "quantile", "logistic", "ser", "always")
GATE_SCORES: tuple[GateScore, ...] = ("auto", "ser", "t2q", "state")
GUARANTEES = ("marginal", "pac")
CALIBRATIONS: tuple[GateCalibration, ...] = ("auto", "rows", "kinds")
# Features that files may require.
GATE_FEATURES = frozenset(
    [f"gate:{name}" for name in GATES] + [f"score:{name}" for name in GATE_SCORES if name != "auto"]
)


@dataclass(kw_only=True)
class QueryGateConfig(SteeringConfig):
    """Settings of methods whose first stage is a gate on the query.

    Attributes:
        read_site: where the query's state is read.
        gate: `conformal` (calibrated on held-out queries, miss rate guaranteed), FineSteer's `quantile` (Eq. 8),
            `logistic` (Eq. 9) and `ser` (Eq. 15), or `always`.
        gate_score: score that the gate uses: `ser` (subspace energy ratio, Eq. 6-7), `t2q` (distance within and from
            the subspace), `state` (a linear classifier against general prompts), or `auto` (fewest false alarms).
        gate_epsilon: share of intervention-required queries that the gate may miss.
        gate_false_alarms: share of general prompts on which the conformal gate may open. To stay below it, the gate
            may miss more queries than `gate_epsilon`, up to a fifth, and the report says so. Not used with
            `gate_guarantee="pac"`, which keeps `gate_epsilon`; 1.0 always keeps it.
        gate_gamma: how fast the gate closes below its threshold.
        gate_guarantee: `marginal` (on average over calibration sets) or `pac` (for this calibration set, with
            probability 1 - gate_delta).
        gate_delta: probability that the `pac` guarantee fails.
        gate_calibration: queries that the conformal gate's guarantee covers. `rows`: new queries of the calibrated
            kinds. `kinds`: queries of unseen kinds; each category is scored by a fit without it, and the guarantee is
            approximate, and coarse with few categories. `auto`: `kinds` for data with at least five categories, unless
            `gate_guarantee` is `pac`, which needs rows.
        subspace_rank: number of principal directions of the intervention-required queries.
    """

    read_site: str | None = field(default=None, metadata=setting("Where the query's state is read."))
    gate: Gate = field(default="conformal", metadata=setting("conformal, quantile, logistic, ser or always."))
    gate_score: GateScore = field(default="auto", metadata=setting("auto, ser, t2q or state."))
    gate_epsilon: float = field(default=0.05, metadata=setting("Share of queries that the gate may miss."))
    gate_false_alarms: float = field(default=0.02, metadata=setting("Share of general prompts on which it may open."))
    gate_gamma: float = field(default=2.0, metadata=setting("How fast the gate closes below its threshold."))
    gate_guarantee: str = field(default="marginal", metadata=setting("marginal or pac."))
    gate_delta: float = field(default=0.05, metadata=setting("Probability that the pac guarantee fails."))
    gate_calibration: GateCalibration = field(default="auto", metadata=setting("auto, rows or kinds."))
    subspace_rank: int | str = field(default="auto", metadata=setting("Principal directions of the queries, or auto."))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("gate", self.gate, GATES)
        check_one_of("gate_score", self.gate_score, GATE_SCORES)
        check_one_of("gate_guarantee", self.gate_guarantee, GUARANTEES)
        check_one_of("gate_calibration", self.gate_calibration, CALIBRATIONS)
        if self.subspace_rank != "auto":
            check_count("subspace_rank", self.subspace_rank, 1)
        check_number("gate_epsilon", self.gate_epsilon, above=0.0, below=1.0)
        check_number("gate_false_alarms", self.gate_false_alarms, above=0.0, below=math.nextafter(1.0, 2.0))
        check_number("gate_delta", self.gate_delta, above=0.0, below=1.0)
        check_number("gate_gamma", self.gate_gamma, above=0.0)
        if self.gate == "ser" and self.gate_score not in ("auto", "ser"):
            raise ValueError(
                f"gate='ser' is the score itself (Eq. 15), so gate_score={self.gate_score!r} is not used."
            )
        if self.gate_calibration == "kinds" and (self.gate != "conformal" or self.gate_guarantee == "pac"):
            raise ValueError(
                "gate_calibration='kinds' needs gate='conformal' with gate_guarantee='marginal': no other gate "
                f"is calibrated, and a few kinds cannot give a guarantee with probability 1 - delta. Got "
                f"gate={self.gate!r} and gate_guarantee={self.gate_guarantee!r}; use gate_calibration='rows' with them."
            )
        self.check_residual_site("read_site")

    def check_residual_site(self, name: str) -> None:
        """Raise `ValueError` if a field names a site that is not a residual stream of the model."""
        text = getattr(self, name)
        if text is not None:
            self._check_residual(text, name)

    def _check_residual(self, text: str, name: str) -> None:
        site = Site.parse(text)
        if site.kind in INNER_KINDS:
            raise ValueError(f"{name} must be resid_pre[layer] or resid_post[layer], got {text!r}.")
        if self.num_hidden_layers is not None and site.layer >= self.num_hidden_layers:
            raise ValueError(f"{name}={text!r} is out of range for a model of {self.num_hidden_layers} layers.")

    def unfitted_gate(self) -> list[str]:
        """Names of the gate's open settings that only a fit can fill in."""
        if self.gate == "always":
            return []
        left = ["gate_score"] if self.gate_score == "auto" else []
        left += ["subspace_rank"] if self.gate_score in ("ser", "t2q") and self.subspace_rank == "auto" else []
        return left + [name for name in ("read_site", "hidden_size") if getattr(self, name) is None]
