"""Put a sentence and examples into the adapters of `hub_cards/`, which their cards begin with.

An example is the first prompt of its kind, a win and a loss: of TruthfulQA's held-out questions and of the requests of the
demo for the real model, of the held-out half for the playground. Nothing is fitted; `playground_cards.py` and
`real_cards.py` write the cards themselves.

make real-model
python -m benchmarks.pages.card_examples
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.real.real_data import QUICK, truthful_halves
from finesteer_hf import SteeredModelForCausalLM, playground
from finesteer_hf.adapters.config import CONFIG_NAME
from finesteer_hf.cli.demo.real import ASKED
from finesteer_hf.cli.demo.run import ABOUT
from finesteer_hf.evaluation.behaviour import JudgedPrompt, evaluate
from finesteer_hf.evaluation.data.playground_eval import TASKS, target_prompts
from finesteer_hf.evaluation.data.safety import classify_response
from finesteer_hf.evaluation.data.truthfulqa import nearer_to_truth
from finesteer_hf.evaluation.examples import examples_of
from finesteer_hf.evaluation.measures.prompts import as_chat


ROOT = Path(__file__).resolve().parents[2]
DATA = Path("../shared/data")
REAL_ABOUT = {
    "smollm2-truthful": "More truthful answers to questions that invite a misconception",
    "smollm2-safety": "Refusals of harmful requests that are put as commands",
}


def write(folder: Path, about: str, model: Path | str, prompts: list[JudgedPrompt], source: str) -> None:
    """Ask the prompts with and without an adapter, and keep what its card is to begin with."""
    steered = SteeredModelForCausalLM.from_pretrained(str(model), steering=str(folder))
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    ask: dict[str, Any] = {"choices": False, "max_new_tokens": 40}
    base = evaluate(steered, tokenizer, prompts, **ask)
    after = evaluate(steered, tokenizer, prompts, adapter="default", **ask)
    path = folder / CONFIG_NAME
    config = json.loads(path.read_text(encoding="utf-8"))
    config["fit"] |= {"about": about, "examples": examples_of(source, base, after)}
    path.write_text(json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
    print(folder.name, json.dumps(config["fit"]["examples"], indent=2, ensure_ascii=False))


def real_prompts(data: Path) -> dict[str, tuple[list[JudgedPrompt], str]]:
    """For each adapter of the real model its prompts and what they are."""
    questions = truthful_halves(data, dataclasses.replace(QUICK, questions=60))[1]
    truthful = [JudgedPrompt(q.question, as_chat(q.question), partial(nearer_to_truth, q), "") for q in questions]
    requests = [JudgedPrompt(text, as_chat(text), refuses, "") for text in dict(ASKED)["smollm2-safety"]]
    return {
        "smollm2-truthful": (truthful, "TruthfulQA, held out, by ROUGE-1 against its references"),
        "smollm2-safety": (requests, "the demo"),
    }


def refuses(text: str) -> bool:
    """Whether an answer is a refusal."""
    return classify_response(text) == "refuse"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=ROOT / "hub_cards")
    parser.add_argument(
        "--model", type=Path, default=ROOT / "out" / "real" / "model", help="what make real-model wrote"
    )
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the data sets")
    arguments = parser.parse_args()
    for task in TASKS:
        folder = arguments.to / f"playground-{task}"
        prompts = target_prompts(task, limit=300)
        write(folder, ABOUT[task], playground.model_path(), prompts, f"the playground's {task} task, held out")
    for name, (prompts, source) in real_prompts(arguments.data).items():
        write(arguments.to / name, REAL_ABOUT[name], arguments.model, prompts, source)


if __name__ == "__main__":
    main()
