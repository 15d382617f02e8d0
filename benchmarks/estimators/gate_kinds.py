"""How often gates open on kinds of queries that they have not seen, calibrated on rows and on kinds.

The rest of `gate_guarantees.py` draws queries of known kinds; here whole kinds are held out of the fit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from finesteer_hf.estimators import GATE_FUNCTIONS, SCORE_FUNCTIONS
from finesteer_hf.fitting.data.splits import Split, SplitBy, split_rows, split_units
from finesteer_hf.method_api import ModelInfo
from finesteer_hf.methods.query_gate import GateFit, QueryGateConfig, fit_gate
from finesteer_hf.methods.query_gate.tensors import GATE_TENSORS, SCORE_TENSORS, from_file
from finesteer_hf.sites import Site


SITE = Site("resid_post", 0)
# Calibration and split of the rows.
CALIBRATIONS: tuple[tuple[Any, Any], ...] = (("rows", "prompt"), ("rows", "group"), ("kinds", "prompt"))


@dataclass(frozen=True)
class Prompts:
    """Prompts of one class: what they say, their states `[rows, width]`, their kinds."""

    texts: Sequence[str]
    states: np.ndarray
    kinds: np.ndarray

    def take(self, rows: np.ndarray) -> Prompts:
        """Some of them."""
        return Prompts([self.texts[i] for i in rows], self.states[rows], self.kinds[rows])


@dataclass
class StateData:
    """As much of `FitData` as a gate's fit asks for, on states that were read before; without `form` all texts are one."""

    ir: Prompts
    others: Prompts
    seed: int = 0
    by: SplitBy = "prompt"
    form: bool = True
    info: ModelInfo = field(init=False)
    split: Split = field(init=False)
    other_split: Split = field(init=False)

    def __post_init__(self) -> None:
        self.info = ModelInfo(1, self.ir.states.shape[1], 1, self.ir.states.shape[1], 1)
        self.split = split_rows(list(self.ir.texts), list(self.ir.kinds), self.seed, by=self.by)
        self.other_split = split_units(list(self.others.texts), self.seed)

    def query(self, site: Site, part: Any) -> np.ndarray:
        return self.ir.states[self.split.rows[part]]

    def general(self, site: Site, part: Any) -> np.ndarray:
        return self.others.states[self.other_split.rows[part]]

    def prompts(self, part: Any) -> np.ndarray:
        return self.split.rows[part]

    def kinds(self, part: Any) -> np.ndarray:
        return self.ir.kinds[self.split.rows[part]]

    def texts(self, text: str, part: Any) -> list[str]:
        side, split = (self.ir, self.split) if text == "prompt" else (self.others, self.other_split)
        return [side.texts[i] if self.form else "" for i in split.rows[part]]


def scores_of(gate: GateFit, states: np.ndarray) -> torch.Tensor:
    """Scores of states `[rows, width]` by a fitted gate."""
    return SCORE_FUNCTIONS[gate.score](torch.from_numpy(states), **from_file(SCORE_TENSORS[gate.score], gate.tensors))


def doses(gate: GateFit, states: np.ndarray) -> np.ndarray:
    """Doses of states `[rows, width]` by a fitted conformal gate."""
    score = scores_of(gate, states)
    return GATE_FUNCTIONS["conformal"](score, **from_file(GATE_TENSORS["conformal"], gate.tensors)).numpy()


def by_kind(
    name: str, ir: Prompts, general: Prompts, held_out: int, seeds: int, line: Callable[[Sequence[float]], str]
) -> list[str]:
    """Queries of unseen kinds that the default gate opens on, by what it was calibrated on.

    Args:
        name: of the task.
        ir: queries that should be steered.
        general: general prompts; half are learned from, and one kind of them is held out too, in turns.
        held_out: kinds of `ir` that each seed holds out.
        seeds: how many draws.
        line: writes a mean with its interval.
    """
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    kinds, tasks = np.unique(ir.kinds), np.unique(general.kinds)
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        new = np.isin(ir.kinds, rng.permutation(kinds)[:held_out])
        new_task = general.kinds == tasks[seed % len(tasks)]
        learned = rng.random(len(new_task)) < 0.5
        others = general.take(np.flatnonzero(learned & ~new_task))
        tests = {
            "unseen kinds": ir.states[new],
            "general": general.states[~learned & ~new_task],
            "general, unseen kind": general.states[new_task],
        }
        for calibration, split in CALIBRATIONS:
            data = StateData(ir.take(np.flatnonzero(~new)), others, seed, split)
            gate = fit_gate(QueryGateConfig(gate_calibration=calibration), data, SITE)
            row = found[f"{calibration}, split='{split}'"]
            for test, states in tests.items():
                # what is promised is a full dose, what disturbs is half of one
                full = 1.0 if test == "unseen kinds" else 0.5
                row[test].append(float((doses(gate, states) >= full).mean()))
            row["bound"].append(gate.report["miss_bound"])
    return [
        f"{name}: {held_out} of {len(kinds)} kinds held out, {(~new).sum()} queries of the others in the fit; {seeds} "
        "draws.",
        "",
        "| calibrated on | fires on unseen kinds | least of the draws | bound of its misses | fires on general prompts | "
        "on an unseen kind of them |",
        "| --- | --- | --- | --- | --- | --- |",
        *(
            f"| {how} | {line(row['unseen kinds'])} | {min(row['unseen kinds']):.0%} | {np.mean(row['bound']):.0%} | "
            f"{line(row['general'])} | {line(row['general, unseen kind'])} |"
            for how, row in found.items()
        ),
        "",
    ]
