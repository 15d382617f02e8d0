"""`finesteer generate`: answers, steered and unsteered."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from rich.markup import escape

from finesteer_hf.cli.common import console, load
from finesteer_hf.cli.options import LOAD, takes


@takes(loading=LOAD)
def generate(
    model: Annotated[str, typer.Argument(help="Base model: Hub id, folder, or `playground`.")],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="May be repeated; by default lines of stdin.")
    ] = None,
    scale: Annotated[float, typer.Option(help="Multiplies the adapter's strength.")] = 1.0,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Use the prompt as it is, without the chat template.")
    ] = False,
    compare: Annotated[bool, typer.Option("--compare/--no-compare", help="Show the unsteered answer too.")] = True,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 128,
    *,
    loading: dict[str, Any],
) -> None:
    """Answer prompts, unsteered and steered.

    Answers are greedy. The gate's value is shown if the adapter has one.
    """
    from finesteer_hf.evaluation.measures.generation import greedy_answers
    from finesteer_hf.evaluation.measures.prompts import as_chat
    from finesteer_hf.evaluation.measures.scoring import steered_as

    texts = list(prompt) if prompt else [line.strip() for line in sys.stdin if line.strip()]
    if not texts:
        raise ValueError("Give --prompt TEXT, or lines of text on standard input.")
    if plain and system:
        raise ValueError("--system needs the chat template; leave --plain out.")
    steering = loading["steering"]
    loaded, tokenizer = load(model, **loading)
    prompts = [text if plain else as_chat(text, system) for text in texts]
    conditions: list[tuple[str, str | None]] = [("unsteered", None)] if compare or steering is None else []
    if steering is not None:
        conditions.append(("steered", next(iter(loaded.steering_adapters))))
    results = {}
    for name, adapter in conditions:
        with steered_as(loaded, adapter, scale):
            results[name] = greedy_answers(loaded, tokenizer, prompts, max_new_tokens=max_new_tokens)
    for row, text in enumerate(texts):
        console.print(f"[bold]{escape(text)}[/]", highlight=False)
        for name, answers in results.items():
            gates = [record["gate"][row] for record in answers.steering.values() if "gate" in record]
            remark = f" (gate {float(gates[0]):.3f})" if gates else ""
            console.print(f"  [cyan]{name}{remark}:[/] {escape(answers.texts[row])}", highlight=False)
