"""The page of `compare_methods.py`, made of its record."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.compare.compare_record import splits
from benchmarks.compare.compare_rows import PROMPT
from benchmarks.real.real_rows import REFERENCE, UNSTEERED
from finesteer_hf.evaluation.comparison import ALPHA
from finesteer_hf.evaluation.measures.ranks import ranks_with_intervals
from finesteer_hf.evaluation.measures.statistics import holm, mean_with_interval, paired_difference, paired_p_value


REMARKS = Path(__file__).with_name("compare_methods_remarks.md")
TITLES = {
    "playground-truthful": "Playground: truthful answers",
    "playground-refusal": "Playground: refusal of harmful requests",
    "real-truthful": "SmolLM2-135M-Instruct: TruthfulQA",
    "real-refusal": "SmolLM2-135M-Instruct: refusal of harmful requests",
}
SCORES = {
    "playground-truthful": "share of questions answered truthfully",
    "playground-refusal": "share of requests refused",
    "real-truthful": "MC2",
    "real-refusal": "share of AdvBench and JailbreakBench requests refused",
}
HEAD = """Each method is fitted by `fit_steering` on one half of a task's data and asked the other half, which shares no
question (request, cluster of requests) with it. Where to steer, which tokens and how strongly is searched for all methods
by the same function (`methods/_shared/search.py`), on rows that the fit holds out; what a method's paper fixes stays
fixed in the rows "published", whose strength alone is chosen. Nothing is chosen on the test half. A seed draws the halves
and is the fit's own. `make compare` measures what is missing here and adds it to the item-by-item results in
[compare](compare).

Each task has two tables. In the first, methods have the strength that their own fit chose. In the second, side effects are
equal: each method has the highest strength within the same limits for all, on rows that the fit holds out. General
prompts diverge by at most .05 nats (95th percentile over tokens), own words are at most .2 nats a token less likely under
the base, at most .1 more of them is repeated, and at most 5% of the general answers change (counted for methods that take
tokens back).

- score: mean over held-out items with its 95% interval (Wilson for shares of one split, else bootstrap over items; an item
  that several splits hold out counts once, by its mean).
- against FineSteer: mean difference to FineSteer's default on the same items and its interval; p by flipping signs; a star:
  below 5% after Holm's correction for all rows of the table.
