"""What steering costs: steered against unsteered `generate`, on the same model, in one run.

Every condition is timed in pairs with the unsteered model, many times over, and the ratio of each pair is taken. Shown are
the medians of the ratios and their quartiles; 1.00 is free. Each condition steers a copy of the model that shares its
weights, so that no library's wrappers slow another.

    python -m benchmarks.speed.generate_overhead                                   # CPU, Llama shape of 57 M parameters
    python -m benchmarks.speed.generate_overhead --device cuda --shape llama-8b    # random bf16 weights
    python -m benchmarks.speed.generate_overhead --batch 8 --only FineSteer        # a part; the other figures are kept
    python -m benchmarks.speed.generate_overhead --estimate                        # how long it would take

The page is written from a JSON file beside it, in which each run replaces the rows that it measured.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import json
import platform
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.speed.paired_timing import PHASES, Condition, Generate, pairs_within, time_pairs, timed_call
from benchmarks.speed.peers import PEERS, available_peers
from finesteer_hf import FineSteerConfig, SteeredModelForCausalLM, SteeringAdapter


SHAPES = {
    "llama-57m": {
        "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 16, "num_attention_heads": 8,
        "num_key_value_heads": 8, "vocab_size": 8192,
    },
    "llama-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip
OUT = Path(__file__).parents[1] / "results" / "generate_overhead.md"
HEAD = """# What steering costs

Time of a steered `generate` over that of an unsteered one: median of the pairs, and their quartiles. 1.00 is free.
Written by `benchmarks/speed/generate_overhead.py`. The peers add the same vector at the same layers, each by its own
documented way; a `no` in the last column is one whose text is not that of a plain hook. The FineSteer adapters have random
weights and the usual sizes: a calibrated gate on the state, four experts, a residual map of rank 32.
"""


def random_finesteer(model: Any, seed: int) -> SteeringAdapter:
    """An adapter of the default kind and its usual sizes, at the middle layer, whose gate is open."""
    layers, width = model.config.num_hidden_layers, model.config.hidden_size
    site = f"resid_post[{layers // 2}]"
    config = FineSteerConfig(
        layer=layers // 2, read_site=site, write_site=site, hidden_size=width, num_hidden_layers=layers,
        base_model_type="llama", strength=1.0, positions="all", gate_score="state", experts="mixture", subspace_rank=8,
        num_experts=4, residual_rank=32,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    shapes = SteeringAdapter(config, {}).tensor_shapes()
    tensors = {
        name: torch.randn([size if isinstance(size, int) else 100 for size in shape], generator=generator) / width**0.5
        for name, shape in shapes.items()
    }
    tensors["gate.calibration"] = tensors["gate.calibration"].sort().values
    tensors["gate.level"], tensors["gate.gamma"] = torch.tensor(0.05), torch.tensor(2.0)
    tensors["gate.threshold"] = tensors["gate.floor"] = torch.tensor(-1e3)
    return SteeringAdapter(config, tensors)


@contextlib.contextmanager
def finesteer(model: Any, adapters: int, **steering: Any) -> Iterator[Generate]:
    """Generate with FineSteer adapters `a`, `b`, `c`: all that are loaded, or as `steering` says."""
    SteeredModelForCausalLM.from_model(model)
    names = list("abc")[:adapters]
    for seed, name in enumerate(names):
        model.load_steering(random_finesteer(model, seed), name)
    model.set_steering(names)

    def generate(**kwargs: Any) -> torch.Tensor:
        return model.generate(**kwargs, **steering)

    try:
        yield generate
    finally:
        model.unload_steering()


def sharing_copy(model: Any) -> Any:
    """A model with modules of its own and the weights of another."""
    memo = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, memo)


def conditions(model: Any, batch: int, with_peers: bool) -> dict[str, Condition]:
    """What is measured at a batch size, by name."""
    middle, layers = model.config.num_hidden_layers // 2, model.config.num_hidden_layers
    vector = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(0)) * 0.1
    vector = vector.to(model.device, model.dtype)
    found: dict[str, Callable[[Any], Any]] = {}
    for peer_name, peer in available_peers().items():
        if with_peers or peer_name in ("plain hook", "finesteer_hf"):
            for title, where in (("one layer", [middle]), ("all layers", list(range(layers)))):
                found[f"{peer_name}, {title}"] = lambda m, peer=peer, where=where: peer(m, where, vector)
    found["finesteer_hf, a FineSteer adapter"] = lambda m: finesteer(m, 1)
    found["finesteer_hf, three FineSteer adapters on every row"] = lambda m: finesteer(m, 3)
    if batch > 1:
        mixed = [("a", "b", "c")[row % 3] for row in range(batch)]
        found["finesteer_hf, three FineSteer adapters, one on each row"] = lambda m: finesteer(m, 3, steering=mixed)
    return {name: functools.partial(make, sharing_copy(model)) for name, make in found.items()}


def page(rows: list[dict[str, Any]]) -> str:
    """All figures as markdown, the setups one after the other."""
    text = HEAD
    for setup in dict.fromkeys(row["setup"] for row in rows):
        text += f"\n## {setup}\n"
        mine = [row for row in rows if row["setup"] == setup]
        for batch in sorted({row["batch"] for row in mine}):
            text += f"\n### Batch {batch}\n\n| | {' | '.join(PHASES)} | pairs | as the hook |\n|---|{'---|' * 5}\n"
            for row in mine:
                if row["batch"] == batch:
                    cells = [f"{m:.3f} ({low:.3f} to {high:.3f})" for m, low, high in (row[p] for p in PHASES)]
                    text += f"| {row['condition']} | {' | '.join(cells)} | {row['pairs']} | {row['as_the_hook']} |\n"
    return text


def record(out: Path, new: list[dict[str, Any]]) -> None:
    """Put rows in the place of older ones, and write JSON and page again."""
    store = out.with_suffix(".json")
    old = json.loads(store.read_text(encoding="utf-8")) if store.exists() else []

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["setup"], row["batch"], row["condition"]

    rows = list({key(row): row for row in [*old, *new]}.values())
    store.parent.mkdir(parents=True, exist_ok=True)
    store.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    out.write_text(page(rows), encoding="utf-8")


def as_the_hook(name: str, said: dict[str, torch.Tensor]) -> str:
    """Whether a peer says what the plain hook at the same layers says."""
    peer, _, where = name.partition(", ")
    reference = said.get(f"plain hook, {where}")
    return "" if reference is None or peer == "plain hook" else ("yes" if torch.equal(said[name], reference) else "no")


def build(shape: str, device: str) -> Any:
    """A Llama of a shape with random weights: float32, on a GPU bfloat16."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model = LlamaForCausalLM._from_config(LlamaConfig(**SHAPES[shape], pad_token_id=0), dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    return model


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shape", default="llama-57m", choices=SHAPES)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--peers-at", type=int, nargs="*", default=[1, 8], help="batch sizes that the peers run at")
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens")
    parser.add_argument("--tokens", type=int, default=16, help="new tokens")
    parser.add_argument("--minutes", type=float, default=11.0, help="time for all batch sizes together")
    parser.add_argument(
        "--pairs", type=int, default=None, help="pairs of each condition, instead of what fits the time"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="measure conditions whose name contains this")
    parser.add_argument("--estimate", action="store_true", help="say how long it would take, and stop")
    parser.add_argument("--out", type=Path, default=OUT, help="page to write; the JSON file stands beside it")
    return parser.parse_args()


