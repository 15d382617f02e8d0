"""Adapters for vLLM: what `finesteer-vllm` (`integrations/vllm/`) reads, safetensors and JSON.

The plugin has neither this package nor its methods, so a file holds all that a decision takes: sites, strength, the names
of the score, the gate and the vector, and their tensors. A gated adapter stays gated: it is never averaged into a constant.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from finesteer_hf.adapters.adapter import SteeringAdapter
from finesteer_hf.adapters.staging import Staging
from finesteer_hf.adapters.tensor_files import write_tensors
from finesteer_hf.method_api import SteeringMethod
from finesteer_hf.processors import DecisionFormula, QueryStates
from finesteer_hf.sites import INNER_KINDS, Site


FORMAT = "finesteer-vllm"
FORMAT_VERSION = 1
CONFIG_NAME = "steering_vllm.json"
WEIGHTS_NAME = "steering_vllm.safetensors"
# Tensor of an adapter that adds the same whatever the query: `[write layers, hidden_size]`.
CONSTANT, VECTORS = "constant", "vectors"
_INSTEAD = "Serve it with finesteer_hf, whose `generate(steering=...)` has every method"


def export_vllm(adapter: SteeringAdapter, out: str | Path) -> Path:
    """Write an adapter for a vLLM server with the plugin `finesteer-vllm`.

    Args:
        adapter: fitted, with `positions="generated"`, that adds to residual streams a vector of one unsteered state of the
            query (FineSteer), or always the same (CAA, CONSTANT and the like).
        out: folder of the two files, made if it is not there.

    Returns:
        The folder, with `steering_vllm.json` and `steering_vllm.safetensors`.

    Raises:
        AdapterFileError: if the adapter is not fitted.
        ValueError: if the plugin cannot do what the adapter does; the message says what, and what to do instead.
        OSError: if the disk is full or cannot be written.
    """
    processor = adapter.build()
    _check_processor(processor)
    formula = processor.formula()
    if formula is None and processor.reads:
        raise ValueError(
            f"A {_name(processor)} adapter decides at {', '.join(map(str, processor.reads))} by rules of its own, and the "
            f"vLLM plugin knows a score, a gate and a vector of one state. {_INSTEAD}."
        )
    writes = [_layer_of(site, processor) for site in processor.writes]
    if len(set(writes)) != len(writes):
        raise ValueError(
            f"This {_name(processor)} adapter writes {', '.join(map(str, processor.writes))}, and the input of a block is "
            "the output of the one before it: vLLM has one place for both. Fit it with one site for each block."
        )
    read = None if formula is None else _layer_of(formula.read, processor)
    if read is not None and read > min(writes):
        raise ValueError(
            f"This {_name(processor)} adapter reads the output of block {read} after it has written to that of block "
            f"{min(writes)}; the unsteered state there takes a second pass over the prompt, which vLLM does not make. Fit "
            "it with a read_site at or before its first write_site."
        )
    tensors = {VECTORS: _constant(processor)} if formula is None else dict(formula.tensors)
    directory = Path(out)
    with Staging(directory) as stage:
        with stage.writing(WEIGHTS_NAME) as path:
            digest = write_tensors(path, tensors)
        config = _config(adapter.published(), formula, read, writes, digest)
        stage.write(CONFIG_NAME, (json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())
        # A reader compares the hash in the JSON, so between the two moves there is no adapter and never a mixed one.
        stage.publish(WEIGHTS_NAME)
        stage.publish(CONFIG_NAME)
    return directory


def _config(
    adapter: SteeringAdapter, formula: DecisionFormula | None, read: int | None, writes: list[int], digest: str
) -> dict[str, Any]:
    """The JSON: what the plugin computes, what the server is checked against, and the salt of all of it."""
    config = adapter.config
    forms = {
        "vector": CONSTANT if formula is None else formula.vector,
        "score": None if formula is None else formula.score,
        "gate": None if formula is None else formula.gate,
    }
    content: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "requires": sorted(f"{part}:{name}" for part, name in forms.items() if name is not None),
        "steering_type": config.steering_type,
        **forms,
        "positions": config.positions,
        "strength": float(config.strength),
        "read_layer": read,
        "write_layers": writes,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "base_model_name_or_path": config.base_model_name_or_path,
        "base_model_revision": config.base_model_revision,
        "base_model_type": config.base_model_type,
        "base_model_fingerprint": config.base_model_fingerprint,
        "lora": list(config.lora),
        "chat_template_sha256": config.fit.get("chat_template_sha256"),
        "weights_sha256": digest,
    }
    return {**content, "salt": salt_of(content)}


def salt_of(content: dict[str, Any]) -> str:
    """SHA-256 of everything else that the JSON says, the hash of the weights included: what the adapter does, in a word."""
    text = json.dumps({name: value for name, value in content.items() if name != "salt"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_processor(processor: SteeringMethod[Any]) -> None:
    """Refuse what is no addition to residual streams from the query on."""
    name = _name(processor)
    if processor.maps or processor.acts_on_logits or processor.lookback:
        does = "maps the stream" if processor.maps else "acts on logits"
        raise ValueError(
            f"A {name} adapter {'takes tokens back' if processor.lookback else does}, and the vLLM plugin adds vectors to "
            f"residual streams. {_INSTEAD}."
        )
    if processor.positions != "generated":
        raise ValueError(
            f"This {name} adapter steers positions={processor.positions!r}, and the vLLM plugin steers 'generated': from "
            "the prompt's last token on, as vLLM reads prompts in pieces and shares them. Fit it with "
            f"positions='generated'; or, if the same vectors from there on will do, set `adapter.config.positions` to it. "
            f"{_INSTEAD} and position."
        )
    if processor.query_pool != "last":
        raise ValueError(
            f"This {name} adapter decides by the mean over the prompt, which vLLM reads in pieces and shares. {_INSTEAD}."
        )
    inner = [str(site) for site in (*processor.reads, *processor.writes) if site.kind in INNER_KINDS]
    if inner:
        raise ValueError(
            f"This {name} adapter steers inside blocks ({', '.join(inner[:5])}), and the vLLM plugin steers residual "
            f"streams: heads and neurons are split over the ranks of a tensor-parallel server. {_INSTEAD}."
        )


def _layer_of(site: Site, processor: SteeringMethod[Any]) -> int:
    """The block whose output a residual site is: a block's input is the output of the one before it."""
    layer = site.layer if site.kind == "resid_post" else site.layer - 1
    if layer < 0:
        raise ValueError(
            f"This {_name(processor)} adapter uses {site}, the token embeddings; the vLLM plugin reads and writes the "
            "outputs of blocks. Fit it at a later site."
        )
    return layer


def _constant(processor: SteeringMethod[Any]) -> torch.Tensor:
    """What an adapter that reads nothing adds, `[write sites, hidden_size]` float32, strength left out."""
    decision = processor.decide(QueryStates({}, 1, torch.device("cpu")))
    if decision.gate is not None or not processor.writes:
        raise ValueError(
            f"A {_name(processor)} adapter reads no query, but adds no constant vector either. {_INSTEAD}."
        )
    return torch.cat([decision.vectors[site] for site in processor.writes]).float()


def _name(processor: SteeringMethod[Any]) -> str:
    return processor.config.steering_type
