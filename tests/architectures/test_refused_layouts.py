"""Unsupported layouts are refused before or in the first forward, and nothing is left half done."""

from __future__ import annotations

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from finesteer_hf import ConstantVector, SteeredModelForCausalLM, decoder_layout
from finesteer_hf.errors import SiteError, UnsupportedModelError
from finesteer_hf.sites import Site
from finesteer_hf.testing.architecture_checks import Fingerprint
from finesteer_hf.testing.tiny_models import VOCAB, tiny_model


PROMPT = torch.randint(3, VOCAB, (2, 6), generator=torch.Generator().manual_seed(1))
AT_ONE = [ConstantVector("resid_post[1]", torch.ones(32))]


def refuse(model, match):
    before = Fingerprint.of(model)
    with pytest.raises(UnsupportedModelError, match=match):
        SteeredModelForCausalLM.from_model(model)
    assert Fingerprint.of(model) == before


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("DeepseekV4ForCausalLM", "4 residual streams"),
        ("HYV4ForCausalLM", "4 residual streams"),
        ("Gemma3nForCausalLM", "4 residual streams"),
        ("XLNetLMHeadModel", r"\[tokens, rows, width\]"),
        ("XLMWithLMHeadModel", "no blocks"),
        ("HrmTextForCausalLM", "several times in one forward"),
        ("ProphetNetForCausalLM", "a stream for each predicted token"),
        ("RwkvForCausalLM", "not a transformers cache"),
        ("BltForCausalLM", "patches of bytes"),
    ],
)
def test_known_layouts_are_refused_at_load(name, match):
    refuse(tiny_model(name), match)


def test_an_encoder_decoder_is_refused():
    config = T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    refuse(T5ForConditionalGeneration(config), "encoder-decoder")


def test_blocks_that_are_not_found_are_refused():
    model = tiny_model("LlamaForCausalLM")
    model.model.twins = torch.nn.ModuleList(model.model.layers)
    model.model.blocks = torch.nn.ModuleList(model.model.layers)
    refuse(model, "Cannot find the decoder blocks .* 'blocks': 4")


def steer_and_expect(model, match, **kwargs):
    """Steering raises; the model's answers then are as before, and no block has a hook."""
    settings = {"max_new_tokens": 3, "do_sample": False, **kwargs}
    base = model.generate(PROMPT, **settings)
    SteeredModelForCausalLM.from_model(model)
    with pytest.raises(UnsupportedModelError, match=match):
        model.generate(PROMPT, steering_processor=AT_ONE, **settings)
    assert model.steering_status().hooks == ()
    assert torch.equal(model.generate(PROMPT, **settings), base)


def test_a_transposed_stream_is_refused_in_the_forward(monkeypatch):
    monkeypatch.setattr(decoder_layout, "_REFUSED_TYPES", {})
    steer_and_expect(tiny_model("XLNetLMHeadModel"), "transposes its stream")


def test_blocks_in_a_loop_are_refused_in_the_forward():
    model = tiny_model("LlamaForCausalLM")
    model.model.layers[2] = model.model.layers[1]
    steer_and_expect(model, "more than once", use_cache=False)


def test_a_skipped_block_is_refused_in_the_forward():
    # Without an image, Mllama leaves out the blocks that attend to one.
    model = SteeredModelForCausalLM.from_model(tiny_model("MllamaForCausalLM"))
    at_three = [ConstantVector("resid_post[3]", torch.ones(32))]
    with pytest.raises(UnsupportedModelError, match=r"did not pass \['resid_post\[3\]'\]"):
        model.generate(PROMPT, steering_processor=at_three, max_new_tokens=3)
    with torch.no_grad(), model.steering_with(at_three), pytest.raises(UnsupportedModelError, match="did not pass"):
        model(PROMPT)
    with torch.no_grad():
        assert torch.isfinite(model(PROMPT).logits).all()


def test_a_block_without_attention_has_no_head_site():
    model = SteeredModelForCausalLM.from_model(tiny_model("MambaForCausalLM"))
    with pytest.raises(SiteError, match="no attention output projection"):
        model._steering.tower.check(Site("head_out", 1))


@pytest.mark.parametrize(("name", "layer"), [("MixtralForCausalLM", 1), ("DeepseekV3ForCausalLM", 2)])
def test_a_block_of_experts_has_no_neurons_that_all_tokens_pass(name, layer):
    tower = SteeredModelForCausalLM.from_model(tiny_model(name))._steering.tower
    with pytest.raises(SiteError, match=rf"no mlp_act\[{layer}\].*no feed-forward that all tokens pass"):
        tower.check(Site("mlp_act", layer))


def test_neurons_without_an_axis_of_tokens_are_refused_in_the_forward():
    # OPT puts the tokens of all rows behind one another there.
    model = SteeredModelForCausalLM.from_model(tiny_model("OPTForCausalLM"))
    with pytest.raises(UnsupportedModelError, match=r"layout at mlp_act\[1\]: expected \[rows, tokens, 64\]"):
        model.generate(PROMPT, steering_processor=[ConstantVector("mlp_act[1]", torch.ones(64))], max_new_tokens=3)


@pytest.mark.parametrize(
    ("name", "width"),
    [("LlamaForCausalLM", 64), ("GPT2LMHeadModel", 64), ("BloomForCausalLM", 128), ("DeepseekV3ForCausalLM", 64)],
)
def test_neurons_are_as_many_as_their_projection_takes(name, width):
    tower = SteeredModelForCausalLM.from_model(tiny_model(name))._steering.tower
    assert tower.width(Site("mlp_act", 0)) == width


@pytest.mark.parametrize(
    ("name", "width"),
    [("LlamaForCausalLM", 32), ("Gemma4ForCausalLM", 32), ("DeepseekV3ForCausalLM", 32), ("GPT2LMHeadModel", 32)],
)
def test_head_sites_are_as_wide_as_their_projection(name, width):
    tower = SteeredModelForCausalLM.from_model(tiny_model(name))._steering.tower
    assert tower.width(Site("head_out", 1)) == width
    assert tower.head_size == width // tower.num_heads
