"""What the commands share: consoles, JSON, tables, loading."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from finesteer_hf.cli.options import assignments


# Results go to stdout, so that they can be piped; progress goes to stderr.
console = Console()
errors = Console(stderr=True)
# `--json` of a command whose result is one object or list.
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
# The model's keyword arguments that its tokenizer is loaded with too.
SHARED = ("revision", "subfolder", "trust_remote_code", "token", "cache_dir", "local_files_only")


def load(
    model: str,
    tp: bool = False,
    *,
    steering: str | dict[str, str] | None = None,
    steering_revision: str | None = None,
    revision: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: str | None = None,
    device_map: str | None = None,
    quantization: Literal["4bit", "8bit"] | None = None,
    model_arg: list[str] | None = None,
) -> tuple[Any, Any]:
    """Load a steerable model onto its device, and its tokenizer.

    Args:
        model: Hub id, folder or `playground`.
        tp: whether its layers are spread over the processes that torchrun has started.
        steering: adapter: a folder or a Hub id (org/name, org/name@revision).
        steering_revision: branch, tag or commit of the adapter's repo.
        revision: branch, tag or commit of the base model's repo.
        dtype: dtype of the loaded weights; `auto` is the saved one.
        device: where the model goes, such as cpu or cuda; by default a GPU if there is one.
        device_map: how the model is spread over devices: auto, balanced, sequential, a device, or a JSON object.
        quantization: loads the weights in 4 or 8 bits, with bitsandbytes.
        model_arg: one more argument of transformers' from_pretrained, name=value; may be repeated.

    Returns:
        The model and the tokenizer.

    Raises:
        ValueError: for arguments that contradict each other, or that need a package which is not installed.
    """
    if device and (device_map or quantization or tp):
        raise ValueError(
            "--device puts a whole model on one device; leave it out with --device-map or --quantization, and with --tp."
        )
    import torch
    from transformers import AutoTokenizer, BitsAndBytesConfig

    from finesteer_hf.adapters.base_models import located
    from finesteer_hf.model.auto import SteeredModelForCausalLM

    location = located(model)
    arguments = {"dtype": dtype, **assignments("--model-arg", model_arg or [])}
    if revision is not None:
        arguments["revision"] = revision
    if device_map is not None:
        arguments["device_map"] = json.loads(device_map) if device_map.startswith("{") else device_map
    if quantization is not None:
        bits = {f"load_in_{quantization}": True}
        arguments["quantization_config"] = BitsAndBytesConfig(**bits)
    if tp:
        from transformers.distributed import DistributedConfig

        arguments["distributed_config"] = DistributedConfig(tp_plan="auto")
    shared = {name: arguments[name] for name in SHARED if name in arguments}
    tokenizer = AutoTokenizer.from_pretrained(location, **shared)
    # A missing package (transformers says how to install it), or an unknown argument.
    mendable = (ImportError, TypeError) if model_arg else ImportError
    try:
        loaded = SteeredModelForCausalLM.from_pretrained(
            location, steering=steering, steering_revision=steering_revision, **arguments
        )
    except mendable as error:
        raise ValueError(str(error)) from error
    # Of a model that is spread each process has its share where it belongs.
    if device_map is None and quantization is None and not tp:
        loaded = loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return loaded.eval(), tokenizer


def check_folder(path: Path) -> None:
    """Refuse a file where a folder is needed, before hours of computing.

    Raises:
        FileExistsError: if the path is a file.
    """
    if path.is_file():
        raise FileExistsError(f"--out {path} is a file; give a folder.")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> Table:
    """A rich table of plain text, without markup."""
    made = Table(title=title, title_justify="left", header_style="bold", pad_edge=False)
    for index, name in enumerate(columns):
        made.add_column(name, overflow="fold", style="bold" if index == 0 else None)
    for row in rows:
        made.add_row(*(escape(cell) for cell in row))
    return made


def print_json(value: Any) -> None:
    """Print a result as JSON, indented, for programs and for people."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def say(message: str) -> None:
    """Print a line of progress."""
    errors.print(f"[dim]{escape(message)}[/]", highlight=False)
