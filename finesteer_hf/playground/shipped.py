"""The weights that ship with the package."""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from finesteer_hf.adapters.base_models import located


def model_path() -> str:
    """Return the folder of the shipped model and tokenizer, for any `from_pretrained`.

    Raises:
        FileNotFoundError: if the installation lacks the weights.
    """
    return located("playground")


def load(dtype: torch.dtype = torch.float32) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Load the shipped model, in evaluation mode, and its tokenizer."""
    path = model_path()
    model = LlamaForCausalLM.from_pretrained(path, dtype=dtype)
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(path)
