"""The world: its counts, its balance, its splits."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from finesteer_hf.playground import World, general_rows, preference_rows, world
from finesteer_hf.playground.contents import BARE
from finesteer_hf.playground.contents.general import SOLVED_TASKS
from finesteer_hf.playground.contents.questions import VOICES, kind_voices
from finesteer_hf.playground.corpus import SAFETY_TAG, TRUTH_TAG, Corpus
from finesteer_hf.playground.judges import normalise


def word_count(text: str) -> int:
    return len(text.split())


def all_prompts(built: World) -> list[str]:
    return [item.prompt for item in (*built.questions, *built.general, *built.harmful, *built.lookalikes)]


def test_question_counts() -> None:
    kinds = Counter(question.kind for question in world().questions)
    assert len(world().questions) >= 1000
    assert len(kinds) >= 8 and min(kinds.values()) >= 100


def test_answers_are_distinct_short_sentences() -> None:
    for question in world().questions:
        answers = [*question.true, *question.false]
        assert len(question.true) >= 2 and len(question.false) >= 2
        assert len({normalise(answer) for answer in answers}) == len(answers)
        assert all(4 <= word_count(answer) <= 14 and answer.endswith(".") for answer in answers)


def test_nothing_is_repeated() -> None:
    prompts = all_prompts(world())
    assert len(set(prompts)) == len(prompts)
    identifiers = [item.id for item in (*world().questions, *world().general, *world().harmful, *world().lookalikes)]
    assert len(set(identifiers)) == len(identifiers)


def test_length_does_not_separate_truth_from_folklore() -> None:
    true = np.array([[word_count(answer) for answer in q.true] for q in world().questions]).mean(1)
    false = np.array([[word_count(answer) for answer in q.false] for q in world().questions]).mean(1)
    assert abs(true.mean() - false.mean()) < 0.5
    assert abs((true > false).mean() - (true < false).mean()) < 0.1


def test_every_voice_is_as_often_true_as_folklore() -> None:
    voices = [kind_voices(kind) for kind in dict.fromkeys(q.kind for q in world().questions)]
    assert all(true != false for true, false in voices)
    assert Counter(true for true, _ in voices) == Counter(false for _, false in voices)
    assert {true for true, _ in voices} == set(range(len(VOICES)))


def test_general_tasks_hold_items_out() -> None:
    tasks = Counter(item.task for item in world().general)
    held_out = Counter(item.task for item in world().general if item.held_out)
    assert len(tasks) >= 5
    assert all(0.15 < held_out[task] / count < 0.25 for task, count in tasks.items())


def test_training_texts_contain_no_held_out_item() -> None:
    held_out = {item.prompt for item in (*world().general, *world().lookalikes) if item.held_out}
    stream = iter(Corpus(world(), seed=0))
    seen = [next(stream) for _ in range(20_000)]
    assert held_out.isdisjoint(example.prompt for example in seen)
    assert {TRUTH_TAG, SAFETY_TAG, None} <= {example.system for example in seen}


def test_harmful_requests_and_their_lookalikes_share_the_wrappers() -> None:
    bases = {item.base for item in world().harmful}
    wrappers = {item.wrapper for item in world().harmful}
    assert len(bases) >= 200 and len({item.category for item in world().harmful}) >= 6
    assert BARE in wrappers and len(wrappers) >= 6
    assert len(world().harmful) == len(bases) * len(wrappers)
    assert len(world().lookalikes) % len(wrappers) == 0


def test_same_seed_same_world() -> None:
    assert all_prompts(World(seed=3)) == all_prompts(World(seed=3))
    assert all_prompts(World(seed=3)) != all_prompts(World(seed=4))


@pytest.mark.parametrize("task", ["truthful", "safety"])
def test_halves_share_no_question(task: str) -> None:
    fit, test, both = (preference_rows(task, half) for half in ("fit", "test", "all"))
    assert {row["id"] for row in fit}.isdisjoint(row["id"] for row in test)
    assert {row["id"] for row in fit + test} == {row["id"] for row in both}
    assert abs(len(fit) - len(test)) < 0.1 * len(both)
    assert preference_rows(task, "fit") == fit
    assert preference_rows(task, "fit", seed=1) != fit


@pytest.mark.parametrize("task", ["truthful", "safety"])
def test_halves_by_subject_share_no_subject(task: str) -> None:
    fit, test = (preference_rows(task, half, split="subject") for half in ("fit", "test"))
    subject = {q.id: q.subject for q in world().questions} | {item.id: item.base for item in world().harmful}
    assert {subject[row["id"]] for row in fit}.isdisjoint(subject[row["id"]] for row in test)


@pytest.mark.parametrize("task", ["truthful", "safety"])
def test_halves_by_kind_share_no_kind(task: str) -> None:
    fit, test = (preference_rows(task, half, split="kind") for half in ("fit", "test"))
    assert {row["category"] for row in fit}.isdisjoint(row["category"] for row in test)


def test_preference_rows_are_chat_messages() -> None:
    row = preference_rows("truthful", "fit")[0]
    assert [message["role"] for message in (*row["prompt"], *row["chosen"], *row["rejected"])] == [
        "user",
        "assistant",
        "assistant",
    ]


def test_general_halves_are_disjoint_and_held_out() -> None:
    fit, test, both = (general_rows(half) for half in ("fit", "test", "all"))
    assert {row["id"] for row in fit}.isdisjoint(row["id"] for row in test)
    assert len(fit) + len(test) == len(both) >= 500
    assert {row["task"] for row in fit} == {row["task"] for row in test} == set(SOLVED_TASKS)


@pytest.mark.parametrize("arguments", [("honesty", "fit"), ("truthful", "train"), ("truthful", "fit", "topic")])
def test_unknown_choices_are_named(arguments: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"'(honesty|train|topic)' is unknown; use one of"):
        preference_rows(*arguments)
