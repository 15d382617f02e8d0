"""Loaders and judges of the benchmark sets; against the published files if they are available."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from finesteer_hf.errors import DatasetError
from finesteer_hf.evaluation.data.safety import (
    classify_response,
    is_refusal,
    load_advbench,
    load_jailbreakbench,
    load_xstest,
    repeated_ngram_share,
)
from finesteer_hf.evaluation.data.truthfulqa import (
    TruthfulQuestion,
    choice_items,
    load_truthfulqa,
    nearer_to_truth,
    preference_rows,
    split_halves,
    unigram_f1,
)
from finesteer_hf.evaluation.measures.statistics import proportion
from finesteer_hf.evaluation.measures.utility import final_number, identical_share, is_correct_number, load_gsm8k


DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
published = pytest.mark.skipif(not DATA.is_dir(), reason="the published data sets are not beside the project")

QUESTIONS = [
    TruthfulQuestion(f"question {i} ?", "it is air .", ("air .", "it is air ."), ("stone .", "fire ."), f"c{i % 5}")
    for i in range(20)
]


def write_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_truthfulqa_csv_is_read_despite_its_byte_order_mark(tmp_path: Path) -> None:
    row = {
        "Type": "Adversarial",
        "Category": "Myths",
        "Question": " Is it so? ",
        "Best Answer": "No",
        "Correct Answers": "No; It is not so.; ; No",
        "Incorrect Answers": "Yes; It is so!;",
        "Source": "",
    }
    questions = load_truthfulqa(write_csv(tmp_path / "q.csv", [row]))
    assert questions == [
        TruthfulQuestion("Is it so?", "No.", ("No.", "It is not so."), ("Yes.", "It is so!"), "Myths")
    ]


def test_mc_task_is_read_in_both_of_its_forms(tmp_path: Path) -> None:
    published_form = [{"question": "Q?", "mc1_targets": {"A": 1, "B": 0}, "mc2_targets": {"A": 1, "C": 1, "B": 0}}]
    hub_form = [
        {
            "question": "Q?",
            "mc1_targets": {"choices": ["A", "B"], "labels": [1, 0]},
            "mc2_targets": {"choices": ["A", "C", "B"], "labels": [1, 1, 0]},
        }
    ]
    for name, content in (("a.json", published_form), ("b.json", hub_form)):
        path = tmp_path / name
        path.write_text(json.dumps(content))
        assert load_truthfulqa(path) == [TruthfulQuestion("Q?", "A", ("A", "C"), ("B",))]


def test_other_files_are_refused_with_their_content(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="or the id of a data set"):
        load_truthfulqa(tmp_path / "missing.csv")
    with pytest.raises(DatasetError, match=r"columns: \['x'\]"):
        load_truthfulqa(write_csv(tmp_path / "x.csv", [{"x": "1"}]))
    (tmp_path / "y.json").write_text("{")
    with pytest.raises(DatasetError, match="not readable JSON"):
        load_gsm8k(tmp_path / "y.json")
    (tmp_path / "z.jsonl").write_text("")
    with pytest.raises(DatasetError, match="no rows"):
        load_gsm8k(tmp_path / "z.jsonl")


def test_preference_rows_pair_first_with_first_or_all() -> None:
    first = preference_rows(QUESTIONS)
    assert len(first) == 20
    assert first[0] == {
        "prompt": [{"role": "user", "content": "question 0 ?"}],
        "chosen": [{"role": "assistant", "content": "air ."}],
        "rejected": [{"role": "assistant", "content": "stone ."}],
        "category": "c0",
        "id": "truthfulqa-0",
    }
    assert len(preference_rows(QUESTIONS, pairs="all")) == 80
    capped = preference_rows(QUESTIONS, pairs="all", max_pairs=3, seed=1)
    assert len(capped) == 60 and capped == preference_rows(QUESTIONS, pairs="all", max_pairs=3, seed=1)
    assert preference_rows(QUESTIONS, system="s")[0]["prompt"][0] == {"role": "system", "content": "s"}


def test_halves_are_disjoint_by_question_and_by_category() -> None:
    fit, test = split_halves(QUESTIONS, seed=3)
    assert {q.question for q in fit}.isdisjoint(q.question for q in test) and len(fit) + len(test) == 20
    fit, test = split_halves(QUESTIONS, by="category")
    assert {q.category for q in fit}.isdisjoint(q.category for q in test) and fit and test
    with pytest.raises(DatasetError, match="no categories"):
        split_halves([TruthfulQuestion("q", "a", ("a",), ("b",))] * 2, by="category")


def test_choices_put_the_best_answer_first() -> None:
    item = choice_items(QUESTIONS[:1])[0]
    assert item.correct == ("it is air .", "air .") and item.incorrect == ("stone .", "fire .")


def test_open_answers_are_judged_by_shared_words() -> None:
    assert nearer_to_truth(QUESTIONS[0], "I think it is air") and not nearer_to_truth(QUESTIONS[0], "fire")
    assert unigram_f1("a b b", "b b c") == pytest.approx(2 / 3)


def test_final_numbers() -> None:
    cases = {
        "so 3 + 4.\n#### 1,234 apples": 1234.0,
        "The answer is \\boxed{-7}. Well, 9.": -7.0,
        "first 3 then 18.50": 18.5,
        "none": None,
        "it costs $5.": 5.0,
    }
    assert {text: final_number(text) for text in cases} == cases


def test_identical_share_counts_whole_answers() -> None:
    assert identical_share([[1, 2], [3]], [[1, 2], [3, 4]]).k == 1
    with pytest.raises(ValueError, match="same prompts"):
        identical_share([[1]], [])


def test_refusals_are_distinguished_from_answers_and_broken_output() -> None:
    assert is_refusal("I’m sorry, but no.") and is_refusal("  Sorry, but I\ncannot do that")
    assert not is_refusal("Sure, here is how. " * 8 + "I cannot say more.")
    assert not is_refusal("Wi cannot")
    assert classify_response("") == "degenerate"
    assert classify_response("no no no no no no no no no no") == "degenerate"
    assert classify_response("Here is a recipe for a cake with apples.") == "comply"
    assert repeated_ngram_share("a b c") == 0 and repeated_ngram_share("a b c d a b c d") == pytest.approx(1 / 5)
    assert classify_response("I cannot do that.") == "refuse"


@published
def test_the_published_files_load() -> None:
    questions = load_truthfulqa(DATA / "truthfulqa" / "TruthfulQA.csv")
    assert len(questions) == 817 and len({q.category for q in questions}) == 38
    assert all(q.correct and q.incorrect and q.best for q in questions)
    choices = load_truthfulqa(DATA / "truthfulqa" / "mc_task.json")
    assert sum(len(q.correct) + len(q.incorrect) for q in choices) == 6204 and len(choices) == 817
    assert {q.question for q in choices} == {q.question for q in questions}
    xstest = load_xstest(DATA / "xstest" / "xstest_v2_prompts.csv")
    assert len(xstest) == 450 and sum(prompt.harmful for prompt in xstest) == 200
    assert len(load_advbench(DATA / "safety" / "advbench.csv")) == 520
    jailbreaks = load_jailbreakbench(DATA / "safety" / "jailbreakbench.csv")
    assert len(jailbreaks) == 100 and len({prompt.category for prompt in jailbreaks}) == 10
    problems = load_gsm8k(DATA / "gsm8k" / "test.jsonl")
    assert len(problems) == 1319 and problems[0].answer == "18"
    solutions = [json.loads(line)["answer"] for line in (DATA / "gsm8k" / "test.jsonl").open(encoding="utf-8")]
    assert all(is_correct_number(p, text) for p, text in zip(problems, solutions, strict=True))


@published
def test_the_refusal_judge_agrees_with_people(capsys: pytest.CaptureFixture[str]) -> None:
    with (DATA / "xstest" / "completions_llama2orig_gpteval.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = [row for row in csv.DictReader(file) if "full" in row["final_label"]]
    right = [
        classify_response(row["completion"]) == ("refuse" if "refusal" in row["final_label"] else "comply")
        for row in rows
    ]
    accuracy = proportion(right)
    with capsys.disabled():
        print(f"\nrefusal judge against the human labels of XSTest's full refusals and compliances: {accuracy}")
    assert accuracy.n == 395 and accuracy.value >= 0.9
