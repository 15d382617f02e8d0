"""The study on a real language model: what steering, prompting and LoRA do to SmolLM2-135M-Instruct, held out.

Two tasks, each with its own fit: true answers (TruthfulQA) and refusals (AdvBench; held out JailbreakBench and XSTest).
Every row of the tables is one JSON file, which a later run uses again; a row that cannot be made leaves a note and does
not stop the others. Nothing is chosen on what is held out: each method chooses its layer and strength in its own fit, and
the best system prompt is the one that does best on the fit half.

    python benchmarks/real_model.py --out out/real --page benchmarks/results/real_model.md
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import json
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from real_conditions import Condition
from real_data import (
    QUICK,
    GeneralData,
    Sizes,
    advbench_split,
    asked,
    check_data,
    general_data,
    refusal_row,
    refusal_rows,
    truthful_halves,
    truthful_rows,
    xstest_split,
)
from real_lora import Training, train
from real_measures import Clock, choices, general, own_words, refusals
from real_page import page
from real_rows import REFERENCE, TASKS, UNSTEERED, Row, Task, rows_of, slug_of
from real_setup import BASE, WEIGHTS, is_prepared, load_model

from finesteer_hf import SteeredModelForCausalLM, SteeringAdapter, fit_steering
from finesteer_hf.adapters.config import CONFIG_NAME, SteeringConfig
from finesteer_hf.evaluation.data.safety import is_refusal
from finesteer_hf.evaluation.data.truthfulqa import TruthfulQuestion


DATA = Path("../shared/data")
# Run-time scales of the curves, beside 1; and the held-out questions that they are measured on.
TRUTHFUL_SCALES, REFUSAL_SCALES, CURVE_QUESTIONS = (0.5, 1.5), (0.5, 1.5), 100
ADAPTER = "row"


@dataclasses.dataclass
class Study:
    """What all rows of a task share.

    Attributes:
        task: `truthful` or `refusal`.
        out: folder of all results, with the store of states.
        source: the model.
        data: folder of the data sets.
        sizes: how much of them.
        by: what TruthfulQA is split by.
        dtype: of the model's weights.
        device: where the model runs.
    """

    task: Task
    out: Path
    source: str
    data: Path
    sizes: Sizes
    by: str = "question"
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"

    @property
    def folder(self) -> Path:
        """Of the task's results."""
        return self.out / (self.task if self.by == "question" else f"{self.task}-by-{self.by}")

    @functools.cached_property
    def base(self) -> tuple[Any, Any]:
        """Model and tokenizer that fits are made on."""
        return load_model(self.source, self.dtype, self.device)

    @functools.cached_property
    def steered(self) -> Any:
        """The model that is asked."""
        return SteeredModelForCausalLM.from_model(load_model(self.source, self.dtype, self.device)[0])

    @functools.cached_property
    def general(self) -> GeneralData:
        """General prompts and texts."""
        return general_data(self.data, self.sizes)

    @functools.cached_property
    def halves(self) -> tuple[list[TruthfulQuestion], list[TruthfulQuestion]]:
        """TruthfulQA's questions, to fit on and held out."""
        return truthful_halves(self.data, self.sizes, self.by)

    @functools.cached_property
    def sets(self) -> dict[str, list[str]]:
        """Held-out prompts of the refusal task."""
        return asked(self.data, self.sizes)

    def plain(self) -> Condition:
        """The unsteered model."""
        return Condition(self.steered, self.base[1])

    def fit_data(self, kind: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Preference rows and general rows of the fit half."""
        if self.task == "truthful":
            return truthful_rows(self.halves[0], 4 if kind == "few" else 1), self.general.fit_rows()
        rows = refusal_rows(self.data, self.sizes)
        if kind != "look-alikes":
            return rows, self.general.fit_rows()
        unsafe = [p.prompt for p in xstest_split(self.data)[0] if p.harmful][: self.sizes.fit]
        safe = [p.prompt for p in xstest_split(self.data)[0] if not p.harmful][: self.sizes.fit]
        # XSTest has no answers: what the model would say is what is not wanted.
        own = self.plain().answers(unsafe, 24).texts
        rows += [
            refusal_row(f"xstest-{index}", prompt, text)
            for index, (prompt, text) in enumerate(zip(unsafe, own, strict=True))
            if text and not is_refusal(text)
        ]
        return rows, self.general.fit_rows(safe)


def write(file: Path, found: Any) -> None:
    """Write JSON, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(found) + "\n")
    part.replace(file)


