"""An adapter fitted on pairs that somebody pastes."""

from __future__ import annotations

import csv
import io
import json
import queue
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from finesteer_hf.adapters.base_models import base_of
from finesteer_hf.adapters.registry import get_steering_method
from finesteer_hf.errors import DatasetError
from finesteer_hf.evaluation.measures.prompts import as_chat
from finesteer_hf.fitting import fit_steering
from finesteer_hf.fitting.progress import Watcher, watching
from finesteer_hf.playground import preference_rows
from finesteer_hf.ui.workbench import Workbench, distinct


# Methods that fit a few pasted pairs in seconds to minutes; the command line has all of them.
METHODS = ("FINESTEER", "CAA")
COLUMNS = ("prompt", "chosen", "rejected")
# Other words for the columns, in a header or as JSON keys.
WORDS = {"question": "prompt", "query": "prompt", "wanted": "chosen", "unwanted": "rejected"}
# More would keep a shared page busy for long; `finesteer fit` takes any number.
MOST_PAIRS = 500
_SHOWN = 60

HOW_TO_WRITE = (
    "Write one pair a line: prompt, wanted answer and unwanted answer, with tabs between them (as a spreadsheet copies "
    'them), as CSV, or as JSON: {"prompt": ..., "chosen": ..., "rejected": ...}.'
)


@dataclass(frozen=True)
class Wish:
    """What somebody asks for.

    Attributes:
        pairs: the pasted pairs, see `HOW_TO_WRITE`.
        name: the adapter's name.
        method: one of `METHODS`.
        general: prompts that must not be steered, one a line; "" takes the packaged ones.
        seed: seed of splits and fits.
    """

    pairs: str
    name: str = "mine"
    method: str = "FINESTEER"
    general: str = ""
    seed: int = 0


@dataclass(frozen=True)
class Step:
    """Progress of a fit.

    Attributes:
        task: what it does.
        done: texts that are done.
        total: texts of this task.
    """

    task: str
    done: int
    total: int


@dataclass(frozen=True)
class Fitted:
    """A fitted adapter.

    Attributes:
        name: its name on the workbench.
        strength: the strength that the fit chose.
        rows: number of pairs that it was fitted on.
        remarks: warnings of the fit.
        archive: path of a zip file with its folder.
    """

    name: str
    strength: float
    rows: int
    remarks: tuple[str, ...]
    archive: str


