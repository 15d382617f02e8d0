"""Fitting against a re-creation of the published pipeline's steps: same model, layer and data, in one run.

Published, as its released code does it: for each record three forwards of the whole model, one text at a time, with all
hidden states kept (the prompt for the query's state, prompt and chosen, prompt and rejected); then PCA of rank 128 for
the gate, and the mixture of experts with full-width keys, trained by AdamW. Ours: `fit_steering` with its defaults, once
on the same data (`general_dataset=None`) and once with the packaged general prompts, which its gate learns from and the
published one has not. Layer and strength are given to both, and the rank of our map follows
from held-out R2: choosing any of the three by running the model steered has no counterpart in the published steps.
Each pipeline runs in a process of its own after a small fit that imports what it needs, so that memory is its own;
seconds are those of its processor time.

Time and memory come from a random Llama of a real shape that reads TruthfulQA's questions (or the playground's) in the
playground's tokens; held-out R2 from the playground's trained model, for random weights hold nothing to predict; and the
part after the states once more at the width of an 8 B model, on planted low-rank data.

    python -m benchmarks.speed.fit_vs_published --truthfulqa TruthfulQA.csv --out benchmarks/results/fit_vs_published.md
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.speed.fit_runs import (
    LADDER_ROWS,
    Outcome,
    Setting,
    prepared,
    run_causes,
    run_ours,
    run_published,
    wide_ours,
    wide_published,
)
from benchmarks.speed.own_process import in_its_own_process
from benchmarks.speed.planted_data import PlantedData
from finesteer_hf.estimators import held_out_r2, row_losses
from finesteer_hf.evaluation.measures.statistics import paired_difference


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)] + [""]


def side_by_side(published: Outcome, ours: dict[str, Outcome], shifts: np.ndarray, constant: np.ndarray) -> list[str]:
    """The outcomes, each of ours with its ratio or difference to the published one.

    The interval of a difference in R2 is a bootstrap over test rows.
    """
    scale = float(row_losses(shifts, constant).mean())
    constants = np.broadcast_to(constant, shifts.shape)
    figures: list[tuple[str, str, Callable[[Outcome], float]]] = [
        ("processor seconds", ".1f", lambda one: one.seconds)
    ]
    if published.capture_seconds:
        figures += [
            ("- states (ours: by its share of the wall time)", ".1f", lambda one: one.capture_seconds),
            ("- gate and experts", ".1f", lambda one: one.seconds - one.capture_seconds),
        ]
    figures += [
        ("peak memory above the start, MB", ".0f", lambda one: one.peak_mb),
        ("parameters, MB (ours: the saved file)", ".2f", lambda one: one.size_mb),
    ]
    rows = [
        [name, f"{figure(published):{form}}"]
        + [f"{figure(one):{form}} ({figure(published) / figure(one):.1f}x)" for one in ours.values()]
        for name, form, figure in figures
    ]
    r2 = [
        f"held-out R2 against the constant, n={len(shifts)}",
        f"{held_out_r2(shifts, published.predicted, constants):.3f}",
    ]
    for one in ours.values():
        gain = paired_difference(*(row_losses(shifts, which.predicted) / scale for which in (one, published)))
        r2.append(
            f"{held_out_r2(shifts, one.predicted, constants):.3f} ({gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}])"
        )
    rows += [r2, ["what was fitted", published.notes, *(one.notes for one in ours.values())]]
    return table(["", "published steps", *ours], rows)


def compared(setting: Setting) -> list[str]:
    published, queries, shifts, constant = in_its_own_process(run_published, setting)
    ours = {
        "finesteer_hf, the same data": in_its_own_process(run_ours, setting, queries, None),
        "and the packaged general prompts": in_its_own_process(run_ours, setting, queries, "default"),
    }
    return side_by_side(published, ours, shifts, constant)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--layer", type=int, default=5, help="read and write layer; about a third of the depth")
    parser.add_argument("--timed-rows", type=int, default=136, help="of the random model")
    parser.add_argument("--rows", type=int, default=408, help="of the playground's model and of the planted data")
    parser.add_argument("--wide", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--truthfulqa", type=Path, default=None, help="TruthfulQA.csv; else the playground's questions"
    )
    parser.add_argument("--instructed", action="store_true", help="TruthfulQA in the published form of prompts")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    shape = (args.width, args.layers, args.vocabulary, args.layer, args.timed_rows, args.threads)
    setting = Setting(*shape, args.truthfulqa, args.instructed)
    own = replace(setting, width=None, layers=6, layer=2, rows=args.rows, truthfulqa=None)
    model = prepared(setting)[0]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    questions = "TruthfulQA's questions" if args.truthfulqa else "the playground's questions"
    questions += ", in the published form" if args.instructed else ""
    text = [
        f"{args.threads} thread(s), torch {torch.__version__}, {platform.machine()}, no GPU.",
        "",
        f"Random Llama of {parameters / 1e6:.0f} M parameters ({args.layers} blocks of width {args.width}, vocabulary "
        f"{args.vocabulary}), block {args.layer}, {args.timed_rows} of {questions}. "
        "Random weights: its R2 means little.",
        "",
        *compared(setting),
    ]
    steps, taken_back, floor = in_its_own_process(run_causes, setting)
    ours_seconds = float(steps[-1][1])
    text += [
        f"Reading {LADDER_ROWS} of these rows, one step more in each line (general prompts left out):",
        "",
        *table(["step", "seconds", "of the step", "so far", "passes", "real tokens"], steps),
        "All steps but one:",
        "",
        *table(["taken back", "seconds", "slower than all steps by"], taken_back),
        f"The floor is {floor:.2f} s: the matrix products of those {steps[-1][-1]} tokens in {args.layer + 1} blocks, "
        f"at the measured speed of a large product. Reading takes {ours_seconds / floor:.2f} times that.",
        "",
        "The playground's trained model (1.4 M parameters), block 2, its own questions:",
        "",
        *compared(own),
    ]
    published = in_its_own_process(wide_published, args.wide, args.rows, args.threads)
    ours = in_its_own_process(wide_ours, args.wide, args.rows, args.threads)
    data = PlantedData(args.wide, args.rows)
    learned = np.concatenate([data.shifts[part] for part in ("fit", "calibration", "validation")])
    text += [
        f"Gate and experts alone at width {args.wide}, {args.rows} rows of planted low-rank data:",
        "",
        *side_by_side(published, {"finesteer_hf": ours}, data.shifts["test"], learned.mean(0)),
    ]
    print("\n".join(text))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join(text).rstrip() + "\n")


if __name__ == "__main__":
    main()
