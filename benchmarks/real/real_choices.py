"""Log-probabilities of all answers of a question in one forward: the question is read, and decided on, once.

The answers stand side by side in one row after their question. A mask lets each see the question and itself, and each
begins at the position after the question, so that every token has the state that it has in a row of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.real.real_conditions import Condition
from finesteer_hf.evaluation.measures.likelihood import is_steerable, model_device, token_log_probs
from finesteer_hf.evaluation.measures.multiple_choice import ChoiceItem, choice_scores
from finesteer_hf.evaluation.measures.prompts import encode_pairs


# Questions scored both ways before the packed way is trusted, and how far apart (nats) the two may be: a mask that does not
# hold is off by nats, half precision by tenths.
CHECKED, TOLERANCE, HALF_TOLERANCE = 2, 0.01, 0.5


@dataclass(frozen=True)
class AnswerScores:
    """Log-probabilities of answers, item by item, right answers first.

    Attributes:
        log_probs: `[answers]` float64, nats, summed over an answer's tokens.
        tokens: `[answers]` int64.
        counts: numbers of right and of wrong answers of each item.
        packed: whether the answers of an item shared one row.
    """

    log_probs: np.ndarray
    tokens: np.ndarray
    counts: list[tuple[int, int]]
    packed: bool

    def figures(self) -> dict[str, list[float]]:
        """MC1 and MC2 of each item, as published and from log-probabilities a token."""
        whole = choice_scores(self.log_probs, self.counts)
        token = choice_scores(self.log_probs / self.tokens, self.counts)
        return {
            "mc1": whole.mc1.astype(float).tolist(),
            "mc2": whole.mc2.round(6).tolist(),
            "mc1_token": token.mc1.astype(float).tolist(),
            "mc2_token": token.mc2.round(6).tolist(),
        }

    def a_token(self) -> dict[str, list[float]]:
        """Mean log-probability a token of each item's right and of its wrong answers."""
        found: dict[str, list[float]] = {"correct": [], "incorrect": []}
        start = 0
        rates = self.log_probs / self.tokens
        for right, wrong in self.counts:
            found["correct"].append(round(float(rates[start : start + right].mean()), 5))
            found["incorrect"].append(round(float(rates[start + right : start + right + wrong].mean()), 5))
            start += right + wrong
        return found


def score_items(
    condition: Condition,
    items: Sequence[ChoiceItem],
    *,
    packed: bool = True,
    advance: Callable[[int], None] = lambda count: None,
) -> AnswerScores:
    """Score every answer of every item under a condition.

    Args:
        condition: how the model is asked.
        items: their prompts already hold the condition's system message.
        packed: whether the answers of an item may share one row. The first items are scored both ways; where the two
            disagree (a model or a method that looks at a row's earlier tokens), all are scored one answer a row.
        advance: told of each item that is done.
    """
    pairs = [encoded(condition, item) for item in items]
    counts = [(len(item.correct), len(item.incorrect)) for item in items]
    tokens = np.array([len(ids) for _, answers in pairs for ids in answers])
    with condition.on():
        if packed:
            packed = all(agrees(condition, *pair) for pair in pairs[:CHECKED])
        found = []
        if not packed:
            # All at once, so that batches hold answers of many items.
            prompts = [prompt for prompt, answers in pairs for _ in answers]
            found.append(token_log_probs(condition.model, prompts, [ids for _, answers in pairs for ids in answers]))
            advance(len(pairs))
        for prompt, answers in pairs if packed else ():
            found.append(in_one_row(condition, prompt, answers))
            advance(1)
    return AnswerScores(np.concatenate(found), tokens, counts, packed)


def encoded(condition: Condition, item: ChoiceItem) -> tuple[list[int], list[list[int]]]:
    """Ids of an item's prompt and of its answers, right ones first."""
    answers = [*item.correct, *item.incorrect]
    prompts, ids = encode_pairs(condition.tokenizer, [item.prompt] * len(answers), answers)
    return prompts[0], ids


def agrees(condition: Condition, prompt: list[int], answers: list[list[int]]) -> bool:
    """Whether one row for all answers gives what a row for each gives."""
    shared, own = in_one_row(condition, prompt, answers), in_own_rows(condition, prompt, answers)
    half = next(condition.model.parameters()).dtype in (torch.bfloat16, torch.float16)
    return bool(np.abs(shared - own).max() < (HALF_TOLERANCE if half else TOLERANCE))


def in_own_rows(condition: Condition, prompt: list[int], answers: list[list[int]]) -> np.ndarray:
    """Log-probabilities of answers, a row for each."""
    return token_log_probs(condition.model, [prompt] * len(answers), answers)


@torch.inference_mode()
def in_one_row(condition: Condition, prompt: list[int], answers: list[list[int]]) -> np.ndarray:
    """Log-probabilities of answers that share the row of their prompt."""
    model, device = condition.model, model_device(condition.model)
    start = len(prompt)
    owner = torch.tensor([-1] * start + [index for index, ids in enumerate(answers) for _ in ids])
    ids = torch.tensor([[*prompt, *(token for answer in answers for token in answer)]])
    positions = torch.tensor([[*range(start), *(start + at for answer in answers for at in range(len(answer)))]])
    causal = torch.ones(len(owner), len(owner), dtype=torch.bool).tril()
    seen = causal & ((owner[None] == -1) | (owner[None] == owner[:, None]))
    # Additive, which every implementation of attention takes.
    dtype = next(model.parameters()).dtype
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[None, None]
    extra = {"prompt_lengths": torch.tensor([start])} if is_steerable(model) else {}
    logits = model(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        position_ids=positions.to(device),
        use_cache=False,
        logits_to_keep=len(owner) - start + 1,
        **extra,
    ).logits[0]
    # What predicts an answer's first token is the prompt's last one, which stands first among the logits that were kept.
    before = torch.arange(len(owner) - start)
    first = torch.tensor([at == 0 for answer in answers for at in range(len(answer))])
    before[first] = 0
    chosen = ids[0, start:].to(logits.device)
    log_probs = -torch.nn.functional.cross_entropy(logits[before.to(logits.device)].float(), chosen, reduction="none")
    sums = torch.zeros(len(answers), dtype=torch.float64)
    return sums.index_add_(0, owner[start:], log_probs.double().cpu()).numpy()
