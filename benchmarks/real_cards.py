"""Write the real model's two adapters, with their cards, to `hub_cards/`, as a repo on the Hub would hold them.

make real
python benchmarks/real_cards.py out/real
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from real_rows import REFERENCE, UNSTEERED, slug_of
from real_setup import BASE, WEIGHTS

from finesteer_hf.adapter import SteeringAdapter
from finesteer_hf.cards import CARD_NAME
from finesteer_hf.evaluation.comparison import ComparisonRow
from finesteer_hf.evaluation.statistics import mcnemar, mean_with_interval, proportion


HUB_CARDS = Path(__file__).resolve().parents[1] / "hub_cards"
FOLDERS = {"truthful": "smollm2-truthful", "refusal": "smollm2-safety"}
SETS = {
    "advbench": "AdvBench, requests of other clusters",
    "jailbreakbench": "JailbreakBench",
    "xstest_unsafe": "XSTest, unsafe, other families",
    "xstest_safe": "XSTest, safe, other families",
}
PREAMBLE = """
The base's {weights}; fitted and measured in bfloat16. Written by `benchmarks/real_cards.py` from the output of
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="the folder that `make real` wrote")
    parser.add_argument("--row", default=slug_of(REFERENCE), help="whose adapters are shipped")
    parser.add_argument("--to", type=Path, default=HUB_CARDS)
    arguments = parser.parse_args()
    for task, name in FOLDERS.items():
        folder = arguments.study / task
        base, steered = (json.loads((folder / f"{slug}.json").read_text()) for slug in (UNSTEERED, arguments.row))
        source = SteeringAdapter.from_pretrained(str(folder / arguments.row))
        evaluation = [row.to_dict() for row in figures(task, base, steered)]
        config = dataclasses.replace(
            source.config,
            base_model_name_or_path=BASE,
            base_model_revision=None,
            fit=source.config.fit | {"evaluation": evaluation, "base_weights": WEIGHTS},
        )
        target = arguments.to / name
        shutil.rmtree(target, ignore_errors=True)
        dataclasses.replace(source, config=config).save_pretrained(target)
        card = target / CARD_NAME
        text = card.read_text(encoding="utf-8").replace("this-folder-or-its-repo", f"hub_cards/{name}")
        card.write_text(f"{text.rstrip()}\n{PREAMBLE.format(weights=WEIGHTS)}", encoding="utf-8")
        print(f"wrote {target.relative_to(arguments.to.parent)}")


if __name__ == "__main__":
    main()