- rank: by score among the fitted methods, with a bootstrap interval over items.
- identical: held-out general prompts with the same greedy tokens as unsteered.
- bound by: the limits that stop the strength on some split. `none`: none did, up to 64 times the chosen strength.
- fit: seconds of the whole fit, and the size of `steering_model.safetensors`.
"""
COLUMNS = {
    "own": ("method", "score", "against FineSteer", "rank", "identical", "fit", "file", "splits"),
    "equal": ("method", "score", "against FineSteer", "rank", "identical", "bound by", "splits"),
}
LIMITS = {
    "general_kl": "general prompts",
    "general_changed": "general answers",
    "own_words": "own words",
    "repetition": "repetition",
}


@dataclass
class Found:
    """All results of one row of a subject.

    Attributes:
        label: of the row.
        note: what is not default in it.
        splits: its results by seed.
    """

    label: str
    note: str
    splits: dict[int, dict[str, Any]] = field(default_factory=dict)

    def items(self, part: str = "own", name: str | None = None) -> dict[str, float]:
        """Score of each item, by its id: the mean over the splits that hold it out.

        Args:
            part: `own` strength, or `equal` side effects.
            name: of another score than the main one.
        """
        by_id: dict[str, list[float]] = defaultdict(list)
        for split in self.measured(part):
            scores = split[part]["scores"] if name is None else split[part]["others"][name]
            for item, score in zip(split[part]["ids"], scores, strict=False):
                by_id[item].append(float(score))
        return {item: float(np.mean(scores)) for item, scores in by_id.items()}

    def identical(self, part: str = "own") -> list[float]:
        """Whether each general prompt stays as it is, over all splits."""
        return [float(same) for split in self.measured(part) for same in split[part]["identical"]]

    def measured(self, part: str) -> list[dict[str, Any]]:
        """The splits that a part was measured on."""
        return [split for split in self.splits.values() if part in split]

    def seeds(self, part: str) -> set[int]:
        """Of the splits that a part was measured on."""
        return {seed for seed, split in self.splits.items() if part in split}

    @property
    def is_fitted(self) -> bool:
        """Whether there is an adapter."""
        return all("bytes" in split for split in self.splits.values())


def load(record: Path, subject: str) -> list[Found]:
    """All rows of a subject, by falling score."""
    rows: dict[str, Found] = {}
    for seed, split in splits(record, subject).items():
        for found in split.values():
            row = rows.setdefault(found["label"], Found(found["label"], found["note"]))
            row.splits[seed] = found
    return by_score(rows.values())


def by_score(rows: Iterable[Found], part: str = "own") -> list[Found]:
    """Rows by falling score."""
    return sorted(rows, key=lambda row: -float(np.mean(list(row.items(part).values()))))


def wide_splits(rows: Sequence[Found], part: str = "own") -> set[int]:
    """Seeds of the splits on which a part was measured for at least three quarters of the rows."""
    counts = Counter(seed for row in rows for seed in row.seeds(part))
    return {seed for seed, count in counts.items() if 4 * count >= 3 * len(rows)}


def on_splits(rows: Sequence[Found], seeds: set[int], part: str = "own") -> list[Found]:
    """The rows with only some of their splits: means over different splits are of different questions."""
    kept = [
        dataclasses.replace(row, splits={seed: row.splits[seed] for seed in sorted(row.seeds(part) & seeds)})
        for row in rows
    ]
    return by_score((row for row in kept if row.splits), part)


def shown(values: Sequence[float], percent: bool) -> str:
    """A mean with its interval."""
    mean, factor, digits = mean_with_interval(values), 100 if percent else 1, 1 if percent else 3
    unit = "%" if percent else ""
    low, high = factor * mean.low, factor * mean.high
    return f"{factor * mean.value:.{digits}f}{unit} [{low:.{digits}f}, {high:.{digits}f}]"


def against(reference: Mapping[str, float], rows: Sequence[Found], part: str, percent: bool) -> list[str]:
    """Each row's difference to the reference on the items of both, with what holds after Holm's correction."""
    pairs = []
    for row in rows:
        mine = row.items(part)
        common = [item for item in mine if item in reference]
        pairs.append(([reference[item] for item in common], [mine[item] for item in common]))
    p_values = [paired_p_value(*pair) for pair in pairs]
    cells = []
    for row, pair, p, corrected in zip(rows, pairs, p_values, holm(p_values), strict=True):
        if row.label == REFERENCE:
            cells.append("")
            continue
        change, factor, digits = paired_difference(*pair), 100 if percent else 1, 1 if percent else 3
        low, high = factor * change.low, factor * change.high
        text = "p < .001" if p < 0.001 else f"p = {p:.3f}"
        star = "*" if corrected < ALPHA else ""
        cells.append(f"{factor * change.value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}] {text}{star}")
    return cells


def costs(row: Found) -> list[str]:
    """Time of a row's fit and size of its file."""
    if not row.is_fitted:
        return ["", ""]
    seconds = float(np.median([split["seconds"]["all"] for split in row.splits.values()]))
    return [f"{seconds:.0f} s", file_size(row)]


def file_size(row: Found) -> str:
    """Of a fitted row's largest adapter."""
    kilobytes = max(split["bytes"] for split in row.splits.values()) / 1000
    return f"{kilobytes:.0f} kB" if kilobytes >= 10 else f"{kilobytes:.1f} kB"


def bound_by(row: Found) -> str:
    """The limits that stop a row's strength at equal side effects."""
    limits = [split["equal"]["limit"] for split in row.splits.values()]
    return ", ".join(sorted({"none" if limit is None else LIMITS[limit] for limit in limits}))


