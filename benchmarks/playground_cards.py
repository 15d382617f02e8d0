"""Write the adapters of a demo run, with their cards, to `hub_cards/`, as a repo on the Hub would hold them.

finesteer demo --out out/demo
python benchmarks/playground_cards.py out/demo
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from pathlib import Path

from finesteer_hf.adapter import SteeringAdapter
from finesteer_hf.cards import CARD_NAME


HUB_CARDS = Path(__file__).resolve().parents[1] / "hub_cards"
# No Hub id, so the card links to nothing; its last part is the name that the card shows.
BASE = "./finesteer_hf/playground"
BASE_NAME = "playground"
PREAMBLE = """
The base is the small model that ships inside `finesteer_hf` (`playground.model_path()`), an organism for showing and
testing the machinery: these figures say nothing about large models. Written by `benchmarks/playground_cards.py` from the
output of `make demo`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="the folder that `finesteer demo` wrote")
    parser.add_argument("--to", type=Path, default=HUB_CARDS)
    arguments = parser.parse_args()
    for task in ("truthful", "safety"):
        source = SteeringAdapter.from_pretrained(str(arguments.demo / "adapters" / f"{task}-by-question"))
        # The playground has no Hub id, and a path of the machine that fitted it is nobody's business.
        adapter = dataclasses.replace(
            source, config=dataclasses.replace(source.config, base_model_name_or_path=BASE, base_model_revision=None)
        )
        folder = arguments.to / f"playground-{task}"
        shutil.rmtree(folder, ignore_errors=True)
        adapter.save_pretrained(folder)
        card = folder / CARD_NAME
        text = card.read_text(encoding="utf-8")
        text = text.replace(f'from_pretrained("{BASE_NAME}"', "from_pretrained(playground.model_path()")
        text = text.replace("import SteeredModelForCausalLM\n", "import SteeredModelForCausalLM, playground\n")
        text = text.replace("this-folder-or-its-repo", f"hub_cards/{folder.name}")
        card.write_text(f"{text.rstrip()}\n{PREAMBLE}", encoding="utf-8")
        print(f"wrote {folder.relative_to(arguments.to.parent)}")


if __name__ == "__main__":
    main()
