"""What the real model is fitted on and asked: TruthfulQA, AdvBench, JailbreakBench, XSTest, GSM8K and general prompts.

Everything that is held out is held out here, by fixed seeds, before any method sees a row.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.cluster import KMeans
from sklearn.feature_extraction.text import TfidfVectorizer

from finesteer_hf.evaluation.data.safety import SafetyPrompt, load_jailbreakbench, load_xstest
from finesteer_hf.evaluation.data.sources import read_rows
from finesteer_hf.evaluation.data.truthfulqa import TruthfulQuestion, load_truthfulqa, preference_rows, split_halves
from finesteer_hf.evaluation.measures.prompts import as_chat
from finesteer_hf.fitting.data.general import default_general_prompts


FILES = (
    "truthfulqa/mc_task.json",
    "truthfulqa/TruthfulQA.csv",
    "safety/advbench.csv",
    "safety/jailbreakbench.csv",
    "xstest/xstest_v2_prompts.csv",
    "gsm8k/test.jsonl",
)
SEED = 0
# AdvBench repeats itself: near-duplicates must not lie on both sides, so whole clusters of requests are held out.
CLUSTERS = 20
# Said to requests of the fit half in turn, so that a method does not learn one sentence by heart.
REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I can't help with that request, because it could cause harm.",
    "I'm sorry, but I cannot assist with this. It could hurt someone.",
    "I won't help with that. It is dangerous or against the law.",
)
# XSTest pairs each family of safe prompts with unsafe contrasts; both sides of a family are held out together.
FAMILIES = {
    "homonyms": ("homonyms",),
    "figurative_language": ("figurative_language",),
    "safe_targets": ("safe_targets",),
    "safe_contexts": ("safe_contexts",),
    "definitions": ("definitions",),
    "discr": ("real_group_nons_discr", "nons_group_real_discr"),
    "historical_events": ("historical_events",),
    "privacy": ("privacy_public", "privacy_fictional"),
}
HELD_OUT_FAMILIES = ("figurative_language", "safe_contexts", "discr", "historical_events")


@dataclass(frozen=True)
class Sizes:
    """How much of everything is used; `QUICK` is for trying the machinery, its figures mean nothing.

    Attributes:
        fit: rows to fit on.
        questions: held-out TruthfulQA questions.
        spoken: those of them to which the model's own answers are read.
        requests: held-out AdvBench requests, and JailbreakBench's.
        xstest: held-out XSTest prompts of each side.
        general: held-out packaged general prompts, and as many GSM8K questions.
        texts: GSM8K solutions whose likelihood is measured, and prompts of each kind whose divergence is.
        chosen_on: fit questions, or requests, on which the best system prompt is chosen.
    """

    fit: int = 408
    questions: int = 409
    spoken: int = 200
    requests: int = 100
    xstest: int = 125
    general: int = 100
    texts: int = 40
    chosen_on: int = 100


QUICK = Sizes(fit=48, questions=12, spoken=12, requests=8, xstest=8, general=8, texts=6, chosen_on=8)


@dataclass(frozen=True)
class GeneralData:
    """General prompts and texts.

    Attributes:
        fit: packaged prompts that fits may use.
        held_out: prompts whose answers should not change.
        sources: where each of them is from.
        texts: questions with their solutions, for likelihoods.
    """

    fit: list[str]
    held_out: list[str]
    sources: list[str]
    texts: list[tuple[str, str]]

    def fit_rows(self, more: Sequence[str] = ()) -> list[dict[str, Any]]:
        """Rows for `general_dataset`, as chats like the training prompts."""
        return [{"prompt": as_chat(text)} for text in (*self.fit, *more)]


def check_data(folder: Path) -> None:
    """Stop with one clear line if a file is missing."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise SystemExit(f"No data: {folder} lacks {', '.join(missing)}. Name the folder that has them with --data.")


def general_data(folder: Path, sizes: Sizes, seed: int = SEED) -> GeneralData:
    """Half of the packaged prompts to fit on; the others and GSM8K's questions held out."""
    prompts = default_general_prompts()
    order = np.random.default_rng(seed).permutation(len(prompts))
    half = len(prompts) // 2
    packaged = [prompts[at] for at in order[half : half + sizes.general]]
    problems = [(row["question"], row["answer"].split("####")[0].strip()) for row in read_rows(folder / FILES[5])]
    questions = [question for question, _ in problems[: sizes.general]]
    # The texts are other problems than the ones that are asked.
    return GeneralData(
        fit=[prompts[at] for at in order[:half]],
        held_out=[*packaged, *questions],
        sources=["packaged"] * len(packaged) + ["GSM8K"] * len(questions),
        texts=problems[sizes.general : sizes.general + sizes.texts],
    )


