"""Tables of the study on a real model, each from the rows' JSON: no figure without its interval."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.real.paired_tests import mcnemar_cells
from benchmarks.real.real_rows import UNSTEERED
from finesteer_hf.evaluation.measures.statistics import mean_with_interval, paired_difference, proportion


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a markdown table."""
    return [
        f"| {' | '.join(columns)} |",
        f"|{' --- |' * len(columns)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def name(row: dict[str, Any], rows: dict[str, Any]) -> str:
    """The row's label; in bold for the system prompt that did best on the fit half."""
    prompts = [other for other in rows.values() if "fit_score" in other]
    if row["kind"] != "system" or row["slug"] != max(prompts, key=lambda other: other["fit_score"])["slug"]:
        return str(row["label"])
    return f"**{row['label']}**"


def share(hits: Sequence[Any]) -> str:
    return proportion([bool(hit) for hit in hits]).brief


def mean(values: Sequence[float], digits: int = 3) -> str:
    found = mean_with_interval(values)
    return f"{found.value:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def change(before: Sequence[float], after: Sequence[float], digits: int = 3) -> str:
    found = paired_difference(before, after)
    return f"{found.value:+.{digits}f} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"


def truthful_table(rows: dict[str, Any]) -> list[str]:
    """MC1 and MC2 of each row, and their paired changes to unsteered."""
    base = rows[UNSTEERED]["choices"]
    columns = ("row", "MC1", "p", "MC2", "change of MC2", "MC1 a token", "MC2 a token", "change", "fit, s", "file")
    steered = [slug for slug in rows if slug != UNSTEERED]
    p = dict(
        zip(steered, mcnemar_cells([(base["mc1"], rows[slug]["choices"]["mc1"]) for slug in steered]), strict=True)
    )
    cells = []
    for slug, row in rows.items():
        own = row["choices"]
        plain = row["slug"] == UNSTEERED
        cells.append(
            [
                name(row, rows),
                share(own["mc1"]),
                "" if plain else p[slug],
                mean(own["mc2"]),
                "" if plain else change(base["mc2"], own["mc2"]),
                share(own["mc1_token"]),
                mean(own["mc2_token"]),
                "" if plain else change(base["mc2_token"], own["mc2_token"]),
                fit_seconds(row),
                size(row),
            ]
        )
    return [f"n = {len(base['mc1'])} questions, {base['answers']} answers.", "", *table(columns, cells), *notes(rows)]


def words_table(rows: dict[str, Any], starts: Sequence[str]) -> list[str]:
    """What each row says, and whether the unsteered model would say it."""
    base = rows[UNSTEERED]["answers"]
    affirmed = [at for at, start in enumerate(starts) if start == "yes"]
    columns = ("row", "own words", "change", "words", "repeats a 4-gram", "same answer", "first words", 'begins "No"')
    columns += (f'MC2 where "Yes" (n={len(affirmed)})', "right answers, nats a token", "wrong ones", "gate open")
    cells = []
    for row in rows.values():
        own, scores = row["answers"], row["choices"]
        first = [(text.split() or [""])[0].strip(",.").lower() for text in own["texts"]]
        ((_, most),) = Counter(own["texts"]).most_common(1)
        plain = row["slug"] == UNSTEERED
        cells.append(
            [
                name(row, rows),
                mean(own["own_words"], 2),
                "" if plain else change(base["own_words"], own["own_words"], 2),
                mean(own["words"], 1),
                share(own["repeats"]),
                proportion(most, len(first)).brief,
                str(len(set(first))),
                share([word == "no" for word in first]),
                mean([scores["mc2"][at] for at in affirmed], 2) if affirmed else "-",
                mean(scores["correct"], 2),
                mean(scores["incorrect"], 2),
                opened(own["gate"]),
            ]
        )
    return table(columns, cells)


def dose_table(rows: dict[str, Any]) -> list[str]:
    """MC1, MC2 and own words over the run-time scale, on the questions of the curve."""
    cells = []
    for row in rows.values():
        if not row.get("curve"):
            continue
        some = len(next(iter(row["curve"].values()))["choices"]["mc2"])
        base = rows[UNSTEERED]
        points = {**{float(scale): point for scale, point in row["curve"].items()}, 1.0: row}
        for scale, point in sorted(points.items()):
            scores, said = point["choices"], point["answers"]
            cells.append(
                [
                    row["label"],
                    f"{scale:g}",
                    share(scores["mc1"][:some]),
                    mean(scores["mc2"][:some]),
                    change(base["choices"]["mc2"][:some], scores["mc2"][:some]),
                    change(base["answers"]["own_words"][:some], said["own_words"][:some], 2),
                    mean(said["words"][:some], 1),
                ]
            )
    columns = ("row", "scale", "MC1", "MC2", "change of MC2", "change of own words", "words")
    return table(columns, cells) if cells else []


SETS = {
    "advbench": "AdvBench",
    "jailbreakbench": "JailbreakBench",
    "xstest_unsafe": "XSTest unsafe",
    "xstest_safe": "XSTest safe",
}


def refused(found: dict[str, Any]) -> list[bool]:
    return [kind == "refuse" for kind in found["classes"]]


def refusal_table(rows: dict[str, Any]) -> list[str]:
    """Refusals by set at scale 1, with McNemar's tests against unsteered."""
    base = rows[UNSTEERED]["refusals"]
    columns = ["row"]
    for kind in base:
        columns += [f"{SETS[kind]} (n={len(base[kind]['classes'])})", "p"]
    columns += ["degenerate", "gate open: unsafe / safe", "fit, s", "file"]
    tests = [(slug, kind) for slug in rows if slug != UNSTEERED for kind in base]
    pairs = [(refused(base[kind]), refused(rows[slug]["refusals"][kind])) for slug, kind in tests]
    p = dict(zip(tests, mcnemar_cells(pairs), strict=True))
    cells = []
    for slug, row in rows.items():
        own = row["refusals"]
        line = [name(row, rows)]
        for kind in base:
            line += [share(refused(own[kind])), p.get((slug, kind), "")]
        every = [kind == "degenerate" for found in own.values() for kind in found["classes"]]
        both = f"{opened(own['xstest_unsafe']['gate'])} / {opened(own['xstest_safe']['gate'])}"
        cells.append([*line, share(every), both, fit_seconds(row), size(row)])
    return [*table(columns, cells), *notes(rows)]


def curve_table(rows: dict[str, Any]) -> list[str]:
    """Refused unsafe prompts against refused safe ones, over scales."""
    cells = []
    for row in rows.values():
        points = {float(scale): point for scale, point in row.get("curve", {}).items()} | {1.0: row["refusals"]}
        for scale, point in sorted(points.items()):
            line = [name(row, rows), f"{scale:g}" if row.get("curve") else "-"]
            cells.append([*line, *(share(refused(point[kind])) for kind in SETS if kind in point)])
    columns = ("row", "scale", *(text for kind, text in SETS.items() if kind in rows[UNSTEERED]["refusals"]))
    return table(columns, cells) if any("curve" in row for row in rows.values()) else []


def side_effect_table(rows: dict[str, Any], sources: Sequence[str]) -> list[str]:
    """What changes on general prompts and other texts."""
    kinds = list(dict.fromkeys(sources))
    columns = ["row", *(f"identical, {kind} (n={list(sources).count(kind)})" for kind in kinds)]
    base = rows[UNSTEERED]["general"]
    asked = next((len(row["general"]["kl"]) for row in rows.values() if "kl" in row["general"]), 0)
    columns += [f"KL (n={asked})", "largest KL", f"texts (n={len(base['text_log_probs'])})", "change", "gate open"]
    cells = []
    for row in rows.values():
        own = row["general"]
        if row["slug"] == UNSTEERED:
            blank = [""] * (len(kinds) + 2)
            cells.append([name(row, rows), *blank, mean(own["text_log_probs"]), "", ""])
            continue
        by_kind = [
            [same for same, source in zip(own["identical"], sources, strict=True) if source == k] for k in kinds
        ]
        cells.append(
            [
                name(row, rows),
                *(share(hits) for hits in by_kind),
                mean(own["kl"]),
                f"{max(own['kl']):.3f}",
                mean(own["text_log_probs"]),
                change(base["text_log_probs"], own["text_log_probs"]),
                opened(own["gate"]),
            ]
        )
    return table(columns, cells)


def time_table(found: dict[str, Any]) -> list[str]:
    """The default fit beside one plain pass over its texts."""
    passes, fits = found["passes"], found["fits"]
    plain = float(np.mean([one["seconds"] for one in passes]))
    cells = [
        ["one plain pass", *(f"{value:.0f}" for value in (plain, max(one["peak_mb"] for one in passes))), "1"],
        *(
            [f"fit, {name}", f"{fit['seconds']:.0f}", f"{fit['peak_mb']:.0f}", f"{fit['passes']:.1f}"]
            for name, fit in fits.items()
        ),
    ]
    text = (
        f"{found['rows']} rows and {found['general']} general prompts: {passes[0]['texts']} texts, "
        f"{passes[0]['tokens']} tokens, in bfloat16 on one thread, each in a process of its own; seconds are the "
        "processor's. A plain pass reads one text at a time; it was measured before, between and after the fits "
        f"({', '.join(format(one['seconds'], '.0f') for one in passes)} s), and each fit is held against those beside it."
    )
    return [text, "", *table(("", "seconds", "peak memory, MB", "in passes"), cells)]


def opened(gate: Sequence[float] | None) -> str:
    """Share of prompts on which the gate is at least half open."""
    return "-" if gate is None else share([value >= 0.5 for value in gate])


def fit_seconds(row: dict[str, Any]) -> str:
    """Seconds of the fit, reading states left out, for rows share them."""
    seconds = row["made"].get("fit_seconds") or row["made"].get("seconds") or {}
    return f"{seconds['fit']:.0f}" if "fit" in seconds else ""


def size(row: dict[str, Any]) -> str:
    """Kilobytes of the adapter's tensors."""
    return f"{row['made']['bytes'] / 1000:.1f} kB" if "bytes" in row["made"] else ""


def notes(rows: dict[str, Any]) -> list[str]:
    """What each row is, and what its fit chose."""
    lines = []
    for row in rows.values():
        chosen = ", ".join(f"{key} {value}" for key, value in row["made"].get("settings", {}).items())
        parts = [row["note"], f'"{row["system"]}"' if row["system"] else "", chosen]
        told = "; ".join(part for part in parts if part)
        lines += [f"- {row['label']}: {told}"] if told else []
    return ["", *lines] if lines else []
