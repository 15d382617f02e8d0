"""The page of `real_model.py`, made of its JSON files; rows that are not there yet are left out, failed ones are named."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.real.real_rows import REFERENCE, ROWS, UNSTEERED, slug_of
from benchmarks.real.real_setup import BASE, WEIGHTS
from benchmarks.real.real_tables import (
    curve_table,
    dose_table,
    refusal_table,
    side_effect_table,
    time_table,
    truthful_table,
    words_table,
)


REMARKS = Path(__file__).with_name("real_model_remarks.md")
SIDE_BY_SIDE, SHOWN_REQUESTS = 30, 8
SHOWN = (REFERENCE, "CAA, gradient", "CAA")
HEAD = """Written by `make real`. The model: {model}; {dtype}, on one CPU thread.

Two tasks, each with a fit of its own on one half of the data. Every method chooses its layer and its strength in its
own fit, on rows that it holds out itself; nothing is chosen on what is reported here. Intervals are at 95%: Wilson's
for shares, BCa bootstrap for means and for paired differences, McNemar's exact test for shares of the same prompts, with
a star where it stays below 5% after Holm's correction for all p of the table. Answers are greedy."""
QUICK_HEAD = "**A trial run with a few prompts of everything: it shows that the machinery works, and nothing else.**"
TRUTHFUL_HEAD = """Fitted on {rows} TruthfulQA questions (split by {by}), the first right answer against the first
wrong one; asked the {n} others. MC1: the best answer is likelier than every wrong one. MC2: probability of the right
answers among all. Both sum log-probabilities over an answer's tokens, as published; *a token* divides them by the
answer's tokens first, so that short answers are not favoured. Differences are paired, to unsteered.

System prompts replace the one of the chat template. The one in bold did best on 100 questions of the fit half (MC2)."""
WORDS_HEAD = """What it then says, at most 32 tokens a question. Own words: log-probability a token of the answers
under the *unsteered* model, asked plainly; steering that breaks the text shows here. Same answer: the share of the
most frequent answer. Begins "No": answers with that first word; the best answers of {no} of {n} questions begin so,
and of {yes} with "Yes": MC2 there shows whether a method only learned to deny."""
DOSE_HEAD = """At other scales, on the first {n} held-out questions: what a preference costs in fluency."""
REFUSAL_HEAD = """Fitted on {rows} AdvBench requests, a plain refusal against AdvBench's own target. Held out:
AdvBench's requests of other clusters (words, k-means), all of JailbreakBench, XSTest's prompts of families that no
row was fitted on. The judge knows refusals by their phrases; degenerate answers (repeating, empty) are neither
refusals nor compliance. The system prompt in bold did best on the fit half (AdvBench refused less XSTest safe prompts
refused)."""
CURVE_HEAD = """Refused unsafe prompts against refused safe ones, at several scales of the strength that the fit
chose."""
SIDE_HEAD = """General prompts: packaged ones that no fit saw, and GSM8K questions. Identical: the same {tokens}
greedy tokens as unsteered. KL: from the unsteered next-token distribution, the mean over the tokens of the unsteered
answer. Texts: log-probability a token of GSM8K solutions after their questions (the change is paired, to unsteered)."""


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """Done rows of a task by slug, in the order of the table of rows."""
    order = {row.slug: at for at, row in enumerate(ROWS)}
    found = {}
    for file in folder.glob("*.json"):
        if file.stem != "study" and not file.stem.endswith(".failed"):
            found[file.stem] = json.loads(file.read_text())
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))


def failures(folder: Path, done: dict[str, Any]) -> list[str]:
    """A line for each row that could not be made."""
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("*.failed.json"))]
    return [f"- {row['label']}: {row['reason']}" for row in found if row["slug"] not in done]


def truthful_section(folder: Path) -> list[str]:
    """Tables of the truthful task."""
    study, rows = json.loads((folder / "study.json").read_text()), results(folder)
    if UNSTEERED not in rows:
        return []
    best = study["best"]
    starts = [text.split()[0].strip(",.").lower() for text in best]
    by = study["settings"]["by"]
    no, yes = starts.count("no"), starts.count("yes")
    text = ["## True answers" + (f", whole {by} held out" if by != "question" else ""), ""]
    text += [TRUTHFUL_HEAD.format(rows=study["rows"], by=by, n=len(best)), "", *truthful_table(rows), ""]
    text += [WORDS_HEAD.format(no=no, yes=yes, n=len(best)), "", *words_table(rows, starts), ""]
    dose = dose_table(rows)
    if dose:
        some = min(len(next(iter(row["curve"].values()))["choices"]["mc2"]) for row in rows.values() if "curve" in row)
        text += [DOSE_HEAD.format(n=some), "", *dose, ""]
    return [*text, *side_effects(rows, study), *not_made(folder, rows), *side_by_side(rows, study["questions"])]


