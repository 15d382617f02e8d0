"""What is installed, on which device, and how the Hub is reached."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from finesteer_hf.cli.adapters.list import size


PACKAGES = ("finesteer-hf", "torch", "transformers", "accelerate", "peft", "safetensors", "huggingface-hub")
# Optional packages, and what they are for.
OPTIONAL = {
    "gguf": "control vectors of llama.cpp and repeng: pip install 'finesteer-hf[gguf]'",
    "bitsandbytes": "--quantization: pip install bitsandbytes",
    "lm-eval": "lm-eval's tasks: pip install 'finesteer-hf[eval]'",
    "fastapi": "finesteer serve: pip install 'finesteer-hf[serve]'",
    "trl": "training on preferences with TRL: pip install 'finesteer-hf[train]'",
}


def environment() -> list[tuple[str, str]]:
    """Facts about the installation, by name."""
    return [
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        *packages(),
        *device(),
        *hub(),
    ]


def packages() -> list[tuple[str, str]]:
    """Versions of the packages that this one needs, and of the optional ones."""
    from finesteer_hf.serving.contract import TESTED, problems

    facts = [(name, installed(name) or "not installed") for name in PACKAGES]
    optional = [(name, installed(name) or f"not installed; for {use}") for name, use in OPTIONAL.items()]
    missing = problems()
    batching = (
        f"transformers lacks {', '.join(missing)}; install transformers {TESTED}" if missing else "can be steered"
    )
    return [*facts, *optional, ("continuous batching", batching)]


def installed(name: str) -> str | None:
    """Version of a package; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def device() -> list[tuple[str, str]]:
    """Where a model goes by default, and its memory."""
    import torch

    cpu = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads used"
    memory = free_memory()
    facts = [("cpu", cpu if memory is None else f"{cpu}, {size(memory)} of memory free")]
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        facts.append((f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, {size(free)} of {size(total)} free"))
    if torch.backends.mps.is_available():
        facts.append(("mps", "available with --device mps"))
    default = "cuda" if torch.cuda.is_available() else "cpu"
    return [*facts, ("default device", f"{default}; --device or --device-map choose another")]


def free_memory() -> int | None:
    """Bytes of memory that can be used; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    values = {line.split(":")[0]: line.split()[1] for line in lines if len(line.split()) > 1}
    return int(values["MemAvailable"]) * 1024 if "MemAvailable" in values else None


def hub() -> list[tuple[str, str]]:
    """How the Hub is reached; nothing is asked of it."""
    from huggingface_hub import constants, get_token

    cache = Path(constants.HF_HUB_CACHE)
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = size(shutil.disk_usage(existing).free)
    shown = f"~/{cache.relative_to(Path.home())}" if cache.is_relative_to(Path.home()) else str(cache)
    return [
        ("hub", "offline (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else constants.ENDPOINT),
        ("signed in", "yes" if get_token() else "no; `hf auth login` lets you push and load gated models"),
        ("hub cache", f"{shown}, {free} free"),
    ]
