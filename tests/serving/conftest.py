"""A model with adapters of several methods, each at each of the positions."""

from __future__ import annotations

import pytest
import torch
from engines import METHODS, NEW_TOKENS, POSITIONS, at, constant, fitted

from finesteer_hf import SteeredModelForCausalLM
from finesteer_hf.serving.contract import problems
from finesteer_hf.testing.toy import toy_general_prompts, toy_model, toy_preferences, toy_tokenizer


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/serving" in str(item.path) and problems():
            item.add_marker(pytest.mark.skip(reason=f"the installed transformers lacks {problems()}"))


@pytest.fixture(scope="session")
def model():
    model = SteeredModelForCausalLM.from_model(toy_model())
    for name in METHODS:
        adapter = constant() if name == "constant" else fitted(name)
        for positions in POSITIONS:
            model.load_steering(at(adapter, positions), f"{name}-{positions}", strict=False)
    model.load_steering(fitted("iti"), "iti-generated")
    model.load_steering(at(constant(layer=0), "all"), "early-all")
    model.set_steering(None)
    return model


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Of the adapters' own kind, general ones and others, of 6 to 30 tokens; some begin alike."""
    tokenizer = toy_tokenizer()
    own = [tokenizer(row["prompt"])["input_ids"] for row in toy_preferences(12)]
    generator = torch.Generator().manual_seed(3)
    other = [torch.randint(6, 54, (n,), generator=generator).tolist() for n in (7, 12, 21, 30)]
    stem = torch.randint(6, 54, (17,), generator=generator).tolist()
    general = [tokenizer(row["prompt"])["input_ids"] for row in toy_general_prompts(3)]
    return [*own[:4], *general, *other[1:], [*stem, 9, 10], [*stem, 11, 12, 13]]


@pytest.fixture(scope="session")
def alone(model, prompts):
    """What `generate` answers to a prompt by itself."""

    known: dict[str, list[int]] = {}

    def answer(index: int, steering: str | dict[str, float] | None, scale: float = 1.0) -> list[int]:
        if (key := f"{index} {steering} {scale}") not in known:
            known[key] = generated(index, steering, scale)
        return known[key]

    def generated(index, steering, scale):
        ids = torch.tensor([prompts[index]])
        out = model.generate(ids, steering=steering, steering_scale=scale, max_new_tokens=NEW_TOKENS, do_sample=False)
        return out[0, ids.shape[1] :].tolist()

    return answer
