"""Defaults that were mended, before and after, on the playground: positions, blocks, the last token, absolute strengths.

python -m benchmarks.compare.mended_defaults --page benchmarks/results/mended_defaults.md
"""

from __future__ import annotations

import argparse
import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers

from benchmarks.compare.compare_methods import asked, fit, states_of
from benchmarks.compare.compare_rows import Row
from benchmarks.compare.compare_subjects import Playground
from finesteer_hf import CAAConfig, FineSteerConfig
from finesteer_hf.adapters.config import SteeringConfig
from finesteer_hf.evaluation.measures.statistics import proportion
from finesteer_hf.fitting.data.encoding import Passage
from finesteer_hf.methods.cast import CASTConfig
from finesteer_hf.methods.fasb import FASBConfig
from finesteer_hf.methods.inferaligner import InferAlignerConfig
from finesteer_hf.methods.iti import ITIConfig


# The blocks between 20% and 80% of the playground's depth, all of which were steered at once.
MIDDLE = [1, 2, 3, 4]
TASKS = ("truthful", "refusal")
HEAD = """Each line is a fit on the fit half of the playground (600 rows, split 0), asked 300 held-out targets and 275
held-out general prompts. "Before" is the default that was; where it can still be given, by the settings in brackets. At
the end of turn: `answer_last` was the state of the last token of the answer with its end of turn, which is emulated here.
"""


@dataclass(frozen=True)
class Line:
    """One line: what is shown, its settings, on which tasks, and whether answers are read at their end of turn."""

    label: str
    config: SteeringConfig
    tasks: tuple[str, ...] = ("refusal",)
    end_of_turn: bool = False


def lines() -> list[Line]:
    """All lines, before and after side by side."""
    constant = FineSteerConfig(experts="reduced_rank", num_experts=1, residual_rank=0)
    before = CASTConfig(positions="generated", layers=MIDDLE, length="mean")
    return [
        Line("CAST before (from the query on, four blocks, scaled)", before),
        Line("CAST, all tokens, four blocks", CASTConfig(layers=MIDDLE)),
        Line("CAST", CASTConfig()),
        Line("INFERALIGNER before (four blocks)", InferAlignerConfig(layers=MIDDLE)),
        Line("INFERALIGNER", InferAlignerConfig()),
        Line("ITI before (48 heads, at the end of turn)", ITIConfig(num_heads=48), end_of_turn=True),
        Line("ITI, 48 heads", ITIConfig(num_heads=48)),
        Line("ITI", ITIConfig()),
        Line("FASB before (48 heads, at the end of turn)", FASBConfig(num_heads=48), end_of_turn=True),
        Line("FASB, 48 heads", FASBConfig(num_heads=48)),
        Line("FASB", FASBConfig()),
        Line("CAA at a divergence of .05 nats", CAAConfig(positions="generated", strength="kl:0.05"), TASKS),
        Line("CAA", CAAConfig(), TASKS),
        Line("FINESTEER's gate with a constant vector", constant, TASKS),
        Line("FINESTEER", FineSteerConfig(), TASKS),
    ]


@contextlib.contextmanager
def read_at_the_end_of_turn(wanted: bool) -> Iterator[None]:
    """An answer's last state as it was read before."""
    if not wanted:
        yield
        return
    # States that were read so are kept apart from the others.
    states_of.cache_clear()
    with mock.patch.object(Passage, "last_content", property(lambda passage: len(passage.ids) - 1)):
        yield
    states_of.cache_clear()


def cells(subject: Playground, line: Line) -> list[str]:
    """What a line reaches on a task."""
    with read_at_the_end_of_turn(line.end_of_turn):
        adapter = fit(subject, Row(line.label, lambda sizes: line.config))
    found = asked(subject, adapter)
    hits = [score == 1 for score in found["scores"]]
    shown = adapter.config.to_dict()
    if shown.get("heads"):
        where = f"{len(shown['heads'])} heads"
    else:
        where = f"blocks {shown['layers']}" if "layers" in shown else f"block {shown['layer']}"
    return [
        line.label,
        subject.task,
        proportion(hits).brief,
        proportion(found["identical"]).brief,
        f"{where}, {shown['positions']}",
        f"{float(adapter.config.strength):.3g}",
    ]


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, required=True, help="page to write")
    parser.add_argument("--only", default=None, help="measure lines whose name holds this, to try one")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    subjects: dict[str, Any] = {task: Playground(f"playground-{task}", 0, False) for task in TASKS}
    columns = ("default", "task", "wanted answers", "general prompts identical", "where", "strength")
    rows = []
    for line in lines():
        for task in line.tasks if args.only is None or args.only in line.label else ():
            rows.append(cells(subjects[task], line))
            print(" | ".join(rows[-1]), flush=True)
    table = [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)]
    args.page.write_text("\n".join(["# Mended defaults", "", HEAD, *table]) + "\n")


if __name__ == "__main__":
    main()
