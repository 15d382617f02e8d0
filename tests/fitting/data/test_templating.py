"""Where the query ends and the answer begins, id by id."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from finesteer_hf.errors import DatasetError
from finesteer_hf.fitting.data.encoding import Passage, encode_preferences, encode_prompts
from finesteer_hf.fitting.data.rows import PreferenceRow, PromptRow
from finesteer_hf.fitting.data.templating import chat_template_hash, format_query
from finesteer_hf.testing.toy import toy_tokenizer


CHAT = PreferenceRow(
    [{"role": "user", "content": "sun0 sun1"}],
    [{"role": "assistant", "content": "oak0 oak1"}],
    [{"role": "assistant", "content": "fox0"}],
)


def ids_of(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.convert_tokens_to_ids(text.split()))


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Letters, and the pair `:b` as one token: an answer may merge with the prompt's last character."""
    letters = {letter: i for i, letter in enumerate("abcdQ:? ")}
    tokenizer = Tokenizer(models.BPE({**letters, ":b": len(letters)}, [(":", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_query_is_templated_with_the_generation_prompt_and_one_start() -> None:
    tokenizer = toy_tokenizer()
    expected = ids_of(tokenizer, "<bos> <user> sun0 sun1 <assistant>")
    assert tuple(format_query(tokenizer, CHAT.prompt)) == expected
    assert encode_prompts(tokenizer, [CHAT]) == [Passage(expected)]
    templated = tokenizer.apply_chat_template(CHAT.prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert templated == list(expected)


def test_text_is_tokenised_as_it_is() -> None:
    tokenizer = toy_tokenizer()
    assert tuple(format_query(tokenizer, "sun0 sun1")) == ids_of(tokenizer, "sun0 sun1")


def test_a_system_text_makes_a_chat() -> None:
    tokenizer = toy_tokenizer()
    tokenizer.add_tokens(["<system>"], special_tokens=True)
    expected = ids_of(tokenizer, "<bos> <system> sea0 <user> sun0 <assistant>")
    assert tuple(format_query(tokenizer, "sun0", system="sea0")) == expected


@pytest.mark.parametrize(("end", "after"), [("include", " <eos>"), ("exclude", "")])
def test_a_chat_answer_begins_after_the_prompt_and_ends_as_asked(end: Any, after: str) -> None:
    tokenizer = toy_tokenizer()
    (row,) = encode_preferences(tokenizer, [CHAT], answer_end=end).rows
    assert row.prompt.ids == row.chosen.ids[: row.chosen.answer_start]
    assert row.chosen.ids[row.chosen.answer_start :] == ids_of(tokenizer, f"oak0 oak1{after}")
    assert row.rejected.ids[row.rejected.answer_start :] == ids_of(tokenizer, f"fox0{after}")


@pytest.mark.parametrize("end", ["include", "exclude"])
def test_the_last_token_of_content_is_known_however_an_answer_ends(end: Any) -> None:
    tokenizer = toy_tokenizer()
    (row,) = encode_preferences(tokenizer, [CHAT], answer_end=end).rows
    assert tokenizer.decode([row.chosen.ids[row.chosen.last_content]]) == "oak1"
    assert tokenizer.decode([row.rejected.ids[row.rejected.last_content]]) == "fox0"
    (plain,) = encode_preferences(tokenizer, [PreferenceRow("sun0", " oak0 oak1", " fox0")], answer_end=end).rows
    assert plain.chosen.closing == 0


@pytest.mark.parametrize(("cut", "closing"), [(0, 1), (1, 0), (2, 0)])
def test_cutting_an_answer_removes_its_end_first(cut: int, closing: int) -> None:
    tokenizer = toy_tokenizer()
    (whole,) = encode_preferences(tokenizer, [CHAT]).rows
    (row,) = encode_preferences(tokenizer, [CHAT], max_length=len(whole.chosen.ids) - cut).rows
    assert row.chosen.closing == closing
    assert (row.chosen.answer_start or 0) <= row.chosen.last_content


def test_a_token_that_merges_an_answer_and_its_end_is_content() -> None:
    tokenizer = merging_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}Q{{ m['content'] }}{% else %}{{ m['content'] }}b{% endif %}"
        "{% endfor %}"
    )
    user, said = [{"role": "user", "content": "ad"}], [{"role": "assistant", "content": "d:"}]
    (row,) = encode_preferences(tokenizer, [PreferenceRow(user, said, said)]).rows
    # The colon and the template's b are one token.
    assert tokenizer.decode([row.chosen.ids[row.chosen.last_content]]) == ":b"


def test_a_token_that_merges_prompt_and_answer_belongs_to_the_answer() -> None:
    tokenizer = merging_tokenizer()
    encoded = encode_preferences(tokenizer, [PreferenceRow("Qa:", "bc", "dd"), PreferenceRow("Qa:", "dc", "dd")])
    first = encoded.rows[0]
    assert first.chosen.answer_start == len(first.prompt.ids) - 1
    assert tokenizer.decode(list(first.chosen.ids[first.chosen.answer_start :])) == ":bc"
    ((remark, numbers),) = encoded.remarks.items()
    assert "merge with the prompt's last 1" in remark and numbers == {0}


def test_a_template_that_rewrites_the_prompt_is_refused() -> None:
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}sea1 sea2 sea3 {% endif %}"
    )
    with pytest.raises(DatasetError, match=r"rows 0, 70 .*rendered differently from token 3 on: .*sea1 sea2 sea3"):
        encode_preferences(tokenizer, [CHAT, replace(CHAT, number=70)])


def test_a_missing_template_and_a_refused_role_name_the_rows() -> None:
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DatasetError, match=r"train_dataset: row 70 .*no chat template.*tokenizer.chat_template"):
        encode_preferences(tokenizer, [PreferenceRow("sun0", " oak0", " fox0"), replace(CHAT, number=70)])
    assert chat_template_hash(tokenizer) is None
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(DatasetError, match=r"row 0 .*refuses .*System role not supported.*first user message"):
        encode_preferences(tokenizer, [CHAT])


