"""Checks a data set before the fit; findings name rows and are stored with the adapter."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import roc_auc_score

from finesteer_hf.estimators import FormProbe
from finesteer_hf.fitting.data.encoding import EncodedRow
from finesteer_hf.fitting.data.records import name_rows
from finesteer_hf.fitting.data.rows import PreferenceRow, Row, Text, plain_text, prompt_key
from finesteer_hf.fitting.data.templating import text_tokenizer


class DatasetWarning(UserWarning):
    """Something in a data set may make the fitted adapter worse."""


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
# AUROC from which form alone nearly separates the classes, and the fewest prompts of each class to judge it.
FORM_AUROC, MIN_FORM_ROWS = 0.95, 20
RARE_GROUP_SHARE = 0.02
# Most groups that are named; of more, only the number is given.
NAMED_GROUPS = 10
# Fewest rows and characters of a common beginning to call it a wrapper.
MIN_WRAPPED_ROWS, MIN_WRAPPER = 10, 3
# Cosine of two prompts' TF-IDF vectors above which they are variants, and the share of prompts with one that is
# reported.
VARIANT_COSINE, VARIANT_SHARE = 0.6, 1 / 3
# Fewest and most prompts that are compared.
MIN_COMPARED, MAX_COMPARED = 50, 2000


def lint_rows(rows: Sequence[PreferenceRow], encoded: Sequence[EncodedRow], tokenizer: Any) -> list[str]:
    """Findings about preference rows; none prevents a fit.

    Args:
        rows: the rows.
        encoded: the same rows as token ids.
        tokenizer: the tokenizer that encoded them.
    """
    return [
        *_duplicates(rows),
        *_template_marks(rows),
        *_double_start(rows, encoded, tokenizer),
        *_plain_text_for_chat_model(rows, tokenizer),
        *_glued_answers(rows),
        *_length_confound(encoded),
        *_rare_groups(rows),
    ]


def lint_general(prompts: Sequence[Text], rows: Sequence[PreferenceRow], seed: int = 0) -> list[str]:
    """Findings about general prompts, compared with the training rows.

    Args:
        prompts: the general prompts.
        rows: the training rows.
        seed: seed of the draws.
    """
    chats = {isinstance(prompt, list) for prompt in prompts}, {isinstance(row.prompt, list) for row in rows}
    findings = []
    if len(prompts) and chats[0] != chats[1]:
        findings.append(
            "general_dataset and train_dataset have different forms (chat messages and plain text): the gate may learn the "
            "form"
        )
    own = common_ends([plain_text(row.prompt) for row in rows])
    general = common_ends([plain_text(prompt) for prompt in prompts])
    if len(rows) >= MIN_WRAPPED_ROWS and prompts:
        for where, ours, theirs in zip(("begin", "end"), own, general, strict=True):
            if len(ours.strip()) >= MIN_WRAPPER and ours.strip() not in theirs:
                findings.append(
                    f"all training prompts {where} with {ours.strip()[:60]!r}, but not the general ones: the gate may "
                    "learn that. Wrap both alike"
                )
    return findings + _form_shortcut(prompts, rows, seed)


def _form_shortcut(prompts: Sequence[Text], rows: Sequence[PreferenceRow], seed: int) -> list[str]:
    """Whether the form of prompts, without their meaning, separates the classes."""
    own = {plain_text(row.prompt): row.group for row in rows}
    general = sorted({plain_text(prompt) for prompt in prompts})
    if min(len(own), len(general)) < MIN_FORM_ROWS:
        return []
    groups = None if rows[0].group is None else list(own.values())
    probe = FormProbe(seed=seed).fit(list(own), general, groups)
    if probe.auroc_ < FORM_AUROC:
        return []
    return [
        f"form alone, without any meaning, separates training prompts from general ones (AUROC {probe.auroc_:.2f}): "
        f"{probe.describe()}. The gate may learn the form, and then says nothing about prompts of the other form: give "
        "general prompts of the same form as general_dataset, such as harmless prompts that look like these"
    ]


def drop_known(own: Sequence[Row], rows: Sequence[PreferenceRow], what: str, why: str) -> tuple[list[Row], list[str]]:
    """The rows whose prompts are not also training prompts, and a finding about the others."""
    known = {prompt_key(row.prompt) for row in rows}
    shared = [prompt_key(row.prompt) in known for row in own]
    kept = [row for row, is_shared in zip(own, shared, strict=True) if not is_shared]
    if not any(shared):
        return kept, []
    dropped = name_rows(row.number for row, is_shared in zip(own, shared, strict=True) if is_shared)
    return kept, [f"{what}: {dropped}: the prompt is also in train_dataset; {why}"]


def lint_variants(rows: Sequence[PreferenceRow], seed: int) -> list[str]:
    """Whether many prompts are variants of one another, so that held-out prompts are nothing new.

    On the playground, where each request comes in several wrappers, a gate calibrated on known requests misses 45% of
    the new ones at a nominal 5%, and 5% if whole requests are held out (`benchmarks/results/gate_guarantees.md`).

    Args:
        rows: the rows that will be split by prompt.
        seed: seed of the draw if there are more than `MAX_COMPARED` prompts.
    """
    texts = sorted({plain_text(row.prompt) for row in rows})
    if len(texts) < MIN_COMPARED:
        return []
    kept = np.random.default_rng(seed).permutation(len(texts))[:MAX_COMPARED]
    vectors = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\w+").fit_transform([texts[i] for i in kept])
    cosines = (vectors @ vectors.T).toarray()
    np.fill_diagonal(cosines, 0.0)
    share = float((cosines.max(axis=1) >= VARIANT_COSINE).mean())
    if share < VARIANT_SHARE:
        return []
    return [
        f"{share:.0%} of the prompts are close variants of another one (TF-IDF cosine of at least {VARIANT_COSINE:g}). If "
        "new queries will be about other things, a gate calibrated on variants of its training prompts misses "
        "more of them than it promises: give rows about one thing the same `category`, and fit with "
        "split='group'"
    ]


def lint_memory(passages: int, width: int) -> list[str]:
    """Whether the captured states would fill the memory.

    Args:
        passages: number of prompts and answers.
        width: float32 values of each, over all sites and pools.
    """
    size = 4 * passages * width
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return []
    if size < free / 2:
        return []
    return [
        f"the captured states take {size / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free: give `store_dir`, name a "
        "layer, or take fewer rows"
    ]


def common_ends(texts: Sequence[str]) -> tuple[str, str]:
    """Whole words that all texts begin with, and whole words that all remainders end with."""
    start = _common_start(texts)
    return start, _common_start([text[len(start) :][::-1] for text in texts])[::-1]


def _common_start(texts: Sequence[str]) -> str:
    # The first and the last text in sort order differ earliest.
    first, last = (min(texts), max(texts)) if texts else ("", "")
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    while length and not first[length - 1].isspace():
        length -= 1
    return first[:length]


def _duplicates(rows: Sequence[PreferenceRow]) -> list[str]:
    seen: set[tuple[str, str, str]] = set()
    repeated = []
    for row in rows:
        key = (prompt_key(row.prompt), str(row.chosen), str(row.rejected))
        if key in seen:
            repeated.append(row.number)
        seen.add(key)
    return [f"rows that repeat an earlier one: {name_rows(repeated)}"] if repeated else []


def _template_marks(rows: Sequence[PreferenceRow]) -> list[str]:
    marked = [
        row.number
        for row in rows
        if isinstance(row.prompt, list) and any(mark in plain_text(row.prompt) for mark in TEMPLATE_MARKS)
    ]
    if not marked:
        return []
    return [
        f"messages that already contain a chat template's tokens, so they are templated twice: {name_rows(marked)}"
    ]


def _double_start(rows: Sequence[PreferenceRow], encoded: Sequence[EncodedRow], tokenizer: Any) -> list[str]:
    start = getattr(text_tokenizer(tokenizer), "bos_token_id", None)
    double = [
        row.number
        for row, ids in zip(rows, encoded, strict=True)
        if start is not None and ids.prompt.ids[:2] == (start, start)
    ]
    return [f"prompts that begin with two beginning-of-text tokens: {name_rows(double)}"] if double else []


def _plain_text_for_chat_model(rows: Sequence[PreferenceRow], tokenizer: Any) -> list[str]:
    if getattr(text_tokenizer(tokenizer), "chat_template", None) is None:
        return []
    plain = [
        row.number
        for row in rows
        if isinstance(row.prompt, str) and not any(mark in row.prompt for mark in TEMPLATE_MARKS)
    ]
    if not plain:
        return []
    return [
        f"the tokenizer has a chat template, but prompts are plain text and tokenised without it: {name_rows(plain)}. If "
        "the model is used as a chat model, give messages"
    ]


def _glued_answers(rows: Sequence[PreferenceRow]) -> list[str]:
    glued = [
        row.number
        for row in rows
        if isinstance(row.prompt, str)
        and any(row.prompt[-1].isalnum() and str(answer)[0].isalnum() for answer in (row.chosen, row.rejected))
    ]
    if not glued:
        return []
    return [f"answers that follow their prompt without a space, so two words become one: {name_rows(glued)}"]


def _length_confound(encoded: Sequence[EncodedRow]) -> list[str]:
    lengths = [len(side.ids) - (side.answer_start or 0) for row in encoded for side in (row.chosen, row.rejected)]
    auroc = float(roc_auc_score([1, 0] * len(encoded), lengths))
    if max(auroc, 1 - auroc) < LENGTH_AUROC:
        return []
    chosen, rejected = np.mean(lengths[0::2]), np.mean(lengths[1::2])
    return [
        f"length alone separates chosen from rejected answers (AUROC {auroc:.2f}; {chosen:.1f} and {rejected:.1f} "
        "tokens on average): the vector may learn length"
    ]


def _rare_groups(rows: Sequence[PreferenceRow]) -> list[str]:
    counts = Counter(row.group for row in rows if row.group is not None)
    rare = sorted(group for group, count in counts.items() if count < RARE_GROUP_SHARE * len(rows))
    if not rare:
        return []
    more = f" and {len(rare) - NAMED_GROUPS} more" if len(rare) > NAMED_GROUPS else ""
    return [f"categories with fewer than {RARE_GROUP_SHARE:.0%} of the rows: {rare[:NAMED_GROUPS]}{more}"]
