"""The table of all methods in `docs/methods.md`: what each is, and what it reached in `compare_methods.py`.

python -m benchmarks.compare.methods_table --page docs/methods.md
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.compare.compare_methods_page import Found, file_size, load, on_splits, wide_splits
from benchmarks.compare.compare_record import RECORD
from benchmarks.compare.compare_subjects import SUBJECTS


BEGIN, END = "<!-- methods table: begin -->", "<!-- methods table: end -->"


@dataclass(frozen=True)
class Method:
    """What a method is.

    Attributes:
        name: as registered.
        reads: states that it looks at, and when.
        writes: what it changes.
        decides: what for each query, or token.
        trains: what the fit learns, beside the search.
        costs: at run time, beside the addition of a vector.
        source: paper.
        differs: from it, in a word; the section below has the rest.
    """

    name: str
    reads: str
    writes: str
    decides: str
    trains: str
    costs: str
    source: str
    differs: str


METHODS = (
    Method(
        "FINESTEER",
        "query, one block",
        "1 to 8 blocks",
        "gate and vector, by query",
        "closed form; small mixture, or a map",
        "a map a query",
        "arXiv 2604.15488",
        "calibrated gate, gradients as targets; `paper()`",
    ),
    Method(
        "FASB",
        "newest token, heads",
        "heads",
        "when to go back, and how far to push",
        "probes of heads",
        "tokens taken back",
        "arXiv 2508.17621",
        "a shifted position stays shifted; `compat`",
    ),
    Method("ITI", "-", "heads", "-", "probes of heads", "-", "arXiv 2306.03341", "the number of heads is searched"),
    Method("CAA", "-", "one block", "-", "-", "-", "arXiv 2312.06681", "means over answers; `paper()`"),
    Method(
        "CAST",
        "query or prompt, some blocks",
        "blocks",
        "conditions, by query",
        "principal directions",
        "-",
        "arXiv 2409.05907",
        "each row by itself; block outputs",
    ),
    Method(
        "ALPHASTEER",
        "query, blocks",
        "blocks, prompt only",
        "how far, by query",
        "null space and ridge",
        "a product a block",
        "arXiv 2506.07022",
        "two vectors for the matrix",
    ),
    Method(
        "TRUTHFLOW",
        "query, one block",
        "one block",
        "vector, by query",
        "a flow network",
        "the network, once a query",
        "arXiv 2502.04556",
        "smaller network; `paper()`",
    ),
    Method(
        "ANGULAR",
        "each token",
        "blocks",
        "angle, by token in two modes",
        "a plane",
        "a rotation a block",
        "arXiv 2510.26243, 2601.19375",
        "block outputs, not norms' outputs",
    ),
    Method(
        "SADI",
        "each token",
        "heads, dimensions or neurons",
        "-",
        "-",
        "a product a site",
        "arXiv 2410.12299",
        "chosen on held-out rows; `compat`",
    ),
    Method(
        "FLORAIN",
        "each token, heads of a block",
        "the same",
        "vector, by token",
        "a low-rank map",
        "the map a token",
        "arXiv 2502.04043",
        "the state is kept; heads, not pieces",
    ),
    Method(
        "INFERALIGNER",
        "query, blocks",
        "blocks",
        "gate, by query and block",
        "-",
        "-",
        "arXiv 2401.11206",
        "boundary halfway; own answers' vector",
    ),
    Method(
        "TASKDRIVEN",
        "-",
        "heads of a block",
        "-",
        "shifts, by the loss",
        "-",
        "arXiv 2502.06115",
        "penalties as shares; proximal steps",
    ),
    Method("REPS", "-", "one block", "-", "a vector, by preferences", "-", "arXiv 2505.20809", "one factor a batch"),
    Method(
        "BIPO", "-", "one block", "-", "a vector, by preferences", "-", "arXiv 2406.00045", "fewer steps; `paper()`"
    ),
    Method(
        "WAS",
        "each token, early blocks",
        "later blocks",
        "how far, by token",
        "a controller",
        "the controller a token",
        "arXiv 2505.20309",
        "a sigmoid; reads before writes",
    ),
    Method(
        "TAD",
        "each token",
        "one block",
        "gate, by token",
        "an uncertainty head",
        "the head a token",
        "arXiv 2408.10692",
        "it steers; see below",
    ),
    Method(
        "SWAI",
        "logits",
        "logits of the likeliest tokens",
        "-",
        "counts of words",
        "a lookup a token",
        "arXiv 2601.10960",
        "-",
    ),
    Method(
        "CONTRASTIVE",
        "logits, twice",
        "logits",
        "-",
        "CAA's vector",
        "a second forward",
        "no paper",
        "-",
    ),
)
COLUMNS = (
    "method", "reads", "writes", "decides", "trains", "costs beside", "file, playground / SmolLM2",
    "playground: truthful, refusals", "SmolLM2: MC2, refusals", "source", "differs",
)  # fmt: skip
UNKNOWN = "-"


def reached(rows: list[Found], name: str, percent: bool) -> str:
    """Mean score of a method's default."""
    found = next((row for row in rows if row.label == name), None)
    if found is None:
        return UNKNOWN
    mean = float(np.mean(list(found.items().values())))
    return f"{100 * mean:.0f}%" if percent else f"{mean:.3f}"


def size(rows: list[Found], name: str) -> str:
    """Of a method's file."""
    found = next((row for row in rows if row.label == name and row.is_fitted), None)
    return UNKNOWN if found is None else file_size(found)


def table(record: Path) -> list[str]:
    """The table's lines.

    Args:
        record: folder of the results.
    """
    every = {subject: load(record, subject) for subject in SUBJECTS}
    by_subject = {subject: on_splits(rows, wide_splits(rows)) for subject, rows in every.items()}
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    for method in METHODS:
        scores = [reached(rows, method.name, subject != "real-truthful") for subject, rows in by_subject.items()]
        sizes = [size(by_subject[subject], method.name) for subject in SUBJECTS[::2]]
        figures = [" / ".join(sizes), ", ".join(scores[:2]), ", ".join(scores[2:])]
        cells = [
            f"[{method.name}](#{method.name.lower()})", method.reads, method.writes, method.decides, method.trains,
            method.costs, *figures, method.source, method.differs,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Put the table where the page has its marks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, default=RECORD, help="folder of compare_methods' results")
    parser.add_argument("--page", type=Path, required=True, help="markdown with the marks of the table")
    args = parser.parse_args()
    text = args.page.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    args.page.write_text("\n".join([f"{before}{BEGIN}", *table(args.record), f"{END}{after}"]))


if __name__ == "__main__":
    main()
