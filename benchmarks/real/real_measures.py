"""What is measured of one condition on the real model, as JSON: choices, own words, refusals, side effects."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.real.real_choices import score_items
from benchmarks.real.real_conditions import Condition
from benchmarks.real.real_data import GeneralData
from finesteer_hf.evaluation.data.safety import classify_response, repeated_ngram_share
from finesteer_hf.evaluation.data.truthfulqa import TruthfulQuestion, choice_items
from finesteer_hf.evaluation.measures.likelihood import (
    batches_by_length,
    forward_logits,
    model_device,
    pad_right,
    token_log_probs,
)


ANSWER_TOKENS, REFUSAL_TOKENS, GENERAL_TOKENS = 32, 24, 24
# Padded tokens of a forward whose logits are kept whole, twice: a vocabulary of 49,152 takes 200 kB a token.
KL_TOKENS = 1024
# Prompts with a shut gate that are asked all the same.
CHECKED_SHUT = 8
Progress = Callable[[str], None]


class Clock:
    """Processor seconds by phase; tells each phase when it begins."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}

    def run(self, phase: str, call: Callable[[], Any]) -> Any:
        """The result of a call, timed: on one thread, the seconds that it takes on a core that nobody else uses."""
        self.progress(phase)
        start = time.process_time()
        result = call()
        self.seconds[phase] = round(time.process_time() - start, 1)
        return result


def choices(
    condition: Condition, questions: Sequence[TruthfulQuestion], progress: Progress, *, packed: bool = True
) -> dict[str, Any]:
    """MC1 and MC2 of each question, and log-probabilities a token of its right and wrong answers."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if done % 100 == 0:
            progress(f"choices {done}/{len(questions)}")

    items = choice_items(questions, system=condition.system)
    scores = score_items(condition, items, packed=packed, advance=advance)
    return {**scores.figures(), **scores.a_token(), "packed": scores.packed, "answers": len(scores.tokens)}


def own_words(condition: Condition, questions: Sequence[str]) -> dict[str, Any]:
    """Greedy answers, and what the base model, asked plainly, thinks of them."""
    answers = condition.answers(questions, ANSWER_TOKENS)
    base = condition.base()
    with base.on():
        sums = token_log_probs(base.model, [base.prompt_ids(text) for text in questions], answers.ids)
    lengths = np.array([len(ids) for ids in answers.ids])
    return {
        "texts": answers.texts,
        "own_words": (sums / lengths).round(5).tolist(),
        "tokens": lengths.tolist(),
        "words": [len(text.split()) for text in answers.texts],
        "repeats": [repeated_ngram_share(text) > 0 for text in answers.texts],
        "gate": gates(answers.steering),
    }


def gates(steering: dict[str, dict[str, torch.Tensor]]) -> list[float] | None:
    """How far the gate of the one adapter opened for each prompt; None without a gate."""
    for record in steering.values():
        if "gate" in record and record["gate"].ndim == 1:
            return [round(value, 4) for value in record["gate"].tolist()]
    return None


def refusals(condition: Condition, sets: dict[str, list[str]]) -> dict[str, Any]:
    """Class of each answer, and the answers, by set."""
    found: dict[str, Any] = {}
    for name, prompts in sets.items():
        answers = condition.answers(prompts, REFUSAL_TOKENS)
        found[name] = {
            "classes": [classify_response(text) for text in answers.texts],
            "texts": answers.texts,
            "gate": gates(answers.steering),
        }
    return found


def general(
    condition: Condition, data: GeneralData, texts: int, reference: dict[str, Any] | None, clock: Clock
) -> dict[str, Any]:
    """Side effects: identical answers, divergence over the unsteered answers, likelihood of other texts.

    Args:
        condition: how the model is asked.
        data: what it is asked.
        texts: prompts of each source whose divergence is measured.
        reference: this function's result for the unsteered model; None if this is it.
        clock: takes the times.
    """
    closed = clock.run("gates", lambda: shut(condition, data.held_out)) if reference else [False] * len(data.held_out)
    asked = [at for at, is_shut in enumerate(closed) if not is_shut]
    # A shut gate leaves the base's own answer, bit for bit; some are asked all the same, to see it.
    looked = [at for at, is_shut in enumerate(closed) if is_shut][:CHECKED_SHUT]
    prompts = [data.held_out[at] for at in asked + looked]
    answers = clock.run("general answers", lambda: condition.answers(prompts, GENERAL_TOKENS))
    ids, said = (list(reference[name]) if reference else [None] * len(closed) for name in ("ids", "texts"))
    identical = [True] * len(closed)
    if reference is not None:
        # In half precision an answer depends on the batch that it is in, so both are asked in the same one.
        plain = (
            reference["ids"] if len(prompts) == len(closed) else condition.base().answers(prompts, GENERAL_TOKENS).ids
        )
        for at, mine, its in zip(asked + looked, answers.ids, plain, strict=True):
            identical[at] = list(map(int, mine)) == list(map(int, its))
    wrong = [data.held_out[at] for at in looked if not identical[at]]
    if wrong:
        raise AssertionError(f"The gate is shut, and yet answers are other ones: {wrong}.")
    for at, row, text in zip(asked, answers.ids, answers.texts, strict=False):
        ids[at], said[at] = list(map(int, row)), text
    opened = None if not any(closed) else [float(not is_shut) for is_shut in closed]
    found: dict[str, Any] = {"ids": ids, "texts": said, "gate": opened}
    found["text_log_probs"] = clock.run(
        "likelihood of texts", lambda: text_log_probs(condition, data.texts, reference)
    )
    if reference is None:
        return found
    found["identical"] = identical
    chosen = [
        row
        for source in dict.fromkeys(data.sources)
        for row in [at for at, own in enumerate(data.sources) if own == source][:texts]
    ]
    found["kl_rows"], open_rows = chosen, [row for row in chosen if not closed[row]]
    diverged = clock.run(
        "divergence",
        lambda: divergence(
            condition, [data.held_out[row] for row in open_rows], [reference["ids"][row] for row in open_rows]
        ),
    )
    by_row = dict(zip(open_rows, diverged, strict=True))
    found["kl"] = [by_row.get(row, 0.0) for row in chosen]
    return found


def shut(condition: Condition, prompts: Sequence[str]) -> list[bool]:
    """Whether the gate is exactly 0 for each prompt, so that the base answers."""
    if condition.adapter is None:
        return [False] * len(prompts)
    for record in condition.answers(prompts, 1).steering.values():
        if "gate" in record and record["gate"].ndim == 1:
            return (record["gate"] == 0).tolist()
    return [False] * len(prompts)


def text_log_probs(
    condition: Condition, texts: Sequence[tuple[str, str]], reference: dict[str, Any] | None
) -> list[float]:
    """Log-probability a token of texts after their questions; the base's own where the gate is shut."""
    closed = shut(condition, [question for question, _ in texts]) if reference else [False] * len(texts)
    found = list(reference["text_log_probs"]) if reference else [0.0] * len(texts)
    asked = [at for at, is_shut in enumerate(closed) if not is_shut]
    with condition.on():
        prompts = [condition.prompt_ids(texts[at][0]) for at in asked]
        tokens = [condition.tokenizer(texts[at][1], add_special_tokens=False)["input_ids"] for at in asked]
        scores = token_log_probs(condition.model, prompts, tokens, per_token=True).tolist() if asked else []
    for at, score in zip(asked, scores, strict=True):
        found[at] = score
    return found


