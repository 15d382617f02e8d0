"""Greedy continuations of many prompts against one prompt and one token at a time."""

from __future__ import annotations

import torch
from fitting_toys import random_rows, small_model

from finesteer_hf import ConstantVector, SteeredModelForCausalLM
from finesteer_hf.fitting.data.encoding import Passage
from finesteer_hf.fitting.own_words import own_words


def test_texts_are_those_of_single_prompts_up_to_their_end() -> None:
    model, rows = small_model("llama"), random_rows(6)
    expected = []
    for row in rows:
        ids = list(row.prompt.ids)
        for _ in range(9):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        expected.append(ids)
    end = expected[0][len(rows[0].prompt.ids) + 2]
    model.generation_config.eos_token_id = end
    passages = []
    for row, ids in zip(rows, expected, strict=True):
        start = len(row.prompt.ids)
        stop = next((i + 1 for i in range(start, len(ids)) if ids[i] == end), len(ids))
        passages.append(Passage(tuple(ids[:stop]), start))
    # What a passage answers already is left out, and a prompt that occurs twice is asked once.
    asked = [rows[0].chosen, *(row.prompt for row in rows)]
    assert own_words(model, asked, 9) == [passages[0], *passages]
    SteeredModelForCausalLM.from_model(model)
    with model.steering_with([ConstantVector("resid_post[1]", 9 * torch.ones(32))]):
        assert own_words(model, asked, 9) == [passages[0], *passages]


def test_a_text_ends_where_the_model_has_no_positions_left() -> None:
    model = small_model("gpt2", n_positions=20)
    prompt = Passage(tuple(range(3, 20)))
    assert [len(passage.ids) for passage in own_words(model, [prompt], 9)] == [20]
