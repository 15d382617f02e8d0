"""Fitting on data sets of ten thousand, a hundred thousand and a million rows, as a generator gives them.

Layer, strength, the form of the experts and the score are given: choosing among them is not what grows with the data. The
rows are the playground's, each with a serial number in its question, so that no two prompts are the same. Of each data
set at most `--max-rows` rows are fitted, drawn as the rows pass; their states go to a store on the disk. Each fit runs in
a process of its own, after a small one that loads what Python loads late; memory is the peak of what is resident above
that, the store's mapped pages included. Beside it stands what the rows take as a list, which is the least that a fit needs
that reads a data set whole.

    python -m benchmarks.speed.large_data --out benchmarks/results/large_data.md
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.own_process import in_its_own_process, measured
from finesteer_hf import CAAConfig, FineSteerConfig, SteeringAdapter, SteeringConfig, fit_steering, playground
from finesteer_hf.fitting import DatasetWarning


METHODS: dict[str, SteeringConfig] = {
    "CAA": CAAConfig(layer=2, strength=1.0),
    "FineSteer": FineSteerConfig(
        layer=2, strength=1.0, experts="reduced_rank", residual_rank=8, gate_score="state", target="difference"
    ),
}
SIZES = (10_000, 100_000, 1_000_000)
WARM_UP_ROWS = 200


@dataclass(frozen=True)
class Outcome:
    """What a fit took: wall seconds by phase, processor seconds, peak memory above the start in MB; and what it read."""

    seconds: dict[str, float]
    processor_seconds: float
    peak_mb: float
    rows: int
    taken: int
    tokens: int
    store_mb: float


def numbered_rows(count: int) -> Iterator[dict[str, Any]]:
    """So many rows of the playground, each with a number in its question."""
    rows = cycle(playground.preference_rows("truthful", "fit"))
    for number, row in enumerate(islice(rows, count)):
        (message,) = row["prompt"]
        yield {**row, "prompt": [{**message, "content": f"{number}. {message['content']}"}]}


def run_fit(method: str, count: int, max_rows: int) -> Outcome:
    """Fit a method on so many rows."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", DatasetWarning)
    model, tokenizer = playground.load()

    def fit(rows: int, folder: str) -> SteeringAdapter:
        return fit_steering(
            model,
            tokenizer,
            numbered_rows(rows),
            METHODS[method],
            max_rows=max_rows,
            store_dir=folder,
            progress=False,
        )

    with tempfile.TemporaryDirectory() as other, tempfile.TemporaryDirectory() as folder:
        fit(WARM_UP_ROWS, other)
        adapter, seconds, peak = measured(lambda: fit(count, folder))
        stored = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    found = adapter.config.fit
    data = found["data"]
    return Outcome(
        found["seconds"], seconds, peak, data["rows"], data["taken"], found["capture"]["tokens"], stored / 2**20
    )


def run_list(count: int) -> tuple[float, float]:
    """Processor seconds and megabytes of the rows as a list, parsed as from a file, so that each has its own texts."""
    list(numbered_rows(WARM_UP_ROWS))
    _, seconds, peak = measured(lambda: [json.loads(json.dumps(row)) for row in numbered_rows(count)])
    return seconds, peak


def page(sizes: list[int], max_rows: int) -> str:
    """Run everything; the page of the results."""
    lines = [
        "| method | rows | fitted | reading, s | states, s | fit, s | processor, s | peak memory above the start, MB | "
        "store, MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method, count in product(METHODS, sizes):
        found = in_its_own_process(run_fit, method, count, max_rows)
        cells = [
            method,
            f"{found.rows:,}",
            f"{found.taken:,}",
            *(f"{found.seconds[phase]:.1f}" for phase in ("read", "capture", "fit")),
            f"{found.processor_seconds:.1f}",
            f"{found.peak_mb:.0f}",
            f"{found.store_mb:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    lines += ["", "The same rows as a list:", "", "| rows | processor, s | MB |", "| --- | --- | --- |"]
    for count in sizes:
        seconds, peak = in_its_own_process(run_list, count)
        lines.append(f"| {count:,} | {seconds:.1f} | {peak:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Run, print and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--max-rows", type=int, default=2_000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    summary = " ".join((__doc__ or "").split("\n\n")[1].split())
    text = "\n".join(
        [
            "# Fitting on large data",
            "",
            f"1 thread, torch {torch.__version__}, {platform.machine()}, no GPU; wall time of a shared machine, and "
            "processor time.",
            "",
            summary,
            "",
            page(arguments.sizes, arguments.max_rows),
            "",
            f"Command: `python -m benchmarks.speed.large_data --max-rows {arguments.max_rows}`",
        ]
    )
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
