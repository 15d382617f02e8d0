"""The site that shows attention: what it shows of each architecture, and where it is refused."""

import pytest
import torch
from fitted_tad import N, eager_model, fitted

from finesteer_hf import Site, SteeredModelForCausalLM
from finesteer_hf.errors import UnsupportedModelError
from finesteer_hf.methods.tad import TADConfig
from finesteer_hf.processors import SteeringProcessor
from finesteer_hf.sites import BACK
from finesteer_hf.testing import toy_model
from finesteer_hf.testing.conformance import fit_on_toy
from finesteer_hf.testing.tiny_models import tiny_model


class Looking(SteeringProcessor):
    """Keeps what an attention site shows."""

    def __init__(self, site):
        self.maps, self.seen = (site,), []

    def transform(self, site, hidden, view):
        self.seen.append(hidden)
        return hidden


@pytest.mark.parametrize("cache", [None, "static"])
def test_the_site_shows_the_weights_of_the_tokens_before(cache):
    model = SteeredModelForCausalLM.from_model(eager_model())
    ids = torch.randint(6, 54, (2, 14), generator=torch.Generator().manual_seed(3))
    looking = Looking(Site("attention", 2))
    settings = {"cache_implementation": cache, "disable_compile": True} if cache else {}
    out = model.generate(ids, max_new_tokens=4, do_sample=False, steering_processor=[looking], **settings)
    seen = torch.cat(looking.seen, dim=1).unflatten(-1, (4, BACK))
    with torch.no_grad():
        maps = model(out[:, :-1], output_attentions=True).attentions[2]
    assert seen.shape == (2, 17, 4, BACK)
    for token in range(17):
        for n in range(1, BACK + 1):
            expected = maps[:, :, token, token - n] if token >= n else torch.zeros(2, 4)
            torch.testing.assert_close(seen[:, token, :, n - 1], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "name", ["GPT2LMHeadModel", "GPTNeoXForCausalLM", "Gemma2ForCausalLM", "BloomForCausalLM", "FalconH1ForCausalLM"]
)
def test_the_site_shows_what_an_architecture_says_of_its_attention(name):
    model = tiny_model(name)
    model.set_attn_implementation("eager")
    model, looking = SteeredModelForCausalLM.from_model(model), Looking(Site("attention", 1))
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 2, "output_attentions": True, "return_dict_in_generate": True, "eos_token_id": None}
    out = model.generate(ids, do_sample=False, steering_processor=[looking], **settings)
    for forward, (shown, maps) in enumerate(zip(looking.seen, out.attentions, strict=True)):
        shown = shown.unflatten(-1, (-1, BACK))
        for n in (1, 4, BACK):
            torch.testing.assert_close(shown[:, -1, :, n - 1], maps[1][:, :, -1, 11 + forward - n])


def test_an_architecture_that_gives_no_weights_is_refused():
    model = tiny_model("BertLMHeadModel")
    model.set_attn_implementation("eager")
    model = SteeredModelForCausalLM.from_model(model)
    with pytest.raises(UnsupportedModelError, match=r"attention\[1\]: the attention returns no weights"):
        model.generate(torch.tensor([[3, 4]]), max_new_tokens=2, steering_processor=[Looking(Site("attention", 1))])


def test_a_sliding_window_shows_the_weights_of_the_tokens_before():
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=54, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=12, attn_implementation="eager", initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = SteeredModelForCausalLM.from_model(MistralForCausalLM(config).eval())
    ids, looking = torch.randint(6, 54, (1, 15)), Looking(Site("attention", 1))
    model.generation_config.eos_token_id = None
    out = model.generate(ids, max_new_tokens=8, do_sample=False, steering_processor=[looking])
    seen = torch.cat(looking.seen, dim=1).unflatten(-1, (4, BACK))
    with torch.no_grad():
        maps = model(out[:, :-1], output_attentions=True, use_cache=False).attentions[1]
    for token in (3, 14, 16, 21):
        for n in (1, 3):
            torch.testing.assert_close(seen[:, token, :, n - 1], maps[:, :, token, token - n], atol=1e-5, rtol=1e-4)


def test_attention_without_weights_is_refused_by_name():
    with pytest.raises(UnsupportedModelError, match=r"attention=True needs.*attn_implementation='eager'"):
        fit_on_toy(TADConfig(layer=1, recurrence=N, attention=True, strength=1.0))
    with pytest.raises(UnsupportedModelError, match=r"attention\[0\] needs.*'sdpa' does not return"):
        SteeredModelForCausalLM.from_model(toy_model(), steering={"a": fitted()})
    model = SteeredModelForCausalLM.from_model(eager_model(), steering={"a": fitted()})
    model.set_attn_implementation("sdpa")
    with pytest.raises(UnsupportedModelError, match=r"attention\[0\] needs.*'sdpa' does not return"):
        model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=2)


def test_an_eager_attention_that_gives_no_weights_is_refused_in_the_forward():
    model = SteeredModelForCausalLM.from_model(eager_model())
    model.model.layers[1].self_attn.register_forward_hook(lambda module, args, output: (output[0], None))
    with pytest.raises(UnsupportedModelError, match=r"returns no weights \[rows, 4, tokens, keys\], but NoneType"):
        model.generate(torch.tensor([[3, 4]]), max_new_tokens=2, steering_processor=[Looking(Site("attention", 1))])


def test_attention_is_looked_at_and_not_written():
    class Writing(Looking):
        def transform(self, site, hidden, view):
            return hidden + 1

    model = SteeredModelForCausalLM.from_model(eager_model())
    with pytest.raises(ValueError, match=r"attention\[1\] can be read"):
        model.generate(torch.tensor([[3, 4]]), max_new_tokens=2, steering_processor=[Writing(Site("attention", 1))])
