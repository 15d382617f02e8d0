"""All methods on two tasks of two models, each by one call, held out: effect, side effects and cost, on three splits.

Each method is measured twice: at the strength that its own fit has chosen, and at equal side effects, the highest strength
that keeps within the same limits for all. Nothing is chosen on the test half. Results are added to the record in the
repository (`compare_record.py`), and what it has is not measured again; a method that cannot be made does not stop the
others.

    python -m benchmarks.compare.compare_methods --subjects playground-truthful playground-refusal
    python -m benchmarks.compare.compare_methods --subjects real-truthful real-refusal --device cuda --workers 8
    python -m benchmarks.compare.compare_methods --only-page

On one GPU, start NVIDIA's multi-process service first (`nvidia-cuda-mps-control -d`): kernels of several processes then run
side by side. Eighteen processes took 60 GB.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import dataclasses
import functools
import multiprocessing
import queue
import shutil
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.compare.compare_methods_page import page
from benchmarks.compare.compare_record import PARTS, RECORD, add, read
from benchmarks.compare.compare_rows import PROMPT, Row, rows
from benchmarks.compare.compare_subjects import SUBJECTS, Subject, subject_of
from benchmarks.real.real_rows import UNSTEERED
from benchmarks.real.real_study import DATA
from finesteer_hf.adapters.adapter import SteeringAdapter
from finesteer_hf.adapters.config import SteeringConfig
from finesteer_hf.adapters.registry import get_steering_method
from finesteer_hf.fitting import fit_steering
from finesteer_hf.fitting.data.inputs import prepare_inputs
from finesteer_hf.fitting.dose import DoseRunner
from finesteer_hf.method_api import DosePoint
from finesteer_hf.methods._shared.objective import Limits
from finesteer_hf.processors import SteeringProcessor


PAGE = Path("benchmarks/results/compare_methods.md")
# What all methods may cost on held-out rows of the fit half, when they are compared at equal side effects.
EQUAL = Limits(general_kl=0.05, own_words=0.2, likelihood=float("inf"), repetition=0.1)
# The search for it begins at this dose at least, in units of the state's norm, doubles up to so many times, and halves
# the gap (in logarithms) so often.
LEAST_DOSE, DOUBLINGS, HALVINGS = 0.05, 7, 3
ADAPTER, MODEL = "method", "out/real/model"


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all jobs of a run share."""

    out: Path
    quick: bool
    model: str
    data: Path
    device: str


@dataclasses.dataclass(frozen=True)
class Job:
    """A part of one row of one subject on one split: at its `own` strength, or at `equal` side effects."""

    subject: str
    seed: int
    slug: str
    part: str

    def __str__(self) -> str:
        return f"{self.subject} {self.seed} {self.slug} ({self.part})"

    def adapter(self, out: Path) -> Path:
        """Folder of the row's adapter."""
        return out / f"{self.subject}-{self.seed}" / self.slug


def fit(subject: Subject, row: Row) -> SteeringAdapter:
    """Fit a row's method."""
    assert row.config is not None
    model, tokenizer = subject.base
    return fit_steering(
        model,
        tokenizer,
        subject.rows,
        row.config(subject.sizes),
        split=subject.split,
        general_dataset=subject.general_rows,
        progress=False,
        seed=subject.seed,
        store_dir=states_of(subject.name, subject.seed),
    )


@functools.cache
def states_of(name: str, seed: int) -> Path:
    """Where this process keeps a subject's states, for its next method."""
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-{seed}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def dose_runner(subject: Subject) -> DoseRunner:
    """Measures side effects on the rows and general prompts that the fits hold out."""
    model, tokenizer = subject.base
    inputs = prepare_inputs(
        tokenizer, subject.rows, None, subject.general_rows, seed=subject.seed, split=subject.split
    )
    held_out = [inputs.rows[i] for i in inputs.split.rows["validation"]]
    return DoseRunner(model, held_out, inputs.side_effects, subject.seed)


