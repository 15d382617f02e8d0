"""Looking a data set over before anything is fitted; findings name rows and are stored with the adapter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from sklearn.metrics import roc_auc_score

from finesteer_hf.fitting.data import PreferenceRow, Text, name_rows, prompt_key
from finesteer_hf.fitting.templating import Encoded


# Tokens that only a chat template should write.
TEMPLATE_MARKS = (
    "<|im_start|>",
    "<|start_header_id|>",
    "[INST]",
    "<start_of_turn>",
    "<|user|>",
    "<|assistant|>",
    "<s>",
)
LENGTH_AUROC = 0.75
RARE_GROUP_SHARE = 0.02


def lint_preferences(rows: Sequence[PreferenceRow], encoded: Encoded, evaluated: int = 0) -> list[str]:
    """Findings about a data set, none of which prevents a fit.

    Args:
        rows: all rows; the last `evaluated` of them are the validation data.
        encoded: the same rows as token ids, with the remarks of encoding.
        evaluated: number of validation rows.
    """
    trained = len(rows) - evaluated
    findings = [f"{message}: {name_rows(numbers)}" for message, numbers in encoded.remarks.items()]
    findings += _duplicates(rows[:trained])
    if evaluated:
        findings += _leakage(rows[:trained], rows[trained:])
    findings += _template_marks(rows)
    findings += _length_confound(encoded)
    findings += _rare_groups(rows[:trained])
    return findings


def _duplicates(rows: Sequence[PreferenceRow]) -> list[str]:
    seen: dict[tuple[str, str, str], int] = {}
    repeated = []
    for number, row in enumerate(rows):
        key = (prompt_key(row.prompt), str(row.chosen), str(row.rejected))
        if key in seen:
            repeated.append(number)
        seen.setdefault(key, number)
    return [f"rows that repeat an earlier one: {name_rows(repeated)}"] if repeated else []


def _leakage(train: Sequence[PreferenceRow], held_out: Sequence[PreferenceRow]) -> list[str]:
    known = {prompt_key(row.prompt) for row in train}
    leaked = [i for i, row in enumerate(held_out) if prompt_key(row.prompt) in known]
    return (
        [f"eval_dataset has prompts of train_dataset, so its figures flatter: {name_rows(leaked)}"] if leaked else []
    )


def _text(value: Text) -> str:
    return value if isinstance(value, str) else "\n".join(message["content"] for message in value)


def _template_marks(rows: Sequence[PreferenceRow]) -> list[str]:
    marked = [
        i
        for i, row in enumerate(rows)
        if not isinstance(row.prompt, str) and any(m in _text(row.prompt) for m in TEMPLATE_MARKS)
    ]
    if not marked:
        return []
    return [f"messages that already hold a chat template's tokens, so they are templated twice: {name_rows(marked)}"]


def _length_confound(encoded: Encoded) -> list[str]:
    lengths = [
        [len(side.ids) - (side.answer_start or 0) for row in encoded.rows for side in (row.chosen, row.rejected)]
    ][0]
    labels = [1, 0] * len(encoded.rows)
    if len(set(lengths)) == 1:
        return []
    auroc = float(roc_auc_score(labels, lengths))
    if max(auroc, 1 - auroc) < LENGTH_AUROC:
        return []
    chosen, rejected = np.mean(lengths[0::2]), np.mean(lengths[1::2])
    return [
        f"chosen and rejected answers can be told by length alone (AUROC {auroc:.2f}; {chosen:.1f} and {rejected:.1f} tokens "
        "on average): the vector may learn length"
    ]


def _rare_groups(rows: Sequence[PreferenceRow]) -> list[str]:
    if not rows or rows[0].group is None:
        return []
    counts = Counter(str(row.group) for row in rows)
    rare = sorted(group for group, count in counts.items() if count < RARE_GROUP_SHARE * len(rows))
    return [f"categories with fewer than {RARE_GROUP_SHARE:.0%} of the rows: {rare}"] if rare else []