def test_prompts_are_never_cut_and_answers_only_on_request() -> None:
    tokenizer = toy_tokenizer()
    long = PreferenceRow("sun0 " * 20, "oak0", "fox0", number=70)
    with pytest.raises(DatasetError, match=r"row 70 .*20 tokens, at most 10 .*max_length.*never truncated"):
        encode_preferences(tokenizer, [CHAT, long], max_length=10)
    with pytest.raises(DatasetError, match=r"positions of the model"):
        encode_prompts(tokenizer, [PromptRow(long.prompt)], max_positions=10)
    wordy = PreferenceRow("sun0 ", "oak0 " * 20, "fox0", number=70)
    with pytest.raises(DatasetError, match=r"row 70 .*21 tokens, the model supports 10"):
        encode_preferences(tokenizer, [wordy], max_positions=10)
    encoded = encode_preferences(tokenizer, [CHAT, wordy], max_length=10, max_positions=10)
    assert len(encoded.rows[1].chosen.ids) == 10
    assert encoded.remarks == {"the chosen answer was cut to max_length=10 tokens": {70}}


def test_a_prompt_that_fills_the_length_leaves_no_answer() -> None:
    with pytest.raises(DatasetError, match="no token is left of the chosen answer"):
        encode_preferences(toy_tokenizer(), [PreferenceRow("sun0 sun1 ", "oak0", "fox0")], max_length=2)


def test_no_pad_token_is_needed() -> None:
    tokenizer = toy_tokenizer()
    tokenizer.pad_token = None
    assert encode_preferences(tokenizer, [CHAT, CHAT]).rows[0].prompt.ids


def test_the_template_is_part_of_the_provenance() -> None:
    one, two = toy_tokenizer(), toy_tokenizer()
    assert chat_template_hash(one) == chat_template_hash(two)
    two.chat_template += " "
    assert chat_template_hash(one) != chat_template_hash(two)