def at_limits(runner: DoseRunner, adapter: SteeringAdapter) -> dict[str, Any]:
    """The highest strength that keeps within `EQUAL`, from absolute doses; None as its limit where none is broken."""
    config, method_cls = adapter.config, get_steering_method(adapter.config.steering_type).method_cls
    norms = config.fit["report"].get("vector", {})
    own = float(config.strength)
    unit = norms["state_norm"] / norms["vector_norm"] if norms.get("vector_norm") else 1.0

    def build(strength: float) -> SteeringProcessor:
        return method_cls(dataclasses.replace(config, strength=strength), adapter.tensors)

    (unsteered,) = runner.run(build, [0.0])

    def broken(strength: float) -> tuple[list[str], DosePoint]:
        (point,) = runner.run(build, [strength])
        return EQUAL.broken_by(point, unsteered, "preference"), point

    low, high, names = 0.0, max(own, LEAST_DOSE * unit), list[str]()
    for _ in range(DOUBLINGS):
        names, _ = broken(high)
        if names:
            break
        low, high = high, 2 * high
    else:
        return {"strength": low, "limit": None, "kl": broken(low)[1].kl}
    if not low:
        low = high / 2
        for _ in range(DOUBLINGS):
            if not broken(low)[0]:
                break
            low, high = low / 2, low
    for _ in range(HALVINGS):
        between = (low * high) ** 0.5
        found, _ = broken(between)
        low, high, names = (low, between, found) if found else (between, high, names)
    return {"strength": low, "limit": names[0], "kl": broken(low)[1].kl}


def asked(subject: Subject, adapter: SteeringAdapter) -> dict[str, Any]:
    """What an adapter does to the held-out prompts."""
    method_cls = get_steering_method(adapter.config.steering_type).method_cls
    packed = not method_cls(adapter.config, adapter.tensors).lookback
    subject.steered.load_steering(adapter, ADAPTER)
    try:
        return subject.ask(ADAPTER, packed=packed)
    finally:
        subject.steered.delete_steering(ADAPTER)


def at_own_strength(subject: Subject, row: Row, folder: Path) -> dict[str, Any]:
    """A row as it comes; its adapter goes to a folder."""
    found: dict[str, Any] = {"label": row.label, "note": row.note, "device": subject.device, "dtype": subject.dtype}
    if row.label == UNSTEERED:
        return {**found, "own": subject.ask()}
    if row.label == PROMPT:
        system = subject.best_prompt()
        return {**found, "system": system, "own": subject.ask(system=system)}
    start = time.perf_counter()
    adapter = fit(subject, row)
    seconds = time.perf_counter() - start
    saved = adapter.save_pretrained(folder)
    config = adapter.config.to_dict()
    shown = ("strength", "layer", "layers", "write_site", "positions", "heads", "num_elements", "guard_layer")
    return found | {
        "settings": {name: config[name] for name in shown if config.get(name) is not None},
        "seconds": {**adapter.config.fit["seconds"], "all": round(seconds, 1)},
        "bytes": (Path(saved) / "steering_model.safetensors").stat().st_size,
        "own": asked(subject, adapter),
    }


def at_equal_side_effects(subject: Subject, runner: DoseRunner, folder: Path) -> dict[str, Any]:
    """The row again, as strong as the limits allow."""
    adapter = SteeringAdapter.from_pretrained(folder)
    equal = at_limits(runner, adapter)
    stronger = SteeringAdapter(dataclasses.replace(adapter.config, strength=equal["strength"]), adapter.tensors)
    return {"equal": {**equal, **asked(subject, stronger)}}


@functools.lru_cache(maxsize=2)
def prepared(name: str, seed: int, setting: Setting) -> tuple[Subject, Callable[[], DoseRunner]]:
    """A process keeps its last subjects: their models, and what is known of them unsteered."""
    subject = subject_of(name, seed, setting.quick, setting.model, setting.data, setting.device)
    return subject, functools.cache(lambda: dose_runner(subject))


def run(job: Job, setting: Setting) -> tuple[Job, dict[str, Any] | str]:
    """Measure one job; instead of what was found, why nothing was."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # findings about the data are the same for every method
    folder = job.adapter(setting.out)
    try:
        subject, runner = prepared(job.subject, job.seed, setting)
        if job.part == "own":
            return job, at_own_strength(subject, rows()[job.slug], folder)
        return job, at_equal_side_effects(subject, runner(), folder)
    except Exception:
        # One method that cannot be made must not cost the others their turn.
        return job, traceback.format_exc()
    finally:
        # Nothing without a GPU; on one that several processes share, what this one keeps is what others lack.
        torch.cuda.empty_cache()


def open_jobs(jobs: list[Job], setting: Setting, record: Path) -> list[Job]:
    """Those that the record lacks; at equal side effects, if the row's adapter is here."""
    kept = {split: read(record, *split) for split in {(job.subject, job.seed) for job in jobs}}
    found = [(job, kept[job.subject, job.seed].get(job.slug, {})) for job in jobs]
    missing = [(job, row) for job, row in found if job.part not in row]
    return [job for job, row in missing if job.part == "own" or is_of(row, job.adapter(setting.out))]


