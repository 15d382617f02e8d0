"""Write the real model's two adapters, with their cards, to `hub_cards/`, as a repo on the Hub would hold them.

make real
python -m benchmarks.pages.real_cards out/real

A task that the study lacks keeps the adapter that it has. Where only the cards or what they say of their base changed,
nothing is fitted; `make real-model` is enough then:

python -m benchmarks.pages.real_cards --again
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.pages.shipped_cards import HUB_CARDS, arguments_of, ship
from benchmarks.real.real_rows import REFERENCE, UNSTEERED, slug_of
from benchmarks.real.real_setup import BASE, WEIGHTS, load_model
from finesteer_hf.adapters.adapter import SteeringAdapter
from finesteer_hf.evaluation.comparison import ComparisonRow
from finesteer_hf.evaluation.measures.statistics import mcnemar, mean_with_interval, proportion


MODEL = HUB_CARDS.parent / "out" / "real" / "model"
FOLDERS = {"truthful": "smollm2-truthful", "refusal": "smollm2-safety"}
SETS = {
    "advbench": "AdvBench, requests of other clusters",
    "jailbreakbench": "JailbreakBench",
    "xstest_unsafe": "XSTest, unsafe, other families",
    "xstest_safe": "XSTest, safe, other families",
}
PREAMBLE = """
The base's {weights}; fitted and measured in bfloat16. Written by `benchmarks/pages/real_cards.py` from the output of
`make real`; every row of that study, and thirty answers side by side: `benchmarks/results/real_model.md`.
"""


def shares(dataset: str, metric: str, base: Sequence[bool], steered: Sequence[bool]) -> ComparisonRow:
    """A share of the same prompts under both conditions."""
    before, after = (proportion(sum(map(bool, hits)), len(hits)) for hits in (base, steered))
    return ComparisonRow(dataset, metric, before, after, mcnemar(steered, base).p_value)


def figures(task: str, base: dict[str, Any], steered: dict[str, Any]) -> list[ComparisonRow]:
    """What the card shows of a task."""
    rows = []
    if task == "truthful":
        name = "TruthfulQA, questions held out"
        rows.append(shares(name, "MC1", base["choices"]["mc1"], steered["choices"]["mc1"]))
        for metric, part, key in (
            ("MC2", "choices", "mc2"),
            ("own words under the base, nats a token", "answers", "own_words"),
        ):
            before, after = (mean_with_interval(row[part][key]) for row in (base, steered))
            rows.append(ComparisonRow(name, metric, before, after))
    else:
        for key, name in SETS.items():
            refused = [[kind == "refuse" for kind in row["refusals"][key]["classes"]] for row in (base, steered)]
            rows.append(shares(name, "refusals", *refused))
    identical = steered["general"]["identical"]
    rows.append(
        ComparisonRow(
            "general prompts and GSM8K, held out",
            "identical output",
            None,
            proportion(sum(identical), len(identical)),
        )
    )
    return rows


def main() -> None:
    parser = arguments_of(__doc__, "study", "the folder that `make real` wrote")
    parser.add_argument("--row", default=slug_of(REFERENCE), help="whose adapters are shipped")
    parser.add_argument("--model", type=Path, default=MODEL, help="the folder that `make real-model` wrote")
    arguments = parser.parse_args()
    if (arguments.study is None) is not arguments.again:
        parser.error("give either the folder of a study or --again")
    model, _ = load_model(arguments.model)
    tasks = [task for task in FOLDERS if arguments.again or (arguments.study / task / arguments.row).is_dir()]
    if not tasks:
        parser.error(f"{arguments.study} has no adapter of {arguments.row}")
    for task in tasks:
        target = arguments.to / FOLDERS[task]
        adapter = SteeringAdapter.from_pretrained(
            str(target if arguments.again else arguments.study / task / arguments.row)
        )
        if not arguments.again:
            folder = arguments.study / task
            base, steered = (json.loads((folder / f"{slug}.json").read_text()) for slug in (UNSTEERED, arguments.row))
            fit = {"evaluation": [row.to_dict() for row in figures(task, base, steered)], "base_weights": WEIGHTS}
            adapter.config = dataclasses.replace(adapter.config, fit=adapter.config.fit | fit)
        ship(adapter, target, base=BASE, model=model, preamble=PREAMBLE.format(weights=WEIGHTS), changes={})


if __name__ == "__main__":
    main()
