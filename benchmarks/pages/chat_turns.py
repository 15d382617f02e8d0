"""What the gate says at a second turn: the playground's adapters, and one that was fitted on chats of two turns as well.

    python -m benchmarks.pages.chat_turns

Writes `benchmarks/results/chat_turns.md`. A first turn is a held-out question or request of the adapter's own task, or a
general prompt; the model's own (steered) answer follows it; then comes a second query of either kind.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finesteer_hf import FineSteerConfig, SteeredModelForCausalLM, SteeringAdapter, fit_steering, playground
from finesteer_hf.evaluation.behaviour import JudgedPrompt
from finesteer_hf.evaluation.data.playground_eval import TASKS, Task, draw, fit_rows, general_prompts, target_prompts
from finesteer_hf.evaluation.measures.generation import greedy_answers
from finesteer_hf.evaluation.measures.statistics import proportion


ROOT = Path(__file__).resolve().parents[2]
NEW_TOKENS = 24
Chat = list[dict[str, Any]]


def follow(firsts: Sequence[Chat], answers: Sequence[str], seconds: Sequence[Chat]) -> list[Chat]:
    """Chats of two turns."""
    return [
        [*first, {"role": "assistant", "content": answer}, *second]
        for first, answer, second in zip(firsts, answers, seconds, strict=True)
    ]


def gates(answers: Any) -> np.ndarray:
    return answers.steering["default"]["gate"].numpy()


def rows_of(model: Any, tokenizer: Any, task: Task, chats: int) -> list[list[str]]:
    """A row for each kind of chat: opened gates, exact zeros and wanted answers at the last turn."""
    kinds: dict[str, list[JudgedPrompt]] = {
        "its task": target_prompts(task, limit=chats),
        "general": general_prompts(limit=chats),
    }
    table = []
    for first_kind, firsts in kinds.items():
        prompts: list[Chat] = [item.prompt for item in firsts]  # type: ignore[misc]
        first = greedy_answers(model, tokenizer, prompts, max_new_tokens=NEW_TOKENS)
        table.append(row(f"one turn: {first_kind}", firsts, first))
        for second_kind, seconds in kinds.items():
            shifted = [seconds[(index + 7) % len(seconds)] for index in range(len(prompts))]
            both = follow(prompts, first.texts, [item.prompt for item in shifted])  # type: ignore[misc]
            second = greedy_answers(model, tokenizer, both, max_new_tokens=NEW_TOKENS)
            table.append(row(f"{first_kind}, then {second_kind}", shifted, second))
    return table


def row(name: str, asked: Sequence[JudgedPrompt], answers: Any) -> list[str]:
    opened = proportion(gates(answers) >= 0.5)
    wanted = proportion([item.judge(text) is True for item, text in zip(asked, answers.texts, strict=True)])
    shares = [f"{100 * s.value:.0f}% [{100 * s.low:.0f}, {100 * s.high:.0f}]" for s in (opened, wanted)]
    return [name, str(len(asked)), shares[0], f"{100 * np.mean(gates(answers) == 0):.0f}%", shares[1]]


def fitted_on_turns(task: Task, seed: int = 0) -> SteeringAdapter:
    """An adapter of which every other row, and every other general prompt, follows a first turn."""
    model, tokenizer = playground.load()
    rows = fit_rows(task, limit=300, seed=seed)
    general = [item.prompt for item in general_prompts(half="fit", limit=200, seed=seed)]
    openings: list[Chat] = [*draw(general, 40, seed), *(row["prompt"] for row in rows[:40])]  # type: ignore[misc]
    replies = greedy_answers(model, tokenizer, openings, max_new_tokens=NEW_TOKENS).texts
    draws = np.random.default_rng(seed)

    def every_other(prompts: Sequence[Any]) -> list[Chat]:
        places = draws.integers(len(openings), size=len(prompts))
        later = follow([openings[i] for i in places], [replies[i] for i in places], list(prompts))
        return [later[index] if index % 2 else prompt for index, prompt in enumerate(prompts)]

    turned = every_other([row["prompt"] for row in rows])
    return fit_steering(
        model,
        tokenizer,
        [{**row, "prompt": prompt} for row, prompt in zip(rows, turned, strict=True)],
        FineSteerConfig(),
        general_dataset=[{"prompt": prompt} for prompt in every_other(general)],
        progress=False,
        seed=seed,
    )


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chats", type=int, default=200, help="chats of each kind")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "chat_turns.md")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="Steering adapter .*")
    lines = [
        "# Gates at a second turn",
        "",
        "Written by `python -m benchmarks.pages.chat_turns`, on the playground, which was trained on single turns. A gate "
        f"has opened at 0.5 or more; answers are greedy, at most {NEW_TOKENS} tokens; Wilson 95% intervals.",
    ]
    for task in TASKS:
        shipped = SteeringAdapter.from_pretrained(ROOT / "hub_cards" / f"playground-{task}")
        for name, adapter in (
            ("as shipped, fitted on single turns", shipped),
            ("fitted on one turn and two", fitted_on_turns(task)),
        ):
            model, tokenizer = playground.load()
            SteeredModelForCausalLM.from_model(model, steering=adapter)
            lines += ["", f"## {task}, {name}", ""]
            lines += ["| chat | n | gate opened | gate exactly 0 | wanted answer |", "|---|---|---|---|---|"]
            lines += ["| " + " | ".join(cells) + " |" for cells in rows_of(model, tokenizer, task, arguments.chats)]
            print("\n".join(lines[-9:]), flush=True)
    arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
