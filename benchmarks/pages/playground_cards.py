"""Write the adapters of a demo run, with their cards, to `hub_cards/`, as a repo on the Hub would hold them.

finesteer demo --out out/demo
python -m benchmarks.pages.playground_cards out/demo

Where only the cards or what they say of their base changed, nothing is fitted:

python -m benchmarks.pages.playground_cards --again
"""

from __future__ import annotations

from benchmarks.pages.shipped_cards import arguments_of, ship
from finesteer_hf import playground
from finesteer_hf.adapters.adapter import SteeringAdapter


BASE = "playground"
PREAMBLE = """
The base is the small model that ships inside `finesteer_hf` (`playground.model_path()`), a toy for showing and
testing the machinery: these figures say nothing about large models. Written by `benchmarks/pages/playground_cards.py` from
the output of `make demo`.
"""
# transformers' own tokenizer knows the model by its folder alone.
CHANGES = {
    f'AutoTokenizer.from_pretrained("{BASE}"': "AutoTokenizer.from_pretrained(playground.model_path()",
    "import SteeredModelForCausalLM\n": "import SteeredModelForCausalLM, playground\n",
}


def main() -> None:
    parser = arguments_of(__doc__, "demo", "the folder that `finesteer demo` wrote")
    arguments = parser.parse_args()
    if (arguments.demo is None) is not arguments.again:
        parser.error("give either the folder of a demo run or --again")
    model, _ = playground.load()
    for task in ("truthful", "safety"):
        folder = arguments.to / f"playground-{task}"
        source = folder if arguments.again else arguments.demo / "adapters" / f"{task}-by-question"
        adapter = SteeringAdapter.from_pretrained(str(source))
        ship(adapter, folder, base=BASE, model=model, preamble=PREAMBLE, changes=CHANGES)


if __name__ == "__main__":
    main()