def read_pairs(text: str) -> list[dict[str, str]]:
    """The rows of pasted pairs.

    Args:
        text: see `HOW_TO_WRITE`. A header line is left out.

    Returns:
        `{"prompt", "chosen", "rejected"}` of each line that is not empty.

    Raises:
        DatasetError: if a line cannot be read, naming it.
    """
    lines = [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if not lines:
        raise DatasetError(f"There are no pairs yet. {HOW_TO_WRITE}")
    if lines[0][1].lstrip().startswith("{"):
        rows = [_of_json(number, line) for number, line in lines]
    else:
        rows = _of_table(lines)
    if len(rows) > MOST_PAIRS:
        raise DatasetError(
            f"There are {len(rows)} pairs, and this page fits at most {MOST_PAIRS}. Save them to a file and run "
            "`finesteer fit MODEL pairs.jsonl --out adapter`, which takes any number."
        )
    return rows


def _of_json(number: int, line: str) -> dict[str, str]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DatasetError(f"Line {number} is not valid JSON ({error.msg}): {_short(line)}. {HOW_TO_WRITE}") from error
    if not isinstance(record, dict):
        raise DatasetError(f"Line {number} is not a JSON object: {_short(line)}. {HOW_TO_WRITE}")
    record = {WORDS.get(name.lower(), name.lower()): value for name, value in record.items()}
    missing = [name for name in COLUMNS if name not in record]
    if missing:
        raise DatasetError(f"Line {number} has no {missing}; it has {sorted(record)}. {HOW_TO_WRITE}")
    return _row(number, [record[name] for name in COLUMNS])


def _of_table(lines: Sequence[tuple[int, str]]) -> list[dict[str, str]]:
    delimiter = "\t" if any("\t" in line for _, line in lines) else ","
    rows = []
    for position, (number, line) in enumerate(lines):
        cells = next(csv.reader(io.StringIO(line), delimiter=delimiter, skipinitialspace=True))
        names = tuple(WORDS.get(cell.strip().lower(), cell.strip().lower()) for cell in cells)
        if position == 0 and names == COLUMNS:
            continue
        if len(cells) != len(COLUMNS):
            what = "tabs" if delimiter == "\t" else "commas"
            quotes = "" if delimiter == "\t" else " Put a text with commas in double quotes."
            raise DatasetError(
                f"Line {number} has {len(cells)} part{'s' * (len(cells) != 1)} between {what}, not 3: {_short(line)}. "
                f"{HOW_TO_WRITE}{quotes}"
            )
        rows.append(_row(number, cells))
    if not rows:
        raise DatasetError(f"There is a header and no pair below it. {HOW_TO_WRITE}")
    return rows


def _row(number: int, cells: Sequence[Any]) -> dict[str, str]:
    row = {}
    for name, cell in zip(COLUMNS, cells, strict=True):
        if not isinstance(cell, str) or not cell.strip():
            raise DatasetError(f"Line {number}: the {name} is {'empty' if isinstance(cell, str) else 'not a text'}.")
        row[name] = cell.strip()
    if row["chosen"] == row["rejected"]:
        raise DatasetError(f"Line {number}: both answers are the same; steering needs a difference.")
    return row


def _short(line: str) -> str:
    return repr(line if len(line) <= _SHOWN else line[: _SHOWN - 1] + "…")


def as_messages(row: dict[str, str]) -> dict[str, Any]:
    """A row of text as a chat, which is how a chat model is asked."""
    return {
        "prompt": as_chat(row["prompt"]),
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }


def fit_own(bench: Workbench, wish: Wish) -> Iterator[Step | Fitted]:
    """Fit an adapter on pasted pairs, load it on the workbench and zip it.

    Closing the iterator stops the fit at its next batch.

    Args:
        bench: the model; nothing else runs on it meanwhile.
        wish: what to fit.

    Yields:
        The latest progress, and at the end what was fitted.

    Raises:
        DatasetError: if the pairs cannot be read or fitted.
        ValueError: for an unknown method.
    """
    if wish.method not in METHODS:
        raise ValueError(f"This page fits {', '.join(METHODS)}, not {wish.method!r}. `finesteer fit` has all methods.")
    rows: list[Any] = read_pairs(wish.pairs)
    if bench.tokenizer.chat_template:
        rows = [as_messages(row) for row in rows]
    said: queue.SimpleQueue[Step | Fitted | Exception] = queue.SimpleQueue()
    stopped = threading.Event()

    def watcher(task: str, done: int, total: int) -> None:
        if stopped.is_set():
            raise _StoppedError
        said.put(Step(task, done, total))

    def work() -> None:
        try:
            said.put(_fitted(bench, wish, rows, watcher))
        except Exception as error:
            said.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            event = said.get()
            # A page draws slower than small batches run.
            while isinstance(event, Step) and not said.empty():
                event = said.get()
            if isinstance(event, Exception):
                raise event
            yield event
            if isinstance(event, Fitted):
                return
    finally:
        stopped.set()


class _StoppedError(Exception):
    """Nobody waits for the fit any more."""


def _fitted(bench: Workbench, wish: Wish, rows: list[Any], watcher: Watcher) -> Fitted:
    general = [{"prompt": line.strip()} for line in wish.general.splitlines() if line.strip()]
    config = get_steering_method(wish.method).config_cls()
    with bench.lock, warnings.catch_warnings(record=True) as caught, watching(watcher):
        warnings.simplefilter("always")
        adapter = fit_steering(
            bench.model,
            bench.tokenizer,
            rows,
            config,
            general_dataset=general or "default",
            progress=False,
            seed=wish.seed,
        )
    loaded = bench.add(adapter, wish.name)
    remarks = distinct([*(str(warning.message) for warning in caught), *loaded.remarks])
    return Fitted(loaded.name, float(adapter.config.strength), len(rows), remarks, bench.zipped(loaded.name))


def example_pairs(bench: Workbench) -> str:
    """Pairs of the playground to try the page with, tab-separated under a header; "" for another model."""
    if base_of(bench.model)[0] != "playground":
        return ""
    # Every sixth row: one question has many forms.
    rows = [[row[name][-1]["content"] for name in COLUMNS] for row in preference_rows("truthful", "fit")[::6]]
    return "\n".join("\t".join(row) for row in [["prompt", "wanted", "unwanted"], *rows])