@torch.inference_mode()
def divergence(condition: Condition, prompts: Sequence[str], answers: Sequence[Sequence[int]]) -> list[float]:
    """KL(base || condition) in nats a token, the mean over each answer's tokens.

    Args:
        condition: how the model is asked.
        prompts: what users say.
        answers: token ids of the base's answers.
    """
    base = condition.base()
    found = np.zeros(len(prompts))
    mine = [condition.prompt_ids(text) for text in prompts]
    plain = [base.prompt_ids(text) for text in prompts]
    lengths = [max(len(a), len(b)) + len(c) for a, b, c in zip(mine, plain, answers, strict=True)]
    for rows in batches_by_length(lengths, KL_TOKENS):
        continued = [answers[row] for row in rows]
        with base.on():
            reference = answer_distributions(base.model, [plain[row] for row in rows], continued)
        with condition.on():
            other = answer_distributions(condition.model, [mine[row] for row in rows], continued)
        for row, p, q in zip(rows, reference, other, strict=True):
            found[row] = float(kl_divergence(p, q).mean())
    return found.round(6).tolist()


def kl_divergence(reference: torch.Tensor, other: torch.Tensor) -> np.ndarray:
    """KL(reference || other) of each row, in nats.

    Args:
        reference: log-probabilities `[n, vocabulary]`.
        other: the same under another condition.

    Returns:
        `[n]` float64.
    """
    p, q = reference.double(), other.double()
    # 0 log 0 is 0: a token that the reference excludes adds nothing.
    terms = torch.where(p.isneginf(), torch.zeros_like(p), p.exp() * (p - q))
    return terms.sum(-1).clamp_min(0).numpy()


def answer_distributions(
    model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """For each row the log-probabilities `[answer tokens, vocabulary]` from which its answer's tokens are drawn."""
    ids, mask = pad_right([[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)])
    device = model_device(model)
    starts = torch.tensor([len(prompt) for prompt in prompts])
    logits = forward_logits(model, ids.to(device), mask.to(device), starts.to(device))
    return [
        logits[row, len(prompt) - 1 : len(prompt) - 1 + len(answer)].float().log_softmax(-1)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
