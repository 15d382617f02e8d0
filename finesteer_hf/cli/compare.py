"""`finesteer compare`: methods side by side on a user's own rows."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from finesteer_hf.cli.common import check_folder, console, load, say, table
from finesteer_hf.cli.fit import make_config
from finesteer_hf.cli.options import FIT, LOAD, takes


@takes(
    fitting=dataclasses.replace(FIT, without=("eval_dataset",)),
    loading=dataclasses.replace(LOAD, without=("steering", "steering_revision")),
)
def compare(
    model: Annotated[str, typer.Argument(help="Base model: Hub id, folder, or `playground`.")],
    data: Annotated[str, typer.Option(help="Rows of prompt, chosen, rejected: a file or a Hub id.")],
    methods: Annotated[str, typer.Option(help="Comma-separated methods; see `finesteer methods`.")] = "FINESTEER,CAA",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="METHOD.name=value, a method's setting; may be repeated.")
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for report.html, figures.json and the adapters.")
    ] = Path("out/compare"),
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 48,
    *,
    fitting: dict[str, Any],
    loading: dict[str, Any],
) -> None:
    """Fit methods on your rows and compare them.

    A fifth of the prompts, or of the categories with --split group, is held out. Each method chooses its layer and
    strength on the rest and answers the held-out prompts once. Tests are paired: McNemar's test for shares, sign flips
    for MC2. A star marks what is significant after Holm's correction over all p of a table. If a prompt has several
    answers, MC2 uses all of them, MC1 the first chosen one.
    """
    check_folder(out)
    configs = make_configs(methods, settings or [])
    from finesteer_hf.cli.compare_report import (
        COST_COLUMNS,
        DUEL_COLUMNS,
        EFFECT_COLUMNS,
        build_report,
        cost_rows,
        duel_rows,
        effect_rows,
        rank_note,
    )
    from finesteer_hf.evaluation.comparison import HOLM_NOTE
    from finesteer_hf.evaluation.method_comparison import compare_methods, part
    from finesteer_hf.views.report import write_report

    general = fitting.pop("general_dataset")
    parts = part(data, general, **{name: fitting[name] for name in ("split", "seed", "max_rows")})
    loaded, tokenizer = load(model, **loading)
    result = compare_methods(loaded, tokenizer, parts, configs, max_new_tokens=max_new_tokens, note=say, **fitting)
    if not result.trials:
        raise ValueError("No method could be fitted on these rows; the reasons are above.")
    for trial in result.trials:
        figures = [row.to_dict() for row in trial.against_base(result)]
        trial.adapter.config.fit["evaluation"] = figures
        trial.adapter.save_pretrained(out / "adapters" / trial.name)
    for title, columns, rows in (
        ("effect on held-out rows, p against unsteered", EFFECT_COLUMNS, effect_rows(result)),
        ("one against another", DUEL_COLUMNS, duel_rows(result)),
        ("side effects and cost", COST_COLUMNS, cost_rows(result)),
    ):
        if rows:
            console.print(table(columns, rows, title=title))
    for note in (HOLM_NOTE, rank_note(result)):
        console.print(note, markup=False, highlight=False)
    content = {
        "model": model,
        "rows": {"fit": len(parts.fit), "held_out": len(parts.own), "general_held_out": len(parts.general)},
        "figures": {t.name: [row.to_dict() for row in t.against_base(result)] for t in result.trials},
        "failed": result.failed,
    }
    (out / "figures.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    path = write_report(build_report(result, str(model)), out / "report.html")
    console.print(f"{path} written", markup=False, highlight=False)


def make_configs(methods: str, settings: list[str]) -> dict[str, Any]:
    """The methods' configs by name, each with its settings.

    Raises:
        ValueError: for an unknown method, one named twice, or a setting of a method that is not compared.
    """
    names = [name.strip().upper() for name in methods.split(",") if name.strip()]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"--methods {methods!r}: name each method once, such as FINESTEER,CAA.")
    of_method: dict[str, list[str]] = {name: [] for name in names}
    for setting in settings:
        owner, dot, own = setting.partition(".")
        if not dot or owner.upper() not in of_method or "=" in owner:
            raise ValueError(f"--set {setting!r}: write METHOD.name=value with one of {', '.join(names)}.")
        of_method[owner.upper()].append(own)
    return {name: make_config(name, own) for name, own in of_method.items()}
