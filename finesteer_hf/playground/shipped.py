"""The weights that ship with the package."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


def model_path() -> str:
    """Give the folder of the shipped model and tokenizer, for any `from_pretrained`.

    Raises:
        FileNotFoundError: If the installation lacks the weights.
    """
    folder = Path(__file__).parent / "weights"
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"{folder} holds no model.safetensors; reinstall finesteer-hf, "
            f"or train it: python -m finesteer_hf.playground.train --out {folder}"
        )
    return str(folder)


def load(dtype: torch.dtype = torch.float32) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Load the shipped model, in evaluation mode, and its tokenizer."""
    path = model_path()
    model = LlamaForCausalLM.from_pretrained(path, dtype=dtype)
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(path)
