"""`finesteer generate`: answers, unsteered and steered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from finesteer_hf.cli.asking.inputs import Asked, read_prompts
from finesteer_hf.cli.common import console, load
from finesteer_hf.cli.options import LOAD, takes


# Prompts that are answered before their answers are written: in a file, and on a screen, where answers are the progress.
PART, PART_ON_SCREEN = 64, 8


@takes(loading=LOAD)
def generate(
    model: Annotated[str, typer.Argument(help="Base model: Hub id, folder, or `playground`.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be repeated.")] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--input",
            "-i",
            help='File with a prompt a line, or .jsonl with {"prompt"} or {"messages"} a line; by default stdin.',
        ),
    ] = None,
    scale: Annotated[float, typer.Option(help="Multiplies the adapter's strength.")] = 1.0,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Use the prompt as it is, without the chat template.")
    ] = False,
    compare: Annotated[bool, typer.Option("--compare/--no-compare", help="Show the unsteered answer too.")] = True,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="Write an object a line, as for JSONL input.")] = False,
    *,
    loading: dict[str, Any],
) -> None:
    """Answer prompts, unsteered and steered.

    Answers are greedy. The gate's value is shown if the adapter has one. One prompt on a terminal is answered as it is
    generated. From JSONL comes JSONL: each object with its own fields and "unsteered", "steered" and "gate".
    """
    asked = read_prompts(prompt, source)
    if plain and system:
        raise ValueError("--system needs the chat template; leave --plain out.")
    for each in asked:
        if plain and not isinstance(each.prompt, str):
            raise ValueError("--plain takes texts, and this input has chat messages; leave --plain out.")
    steering = loading["steering"]
    loaded, tokenizer = load(model, **loading)
    prompts = [with_template(each, system, plain) for each in asked]
    conditions: list[tuple[str, str | None]] = [("unsteered", None)] if compare or steering is None else []
    if steering is not None:
        conditions.append(("steered", next(iter(loaded.steering_adapters))))
    as_json = as_json or asked[0].row is not None
    if len(asked) == 1 and console.is_terminal and not as_json:
        stream_one(loaded, tokenizer, asked[0], prompts[0], conditions, scale, max_new_tokens)
        return
    from finesteer_hf.evaluation.measures.generation import greedy_answers
    from finesteer_hf.evaluation.measures.scoring import steered_as
    from finesteer_hf.fitting.progress import FitProgress

    # A bar below a screen that fills with answers would be torn.
    hidden = console.is_terminal or len(asked) == 1
    size = PART_ON_SCREEN if console.is_terminal else PART
    with FitProgress(not hidden) as bars, bars.task("answering", len(asked) * len(conditions)) as advance:
        for start in range(0, len(asked), size):
            part = slice(start, start + size)
            results = {}
            for name, adapter in conditions:
                with steered_as(loaded, adapter, scale):
                    results[name] = greedy_answers(
                        loaded, tokenizer, prompts[part], max_new_tokens=max_new_tokens, advance=advance
                    )
            for row, each in enumerate(asked[part]):
                texts = {name: answers.texts[row] for name, answers in results.items()}
                gates = [
                    float(record["gate"][row])
                    for answers in results.values()
                    for record in answers.steering.values()
                    if "gate" in record
                ]
                write(each, texts, gates[0] if gates else None, as_json)


def with_template(asked: Asked, system: str | None, plain: bool) -> Any:
    """A prompt as the model gets it: a text as it is, or messages for the chat template."""
    from finesteer_hf.evaluation.measures.prompts import as_chat

    if isinstance(asked.prompt, str):
        return asked.prompt if plain else as_chat(asked.prompt, system)
    first = [{"role": "system", "content": system}] if system and asked.prompt[0]["role"] != "system" else []
    return [*first, *asked.prompt]


def stream_one(
    model: Any,
    tokenizer: Any,
    asked: Asked,
    prompt: Any,
    conditions: list[tuple[str, str | None]],
    scale: float,
    max_new_tokens: int,
) -> None:
    """Answer one prompt on the screen as the answers are generated."""
    from finesteer_hf.cli.asking.streaming import Wrapping, stream_answer
    from finesteer_hf.evaluation.measures.prompts import encode_prompt

    ids = encode_prompt(tokenizer, prompt)
    console.print(f"[bold]{escape(asked.shown)}[/]", highlight=False)
    for name, adapter in conditions:
        console.print(f"  [cyan]{name}:[/] ", end="", highlight=False)
        show = Wrapping(console, indent=4, column=len(name) + 4)
        answer = stream_answer(
            model,
            tokenizer,
            ids,
            steering=adapter,
            scale=scale,
            show=show,
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        if answer.gate is not None:
            show(f" (gate {answer.gate:.3f})")
        show.end()


def write(asked: Asked, texts: dict[str, str], gate: float | None, as_json: bool) -> None:
    """Write the answers to one prompt to stdout."""
    if as_json:
        row = asked.row if asked.row is not None else {"prompt": asked.prompt}
        found = {**texts, **({} if gate is None else {"gate": round(gate, 4)})}
        typer.echo(json.dumps({**row, **found}, ensure_ascii=False))
        return
    console.print(f"[bold]{escape(asked.shown)}[/]", highlight=False)
    for name, text in texts.items():
        remark = f" (gate {gate:.3f})" if gate is not None and name == "steered" else ""
        console.print(f"  [cyan]{name}{remark}:[/] {escape(text)}", highlight=False)
