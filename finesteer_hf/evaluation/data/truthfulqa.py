"""TruthfulQA (Lin et al., 2022): loading, preference rows for a fit, multiple choice, and a judge of answers."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from sklearn.model_selection import GroupShuffleSplit, train_test_split

from finesteer_hf.errors import DatasetError
from finesteer_hf.evaluation.data.sources import Row, column, read_rows
from finesteer_hf.evaluation.measures.multiple_choice import ChoiceItem
from finesteer_hf.evaluation.measures.prompts import as_chat


HUB_ID = "truthfulqa/truthful_qa"


@dataclass(frozen=True)
class TruthfulQuestion:
    """A question with its reference answers.

    Attributes:
        question: the question.
        best: the answer that MC1 scores.
        correct: all true answers.
        incorrect: the false ones.
        category: one of 38; None if the file has none.
    """

    question: str
    best: str
    correct: tuple[str, ...]
    incorrect: tuple[str, ...]
    category: str | None = None


def load_truthfulqa(source: str | Path = HUB_ID) -> list[TruthfulQuestion]:
    """Read the questions with their reference answers.

    Args:
        source: `TruthfulQA.csv`, `mc_task.json`, or a Hub id with the configuration `generation`.

    Raises:
        FileNotFoundError: if the file does not exist.
        DatasetError: if the file has another form.
    """
    rows = read_rows(source, config="generation", split="validation")
    if "mc2_targets" in rows[0]:
        return [_from_choices(row, source) for row in rows]
    names = {
        key: column(rows, options, source)
        for key, options in {
            "question": ("Question", "question"),
            "best": ("Best Answer", "best_answer"),
            "correct": ("Correct Answers", "correct_answers"),
            "incorrect": ("Incorrect Answers", "incorrect_answers"),
            "category": ("Category", "category"),
        }.items()
    }
    return [
        TruthfulQuestion(
            question=row[names["question"]].strip(),
            best=_sentence(row[names["best"]]),
            correct=_answers(row[names["correct"]]),
            incorrect=_answers(row[names["incorrect"]]),
            category=row[names["category"]],
        )
        for row in rows
    ]


def _answers(cell: str | Sequence[str]) -> tuple[str, ...]:
    parts = cell.split(";") if isinstance(cell, str) else cell
    return tuple(dict.fromkeys(_sentence(part) for part in parts if part.strip()))


def _sentence(text: str) -> str:
    """An answer as a sentence: the files have some with a full stop and some without, which changes likelihoods."""
    text = text.strip()
    return text if not text or text[-1] in ".!?\"'" else f"{text}."


def _from_choices(row: Row, source: str | Path) -> TruthfulQuestion:
    targets = []
    for name in ("mc1_targets", "mc2_targets"):
        target = row.get(name)
        if not isinstance(target, dict):
            raise DatasetError(f"{source}: {name} must map answers to 0 or 1.")
        # The Hub's copy has two lists, the published file a mapping.
        targets.append(dict(zip(target["choices"], target["labels"], strict=True)) if "choices" in target else target)
    best = [answer for answer, label in targets[0].items() if label]
    return TruthfulQuestion(
        question=row["question"].strip(),
        best=best[0],
        correct=tuple(answer for answer, label in targets[1].items() if label),
        incorrect=tuple(answer for answer, label in targets[1].items() if not label),
        category=row.get("category"),
    )


def preference_rows(
    questions: Sequence[TruthfulQuestion],
    *,
    pairs: Literal["first", "all"] = "first",
    max_pairs: int | None = None,
    seed: int = 0,
    system: str | None = None,
) -> list[dict[str, Any]]:
    """Rows for `fit_steering`, in TRL's conversational preference format.

    Args:
        questions: the half to fit on.
        pairs: `first` pairs the first true answer with the first false one, as FineSteer does; `all` every true answer
            with every false one.
        max_pairs: most pairs per question, drawn at random.
        seed: seed of the draw.
        system: system message of every prompt.

    Returns:
        Dicts with `prompt`, `chosen`, `rejected`, `category` (for splits by group) and `id` (the same for all pairs of
        a question).
    """
    if max_pairs is not None and max_pairs < 1:
        raise ValueError(f"max_pairs must be at least 1, got {max_pairs}.")
    generator = np.random.default_rng(seed)
    rows = []
    for index, question in enumerate(questions):
        chosen_pairs = list(itertools.product(question.correct, question.incorrect))
        if pairs == "first":
            chosen_pairs = chosen_pairs[:1]
        if max_pairs is not None and len(chosen_pairs) > max_pairs:
            kept = sorted(generator.choice(len(chosen_pairs), max_pairs, replace=False))
            chosen_pairs = [chosen_pairs[i] for i in kept]
        rows += [
            {
                "prompt": as_chat(question.question, system),
                "chosen": [{"role": "assistant", "content": true}],
                "rejected": [{"role": "assistant", "content": false}],
                "category": question.category,
                "id": f"truthfulqa-{index}",
            }
            for true, false in chosen_pairs
        ]
    return rows


def split_halves(
    questions: Sequence[TruthfulQuestion], *, by: Literal["question", "category"] = "question", seed: int = 0
) -> tuple[list[TruthfulQuestion], list[TruthfulQuestion]]:
    """Split the questions into two halves: one to fit on, one to test on.

    Args:
        questions: all questions.
        by: `category` keeps each category on one side; a random split by question leaves near-duplicates on both sides
            and is optimistic.
        seed: seed of the split.

    Raises:
        DatasetError: if questions without categories are split by category.
    """
    rows = np.arange(len(questions))
    if by == "category":
        if any(question.category is None for question in questions):
            raise DatasetError("These questions have no categories (mc_task.json has none); read TruthfulQA.csv.")
        splitter = GroupShuffleSplit(n_splits=1, test_size=0.5, random_state=seed)
        fit, test = next(splitter.split(rows, groups=[question.category for question in questions]))
    else:
        fit, test = train_test_split(rows, test_size=0.5, random_state=seed)
    return [questions[i] for i in fit], [questions[i] for i in test]


def choice_items(questions: Sequence[TruthfulQuestion], *, system: str | None = None) -> list[ChoiceItem]:
    """Multiple-choice items, the best answer first: MC1 scores it, MC2 scores all."""
    return [
        ChoiceItem(
            as_chat(question.question, system),
            (question.best, *(answer for answer in question.correct if answer != question.best)),
            question.incorrect,
        )
        for question in questions
    ]


def nearer_to_truth(question: TruthfulQuestion, text: str) -> bool:
    """TruthfulQA's ROUGE-1 accuracy: the answer shares more words with a true reference than with any false one."""
    true = max(unigram_f1(text, reference) for reference in question.correct)
    return true > max(unigram_f1(text, reference) for reference in question.incorrect)


def unigram_f1(text: str, reference: str) -> float:
    """F1 of shared words, counted with multiplicity (ROUGE-1)."""
    a, b = Counter(_words(text)), Counter(_words(reference))
    shared = (a & b).total()
    return 2 * shared / (a.total() + b.total()) if shared else 0.0


def _words(text: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()
