"""The page of `compare_methods.py`, made of its JSON files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paired_tests import NOTE, mcnemar_cells

from finesteer_hf.evaluation.ranks import ranks_with_intervals
from finesteer_hf.evaluation.statistics import proportion


REFERENCE = "FINESTEER"
# A divergence this near to the equal dose, as a share of it, is not told.
NEAR = 0.1
TITLES = {"truthful": "Truthful answers to questions", "safety": "Refusal of harmful requests"}
HEAD = """Each method is fitted by `fit_steering` with its default settings on one half of the playground (600 rows, 274
general prompts, one store of states a task), and asked the other half, which shares no question (no request) with it.
Layer, strength and all else are chosen by each fit on rows that it holds out itself; nothing is tuned on the test half.

The playground is a model organism of 1.4 M parameters: its folklore and its compliance were trained into it, together with
what brings the truth and the refusal out. The table shows that the methods work and what they cost there, and is no
evidence of how they rank on large models.

- effect: share of held-out targets with the wanted answer [Wilson, 95%]; p: McNemar's exact test against FineSteer's
  default on the same prompts, {note}.
- rank: by effect, the best is 1 [95% over draws of the prompts; it does not hold what another fit or seed would change].
- neither: answers to questions that are neither right nor wrong (garbled, or evasive).
- identical: held-out general prompts with the same greedy tokens as unsteered; right: solved correctly.
- fires: held-out targets, and general prompts, on which the gate is at least 1/2; `-`: no gate of queries.
- KL: 95th percentile of the divergence on general prompts of the fit half, in nats, at the method's own strength.
- equal dose: effect and identical share at the strength (a multiple of the method's own) at which that KL is {dose} nats;
  a large multiple is an overdose of the targets, for general prompts hardly feel the method. `closed`: they hardly
  diverge at any strength (up to 16 times the method's own), for the gate is closed on them or the method is blind to
  them, so its own strength counts. A KL in parentheses is the nearest that a method came.
- time: of a decoded token, steered / unsteered, median of the pairs (quartiles); alternating calls, {rows} rows, {tokens}
  tokens. The model is so small that this is what hooks cost, not what a share of a large model's time would be.
- file: size of `steering_model.safetensors`; fit: seconds on one busy core, states captured before.
"""
COLUMNS = (
    "method",
    "effect",
    "rank",
    "p",
    "neither",
    "identical",
    "right",
    "fires",
    "KL",
    "at equal dose: effect",
    "identical",
    "time",
    "file",
    "fit",
)


def share(k: int, n: int) -> str:
    return proportion(k, n).brief


def kilobytes(size: int) -> str:
    return f"{size / 1000:.0f} kB" if size >= 10_000 else f"{size / 1000:.1f} kB"


def fires(found: dict[str, Any]) -> str:
    if found["fires"] is None:
        return "-"
    target, general = found["fires"]
    return f"{target / len(found['hits']):.0%} / {general / found['general']:.0%}"


def p_values(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Each row's test against FineSteer's default, starred where it holds after Holm; empty for that row itself."""
    reference = next((row["own"]["hits"] for row in rows if row["label"] == REFERENCE), None)
    if reference is None:
        return [""] * len(rows)
    others = [row["own"]["hits"] for row in rows if row["label"] != REFERENCE]
    cells = iter(mcnemar_cells([(reference, hits) for hits in others]))
    return ["" if row["label"] == REFERENCE else next(cells) for row in rows]


def line(found: dict[str, Any], rank: str, p_value: str, nats: float) -> list[str]:
    """One method's cells."""
    own, dose = found["own"], found["dose"]
    n, general = len(own["hits"]), own["general"]
    if dose["strength"] is None:
        equal = ["closed", "closed"]
    else:
        times = f" at {dose['strength'] / found['strength']:.2g}x"
        reached = "" if abs(dose["kl"] / nats - 1) < NEAR else f" (KL {dose['kl']:.3f})"
        equal = [share(sum(dose["hits"]), n) + times + reached, share(dose["identical"], general)]
    time = "" if "time" not in found else "{:.2f} ({:.2f} to {:.2f})".format(*found["time"]["decode"])
    return [
        found["label"],
        share(sum(own["hits"]), n),
        rank,
        p_value,
        f"{own['neither'] / n:.1%}",
        share(own["identical"], general),
        f"{own['general_hits'] / general:.1%}",
        fires(own),
        f"{dose['own_kl']:.3f}",
        *equal,
        time,
        kilobytes(found["bytes"]),
        f"{found['seconds']['fit']:.0f} s",
    ]


def table(folder: Path, nats: float) -> list[str]:
    """A task's table: unsteered first, then the methods by effect."""
    unsteered = json.loads((folder / "unsteered.json").read_text())
    rows = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json")) if file.stem != "unsteered"]
    rows.sort(key=lambda row: (-sum(row["own"]["hits"]), -row["own"]["identical"]))
    base, n = unsteered["own"], len(unsteered["own"]["hits"])
    general = base["general"]
    first, *others = p_values([unsteered, *rows])
    top = ["unsteered", share(sum(base["hits"]), n), "", first]
    top += [f"{base['neither'] / n:.1%}", "100%", f"{base['general_hits'] / general:.1%}"]
    ranks = ranks_with_intervals({row["label"]: row["own"]["hits"] for row in rows}) if rows else {}
    lines = [line(row, str(ranks[row["label"]]), p, nats) for row, p in zip(rows, others, strict=True)]
    cells = [top + [""] * (len(COLUMNS) - len(top)), *lines]
    notes = [f"{row['label']}: {row['note']}." for row in rows if row["note"]]
    capture = sum(row["seconds"]["capture"] for row in rows)
    return [
        f"n = {n} targets, {general} general prompts. Reading all states that any method needs took {capture:.0f} s.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{' --- |' * len(COLUMNS)}",
        *(f"| {' | '.join(row)} |" for row in cells),
        "",
        "Not default: " + " ".join(notes) if notes else "",
    ]


def page(out: Path, targets: int, dose: float, rows: int, tokens: int, remarks: Path | None = None) -> str:
    """The page of all results in a folder.

    Args:
        out: folder of the results.
        targets: number of held-out targets, which names the folders.
        dose: nats of the equal dose.
        rows: rows of a timed call.
        tokens: its new tokens.
        remarks: what is to be said of the tables, in markdown; put before them.
    """
    text = ["# The methods side by side", "", HEAD.format(dose=dose, rows=rows, tokens=tokens, note=NOTE)]
    if remarks is not None:
        text += [remarks.read_text()]
    for name, title in TITLES.items():
        folder = out / f"{name}-{targets}"
        if (folder / "unsteered.json").exists():
            text += [f"## {title}", "", *table(folder, dose), ""]
    return "\n".join(text).rstrip() + "\n"