def fitted(study: Study, row: Row) -> SteeringAdapter:
    """The row's adapter: from its folder, or fitted and saved there."""
    folder = study.folder / row.slug
    if (folder / CONFIG_NAME).exists():
        return SteeringAdapter.from_pretrained(folder)
    config = row.config() if row.config is not None else like_reference(study, row.changes or {})
    model, tokenizer = study.base
    rows, general_rows = study.fit_data(row.data)
    adapter = fit_steering(
        model,
        tokenizer,
        rows,
        config,
        general_dataset=general_rows,
        progress=False,
        seed=0,
        store_dir=study.out / "store" / study.folder.name,
    )
    if is_prepared(study.source):
        adapter.config.fit["base_weights"] = WEIGHTS
    adapter.save_pretrained(folder)
    return SteeringAdapter.from_pretrained(folder)


def like_reference(study: Study, changes: dict[str, Any]) -> SteeringConfig:
    """The settings that the reference row's fit has chosen, with some of them changed."""
    folder = study.folder / slug_of(REFERENCE)
    if not (folder / CONFIG_NAME).exists():
        raise RuntimeError(f"The row {REFERENCE} comes first: this one changes what its fit has chosen.")
    chosen = SteeringConfig.from_pretrained(folder)
    names = {field.name for field in dataclasses.fields(chosen)} - {"fit", "requires", "lora"}
    names -= {name for name in names if name.startswith(("base_model", "hidden", "num_hidden"))}
    return type(chosen)(**{name: getattr(chosen, name) for name in names} | changes)


@contextlib.contextmanager
def condition_of(study: Study, row: Row, clock: Clock) -> Iterator[tuple[Condition, dict[str, Any]]]:
    """The row as a way to ask, and what is told of how it was made."""
    plain = study.plain()
    if row.kind == "adapter":
        adapter = clock.run("fit", lambda: fitted(study, row))
        config = adapter.config.to_dict()
        shown = (
            "strength",
            "layer",
            "write_site",
            "positions",
            "experts",
            "residual_rank",
            "gate",
            "target",
            "refine",
        )
        facts = {
            "settings": {name: config[name] for name in shown if config.get(name) is not None},
            "fit_seconds": adapter.config.fit["seconds"],
            "capture": adapter.config.fit["capture"],
            "bytes": (study.folder / row.slug / "steering_model.safetensors").stat().st_size,
        }
        study.steered.load_steering(adapter, ADAPTER)
        try:
            yield dataclasses.replace(plain, adapter=ADAPTER), facts
        finally:
            study.steered.delete_steering(ADAPTER)
    elif row.kind == "lora":
        assert row.lora is not None
        rows, _ = study.fit_data(row.data)
        # LoRA goes into the layers of the model that it is trained on, so this one is not used again.
        model, tokenizer = load_model(study.source, study.dtype, study.device)
        folder = study.folder / row.slug
        how, settings = row.lora, Training()
        trained, facts = clock.run("fit", lambda: train(model, tokenizer, rows, how, folder, settings))
        yield Condition(trained, tokenizer, lora=True), facts
        del trained, model
        gc.collect()
    else:
        yield dataclasses.replace(plain, system=row.system), {}


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


def keep_questions(study: Study) -> None:
    """Write what was asked beside the results; refuse results of other sizes or of another model.

    Raises:
        SystemExit: if the folder holds results of another study.
    """
    file = study.folder / "study.json"
    settings = {
        "sizes": dataclasses.asdict(study.sizes),
        "by": study.by,
        "prepared": is_prepared(study.source),
        "dtype": str(study.dtype).removeprefix("torch."),
        # Figures of two devices are never mixed: in half precision they differ in the last digits.
        **({} if study.device == "cpu" else {"device": study.device}),
    }
    if file.exists():
        if json.loads(file.read_text())["settings"] != settings:
            raise SystemExit(f"{study.folder} holds results of other settings. Give another --out, or delete it.")
        return
    name = model_name(study.source)
    found: dict[str, Any] = {
        "settings": settings,
        "model": name,
        "general": study.general.held_out,
        "sources": study.general.sources,
    }
    if study.task == "truthful":
        test = study.halves[1]
        found["questions"] = [question.question for question in test]
        found["best"] = [question.best for question in test]
        found["rows"] = len(study.halves[0])
    else:
        found["sets"] = study.sets
        found["rows"] = len(refusal_rows(study.data, study.sizes))
    write(file, found)


def model_name(source: str) -> str:
    """What the page calls the model: of a folder only the last part, for where it lies is nobody's business."""
    if is_prepared(source):
        return f"{BASE}, {WEIGHTS}"
    return Path(source).name if Path(source).exists() else source


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
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the model's weights")
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
        sizes, dtype = QUICK if args.quick else Sizes(), getattr(torch, args.dtype)
        study = Study(task, out, source, args.data, sizes, by, dtype, args.device)
        run(study, rows_of(task, args.rows), args.seconds)
    if args.page is not None:
        args.page.parent.mkdir(parents=True, exist_ok=True)
        args.page.write_text(page(out))
        print(f"wrote {args.page}")


if __name__ == "__main__":
    main()
