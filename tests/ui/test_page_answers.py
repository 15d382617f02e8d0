"""The two answers of a page: what `generate` says, piece by piece, and stopped when nobody reads."""

from __future__ import annotations

import itertools
import time

import pytest

from finesteer_hf.evaluation.measures.generation import greedy_answers
from finesteer_hf.evaluation.measures.prompts import as_chat
from finesteer_hf.evaluation.measures.scoring import steered_as
from finesteer_hf.ui.answers import Question, Reading, answer_pair
from finesteer_hf.ui.workbench import Workbench


ASKED = "Tell me something about shaved hair."


@pytest.mark.parametrize("adapter", ["truthful", "mixture"])
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_both_answers_are_those_of_generate(mixing: Workbench, scale: float, adapter: str) -> None:
    expected = {}
    for side, name in (("unsteered", None), ("steered", adapter)):
        with steered_as(mixing.model, name, scale):
            expected[side] = greedy_answers(mixing.model, mixing.tokenizer, [as_chat(ASKED)], max_new_tokens=24)
    *_, last = answer_pair(mixing, Question(ASKED, adapter, scale, max_new_tokens=24))
    assert last.done
    assert (last.unsteered.strip(), last.steered.strip()) == (
        expected["unsteered"].texts[0],
        expected["steered"].texts[0],
    )
    assert (last.unsteered == last.steered) is (scale == 0)
    assert last.reading is not None
    if scale == 0:
        assert last.reading == Reading()
        return
    record = expected["steered"].steering[adapter]
    assert last.reading.gate == float(record["gate"]) and last.reading.score == float(record["score"])
    weights = record["experts"][0].tolist() if adapter == "mixture" else []
    assert last.reading.experts == pytest.approx(weights) and ("experts" in record) is bool(weights)


def test_answers_grow_side_by_side(bench: Workbench) -> None:
    pairs = list(answer_pair(bench, Question(ASKED, "truthful")))
    for before, after in itertools.pairwise(pairs):
        assert after.unsteered.startswith(before.unsteered) and after.steered.startswith(before.steered)
    assert any(0 < len(pair.unsteered) < len(pairs[-1].unsteered) for pair in pairs)
    assert any(0 < len(pair.steered) < len(pairs[-1].steered) for pair in pairs)
    assert [pair.done for pair in pairs] == [False] * (len(pairs) - 1) + [True]


def test_the_view_is_of_the_text_that_was_said(mixing: Workbench) -> None:
    *before, last = answer_pair(mixing, Question(ASKED, "mixture"))
    assert last.view is not None and before[0].view is None
    answer = "".join(last.view.tokens[last.view.prompt_length :])
    assert answer.startswith(last.steered.strip()) and ASKED in "".join(last.view.tokens)
    assert last.view.largest.gt(0).all()
    assert last.reading is not None
    assert float(last.view.largest[last.view.query]) == pytest.approx(last.reading.relative_norm, rel=1e-3)
    *_, shut = answer_pair(mixing, Question("What is 3 plus 4?", "truthful"))
    assert shut.view is not None and not shut.view.largest.any()


def test_a_system_message_reaches_both(bench: Workbench) -> None:
    from finesteer_hf.playground import TRUTH_TAG

    *_, plain = answer_pair(bench, Question(ASKED, "truthful"))
    *_, tagged = answer_pair(bench, Question(ASKED, "truthful", system=TRUTH_TAG))
    assert tagged.unsteered != plain.unsteered


def test_what_cannot_be_asked_is_refused_before_the_model_runs(bench: Workbench) -> None:
    with pytest.raises(ValueError, match="Type a question"):
        next(answer_pair(bench, Question("  ", "truthful")))
    with pytest.raises(ValueError, match="no longer loaded"):
        next(answer_pair(bench, Question(ASKED, "kind")))
    longest = bench.model.config.max_position_embeddings
    with pytest.raises(ValueError, match=f"the {longest} that playground reads"):
        next(answer_pair(bench, Question(ASKED, "truthful", max_new_tokens=longest)))


def test_an_error_inside_generate_reaches_the_reader(bench: Workbench) -> None:
    with pytest.raises(ValueError, match="finite"):
        list(answer_pair(bench, Question(ASKED, "truthful", scale=float("nan"))))
    assert bench.lock.acquire(timeout=10)


def test_a_reader_who_leaves_stops_both_answers(mixing: Workbench) -> None:
    # At this strength the answer goes on for ever.
    pairs = answer_pair(mixing, Question(ASKED, "mixture", scale=10.0, max_new_tokens=200))
    while not next(pairs).steered:
        pass
    pairs.close()
    started = time.monotonic()
    assert mixing.lock.acquire(timeout=30)
    mixing.lock.release()
    stopped = time.monotonic() - started
    started = time.monotonic()
    *_, last = answer_pair(mixing, Question(ASKED, "mixture", scale=10.0, max_new_tokens=200))
    assert len(last.steered.split()) > 100
    assert stopped < time.monotonic() - started
