"""Identifies a base model without reading all of its weights."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from finesteer_hf.adapters.adapter import active_lora_names


SAMPLED_VALUES = 32
# Config fields about how a model is run or where it came from, not what it computes.
_NOT_THE_MODEL = {"transformers_version", "use_cache", "torch_dtype", "output_hidden_states", "output_attentions"}


def model_identity(model: Any) -> dict[str, Any]:
    """Name, commit and fingerprint of a model, JSON-ready.

    The fingerprint covers the config, the active LoRA adapters, and the dtype, shape and evenly spaced values of every
    weight in memory (not offloaded ones).

    Args:
        model: the causal LM.
    """
    config = {k: v for k, v in model.config.to_dict().items() if not k.startswith("_") and k not in _NOT_THE_MODEL}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        for tensor in _stored(parameter.detach()):
            if tensor.device.type == "meta" or not tensor.numel():
                continue
            values = tensor.reshape(-1)
            picked = torch.linspace(0, len(values) - 1, SAMPLED_VALUES, dtype=torch.float64).long()
            digest.update(values[picked.to(values.device)].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return {
        "model": getattr(model.config, "_name_or_path", "") or None,
        "revision": getattr(model.config, "_commit_hash", None),
        "lora": active_lora_names(model),
        "fingerprint": digest.hexdigest(),
    }


def _stored(weight: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that hold a weight: itself, or of a quantised one (torchao's, which cannot be reshaped) its parts."""
    # A sharded weight has parts too, but each process sees its own: there the whole is read.
    if not hasattr(weight, "__tensor_flatten__") or hasattr(weight, "full_tensor"):
        return [weight]
    names, _ = weight.__tensor_flatten__()
    return [part for name in names for part in _stored(getattr(weight, name))]