def is_of(row: dict[str, Any], folder: Path) -> bool:
    """Whether a folder has the adapter of a recorded row, not one that was fitted elsewhere or before."""
    strength = row.get("settings", {}).get("strength")
    return strength is not None and folder.exists() and SteeringConfig.from_pretrained(folder).strength == strength


def run_all(
    jobs: list[Job], setting: Setting, record: Path, workers: int, seconds: float
) -> Iterator[tuple[Job, dict[str, Any] | str]]:
    """Run what the record lacks of the jobs, in so many processes; what is still running after `seconds` is given up.

    A free process takes the first job that can be begun. What is yielded belongs in the record before the next is asked
    for: equal side effects wait for the row at its own strength.
    """
    deadline = time.monotonic() + seconds
    waiting, running = list(jobs), 0
    finished: queue.SimpleQueue[tuple[Job, dict[str, Any] | str]] = queue.SimpleQueue()
    # Processes that share a device are started anew, not forked.
    with multiprocessing.get_context("spawn").Pool(workers) if workers > 1 else contextlib.nullcontext() as pool:
        while time.monotonic() < deadline:
            for job in open_jobs(waiting, setting, record)[: workers - running]:
                waiting.remove(job)
                running += 1
                if pool is None:
                    finished.put(run(job, setting))
                else:
                    pool.apply_async(run, (job, setting), callback=finished.put)
            if not running:
                return
            try:
                yield finished.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            running -= 1
    print("out of time", flush=True)


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/compare"), help="folder of the adapters")
    parser.add_argument("--record", type=Path, default=RECORD, help="folder of the results")
    parser.add_argument("--methods", nargs="+", default=list(rows()), choices=list(rows()), metavar="METHOD")
    parser.add_argument("--subjects", nargs="+", default=list(SUBJECTS), choices=SUBJECTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="splits, and seeds of the fits")
    parser.add_argument(
        "--parts", nargs="+", default=list(PARTS), choices=PARTS, help="own strength, equal side effects"
    )
    parser.add_argument("--model", default=MODEL, help="the real model's folder or id")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the data sets of the real model's tasks")
    parser.add_argument("--device", default="cpu", help="where the real model runs")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--seconds", type=float, default=1e9, help="give up what is not done by then")
    parser.add_argument("--quick", action="store_true", help="a few of everything: tries the machinery, shows nothing")
    parser.add_argument("--only-page", action="store_true", help="measure nothing")
    parser.add_argument("--page", type=Path, default=PAGE, help="page to write from the record")
    args = parser.parse_args()
    if args.quick and args.record == RECORD:
        parser.error("--quick measures too little to be kept: give a --record and a --page of its own.")
    if args.model != MODEL and args.record == RECORD:
        parser.error(
            f"the record is of SmolLM2, as in {MODEL}: give another model a --record and a --page of its own."
        )
    setting = Setting(args.out, args.quick, args.model, args.data, args.device)
    # Split by split, so that an early end leaves whole tables.
    jobs = [
        Job(name, seed, slug, part)
        for seed in args.seeds
        for part in args.parts
        for slug in args.methods
        for name in args.subjects
    ]
    if args.only_page:
        jobs = []
    for job, found in run_all(jobs, setting, args.record, args.workers, args.seconds):
        if isinstance(found, str):
            print(f"{job}: FAILED\n{found}", flush=True)
            continue
        add(args.record, job.subject, job.seed, job.slug, found)
        print(f"{job}: {np.mean(found[job.part]['scores']):.3f}", flush=True)
    args.page.parent.mkdir(parents=True, exist_ok=True)
    args.page.write_text(page(args.record))


if __name__ == "__main__":
    main()
