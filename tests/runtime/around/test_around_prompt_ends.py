"""Where the prompts of a plain forward end: `prompt_lengths`, labels, and the warning without either."""

from __future__ import annotations

import functools
import types
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from steered_tiny import greedy, query_shift, some_prompts, steer_tiny, tiny_gpt2, tiny_llama
from transformers.modeling_outputs import CausalLMOutputWithPast

from finesteer_hf import ConstantVector
from finesteer_hf.errors import PromptEndWarning, UnsupportedModelError


PROMPTS, ANSWERS = (5, 3, 4), (2, 6, 1)
BUILDERS = {"llama": tiny_llama, "gpt2": tiny_gpt2}


def texts(side: str) -> dict[str, torch.Tensor]:
    """Three rows of prompt and answer, padded on a side; the labels ignore prompts and pads."""
    width = max(p + a for p, a in zip(PROMPTS, ANSWERS, strict=True))
    ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    labels = torch.full((3, width), -100)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        first = width - prompt - answer if side == "left" else 0
        ids[row, first : first + prompt + answer] = some_prompts(1, prompt + answer, seed=row)[0]
        mask[row, first : first + prompt + answer] = 1
        labels[row, first + prompt : first + prompt + answer] = ids[row, first + prompt : first + prompt + answer]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.fixture
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", PromptEndWarning)
        yield


@pytest.mark.parametrize("positions", ["all", "generated"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_labels_are_equivalent_to_prompt_lengths(kind, side, positions, no_warning):
    model, batch = steer_tiny(BUILDERS[kind](), query_shift(positions=positions)), texts(side)
    want = model(**batch, prompt_lengths=PROMPTS)
    got = model(**batch)
    assert torch.equal(got.loss, want.loss) and torch.equal(got.logits, want.logits)
    with model.disable_steering():
        assert not torch.equal(model(**batch).loss, want.loss)


def test_explicit_lengths_come_before_labels(no_warning):
    model, batch = steer_tiny(tiny_llama(), query_shift()), texts("right")
    other = torch.tensor(PROMPTS) - 1
    want = model(batch["input_ids"], batch["attention_mask"], prompt_lengths=other).logits
    assert torch.equal(model(**batch, prompt_lengths=other).logits, want)


def test_labels_given_by_position(no_warning):
    model, batch = steer_tiny(tiny_llama(), query_shift()), texts("right")
    want = model(**batch, prompt_lengths=PROMPTS).logits
    got = model(batch["input_ids"], batch["attention_mask"], None, None, None, batch["labels"])
    assert torch.equal(got.logits, want)


def test_labels_after_a_cache(no_warning):
    model, batch = steer_tiny(tiny_llama(), query_shift()), texts("left")
    ids, labels = batch["input_ids"][:1, 2:], batch["labels"][:1, 2:]
    with model.disable_steering():
        cache = model(ids[:, :2], use_cache=True).past_key_values
    want = model(ids[:, 2:], past_key_values=cache, prompt_lengths=[PROMPTS[0]]).logits
    with model.disable_steering():
        cache = model(ids[:, :2], use_cache=True).past_key_values
    assert torch.equal(model(ids[:, 2:], past_key_values=cache, labels=labels[:, 2:]).logits, want)


def fused_head(model):
    """A forward like that of TRL's trainers: it does not pass on the labels and calls the decoder."""

    @functools.wraps(type(model).forward)
    def forward(self, *args, labels=None, **kwargs):
        return CausalLMOutputWithPast(logits=self.lm_head(self.base_model(*args, **kwargs).last_hidden_state))

    return types.MethodType(forward, model)


@pytest.mark.parametrize("steered_first", [True, False])
@pytest.mark.parametrize("lora", [True, False])
def test_a_forward_that_does_not_pass_the_labels_on(lora, steered_first, no_warning):
    adapter, batch, model = query_shift(), texts("right"), tiny_llama()
    want = steer_tiny(tiny_llama(), adapter)(**batch, prompt_lengths=PROMPTS).logits
    if steered_first:
        steer_tiny(model, adapter)
    model.forward = own = fused_head(model)
    if not steered_first:
        steer_tiny(model, adapter)
    called = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])) if lora else model
    assert torch.equal(called(**batch).logits, want)
    if not lora:
        assert model.unload_steering().__dict__["forward"] == own


def test_a_row_without_ignored_labels_has_no_prompt_end_and_warns():
    model, batch = steer_tiny(tiny_llama(), query_shift()), texts("right")
    batch["labels"][1] = batch["input_ids"][1]
    whole = (PROMPTS[0], PROMPTS[1] + ANSWERS[1], PROMPTS[2])
    with pytest.warns(PromptEndWarning, match="prompt_lengths"):
        got = model(**batch).logits
    assert torch.equal(got, model(**batch, prompt_lengths=whole).logits)


def test_a_forward_without_a_prompt_end_warns_once_per_model():
    ids = some_prompts()
    for model in (steer_tiny(tiny_llama(), query_shift()), steer_tiny(tiny_gpt2(), query_shift())):
        with pytest.warns(PromptEndWarning, match="prompt_lengths") as caught:
            model(ids)
            model(ids, labels=ids)
            model.forward(ids)
        assert len(caught) == 1


def test_what_does_not_warn(no_warning):
    ids = some_prompts()
    model = steer_tiny(tiny_llama(), query_shift())
    greedy(model, ids)
    greedy(model, ids, num_beams=2)
    model(ids, prompt_lengths=[7, 7])
    model(ids[:, :1])
    with model.disable_steering():
        model(ids)
    # A constant vector at all positions does the same wherever the prompt ends.
    with model.steering_with([ConstantVector("resid_post[1]", torch.ones(32))]):
        model(ids)
    with model.steering("a", scale=0.0):
        model(ids)
    with pytest.raises(PromptEndWarning):
        model(ids)


def test_a_constant_vector_on_the_answer_alone_warns():
    model = steer_tiny(tiny_llama())
    vector = ConstantVector("resid_post[1]", torch.ones(32), positions="generated")
    with model.steering_with([vector]), pytest.warns(PromptEndWarning):
        model(some_prompts())


def test_packed_rows_are_refused_where_queries_matter(no_warning):
    model, ids = steer_tiny(tiny_llama(), query_shift()), some_prompts(1, 7)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    limits = torch.tensor([0, 3, 7], dtype=torch.int32)
    for packed in ({"position_ids": positions}, {"cu_seq_lens_q": limits}):
        with pytest.raises(UnsupportedModelError, match="several texts"):
            model(ids, labels=ids, **packed)
    with model.steering_with([ConstantVector("resid_post[1]", torch.ones(32))]):
        model(ids, labels=ids, position_ids=positions)
    with model.disable_steering():
        model(ids, labels=ids, position_ids=positions)


@pytest.mark.slow
def test_a_compiled_forward_reads_labels_and_warns():
    model, batch = steer_tiny(tiny_llama(), query_shift()), texts("right")
    want = model(**batch, prompt_lengths=PROMPTS)
    model.compile(backend="eager")
    got = model(**batch)
    assert torch.allclose(got.logits, want.logits, atol=1e-5) and torch.allclose(got.loss, want.loss, atol=1e-5)
    with pytest.warns(PromptEndWarning):
        model(batch["input_ids"])
