"""The benchmarks of `finesteer eval`, as judged prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from finesteer_hf.evaluation.behaviour import JudgedPrompt
from finesteer_hf.evaluation.data import playground_eval, safety, truthfulqa
from finesteer_hf.evaluation.data.playground_eval import draw
from finesteer_hf.evaluation.measures import utility
from finesteer_hf.evaluation.measures.prompts import as_chat


Half = Literal["test", "all"]


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one kind, and what is counted on them.

    Attributes:
        name: name for tables.
        metric: what a hit is.
        prompts: the prompts.
        max_new_tokens: most tokens of an answer; reported, since figures depend on it.
    """

    name: str
    metric: str
    prompts: list[JudgedPrompt]
    max_new_tokens: int


def _truthfulqa(source: str | Path, half: Half, seed: int) -> list[PromptSet]:
    questions = truthfulqa.load_truthfulqa(source)
    if half == "test":
        questions = truthfulqa.split_halves(questions, seed=seed)[1]
    prompts = [
        JudgedPrompt(
            question.question,
            item.prompt,
            partial(truthfulqa.nearer_to_truth, question),
            question.category or "",
            item,
        )
        for question, item in zip(questions, truthfulqa.choice_items(questions), strict=True)
    ]
    return [PromptSet("TruthfulQA", "nearer to truth (ROUGE-1)", prompts, 64)]


def _refuses(text: str) -> bool:
    return safety.classify_response(text) == "refuse"


def _complies(text: str) -> bool:
    return safety.classify_response(text) == "comply"


def _safety(prompts: list[safety.SafetyPrompt], name: str) -> list[PromptSet]:
    def judged(harmful: bool) -> list[JudgedPrompt]:
        return [
            JudgedPrompt(item.id, as_chat(item.prompt), _refuses if harmful else _complies, item.category or "")
            for item in prompts
            if item.harmful is harmful
        ]

    sets = [
        PromptSet(f"{name}, harmful", "refused", judged(True), 128),
        PromptSet(f"{name}, safe", "complied with", judged(False), 128),
    ]
    return [found for found in sets if found.prompts]


def _gsm8k(source: str | Path, half: Half, seed: int) -> list[PromptSet]:
    prompts = [
        JudgedPrompt(str(index), as_chat(problem.question), partial(utility.is_correct_number, problem), "maths")
        for index, problem in enumerate(utility.load_gsm8k(source))
    ]
    return [PromptSet("GSM8K", "exact match", prompts, 512)]


def _playground(source: str | Path, half: Half, seed: int) -> list[PromptSet]:
    return [
        PromptSet("playground, questions", "truthful", playground_eval.target_prompts("truthful", seed=seed), 32),
        PromptSet("playground, harmful", "refused", playground_eval.target_prompts("safety", seed=seed), 32),
        PromptSet("playground, general", "correct", playground_eval.general_prompts(seed=seed), 32),
    ]


Loader = Callable[[str | Path, Half, int], list[PromptSet]]
_LOADERS: dict[str, tuple[str, Loader]] = {
    "truthfulqa": (truthfulqa.HUB_ID, _truthfulqa),
    "xstest": ("walledai/XSTest", lambda source, half, seed: _safety(safety.load_xstest(source), "XSTest")),
    "advbench": ("walledai/AdvBench", lambda source, half, seed: _safety(safety.load_advbench(source), "AdvBench")),
    "jailbreakbench": (
        "JailbreakBench/JBB-Behaviors",
        lambda source, half, seed: _safety(safety.load_jailbreakbench(source), "JailbreakBench"),
    ),
    "gsm8k": ("openai/gsm8k", _gsm8k),
    "playground": ("", _playground),
}
BENCHMARKS: tuple[str, ...] = tuple(_LOADERS)


def load_benchmark(
    name: str, source: str | Path | None = None, *, half: Half = "test", limit: int | None = None, seed: int = 0
) -> list[PromptSet]:
    """Read a benchmark.

    Args:
        name: one of `BENCHMARKS`.
        source: a file, or a Hub id other than the default one.
        half: half of TruthfulQA: `test` is the half that `finesteer fit --format truthfulqa` does not use (same seed);
            use `all` for adapters that were fitted on other data.
        limit: most prompts of each kind, drawn at random.
        seed: seed of the halves and the draw.

    Raises:
        ValueError: for an unknown name, and for a limit below 1.
    """
    if name not in _LOADERS:
        raise ValueError(f"Unknown benchmark {name!r}. Known: {list(BENCHMARKS)}.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}.")
    usual, load = _LOADERS[name]
    return [
        PromptSet(found.name, found.metric, draw(found.prompts, limit, seed), found.max_new_tokens)
        for found in load(source or usual, half, seed)
    ]
