"""An exported adapter: the two files that finesteer_hf's `export_vllm` writes, checked as they are read."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from finesteer_vllm.decide import GATES, SCORES, VECTORS, decide


FORMAT = "finesteer-vllm"
FORMAT_VERSION = 1
CONFIG_NAME = "steering_vllm.json"
WEIGHTS_NAME = "steering_vllm.safetensors"
CONSTANT = "constant"
UNDERSTOOD = {
    *(f"score:{name}" for name in SCORES),
    *(f"gate:{name}" for name in GATES),
    *(f"vector:{name}" for name in (*VECTORS, CONSTANT)),
}
# A config is a page of settings.
MOST_CONFIG_BYTES = 1 << 20


class AdapterError(ValueError):
    """A folder that holds no exported adapter, a damaged one, or one that this version does not understand."""


@dataclass(frozen=True)
class ServedAdapter:
    """What an adapter does, and what it was fitted on.

    Attributes:
        steering_type: the method, for people.
        read_layer: block whose output is read at the query; None for an adapter that adds the same to every query.
        write_layers: blocks whose outputs are written, in the order of the vectors.
        strength: factor of what is added; a request's scale multiplies it.
        vector, score, gate: names of the formulas, see `decide`; `vector="constant"` reads nothing.
        hidden_size: width of the residual stream.
        num_hidden_layers: blocks of the base, None if the adapter does not say.
        base_model_name_or_path, base_model_type: the base it was fitted on, None if the adapter does not say.
        lora: LoRA adapters that were active when it was fitted.
        chat_template_sha256: hash of the chat template of the prompts that it was fitted on.
        salt: hash of everything that the files say.
        tensors: float32; empty where only the config was read.
    """

    steering_type: str
    read_layer: int | None
    write_layers: tuple[int, ...]
    strength: float
    vector: str
    score: str | None
    gate: str | None
    hidden_size: int
    num_hidden_layers: int | None
    base_model_name_or_path: str | None
    base_model_type: str | None
    lora: tuple[str, ...]
    chat_template_sha256: str | None
    salt: str
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)

    def decide(self, h: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As the function of that name; `tensors` are this adapter's on the device of `h`."""
        return decide(h, tensors, vector=self.vector, score=self.score, gate=self.gate)


def read_config(folder: str | Path) -> ServedAdapter:
    """Read what an adapter says of itself, without its tensors.

    Raises:
        AdapterError: see `read_adapter`.
    """
    return _read_config(Path(folder))[0]


def read_adapter(folder: str | Path) -> ServedAdapter:
    """Read an exported adapter.

    Args:
        folder: with `steering_vllm.json` and `steering_vllm.safetensors`.

    Raises:
        AdapterError: if a file is missing, damaged or not the other's, or asks for something that this version of the
            plugin does not know.
    """
    folder = Path(folder)
    adapter, digest = _read_config(folder)
    path = folder / WEIGHTS_NAME
    try:
        content = path.read_bytes()
        tensors = load(content)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path} cannot be read: {error}. Export the adapter again.") from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise AdapterError(f"{path} is not the file that {CONFIG_NAME} was written with. Export the adapter again.")
    odd = [name for name, tensor in tensors.items() if tensor.dtype != torch.float32 or not tensor.isfinite().all()]
    if odd:
        raise AdapterError(f"{path} holds {odd}, which are no finite float32 numbers. Export the adapter again.")
    made = ServedAdapter(**{**vars(adapter), "tensors": tensors})
    _try_out(made, path)
    return made


def _read_config(folder: Path) -> tuple[ServedAdapter, str]:
    path = folder / CONFIG_NAME
    try:
        if path.stat().st_size > MOST_CONFIG_BYTES:
            raise AdapterError(f"{path} has more than {MOST_CONFIG_BYTES} bytes and is no exported adapter.")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterError(
            f"There is no exported adapter in {folder} ({error}). Make one with finesteer_hf: "
            "`finesteer_hf.interop.export_vllm(adapter, folder)`."
        ) from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"{path} is no readable JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise AdapterError(f"{path} is no adapter for this plugin: its format is not {FORMAT!r}.")
    requires = content.get("requires")
    strange = sorted(set(requires) - UNDERSTOOD) if isinstance(requires, list) else [requires]
    if content.get("format_version") != FORMAT_VERSION or strange or content.get("positions") != "generated":
        raise AdapterError(
            f"{path} has format_version {content.get('format_version')!r}, positions {content.get('positions')!r} and "
            f"requires {strange!r} that this plugin does not know; it reads version {FORMAT_VERSION}, 'generated' and "
            f"{sorted(UNDERSTOOD)}. Upgrade finesteer-vllm."
        )
    rest = {name: value for name, value in content.items() if name != "salt"}
    if hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest() != content.get("salt"):
        raise AdapterError(f"{path} was changed after it was written: its salt is another. Export the adapter again.")
    try:
        return _adapter_of(content), str(content["weights_sha256"])
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read as an adapter: {error!r}") from error


def _adapter_of(content: dict[str, Any]) -> ServedAdapter:
    read, writes = content["read_layer"], tuple(content["write_layers"])
    layers = content["num_hidden_layers"]
    named = [layer for layer in (read, *writes) if layer is not None]
    if not writes or len(set(writes)) != len(writes) or any(not isinstance(n, int) or n < 0 for n in named):
        raise ValueError(f"write_layers {writes} and read_layer {read} must be numbers of blocks, each once")
    if (layers is not None and max(named) >= layers) or (read is not None and read > min(writes)):
        raise ValueError(f"of {layers} blocks it reads {read} and writes {writes}")
    if (content["vector"] == CONSTANT) != (read is None) or (content["score"] is None) != (content["gate"] is None):
        raise ValueError("what it reads and what it computes do not fit each other")
    if not math.isfinite(content["strength"]) or not isinstance(content["hidden_size"], int):
        raise ValueError(
            f"strength {content['strength']!r} and hidden_size {content['hidden_size']!r} must be numbers"
        )
    return ServedAdapter(
        steering_type=str(content["steering_type"]),
        read_layer=read,
        write_layers=writes,
        strength=float(content["strength"]),
        vector=content["vector"],
        score=content["score"],
        gate=content["gate"],
        hidden_size=content["hidden_size"],
        num_hidden_layers=layers,
        base_model_name_or_path=content["base_model_name_or_path"],
        base_model_type=content["base_model_type"],
        lora=tuple(content["lora"]),
        chat_template_sha256=content["chat_template_sha256"],
        salt=content["salt"],
    )


def _try_out(adapter: ServedAdapter, path: Path) -> None:
    """Decide one query, so that a missing tensor or a wrong shape shows here and not in the first request."""
    width = len(adapter.write_layers) * adapter.hidden_size
    try:
        if adapter.vector == CONSTANT:
            fits = tuple(adapter.tensors["vectors"].shape) == (len(adapter.write_layers), adapter.hidden_size)
        else:
            vector, gate = adapter.decide(torch.zeros(2, adapter.hidden_size), adapter.tensors)
            fits = tuple(vector.shape) == (2, width) and (gate is None or tuple(gate.shape) == (2,))
    except (KeyError, RuntimeError, IndexError) as error:
        raise AdapterError(f"{path} does not hold what {CONFIG_NAME} computes with: {error}") from error
    if not fits:
        raise AdapterError(f"{path} holds vectors of another shape than {CONFIG_NAME} says ({width} numbers a query).")