def main() -> None:
    """Measure and write."""
    args = parse()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    model = build(args.shape, args.device)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    chip = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"{platform.machine()} CPU, {args.threads} thread(s)"
    )
    setup = (
        f"{args.shape} ({parameters:.0f} M, {str(model.dtype).removeprefix('torch.')}) on {chip}; prompt {args.prompt}, "
        f"{args.tokens} new tokens; torch {torch.__version__}, transformers {transformers.__version__}"
    )
    absent = sorted(set(PEERS) - set(available_peers()))
    print(setup, f"not installed: {absent}" if absent else "", sep="\n", flush=True)
    settings = {"max_new_tokens": args.tokens, "min_new_tokens": args.tokens, "do_sample": False}
    total = 0.0
    for batch in args.batch:
        chosen = {n: c for n, c in conditions(model, batch, batch in args.peers_at).items() if args.only in n}
        if not chosen:
            raise SystemExit(f"No condition of batch {batch} contains {args.only!r}.")
        ids = torch.randint(3, model.config.vocab_size, (batch, args.prompt), device=args.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **settings}
        a_call = statistics.median(
            timed_call(model.generate, model.device, **inputs)[1]["whole call"] for _ in range(3)
        )
        share = args.minutes * 60 / len(args.batch)
        pairs = args.pairs or pairs_within(share, a_call, len(chosen), fewest=6, most=40)
        seconds = a_call * len(chosen) * 2.3 * (pairs + 1)
        total += seconds
        print(f"batch {batch}: {len(chosen)} conditions, {pairs} pairs, about {seconds / 60:.1f} min", flush=True)
        if args.estimate:
            continue
        said: dict[str, torch.Tensor] = {}
        rows = []
        for name, sequences, ratios in time_pairs(model.generate, chosen, inputs, model.device, pairs):
            said[name] = sequences
            row = {"setup": setup, "batch": batch, "condition": name, "pairs": pairs, **ratios.summary()}
            rows.append({**row, "as_the_hook": as_the_hook(name, said)})
            print(f"  {name}: {', '.join(f'{p} {row[p][0]:.3f}' for p in PHASES)}", flush=True)
        record(args.out, rows)
    print(f"{'would take' if args.estimate else 'was estimated at'} {total / 60:.1f} min")


if __name__ == "__main__":
    with torch.no_grad():
        main()
