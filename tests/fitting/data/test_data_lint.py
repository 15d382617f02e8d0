"""Findings about weak data, and none about good data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from finesteer_hf import playground
from finesteer_hf.fitting.data.encoding import encode_preferences
from finesteer_hf.fitting.data.lint import common_ends, drop_known, lint_general, lint_memory, lint_rows, lint_variants
from finesteer_hf.fitting.data.rows import PreferenceRow
from finesteer_hf.testing.toy import toy_tokenizer


def chat(question: str, chosen: str = "oak0", rejected: str = "fox0", **extra: Any) -> PreferenceRow:
    answers = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
    return PreferenceRow([{"role": "user", "content": question}], *answers, **extra)


def findings(rows: list[PreferenceRow], tokenizer: Any = None) -> list[str]:
    tokenizer = tokenizer or toy_tokenizer()
    rows = [replace(row, number=number) for number, row in enumerate(rows)]
    return lint_rows(rows, encode_preferences(tokenizer, rows).rows, tokenizer)


GOOD = [chat(f"sun{i}", f"oak{i}", f"fox{i}") for i in range(12)]


def test_good_rows_give_no_findings() -> None:
    assert findings(GOOD) == []
    assert lint_general([[{"role": "user", "content": f"fox{i}"}] for i in range(5)], GOOD) == []


@pytest.mark.parametrize(
    ("rows", "finding"),
    [
        ([*GOOD, GOOD[0], GOOD[3]], "repeat an earlier one: rows 12, 13"),
        ([GOOD[0], chat("<|im_start|> sun1")], "templated twice: row 1 "),
        ([PreferenceRow("sun0 ", "oak0", "fox0"), GOOD[1]], "plain text and tokenised without it: row 0 "),
        ([PreferenceRow("<s> sun0", "oak0", "fox0"), GOOD[1]], "two words become one: row 0 "),
        (
            [chat(f"sun{i}", "oak0 oak1 oak2") for i in range(5)],
            r"separates chosen from rejected answers (AUROC 1.00; 4.0 and 2.0 tokens",
        ),
        (
            [chat(f"sun{i % 12} sea{i // 12}", group="many" if i else "few") for i in range(60)],
            "fewer than 2% of the rows: ['few']",
        ),
    ],
)
def test_findings_name_the_rows(rows: list[PreferenceRow], finding: str) -> None:
    found = findings(rows)
    assert len([line for line in found if finding in line]) == 1, found


def test_a_second_start_token_is_found() -> None:
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    assert any("two beginning-of-text tokens" in line for line in findings(GOOD, tokenizer))


def test_general_prompts_of_another_form_are_found() -> None:
    (form,) = lint_general(["fox0", "fox1"], GOOD)
    assert "different forms" in form
    wrapped = [PreferenceRow(f"Question: sun{i} sea{i}\nAnswer:", " a", " b") for i in range(12)]
    begin, end = lint_general(["sun1", "oak2"], wrapped)
    assert "begin with 'Question:'" in begin and "end with 'Answer:'" in end
    assert lint_general([f"Question: sun{i}?\nAnswer:" for i in range(3)], wrapped) == []


def test_common_ends_do_not_overlap() -> None:
    assert common_ends(["ab c ab", "ab d ab"]) == ("ab ", " ab")
    assert common_ends(["a b ", "a b "]) == ("a b ", "")
    assert common_ends(["sun0", "sun1"]) == ("", "")
    assert common_ends([]) == ("", "")


def test_prompts_that_are_known_are_dropped_by_name() -> None:
    own = [replace(row, number=10 + place) for place, row in enumerate((GOOD[3], chat("fox1"), GOOD[5]))]
    kept, (finding,) = drop_known(own, GOOD, "eval_dataset", "left out")
    assert kept == [own[1]] and "eval_dataset: rows 10, 12" in finding
    assert drop_known(own[1:2], GOOD, "eval_dataset", "left out") == (own[1:2], [])


def test_a_warning_comes_before_memory_is_full() -> None:
    assert lint_memory(10, 10) == []
    assert "give `store_dir`" in lint_memory(10**9, 10**6)[0]


def test_variants_of_a_prompt_are_found_and_single_prompts_are_not() -> None:
    rows = playground.preference_rows("safety", "fit")[:300]
    wrapped = [PreferenceRow(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
    (finding,) = lint_variants(wrapped, seed=0)
    assert "split='group'" in finding and finding.startswith("100%")
    questions = {row["id"].rpartition("/")[0]: row for row in playground.preference_rows("truthful", "fit")}
    alone = [PreferenceRow(row["prompt"], row["chosen"], row["rejected"]) for row in questions.values()]
    assert len(alone) > 100 and lint_variants(alone, seed=0) == []
    assert lint_variants(wrapped[:20], seed=0) == []


WORDS = ("boat", "lamp", "river", "stone", "garden", "window", "letter", "engine")
COMMANDS = [f"Describe the {a} and the {b}" for a in WORDS for b in WORDS]
QUESTIONS = [f"Why is the {a} by the {b}?" for a in WORDS for b in WORDS]


def test_a_form_that_separates_the_classes_is_found_and_named() -> None:
    rows = [PreferenceRow(f"{text} ", "a", "b", number=number) for number, text in enumerate(COMMANDS)]
    found = [line for line in lint_general(QUESTIONS, rows) if "form alone" in line]
    assert len(found) == 1
    assert "AUROC 1.00" in found[0] and "100% of the prompts" in found[0] and "0% of the general ones" in found[0]
    assert "general_dataset" in found[0]
    chats = [chat(text) for text in COMMANDS]
    asked = [[{"role": "user", "content": text}] for text in QUESTIONS]
    assert any("form alone" in line for line in lint_general(asked, chats))


def test_a_form_that_both_classes_have_is_not() -> None:
    both = [str(text) for text in np.random.default_rng(0).permutation([*COMMANDS, *QUESTIONS])]
    rows = [PreferenceRow(text, "a", "b", number=number) for number, text in enumerate(both[::2])]
    assert not any("form alone" in line for line in lint_general(both[1::2], rows))
    few = [PreferenceRow(text, "a", "b") for text in COMMANDS[:10]]
    assert not any("form alone" in line for line in lint_general(QUESTIONS, few))
