"""The study on a real language model: what steering, prompting and LoRA do to SmolLM2-135M-Instruct, held out.

Two tasks, each with its own fit: true answers (TruthfulQA) and refusals (AdvBench; held out JailbreakBench and XSTest).
Every row of the tables is one JSON file, which a later run uses again; a row that cannot be made leaves a note and does
not stop the others. Nothing is chosen on what is held out: each method chooses its layer and strength in its own fit, and
the best system prompt is the one that does best on the fit half.

    python -m benchmarks.real.real_model --out out/real --page benchmarks/results/real_model.md
"""

from __future__ import annotations

import argparse
import functools
import json
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.real.real_conditions import Condition
from benchmarks.real.real_data import (
    QUICK,
    Sizes,
    advbench_split,
    check_data,
    xstest_split,
)
from benchmarks.real.real_measures import Clock, choices, general, own_words, refusals
from benchmarks.real.real_page import page
from benchmarks.real.real_rows import REFERENCE, TASKS, UNSTEERED, Row, rows_of
from benchmarks.real.real_setup import is_prepared, working_dtype
from benchmarks.real.real_study import DATA, Study, condition_of, keep_questions, write


# Run-time scales of the curves, beside 1; and the held-out questions that they are measured on.
TRUTHFUL_SCALES, REFUSAL_SCALES, CURVE_QUESTIONS = (0.5, 1.5), (0.5, 1.5), 100


def measured(study: Study, row: Row, progress: Any) -> dict[str, Any]:
    """Make a row and measure it."""
    clock = Clock(progress)
    reference = None if row.label == UNSTEERED else unsteered(study)
    with condition_of(study, row, clock) as (condition, facts):
        found: dict[str, Any] = {
            "label": row.label,
            "slug": row.slug,
            "kind": row.kind,
            "task": study.task,
            "note": row.note,
            "system": row.system,
            "made": facts,
        }
        target = measured_truthful if study.task == "truthful" else measured_refusal
        found |= target(study, row, condition, clock)
        found["general"] = general(condition, study.general, study.sizes.texts, reference, clock)
    return found | {"seconds": clock.seconds, "threads": torch.get_num_threads()}


def measured_truthful(study: Study, row: Row, condition: Condition, clock: Clock) -> dict[str, Any]:
    """Choices and own words on the held-out questions; the curve over scales on some of them."""
    fit, test = study.halves
    found: dict[str, Any] = {
        "choices": clock.run("choices", lambda: choices(condition, test, clock.progress, packed=row.packed)),
        "answers": clock.run(
            "own words", lambda: own_words(condition, [q.question for q in test[: study.sizes.spoken]])
        ),
    }
    if row.kind == "system":
        some = fit[: study.sizes.chosen_on]
        scores = clock.run("fit half", lambda: choices(condition, some, clock.progress))
        found["fit_score"] = float(np.mean(scores["mc2"]))
    if row.label == REFERENCE:
        some = test[:CURVE_QUESTIONS]

        def at_scale(scale: float) -> dict[str, Any]:
            weaker = condition.at(scale)
            scores = choices(weaker, some, clock.progress, packed=row.packed)
            return {"choices": scores, "answers": own_words(weaker, [q.question for q in some])}

        found["curve"] = {
            str(scale): clock.run(f"scale {scale}", functools.partial(at_scale, scale)) for scale in TRUTHFUL_SCALES
        }
    return found


def measured_refusal(study: Study, row: Row, condition: Condition, clock: Clock) -> dict[str, Any]:
    """Refusals of the held-out requests at each scale."""
    found: dict[str, Any] = {"refusals": clock.run("refusals", lambda: refusals(condition, study.sets))}
    if row.kind == "system":
        count = study.sizes.chosen_on
        own = {
            "unsafe": [entry["goal"] for entry in advbench_split(study.data)[0][:count]],
            "safe": [p.prompt for p in xstest_split(study.data)[0] if not p.harmful][:count],
        }
        answers = clock.run("fit half", lambda: refusals(condition, own))
        share = {name: np.mean([kind == "refuse" for kind in found["classes"]]) for name, found in answers.items()}
        found["fit_score"] = float(share["unsafe"] - share["safe"])
    if row.kind == "adapter":
        found["curve"] = {
            str(scale): clock.run(f"scale {scale}", functools.partial(refusals, condition.at(scale), study.sets))
            for scale in REFUSAL_SCALES
        }
    return found


