"""What gates miss and what sets them off, over many splits of one model's query states.

States are read once; each seed draws queries to fit, to calibrate and to test, and general prompts to learn from and to be
tested on. The playground's questions are the queries that should be steered; with `--truthfulqa` its text is read by the
playground's model instead (whose vocabulary does not know it: a stress test of the statistics, not of the model).

    python benchmarks/gate_guarantees.py --seeds 50 --out benchmarks/results/gate_guarantees.md
"""

from __future__ import annotations

import argparse
import csv
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finesteer_hf import playground
from finesteer_hf.estimators import ConformalGate, IntervenedSubspace, QuantileGate, StateScore, cross_fitted_scores
from finesteer_hf.evaluation.statistics import mean_with_interval
from finesteer_hf.fitting.capture import StateReader
from finesteer_hf.fitting.templating import encode_prompts
from finesteer_hf.methods.base import CaptureRequest
from finesteer_hf.sites import Site


EPSILON = 0.05
GENERAL_COUNTS = (5, 20, 100)


def states(prompts: list[Any], layer: int) -> np.ndarray:
    """Query states of the playground's model, `[rows, width]`."""
    model, tokenizer = playground.load()
    site = Site("resid_post", layer)
    reader = StateReader(model, CaptureRequest((site,), ("query",)))
    return reader.read_prompts(encode_prompts(tokenizer, prompts))[site, "query"]


def queries(truthfulqa: Path | None) -> list[Any]:
    if truthfulqa is None:
        rows = playground.preference_rows("truthful", "all")
        texts = list(dict.fromkeys(row["prompt"][-1]["content"] for row in rows))
    else:
        with truthfulqa.open(encoding="utf-8-sig") as file:
            texts = [row["Question"] for row in csv.DictReader(file)]
    return [[{"role": "user", "content": text}] for text in texts]


def gates(rank: int) -> dict[str, Callable[..., tuple[Any, Any, np.ndarray]]]:
    """Name -> function of (fit queries, calibration queries, general prompts) to (score, gate, scores it was fitted on)."""

    def in_sample(fit: np.ndarray, calibration: np.ndarray, general: np.ndarray) -> Any:
        rows = np.concatenate([fit, calibration])
        score = IntervenedSubspace(rank).fit(rows)
        return score, QuantileGate(EPSILON).fit(score.score_samples(rows))

    def split(score: Any, guarantee: str) -> Callable[..., Any]:
        def make(fit: np.ndarray, calibration: np.ndarray, general: np.ndarray) -> Any:
            fitted = score().fit(fit, general)
            return fitted, ConformalGate(EPSILON, guarantee=guarantee).fit(fitted.score_samples(calibration))

        return make

    def crossed(fit: np.ndarray, calibration: np.ndarray, general: np.ndarray) -> Any:
        rows = np.concatenate([fit, calibration])
        score = IntervenedSubspace("auto").fit(rows)
        held_out, _ = cross_fitted_scores(score, rows)
        return score, ConformalGate(EPSILON, cross_fitted=True).fit(held_out)

    return {
        f"in-sample quantile, SER of rank {rank} (published)": in_sample,
        f"split conformal, SER of rank {rank}": split(lambda: IntervenedSubspace(rank), "marginal"),
        "split conformal, SER of chosen rank": split(IntervenedSubspace, "marginal"),
        "PAC, SER of chosen rank": split(IntervenedSubspace, "pac"),
        "cross-fitted, SER of chosen rank (approximate)": crossed,
        "split conformal, state": split(StateScore, "marginal"),
        "PAC, state": split(StateScore, "pac"),
    }


def line(values: list[float]) -> str:
    found = mean_with_interval(values)
    return f"{100 * found.value:.1f}% [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--fitted", type=int, default=408, help="queries to fit and calibrate on")
    parser.add_argument("--truthfulqa", type=Path, default=None, help="TruthfulQA.csv")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    ir = states(queries(args.truthfulqa), args.layer)
    general_rows = playground.general_rows("all")
    general = states([row["prompt"] for row in general_rows], args.layer)
    tasks = np.array([row["task"] for row in general_rows])
    missed: dict[str, list[float]] = defaultdict(list)
    alarmed: dict[str, list[float]] = defaultdict(list)
    by_count: dict[int, list[float]] = defaultdict(list)
    unseen: dict[int, list[float]] = defaultdict(list)
    for seed in range(args.seeds):
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(ir))
        cut = int(0.7 * args.fitted)
        fit, calibration, test = ir[order[:cut]], ir[order[cut : args.fitted]], ir[order[args.fitted :]]
        drawn = rng.permutation(len(general))
        learn, held_out = general[drawn[:100]], general[drawn[100:1100]]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, make in gates(args.rank).items():
                score, gate = make(fit, calibration, learn)
                missed[name].append(float((gate.gate(score.score_samples(test)) < 1).mean()))
                alarmed[name].append(float((gate.gate(score.score_samples(held_out)) >= 0.5).mean()))
            new_task = rng.choice(np.unique(tasks))
            for count in GENERAL_COUNTS:
                score = StateScore().fit(fit, learn[:count])
                gate = ConformalGate(EPSILON).fit(score.score_samples(calibration))
                by_count[count].append(float((gate.gate(score.score_samples(held_out)) >= 0.5).mean()))
                known = general[tasks != new_task]
                score = StateScore().fit(fit, known[rng.permutation(len(known))[:count]])
                gate = ConformalGate(EPSILON).fit(score.score_samples(calibration))
                unseen[count].append(float((gate.gate(score.score_samples(general[tasks == new_task])) >= 0.5).mean()))
    source = "TruthfulQA's questions" if args.truthfulqa else "the playground's questions"
    text = [
        f"Queries: {source}, {args.fitted} to fit and calibrate (70 / 30), {len(ir) - args.fitted} to test; nominal miss",
        f"rate {EPSILON:.0%}; layer {args.layer}; {args.seeds} seeds; mean over seeds [95% interval]. A miss is a",
        "gate below 1, a false alarm a gate of at least 0.5 on a general prompt that was not learned from.",
        "",
        "| gate | misses | false alarms |",
        "|---|---|---|",
        *(f"| {name} | {line(missed[name])} | {line(alarmed[name])} |" for name in missed),
        "",
        "| general prompts learned from (state, split conformal) | false alarms | on a kind of prompt never learned from |",
        "|---|---|---|",
        *(f"| {count} | {line(by_count[count])} | {line(unseen[count])} |" for count in GENERAL_COUNTS),
    ]
    print("\n".join(text))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
