"""Small adapters and a tiny model for tests of files, the Hub and other libraries' formats."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from finesteer_hf import Site, SteeringAdapter
from finesteer_hf.adapters.algebra import constant_adapter


WIDTH = 16
LAYERS = 2


def small_adapter(seed: int = 0, **settings: Any) -> SteeringAdapter:
    """A constant adapter for `tiny_llama`, other vectors for each seed."""
    torch.manual_seed(seed)
    vectors = {Site("resid_post", layer): torch.randn(WIDTH) for layer in range(LAYERS)}
    defaults = {"num_hidden_layers": LAYERS, "base_model_name_or_path": "org/tiny", "base_model_type": "llama"}
    return constant_adapter(vectors, **{**defaults, **settings})


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    """Two layers of width 16 over 64 tokens, with weights large enough that steering changes the answers."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        initializer_range=0.6,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


PROMPT = torch.tensor([[5, 9, 11, 3]])


def tokens_of(model: Any, **kwargs: Any) -> list[int]:
    """Eight greedy tokens after `PROMPT`."""
    mask = torch.ones_like(PROMPT)
    out = model.generate(PROMPT, attention_mask=mask, max_new_tokens=8, do_sample=False, **kwargs)
    return out[0, PROMPT.shape[1] :].tolist()
