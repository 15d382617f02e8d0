"""`finesteer demo`: every step on the model that ships with the package."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from finesteer_hf.cli.common import console, say, table


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the adapters and report.html.")] = Path(
        "out/demo"
    ),
    seed: Annotated[int, typer.Option(help="Seed of the halves and the fits.")] = 0,
    model: Annotated[
        Path, typer.Option("--model", help="Folder of the real model whose adapters are shown first.")
    ] = Path("out/real/model"),
    adapters: Annotated[Path, typer.Option("--adapters", help="Folder of its adapters.")] = Path("hub_cards"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer prompts, one split: about a minute.")] = False,
) -> None:
    """Run every step, from fitting to evaluation, on local models.

    Asks a real model with its shipped adapters, then fits, saves, loads and evaluates two on the playground.
    """
    # Imported here: other commands should not wait for it.
    from finesteer_hf.cli.demo.real import show_real
    from finesteer_hf.cli.demo.report import build_report
    from finesteer_hf.cli.demo.run import QUICK, DemoSettings, run_demo
    from finesteer_hf.cli.demo.standing import STANDING_COLUMNS, standings
    from finesteer_hf.cli.demo.tables import (
        CAA_NOTE,
        GATE_COLUMNS,
        GATE_NOTE,
        INTERVAL_NOTE,
        SPLIT_NAMES,
        TASK_NAMES,
        examples,
        gate_rows,
        gate_tasks,
        gate_title,
        paired_note,
        trial_columns,
        trial_rows,
    )
    from finesteer_hf.views.report import write_report

    settings: dict[str, Any] = dict(QUICK) if quick else {}
    with warnings.catch_warnings():
        # The demo loads fitted adapters on another copy of the model on purpose.
        warnings.filterwarnings("ignore", message="Steering adapter")
        show_real(model, adapters)
        result = run_demo(DemoSettings(out=out, seed=seed, **settings), say)
    console.print(table(STANDING_COLUMNS, [standing.cells() for standing in standings(result)], title="won and lost"))
    for trial in result.trials:
        title = f"{TASK_NAMES[trial.task]}, split {SPLIT_NAMES[trial.task, trial.split]}"
        console.print()
        console.print(table(trial_columns(trial), trial_rows(trial), title=title))
        say(paired_note(trial))
        if trial.split == "question":
            for index in examples(trial, 3):
                console.print(f"[bold]{escape(trial.base.target.prompts[index].text)}[/]", highlight=False)
                for name, arm in (("unsteered", trial.base), ("FineSteer", trial.finesteer), ("CAA", trial.caa)):
                    console.print(f"  [cyan]{name}:[/] {escape(arm.target.answers.texts[index])}", highlight=False)
    for task in gate_tasks(result):
        console.print()
        console.print(table(GATE_COLUMNS, gate_rows(result, task), title=f"gates, {gate_title(result, task)}"))
    for note in (CAA_NOTE, INTERVAL_NOTE, GATE_NOTE):
        say(note)
    path = write_report(build_report(result), out / "report.html")
    console.print(f"[bold]{escape(str(path))}[/] written; {result.seconds:.0f} s in all", highlight=False)
