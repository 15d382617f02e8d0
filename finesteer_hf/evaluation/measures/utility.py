"""Side effects of steering: general tasks, and answers that stay the same."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finesteer_hf.errors import DatasetError
from finesteer_hf.evaluation.data.sources import column, read_rows
from finesteer_hf.evaluation.measures.statistics import Proportion, proportion


_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class MathProblem:
    """A problem and its numeric answer."""

    question: str
    answer: str


def load_gsm8k(source: str | Path = "openai/gsm8k", split: str = "test") -> list[MathProblem]:
    """GSM8K (Cobbe et al., 2021): problems whose solution ends in `#### n`.

    Raises:
        DatasetError: if a solution does not end so.
    """
    rows = read_rows(source, config="main", split=split)
    column(rows, ("question",), source)
    column(rows, ("answer",), source)
    problems = []
    for index, row in enumerate(rows):
        solution = row["answer"]
        if "####" not in solution:
            raise DatasetError(f"{source}: the answer of row {index} does not end in '#### n'.")
        problems.append(MathProblem(row["question"], solution.rsplit("####", 1)[1].strip()))
    return problems


def final_number(text: str) -> float | None:
    """An answer's final number: after `####` or in `\\boxed{}` if it has one, else its last; None without numbers."""
    marked = "####" in text
    if marked:
        text = text.rsplit("####", 1)[1]
    elif "\\boxed{" in text:
        text = text.rsplit("\\boxed{", 1)[1].split("}", 1)[0]
    found = _NUMBER.findall(text)
    if not found:
        return None
    return float((found[0] if marked else found[-1]).replace("$", "").replace(",", ""))


def is_correct_number(problem: MathProblem, text: str) -> bool:
    """Whether an answer's final number is the problem's."""
    return final_number(text) == final_number(problem.answer)


def identical_share(first: Sequence[Sequence[int]], second: Sequence[Sequence[int]]) -> Proportion:
    """Share of prompts with the same greedy token ids under two conditions.

    Raises:
        ValueError: if the numbers of answers differ.
    """
    if len(first) != len(second):
        raise ValueError(f"Paired conditions need the same prompts: got {len(first)} and {len(second)}.")
    return proportion(list(a) == list(b) for a, b in zip(first, second, strict=True))
