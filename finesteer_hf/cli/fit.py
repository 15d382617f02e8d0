"""`finesteer fit`: from a data set to an adapter."""

from __future__ import annotations

import dataclasses
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finesteer_hf.cli import interruption
from finesteer_hf.cli.common import AsJson, check_folder, console, load, print_json, say, table
from finesteer_hf.cli.options import FIT, LOAD, assignments, takes


if TYPE_CHECKING:
    from finesteer_hf.adapters.config import SteeringConfig


class DataFormat(str, Enum):
    """What a data set holds."""

    preference = "preference"
    truthfulqa = "truthfulqa"


class Half(str, Enum):
    """Which questions to fit on."""

    fit = "fit"
    all = "all"


@takes(fitting=FIT, loading=dataclasses.replace(LOAD, without=("steering", "steering_revision")))
def fit(
    model: Annotated[str, typer.Argument(help="Base model: Hub id, folder, or `playground`.")],
    dataset: Annotated[str, typer.Argument(help="Rows of prompt, chosen, rejected: a file or a Hub id.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the adapter.")],
    method: Annotated[str, typer.Option(help="See `finesteer methods`.")] = "FINESTEER",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the method, name=value; may be repeated.")
    ] = None,
    data_format: Annotated[
        DataFormat, typer.Option("--format", help="What the data set holds.")
    ] = DataFormat.preference,
    half: Annotated[
        Half, typer.Option(help="With --format truthfulqa: which half; `eval` uses the other.")
    ] = Half.fit,
    about: Annotated[str | None, typer.Option(help="What the adapter does, in one sentence; opens its card.")] = None,
    example: Annotated[
        str | None, typer.Option(help="A prompt that the card shows with both answers. It is published.")
    ] = None,
    as_json: AsJson = False,
    *,
    fitting: dict[str, Any],
    loading: dict[str, Any],
) -> None:
    """Fit a steering adapter and save it.

    States are captured into OUT.states, which is removed at the end: after ctrl-C or a crash the same command continues.
    """
    from finesteer_hf.evaluation.examples import ask_example
    from finesteer_hf.evaluation.measures.prompts import as_chat
    from finesteer_hf.fitting import fit_steering

    check_folder(out)
    config = make_config(method, settings or [])
    rows: Any = dataset
    if data_format is DataFormat.truthfulqa:
        from finesteer_hf.evaluation.data.truthfulqa import load_truthfulqa, preference_rows, split_halves

        questions = load_truthfulqa(dataset)
        rows = preference_rows(questions if half is Half.all else split_halves(questions, seed=fitting["seed"])[0])
        say(f"{len(rows)} rows from {len(questions)} questions")
    loaded, tokenizer = load(model, **loading)
    with interruption.resumable(out, fitting.pop("store_dir")) as store:
        adapter = fit_steering(loaded, tokenizer, rows, config, store_dir=store, **fitting)
    if about is not None:
        adapter.config.fit["about"] = about
    if example is not None:
        loaded.load_steering(adapter, "fitted")
        asked = as_chat(example) if tokenizer.chat_template else example
        adapter.config.fit["examples"] = [ask_example(loaded, tokenizer, asked, "fitted")]
    adapter.save_pretrained(out)
    size = sum(file.stat().st_size for file in out.iterdir() if file.is_file())
    if as_json:
        kept = {"saved": str(out), "method": adapter.config.steering_type, "strength": adapter.config.strength}
        print_json({**kept, "bytes": size, "fit": adapter.published().config.fit})
        return
    facts = [("strength", f"{adapter.config.strength:g}"), ("files", f"{size:,} bytes")]
    console.print(table(("saved", str(out)), facts))


def make_config(method: str, settings: list[str]) -> SteeringConfig:
    """A method's config from `name=value` arguments; a value that is not JSON is a string.

    Raises:
        ValueError: for an unknown setting, or a value that it does not allow.
    """
    from finesteer_hf.adapters.registry import get_steering_method

    config_cls = get_steering_method(method.upper()).config_cls
    known = config_cls.setting_fields()
    for setting in settings:
        name = setting.partition("=")[0]
        if name not in known and name in {field.name for field in dataclasses.fields(config_cls)}:
            raise ValueError(
                f"--set {setting!r}: {name} is written by the fit and is not a setting. Settings of {config_cls.__name__}: "
                f"{', '.join(sorted(known))}."
            )
    values = assignments("--set", settings, list(known))
    try:
        for name, value in values.items():
            config_cls.check_kind(name, value)
    except TypeError as error:
        raise ValueError(f"--set: {error}") from error
    return config_cls(**values)
