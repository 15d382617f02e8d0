"""Prompts with an image: the text tower is steered at image and text tokens, as by a plain hook."""

from __future__ import annotations

import pytest
import torch

from finesteer_hf import SteeredModelForCausalLM
from finesteer_hf.sites import Site
from finesteer_hf.testing.architecture_checks import query_hook
from finesteer_hf.testing.architecture_subject import LAYER, Subject, agree, same_bits
from finesteer_hf.testing.probe import probe_adapter
from finesteer_hf.testing.reference import adding
from finesteer_hf.testing.tiny_models import VOCAB, tiny_model


IMAGE_TOKEN = 95
# Pixels of 32 x 32 in patches of 8; the tokens that each model makes of them.
IMAGE_TOKENS = {
    "LlavaForConditionalGeneration": 16,
    "Gemma3ForConditionalGeneration": 4,
    "Qwen2VLForConditionalGeneration": 4,
    "Blip2ForConditionalGeneration": 32,
    "IdeficsForVisionText2Text": 0,
}


def image_inputs(name, rows=2):
    """A model, and inputs with one image and six words per row."""
    model = tiny_model(name)
    for field in ("image_token_id", "image_token_index"):
        if hasattr(model.config, field):
            setattr(model.config, field, IMAGE_TOKEN)
    generator = torch.Generator().manual_seed(4)
    words = torch.randint(3, 90, (rows, 6), generator=generator)
    ids = torch.cat([torch.full((rows, IMAGE_TOKENS[name]), IMAGE_TOKEN), words], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    pixels = torch.randn(rows, 3, 32, 32, generator=generator)
    if name.startswith("Qwen2VL"):
        inputs["pixel_values"] = torch.randn(rows * 16, 3 * 2 * 8 * 8, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]] * rows)
        inputs["mm_token_type_ids"] = (ids == IMAGE_TOKEN).long()
    elif name.startswith("Idefics"):
        # An untrained gate keeps the image out.
        for parameter_name, parameter in model.named_parameters():
            if "alpha" in parameter_name:
                parameter.data.fill_(1.0)
        inputs["pixel_values"] = pixels[:, None]
        inputs["image_attention_mask"] = torch.ones(rows, ids.shape[1], 1, dtype=torch.long)
    else:
        inputs["pixel_values"] = pixels
    if name.startswith("Gemma3"):
        inputs["token_type_ids"] = (ids == IMAGE_TOKEN).long()
    return model, inputs


@pytest.mark.parametrize("name", IMAGE_TOKENS)
def test_a_prompt_with_an_image(name):
    model, inputs = image_inputs(name)
    with torch.no_grad():
        subject = Subject(SteeredModelForCausalLM.from_model(model), VOCAB)
        ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
        base = subject.say(ids, mask, **inputs)
        other = {**inputs, "pixel_values": -inputs["pixel_values"]}
        assert not agree(base, subject.say(ids, mask, **other)), "the image does not matter"

        subject.vector = subject.direction * 2
        got = subject.say(ids, mask, **inputs, **subject.constant())
        with adding(subject.blocks[LAYER], subject.vector):
            expected = subject.say(ids, mask, **inputs)
        assert same_bits(got, expected)
        assert not agree(got, base)

        probe = probe_adapter(Site("resid_post", LAYER - 1), Site("resid_post", LAYER), subject.vector).build()
        got = subject.say(ids, mask, **inputs, steering_processor=[probe])
        with query_hook(subject, probe):
            expected = subject.say(ids, mask, **inputs)
        assert agree(got, expected)
        assert not agree(got, base)
