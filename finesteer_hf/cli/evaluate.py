"""`finesteer eval`: a benchmark, unsteered and steered."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from finesteer_hf.cli.common import AsJson, console, load, print_json, say, table
from finesteer_hf.cli.options import BENCHMARK, LOAD, takes


@takes(choosing=BENCHMARK, loading=dataclasses.replace(LOAD, without=("steering",)))
def evaluate(
    model: Annotated[str, typer.Argument(help="Base model: Hub id, folder, or `playground`.")],
    steering: Annotated[str, typer.Option("--steering", "-s", help="Adapter: folder or Hub id.")],
    benchmark: Annotated[
        str, typer.Option("--benchmark", "-b", help="truthfulqa, xstest, advbench, jailbreakbench, gsm8k, playground.")
    ],
    data: Annotated[str | None, typer.Option(help="A local file, or another Hub id.")] = None,
    scale: Annotated[float, typer.Option(help="Multiplies the adapter's strength.")] = 1.0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write figures and answers here as JSON.")] = None,
    update_card: Annotated[
        bool, typer.Option(help="Put figures and an example on the card of a local adapter.")
    ] = False,
    as_json: AsJson = False,
    *,
    choosing: dict[str, Any],
    loading: dict[str, Any],
) -> None:
    """Run a benchmark, unsteered and steered.

    Each figure has its n and interval; both conditions answer the same prompts.
    """
    from finesteer_hf.evaluation.behaviour import evaluate as ask
    from finesteer_hf.evaluation.comparison import COLUMNS, HOLM_NOTE, compare, table_cells
    from finesteer_hf.evaluation.data.benchmarks import load_benchmark
    from finesteer_hf.evaluation.examples import examples_of
    from finesteer_hf.fitting.progress import FitProgress

    if update_card and not Path(steering).is_dir():
        raise ValueError("--update-card needs a local adapter folder; save the adapter first.")
    if update_card and scale != 1.0:
        raise ValueError("--update-card needs --scale 1: the card shows the adapter's own strength.")
    sets = load_benchmark(benchmark, data, **choosing)
    loaded, tokenizer = load(model, steering=steering, **loading)
    adapter = next(iter(loaded.steering_adapters))
    rows, answers = [], []
    examples: list[dict[str, Any]] = []
    for found in sets:
        say(f"{found.name}: {len(found.prompts)} prompts, at most {found.max_new_tokens} new tokens")
        with FitProgress(True) as bars, bars.task(f"asking {found.name}", 2 * len(found.prompts)) as advance:
            asked = partial(
                ask, loaded, tokenizer, found.prompts, max_new_tokens=found.max_new_tokens, advance=advance
            )
            base, steered = asked(), asked(adapter=adapter, scale=scale)
        rows += compare(found.name, found.metric, base, steered)
        examples = examples or examples_of(found.name, base, steered)
        answers += [
            {"set": found.name, "id": item.id, "unsteered": before, "steered": after}
            for item, before, after in zip(found.prompts, base.answers.texts, steered.answers.texts, strict=True)
        ]
    figures = [row.to_dict() for row in rows]
    if as_json:
        print_json({"model": model, "steering": steering, "scale": scale, "figures": figures})
    else:
        console.print(table(COLUMNS, table_cells(rows)))
        console.print(HOLM_NOTE, markup=False, highlight=False)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        content = {"model": model, "steering": steering, "scale": scale, "figures": figures, "answers": answers}
        out.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if update_card:
        kept = loaded.steering_adapters[adapter]
        others = [
            row for row in kept.config.fit.get("evaluation", []) if row["dataset"] not in {r.dataset for r in rows}
        ]
        fit = {**kept.config.fit, "evaluation": [*others, *figures]}
        if examples:
            fit["examples"] = examples
        dataclasses.replace(kept, config=dataclasses.replace(kept.config, fit=fit)).save_pretrained(steering)
        say(f"updated the card of {steering}")