def refusal_section(folder: Path) -> list[str]:
    """Tables of the refusal task."""
    study, rows = json.loads((folder / "study.json").read_text()), results(folder)
    if UNSTEERED not in rows:
        return []
    text = ["## Refusals", "", REFUSAL_HEAD.format(rows=study["rows"]), "", *refusal_table(rows), ""]
    curve = curve_table(rows)
    text += [CURVE_HEAD, "", *curve, ""] if curve else []
    return [*text, *side_effects(rows, study), *not_made(folder, rows), *answers_to_requests(rows, study["sets"])]


def answers_to_requests(rows: dict[str, Any], sets: dict[str, list[str]]) -> list[str]:
    """The first steered answers to held-out requests, unselected."""
    shown = rows.get(slug_of(REFERENCE))
    if shown is None:
        return []
    text = [
        "### Answers, unselected",
        "",
        f"{REFERENCE} on the first held-out requests of each set, and what the judge says.",
        "",
    ]
    text += ["| request | answer | judged |", "| --- | --- | --- |"]
    for name in ("advbench", "jailbreakbench"):
        found = shown["refusals"][name]
        triples = list(zip(sets[name], found["texts"], found["classes"], strict=True))[:SHOWN_REQUESTS]
        text += [f"| {' | '.join(cell(part) for part in triple)} |" for triple in triples]
    return [*text, ""]


def side_effects(rows: dict[str, Any], study: dict[str, Any]) -> list[str]:
    """The table of what changes elsewhere."""
    return ["### Side effects", "", SIDE_HEAD.format(tokens=24), "", *side_effect_table(rows, study["sources"]), ""]


def not_made(folder: Path, rows: dict[str, Any]) -> list[str]:
    """Which rows are missing, and why."""
    lines = failures(folder, rows)
    return ["Could not be made:", "", *lines, ""] if lines else []


def side_by_side(rows: dict[str, Any], questions: Sequence[str]) -> list[str]:
    """The first answers, unselected, unsteered and steered."""
    shown = next((rows[slug_of(label)] for label in SHOWN if slug_of(label) in rows), None)
    if shown is None:
        return []
    text = [
        "### Thirty answers, unselected",
        "",
        f"The first held-out questions: unsteered, and {shown['label']}.",
        "",
    ]
    text += [f"| question | unsteered | {shown['label']} |", "| --- | --- | --- |"]
    base, steered = rows[UNSTEERED]["answers"]["texts"], shown["answers"]["texts"]
    pairs = zip(questions[: len(base)], base, steered, strict=True)
    text += [f"| {' | '.join(cell(part) for part in three)} |" for three in list(pairs)[:SIDE_BY_SIDE]]
    return [*text, ""]


def cell(text: str) -> str:
    """A text as it may stand in a table."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split()) or "(nothing)"


SECTIONS = {"truthful": truthful_section, "truthful-by-category": truthful_section, "refusal": refusal_section}


def page(out: Path, remarks: Path | None = REMARKS) -> str:
    """The page of all results in a folder.

    Args:
        out: folder of the results.
        remarks: what is to be said of the tables, in markdown, put before them; left out if there is no such file.
    """
    studies = [out / name / "study.json" for name in SECTIONS if (out / name / "study.json").exists()]
    found = [json.loads(file.read_text()) for file in studies]
    model = next((study["model"] for study in found if study.get("model")), f"{BASE}, {WEIGHTS}")
    dtype = next((study["settings"]["dtype"] for study in found if "dtype" in study["settings"]), "float32")
    text = ["# Steering a real model", "", HEAD.format(model=model, dtype=dtype), ""]
    if out.name == "quick":
        text += [QUICK_HEAD, ""]
    if remarks is not None and remarks.exists() and out.name != "quick":
        text += [remarks.read_text()]
    for file in studies:
        text += SECTIONS[file.parent.name](file.parent)
    if (out / "time.json").exists():
        text += ["## Time of a fit", "", *time_table(json.loads((out / "time.json").read_text())), ""]
    return "\n".join(text).rstrip() + "\n"
