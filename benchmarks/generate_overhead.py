"""What steering costs: steered against unsteered `generate`, on the same model, in one run.

Every condition is timed in turn with the unsteered model, many times over, and the ratio of each pair is taken: a machine
that is busy for a while slows both. Shown are medians of the ratios and their quartiles; 1.00 is free.

    python benchmarks/generate_overhead.py                                   # CPU, Llama shape of 57 M parameters
    python benchmarks/generate_overhead.py --device cuda --shape llama-8b    # random bf16 weights
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from peers import available_peers
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from finesteer_hf import Decision, QueryStates, SteeredModelForCausalLM, SteeringProcessor
from finesteer_hf.sites import Site


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


class GatedLowRank(SteeringProcessor):
    """The arithmetic of the default FineSteer adapter at its usual sizes: score, gate, router, factors of rank 32."""

    def __init__(self, layer: int, width: int, device: torch.device, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> torch.Tensor:
            return (torch.randn(*shape, generator=generator) / width**0.5).to(device)

        self.reads = self.writes = (Site("resid_post", layer),)
        self.score, self.router, self.prototypes = random(width), random(4, width), random(4, width)
        self.down, self.up = random(width, 32), random(32, width)

    def decide(self, queries: QueryStates) -> Decision:
        state = queries[self.reads[0]]
        gate = torch.sigmoid(state @ self.score)
        vector = torch.softmax(state @ self.router.T, -1) @ self.prototypes + state @ self.down @ self.up
        return Decision({self.writes[0]: vector}, gate)


@contextlib.contextmanager
def ours(model: Any, processors: list[SteeringProcessor], scales: Any = 1.0) -> Iterator[Callable[..., Any]]:
    SteeredModelForCausalLM.from_model(model)

    def generate(**kwargs: Any) -> torch.Tensor:
        return model.generate(steering_processor=processors, steering_scale=scales, **kwargs)

    try:
        yield generate
    finally:
        model.unload_steering()


def timed(call: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def paired_ratios(
    model: Any, condition: Callable[[], Any], inputs: dict[str, torch.Tensor], tokens: int, repeats: int, device: str
) -> list[float]:
    """Ratios steered / unsteered of `repeats` pairs, after a warm-up of each."""
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}

    def unsteered() -> float:
        return timed(lambda: model.generate(**inputs, **settings), device)

    def steered() -> float:
        with condition() as generate:
            return timed(lambda: generate(**inputs, **settings), device)

    unsteered(), steered()
    ratios = []
    for turn in range(repeats):
        # Whoever comes second finds a warmer cache: take turns.
        first, second = (unsteered, steered) if turn % 2 else (steered, unsteered)
        a, b = first(), second()
        ratios.append(b / a if turn % 2 else a / b)
    return ratios


def conditions(model: Any, batch: int) -> dict[str, Callable[[], Any]]:
    """What is measured, by name."""
    width, layers = model.config.hidden_size, model.config.num_hidden_layers
    vector = (torch.randn(width, generator=torch.Generator().manual_seed(0)) * 0.1).to(model.device, model.dtype)
    middle = layers // 2
    result: dict[str, Callable[[], Any]] = {}
    for name, peer in available_peers().items():
        result[f"{name}, one layer"] = lambda peer=peer: peer(model, [middle], vector)
        result[f"{name}, all layers"] = lambda peer=peer: peer(model, list(range(layers)), vector)
    device = model.device
    result["finesteer_hf, gated low-rank"] = lambda: ours(model, [GatedLowRank(middle, width, device)])
    three = [GatedLowRank(middle, width, device, seed) for seed in range(3)]
    rows = [1.0] * batch
    result["finesteer_hf, three stacked, own scale a row"] = lambda: ours(model, three, rows)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", default="llama-57m", choices=SHAPES)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of the decode measurement")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="measure conditions whose name contains this")
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    with torch.device(args.device):
        torch.set_default_dtype(dtype)
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[args.shape], pad_token_id=0)).eval()
        torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = None
    table = Table("batch", "condition", "phase", "steered / unsteered", "quartiles", "pairs")
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for batch in args.batch:
            ids = torch.randint(3, model.config.vocab_size, (batch, args.prompt), device=args.device)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            for name, condition in conditions(model, batch).items():
                if args.only not in name:
                    continue
                for phase, tokens in (("first token", 1), ("whole call", args.tokens)):
                    ratios = paired_ratios(model, condition, inputs, tokens, args.repeats, args.device)
                    low, median, high = statistics.quantiles(ratios, n=4)
                    table.add_row(
                        str(batch), name, phase, f"{median:.3f}", f"{low:.3f} to {high:.3f}", str(len(ratios))
                    )
                    rows.append(
                        {"batch": batch, "condition": name, "phase": phase, "ratio": median, "quartiles": [low, high]}
                    )
    Console().print(table)
    if args.out is not None:
        parameters = sum(p.numel() for p in model.parameters())
        setup = {
            "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or "cpu",
            "threads": args.threads, "dtype": str(dtype), "parameters": parameters, "prompt": args.prompt,
            "tokens": args.tokens, "pairs": args.repeats, "torch": torch.__version__,
            "transformers": transformers.__version__,
        }  # fmt: skip
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"setup": setup, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