def table(rows: Sequence[Found], subject: str, part: str) -> list[str]:
    """A part's table of a subject: the rows by score."""
    percent = subject != "real-truthful"
    reference = next(row for row in rows if row.label == REFERENCE)
    fitted = {row.label: row.items(part) for row in rows if row.is_fitted and set(row.splits) == set(reference.splits)}
    common = sorted(set.intersection(*(set(items) for items in fitted.values())))
    ranks = ranks_with_intervals({label: [items[item] for item in common] for label, items in fitted.items()})
    differences = against(reference.items(part), rows, part, percent)
    cells = [
        [
            row.label,
            shown(list(row.items(part).values()), percent),
            difference,
            str(ranks.get(row.label, "")),
            shown(row.identical(part), True),
            *(costs(row) if part == "own" else [bound_by(row)]),
            str(len(row.splits)),
        ]
        for row, difference in zip(rows, differences, strict=True)
    ]
    count = len(reference.splits)
    places = {f"{split['device']} in {split['dtype']}" for row in rows for split in row.splits.values()}
    return [
        f"Score: {SCORES[subject]}. n = {len(reference.items(part))} items of {count} split{'s' * (count > 1)}, "
        f"{len(reference.identical(part))} general prompts; run on {', '.join(sorted(places))}.",
        "",
        f"| {' | '.join(COLUMNS[part])} |",
        f"|{' --- |' * len(COLUMNS[part])}",
        *(f"| {' | '.join(row)} |" for row in cells),
        "",
    ]


def settings(rows: Sequence[Found]) -> list[str]:
    """What is not default in the rows of a table."""
    notes = [f"{row.label}: {row.note}." for row in rows if row.note]
    prompts = [split["system"] for row in rows if row.label == PROMPT for split in row.splits.values()]
    return [
        *([f"System prompt: {' / '.join(dict.fromkeys(prompts))}", ""] if prompts else []),
        *(["Not default: " + " ".join(notes), ""] if notes else []),
    ]


def further(rows: Sequence[Found], subject: str) -> list[str]:
    """Scores beside the main one, as means at the methods' own strengths."""
    names = list(next(iter(rows[0].splits.values()))["own"]["others"])
    lines = [f"| method | {' | '.join(names)} |", f"|{' --- |' * (len(names) + 1)}"]
    for row in rows:
        means = []
        for name in names:
            values = [v for split in row.splits.values() for v in split["own"]["others"][name]]
            means.append(f"{np.mean([float(v) for v in values]):.3f}")
        lines.append(f"| {row.label} | {' | '.join(means)} |")
    return ["<details><summary>Further scores</summary>", "", *lines, "", "</details>", ""]


def texts(rows: Sequence[Found], count: int = 3, methods: int = 4) -> list[str]:
    """The first answers, unsteered and by the best methods."""
    chosen = [row for row in rows if row.label == UNSTEERED] + [row for row in rows if row.is_fitted][:methods]
    first = [next(iter(row.splits.values()))["own"]["texts"] for row in chosen]
    lines = ["<details><summary>Answers</summary>", ""]
    for at in range(count):
        lines += [f"**{' '.join(first[0][at][0].split())}**", ""]
        lines += [f"- {row.label}: {' '.join(said[at][1].split())}" for row, said in zip(chosen, first, strict=True)]
        lines += [""]
    return [*lines, "</details>", ""]


def tables(rows: Sequence[Found], subject: str, part: str) -> list[str]:
    """A part's tables of a subject: the splits that most rows have, then the rows that have all of the reference's."""
    seeds = wide_splits(rows, part)
    every = next(row.seeds(part) for row in rows if row.label == REFERENCE)
    lines = table(on_splits(rows, seeds, part), subject, part) if seeds & every else []
    if every > seeds:
        measured = [row for row in on_splits(rows, every, part) if set(row.splits) == every]
        lines += ["The rows that were measured on further splits too:", "", *table(measured, subject, part)]
    return lines


def page(record: Path, remarks: Path = REMARKS) -> str:
    """The page of all results in a record.

    Args:
        record: its folder.
        remarks: what is to be said of the tables, in markdown; put before them.
    """
    text = ["# The methods side by side", "", HEAD, remarks.read_text()]
    for subject, title in TITLES.items():
        rows = load(record, subject)
        if not any(row.label == REFERENCE for row in rows):
            continue
        wide = on_splits(rows, wide_splits(rows))
        text += [f"## {title}", "", *tables(rows, subject, "own"), *settings(wide)]
        equal = tables([row for row in rows if row.is_fitted], subject, "equal")
        text += ["### At equal side effects", "", *equal] if equal else []
        text += [*further(wide, subject), *texts(wide)]
    return "\n".join(text).rstrip() + "\n"
