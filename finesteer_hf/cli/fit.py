"""`finesteer fit`: from a data set to an adapter."""

from __future__ import annotations

import dataclasses
import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from finesteer_hf.cli.common import console, load_model, load_tokenizer, say, table
from finesteer_hf.config import SteeringConfig, get_steering_method


class DataFormat(str, Enum):
    """What a data set holds."""

    preference = "preference"
    truthfulqa = "truthfulqa"


class Half(str, Enum):
    """Which questions to fit on."""

    fit = "fit"
    all = "all"


def fit(
    model: Annotated[str, typer.Argument(help="Base model: Hub id, folder, or `playground`.")],
    dataset: Annotated[str, typer.Argument(help="Rows of prompt, chosen, rejected: a file or a Hub id.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the adapter.")],
    method: Annotated[str, typer.Option(help="See `finesteer methods`.")] = "FINESTEER",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the method, name=value; may be repeated.")
    ] = None,
    general: Annotated[str, typer.Option(help="Prompts not to steer: default, none, a file or a Hub id.")] = "default",
    eval_dataset: Annotated[str | None, typer.Option(help="Rows to choose layer and strength on.")] = None,
    data_format: Annotated[
        DataFormat, typer.Option("--format", help="What the data set holds.")
    ] = DataFormat.preference,
    half: Annotated[Half, typer.Option(help="With --format truthfulqa: the half that `eval` leaves out.")] = Half.fit,
    store: Annotated[Path | None, typer.Option(help="Folder that keeps activations, to resume and to reuse.")] = None,
    max_rows: Annotated[
        int, typer.Option(help="Most rows used of each data set, whole prompts drawn at random; 0 uses all.")
    ] = 20_000,
    seed: Annotated[int, typer.Option()] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
) -> None:
    """Fit a steering adapter and save it."""
    from finesteer_hf.fitting import fit_steering

    config = make_config(method, settings or [])
    rows: Any = dataset
    if data_format is DataFormat.truthfulqa:
        from finesteer_hf.evaluation.truthfulqa import load_truthfulqa, preference_rows, split_halves

        questions = load_truthfulqa(dataset)
        rows = preference_rows(questions if half is Half.all else split_halves(questions, seed=seed)[0])
        say(f"{len(rows)} rows from {len(questions)} questions")
    tokenizer = load_tokenizer(model)
    adapter = fit_steering(
        load_model(model, dtype=dtype, device=device),
        tokenizer,
        rows,
        config,
        eval_dataset=eval_dataset,
        general_dataset=None if general == "none" else general,
        seed=seed,
        store_dir=store,
        max_rows=max_rows or None,
    )
    adapter.save_pretrained(out)
    size = sum(file.stat().st_size for file in out.iterdir() if file.is_file())
    facts = [("strength", f"{adapter.config.strength:g}"), ("files", f"{size:,} bytes")]
    console.print(table(("saved", str(out)), facts))


def make_config(method: str, settings: list[str]) -> SteeringConfig:
    """A method's config from `name=value` texts; values are JSON, or else text.

    Raises:
        ValueError: for a setting that the method does not have; it lists those that it has.
    """
    config_cls = get_steering_method(method.upper()).config_cls
    known = sorted(field.name for field in dataclasses.fields(config_cls))
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or name not in known:
            raise ValueError(f"--set {setting!r}: write name=value with a setting of {config_cls.__name__}: {known}.")
        try:
            values[name] = json.loads(text)
        except json.JSONDecodeError:
            values[name] = text
    return config_cls(**values)