def truthful_halves(
    folder: Path, sizes: Sizes, by: str = "question", seed: int = SEED
) -> tuple[list[TruthfulQuestion], list[TruthfulQuestion]]:
    """TruthfulQA's questions to fit on and held out; the published choices, with the categories of the other file."""
    with (folder / FILES[1]).open(encoding="utf-8-sig", newline="") as file:
        categories = {row["Question"].strip(): row["Category"] for row in csv.DictReader(file)}
    questions = [
        dataclasses.replace(question, category=categories.get(question.question, "other"))
        for question in load_truthfulqa(folder / FILES[0])
    ]
    fit, test = split_halves(questions, by="category" if by == "category" else "question", seed=seed)
    return fit[: sizes.fit], test[: sizes.questions]


def truthful_rows(questions: Sequence[TruthfulQuestion], pairs: int = 1) -> list[dict[str, Any]]:
    """Preference rows: the first right against the first wrong answer, or a few pairs of each question."""
    if pairs == 1:
        return preference_rows(questions)
    return preference_rows(questions, pairs="all", max_pairs=pairs, seed=SEED)


@functools.cache
def advbench_split(folder: Path, seed: int = SEED) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """AdvBench's rows in two halves that share no cluster of requests."""
    rows = read_rows(folder / FILES[2])
    words = TfidfVectorizer(stop_words="english", ngram_range=(1, 2)).fit_transform([row["goal"] for row in rows])
    clusters = KMeans(CLUSTERS, n_init=4, random_state=seed).fit_predict(words)
    fit: set[int] = set()
    for cluster in np.random.default_rng(seed).permutation(CLUSTERS):
        if sum(int(c) in fit for c in clusters) < len(rows) / 2:
            fit.add(int(cluster))
    in_fit = [int(cluster) in fit for cluster in clusters]
    order = np.random.default_rng(seed).permutation(len(rows))
    return [rows[i] for i in order if in_fit[i]], [rows[i] for i in order if not in_fit[i]]


def xstest_split(folder: Path) -> tuple[list[SafetyPrompt], list[SafetyPrompt]]:
    """XSTest's prompts of the fit families and of the held-out ones."""
    names = {kind for family in HELD_OUT_FAMILIES for kind in (*FAMILIES[family], f"contrast_{family}")}
    prompts = load_xstest(folder / FILES[4])
    return [p for p in prompts if p.category not in names], [p for p in prompts if p.category in names]


def refusal_rows(folder: Path, sizes: Sizes, seed: int = SEED) -> list[dict[str, Any]]:
    """Preference rows: a refusal against AdvBench's own affirmative target."""
    return [
        refusal_row(f"advbench-{index}", row["goal"], row["target"])
        for index, row in enumerate(advbench_split(folder, seed)[0][: sizes.fit])
    ]


def refusal_row(identifier: str, prompt: str, rejected: str) -> dict[str, Any]:
    """A preference row that wants a refusal; which one is a matter of its number."""
    refusal = REFUSALS[int(identifier.rsplit("-", 1)[1]) % len(REFUSALS)]
    return {
        "prompt": as_chat(prompt),
        "chosen": [{"role": "assistant", "content": refusal}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "id": identifier,
    }


def asked(folder: Path, sizes: Sizes, seed: int = SEED) -> dict[str, list[str]]:
    """Held-out prompts of the refusal task, by set."""
    held_out = xstest_split(folder)[1]
    return {
        "advbench": [row["goal"] for row in advbench_split(folder, seed)[1][: sizes.requests]],
        "jailbreakbench": [p.prompt for p in load_jailbreakbench(folder / FILES[3])[: sizes.requests]],
        "xstest_unsafe": spread([p.prompt for p in held_out if p.harmful], sizes.xstest),
        "xstest_safe": spread([p.prompt for p in held_out if not p.harmful], sizes.xstest),
    }


def spread(items: Sequence[str], count: int) -> list[str]:
    """At most so many, evenly over the list, which stands type by type."""
    if len(items) <= count:
        return list(items)
    return [items[int(at)] for at in np.linspace(0, len(items) - 1, count)]
