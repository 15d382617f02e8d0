"""Text from tokens as they come, and stop strings."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finesteer_hf.playground.shipped import load
from finesteer_hf.serving.text import UNFINISHED, IncrementalText, StopStrings, decode


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load()[1]


@pytest.mark.parametrize("text", ["naïve café", "日本語 and 🙂🙂 mixed", "plain words.", "á combining", " lead"])
def test_pieces_make_the_text_and_cut_no_character(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    decoder = IncrementalText(tokenizer)
    pieces = [*map(decoder.push, ids), decoder.end()]
    assert "".join(pieces) == decode(tokenizer, ids)
    assert not any(UNFINISHED in piece for piece in pieces)


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 2047), max_size=30))
def test_any_tokens_give_the_text_that_they_decode_to(tokenizer: Any, ids: list[int]) -> None:
    decoder = IncrementalText(tokenizer)
    assert "".join([*map(decoder.push, ids), decoder.end()]) == decode(tokenizer, ids)


def test_half_a_character_comes_with_its_other_half_or_at_the_end(tokenizer: Any) -> None:
    ids = tokenizer("🙂")["input_ids"]
    assert len(ids) > 1
    decoder = IncrementalText(tokenizer)
    assert [decoder.push(each) for each in ids] == [""] * (len(ids) - 1) + ["🙂"]
    decoder = IncrementalText(tokenizer)
    assert decoder.push(ids[0]) == ""
    assert decoder.end() == decode(tokenizer, ids[:1])


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("abc", max_size=25),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4),
    data=st.data(),
)
def test_a_stop_string_cuts_alike_however_the_text_comes(text: str, stops: list[str], data: st.DataObject) -> None:
    ends = [n for n in range(len(text) + 1) if text[:n].endswith(tuple(stops))]
    expected = text
    if ends:
        head = text[: ends[0]]
        expected = head[: -max(len(stop) for stop in stops if head.endswith(stop))]
    finder, given_out, stopped, place = StopStrings(stops), "", False, 0
    while place < len(text) and not stopped:
        size = data.draw(st.integers(1, 5))
        released, stopped = finder.push(text[place : place + size])
        given_out += released
        place += size
        # Nothing is given out that would have to be taken back.
        assert expected.startswith(given_out)
    assert given_out + ("" if stopped else finder.end()) == expected
    assert stopped == bool(ends)


def test_without_stop_strings_nothing_is_held_back() -> None:
    finder = StopStrings()
    assert finder.push("all of it") == ("all of it", False)
    assert finder.end() == ""
