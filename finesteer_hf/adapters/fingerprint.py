"""A fingerprint of a base model's weights: tells them from others of the same shape, in a few hundred bytes and
milliseconds.

A fingerprint holds a hash of the sizes in the config and, for a few weights, two hashes of evenly spaced values:
rounded to bfloat16 and to float16. A checkpoint in float32 gives the same bfloat16 hash whether it is loaded in
float32 or bfloat16, and the same float16 hash in float32 or float16; one in bfloat16 gives the same hashes in all
three. So two weights are the same if either hash matches. What cannot be compared (quantised, offloaded or sharded
weights, merged LoRA) is left out; for a 4-bit model the norms and embeddings are still compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


CONFIG_KEY = "config"
WEIGHTS = 8
VALUES = 256
# Sizes that every version of transformers writes, under their standard names. The vocabulary size is left out: added
# tokens do not make another model.
_SIZES = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DIGITS = 12


@dataclass(frozen=True)
class Comparison:
    """How a model's weights compare with a fingerprint.

    Attributes:
        compared: names of what could be compared.
        differing: those that differ.
    """

    compared: tuple[str, ...]
    differing: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether weights were compared and all match."""
        return bool(set(self.compared) - {CONFIG_KEY}) and not self.differing


def fingerprint(model: torch.nn.Module) -> dict[str, str]:
    """Fingerprint a causal LM: `config` and names of weights with their hashes, JSON-ready.

    An unmerged LoRA does not count: the weights below it are read.

    Args:
        model: a causal LM of transformers, with or without PEFT layers.
    """
    found = {name: weight for name, weight in _weights(model).items() if _is_readable(weight)}
    names = list(found)
    picked = dict.fromkeys(names[round(i * (len(names) - 1) / (WEIGHTS - 1))] for i in range(WEIGHTS)) if names else {}
    return {CONFIG_KEY: _config_hash(model), **{name: _hashes(found[name]) for name in picked}}


def compare(model: torch.nn.Module, printed: Mapping[str, str]) -> Comparison:
    """Compare a model with a fingerprint; what cannot be read is skipped.

    Args:
        model: as for `fingerprint`.
        printed: a fingerprint.
    """
    weights = _weights(model)
    compared, differing = [], []
    for name, hashes in printed.items():
        if name == CONFIG_KEY:
            same = hashes == _config_hash(model)
        else:
            weight = weights.get(name)
            if weight is None or not _is_readable(weight) or _shape(weight) != _shape_of(hashes):
                continue
            same = bool(set(hashes.split("-")[1:]) & set(_hashes(weight).split("-")[1:]))
        compared.append(name)
        if not same:
            differing.append(name)
    return Comparison(tuple(compared), tuple(differing))


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights under their names without PEFT, in the model's order; merged ones are left out."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    merged = {
        name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer) and module.merged_adapters
    }
    found: dict[str, torch.Tensor] = {}
    for name, weight in model.named_parameters():
        owner, _, leaf = name.rpartition(".base_layer.")
        if owner in merged or ".lora_" in name:
            continue
        found[f"{owner}.{leaf}" if owner else name] = weight
    return found


def _is_readable(weight: torch.Tensor) -> bool:
    """Whether a weight is a plain tensor in memory; tensor subclasses are quantised or sharded."""
    plain = type(weight.data) is torch.Tensor
    return plain and weight.dtype in _FLOATS and weight.device.type != "meta" and weight.numel() > 0


def _shape(weight: torch.Tensor) -> str:
    return "x".join(map(str, weight.shape))


def _shape_of(hashes: str) -> str:
    return hashes.partition("-")[0]


def _hashes(weight: torch.Tensor) -> str:
    """`<shape>-<bfloat16 hash>-<float16 hash>` of evenly spaced values."""
    values = weight.detach().reshape(-1)
    picked = torch.linspace(0, len(values) - 1, VALUES, dtype=torch.float64).long()
    sample = values[picked.to(values.device)].cpu()
    digests = [
        hashlib.sha256(sample.to(dtype).view(torch.uint8).numpy().tobytes()).hexdigest()[:_DIGITS]
        for dtype in (torch.bfloat16, torch.float16)
    ]
    return "-".join([_shape(weight), *digests])


def _config_hash(model: Any) -> str:
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    sizes = {name: getattr(config, name, None) for name in _SIZES}
    return hashlib.sha256(json.dumps(sizes, sort_keys=True, default=str).encode()).hexdigest()[:_DIGITS]
