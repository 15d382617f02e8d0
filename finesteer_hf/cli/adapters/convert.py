"""`finesteer convert`: adapters to other libraries' files, and their vectors to adapters."""

from __future__ import annotations

import dataclasses
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finesteer_hf.cli.adapters.list import size
from finesteer_hf.cli.common import AsJson, console, print_json, say, table
from finesteer_hf.cli.options import VECTORS, takes


if TYPE_CHECKING:
    from finesteer_hf.adapters.adapter import SteeringAdapter


class Target(str, Enum):
    """What is written."""

    adapter = "adapter"
    gguf = "gguf"
    tensors = "tensors"
    vllm = "vllm"


class Source(str, Enum):
    """What another library's file holds; the keys of `load_vectors`, which are not imported for `--help`."""

    gguf = "gguf"
    svec = "svec"
    lm_eval = "lm_eval"
    steering_lite = "steering_lite"
    tensors = "tensors"


class Tokens(str, Enum):
    """Which tokens are steered."""

    all = "all"
    prompt = "prompt"
    generated = "generated"


@takes(reading=VECTORS)
def convert(
    source: Annotated[str, typer.Argument(help="Adapter (folder or Hub id), or a file of vectors.")],
    out: Annotated[Path, typer.Argument(help="File or folder to write.")],
    to: Annotated[
        Target | None,
        typer.Option(
            "--to", help="What to write: an adapter, gguf, tensors or vllm; by default from the name of OUT."
        ),
    ] = None,
    source_format: Annotated[
        Source | None, typer.Option("--from", help="What a file holds; by default from its name.")
    ] = None,
    positions: Annotated[Tokens | None, typer.Option(help="Steered tokens, if not those of the source.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Base model to record, for a file of vectors: a Hub id.")
    ] = None,
    as_json: AsJson = False,
    *,
    reading: dict[str, Any],
) -> None:
    """Convert adapters to files of other libraries, and back.

    In: .gguf (repeng, llama.cpp), .svec (CAST, AISteer360), .pt (lm-eval's steered models), .safetensors
    (steering-lite, plain tensors). Out: the same adapter for vLLM (a folder), or, if it adds constant vectors, .gguf and
    .safetensors. A gated adapter is never averaged into a vector.
    """
    from finesteer_hf.adapters.adapter import SteeringAdapter
    from finesteer_hf.interop import export_vllm, load_vectors, save_gguf, save_tensors

    is_file = Path(source).is_file()
    target = to or target_of(out, is_file)
    if is_file:
        settings: dict[str, Any] = {"base_model_name_or_path": base_model}
        if positions is not None:
            settings["positions"] = positions.value
        adapter = load_vectors(source, source_format and source_format.value, **reading, **settings)
    else:
        needs_file = {
            "--from": source_format,
            "--base-model": base_model,
            **{f"--{name}": value for name, value in reading.items()},
        }
        for option, value in needs_file.items():
            if value is not None:
                raise ValueError(f"{option} is for files of vectors, and {source} is not a file.")
        adapter = SteeringAdapter.from_pretrained(source)
        if positions is not None:
            config = dataclasses.replace(adapter.config, positions=positions.value)
            adapter = dataclasses.replace(adapter, config=config)
    say(f"writing {target.value}: {out}")
    if target is Target.gguf:
        written = save_gguf(adapter, out)
    elif target is Target.tensors:
        written = save_tensors(adapter, out)
    elif target is Target.vllm:
        written = export_vllm(adapter, out)
    else:
        written = adapter.save_pretrained(out)
    report(adapter, target, written, as_json)


def target_of(out: Path, from_file: bool) -> Target:
    """What a name asks for.

    Raises:
        ValueError: if it does not say.
    """
    if out.suffix == ".gguf":
        return Target.gguf
    if out.suffix == ".safetensors":
        return Target.tensors
    if from_file:
        return Target.adapter
    raise ValueError(
        f"Say what {out} is to be: --to vllm, --to adapter, or a name that ends in .gguf or .safetensors."
    )


def report(adapter: SteeringAdapter, target: Target, written: Path, as_json: bool) -> None:
    """Say what was written."""
    files = [written] if written.is_file() else [file for file in written.iterdir() if file.is_file()]
    config = adapter.config
    sites = [str(site) for site in adapter.build().writes]
    total = sum(file.stat().st_size for file in files)
    facts: dict[str, Any] = {
        "path": str(written),
        "format": target.value,
        "method": config.steering_type,
        "sites": sites,
        "positions": config.positions,
        "strength": config.strength,
        "bytes": total,
    }
    if as_json:
        print_json(facts)
        return
    rows = [
        ("format", target.value),
        ("method", config.steering_type),
        ("sites", ", ".join(adapter_sites(sites))),
        ("tokens", config.positions),
        ("strength", f"{config.strength:g}"),
        ("size", size(total)),
    ]
    console.print(table(("written", str(written)), rows))


def adapter_sites(sites: list[str], most: int = 6) -> list[str]:
    """The first sites, and how many more there are."""
    return sites if len(sites) <= most else [*sites[:most], f"and {len(sites) - most} more"]