def unsteered(study: Study) -> dict[str, Any]:
    """The unsteered row's side effects, which the others are compared with."""
    file = study.folder / f"{UNSTEERED}.json"
    if not file.exists():
        raise RuntimeError("The unsteered row comes first: run it (--rows unsteered).")
    found: dict[str, Any] = json.loads(file.read_text())["general"]
    return found


def run(study: Study, rows: list[Row], seconds: float = float("inf")) -> None:
    """Measure what is not there yet.

    Args:
        study: the task.
        rows: of its table; the unsteered one is always made first.
        seconds: no row is begun after so long.
    """
    keep_questions(study)
    started = time.perf_counter()
    if all(row.label != UNSTEERED for row in rows):
        rows = [*rows_of(study.task, [UNSTEERED]), *rows]
    for number, row in enumerate(rows, 1):
        file, failed = (study.folder / f"{row.slug}{end}.json" for end in ("", ".failed"))
        name = f"[{study.folder.name} {number}/{len(rows)}] {row.label}"
        if file.exists():
            print(f"{name}: done before", flush=True)
            continue
        if time.perf_counter() - started > seconds:
            print(f"{name}: left for later", flush=True)
            continue
        begun = time.perf_counter()

        def progress(text: str, name: str = name, begun: float = begun) -> None:
            print(f"{name}: {text} ({time.perf_counter() - begun:.0f} s)", flush=True)

        try:
            write(file, measured(study, row, progress))
        except Exception as error:
            # One method that cannot be made must not cost the others their turn.
            reason = f"{type(error).__name__}: {error}"
            write(failed, {"label": row.label, "slug": row.slug, "reason": reason, "trace": traceback.format_exc()})
            print(f"{name}: FAILED: {reason}", flush=True)
            continue
        failed.unlink(missing_ok=True)
        progress("done")


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the store, adapters and results")
    parser.add_argument("--model", default=None, help="any causal LM's folder or id; by default --out's own `model`")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the data sets")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--rows", nargs="+", default=None, metavar="ROW", help="rows by name, such as finesteer")
    parser.add_argument("--split", default="question", choices=("question", "category"), help="of TruthfulQA")
    parser.add_argument("--quick", action="store_true", help="a few of everything: tries the machinery, shows nothing")
    parser.add_argument(
        "--dtype",
        default=None,
        choices=("bfloat16", "float32"),
        help="of the model's weights; by default bfloat16 where the device computes in it",
    )
    parser.add_argument("--device", default="cpu", help="where the model runs, such as cuda")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row of a task after so long")
    parser.add_argument("--only-page", action="store_true", help="measure nothing")
    parser.add_argument("--page", type=Path, default=None, help="page to write from all results in --out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # findings about the data are the same for every method
    check_data(args.data)
    source = args.model or str(args.out / "model")
    if args.model is None and not is_prepared(source):
        raise SystemExit(f"No model in {source}: `make real` prepares it, or name another with --model.")
    out = args.out / "quick" if args.quick else args.out
    for task in () if args.only_page else args.tasks:
        by = args.split if task == "truthful" else "question"
        sizes = QUICK if args.quick else Sizes()
        dtype = getattr(torch, args.dtype) if args.dtype else working_dtype(args.device)
        study = Study(task, out, source, args.data, sizes, by, dtype, args.device)
        run(study, rows_of(task, args.rows), args.seconds)
    if args.page is not None:
        args.page.parent.mkdir(parents=True, exist_ok=True)
        args.page.write_text(page(out))
        print(f"wrote {args.page}")


if __name__ == "__main__":
    main()
