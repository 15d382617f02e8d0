"""Throughput of packed batches: every request steered, against the bare engine and against one request after another.

    python -m benchmarks.speed.packed_throughput                  # a 57 M-parameter Llama shape and the playground
    python -m benchmarks.speed.packed_throughput --rounds 3 --shapes playground

The bare engine is transformers' own on a model without steering. Rounds are interleaved, so that a machine that is busy for
a while slows all conditions; ratios are of one round, and the median and quartiles of these are what is written.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from benchmarks.speed.generate_overhead import build, random_finesteer, sharing_copy
from finesteer_hf import SteeredModelForCausalLM, SteeringAdapter
from finesteer_hf.playground import model_path


RESULTS = Path(__file__).parents[1] / "results" / "packed_throughput.md"
CARDS = Path(__file__).parents[2] / "hub_cards"
COLUMNS = (
    "model",
    "all steered / bare engine, wall time",
    "the same, processor time",
    "all steered, tokens/s",
    "one by one, tokens/s",
    "packed / one by one",
)
PAGE = """# Packed batches

Written by `python -m benchmarks.speed.packed_throughput`. {requests} requests at once, {tokens} new tokens each, greedy,
one thread, transformers {version}, torch {torch}. Each row is the median of {rounds} interleaved rounds, with the
quartiles; ratios above 1 favour the first named. Every request of a steered run is steered by its own decision.

{head}
{rows}
"""


def models_of(shape: str) -> tuple[Any, Any, list[str], int]:
    """A bare model, the same one steered, the names of its adapters, and its vocabulary."""
    if shape == "playground":
        bare, model = (AutoModelForCausalLM.from_pretrained(model_path()) for _ in range(2))
        adapters = {n: SteeringAdapter.from_pretrained(CARDS / f"playground-{n}") for n in ("truthful", "safety")}
    else:
        bare = build(shape, "cpu")
        model = sharing_copy(bare)
        adapters = {"gated": random_finesteer(model, seed=0)}
    steered = SteeredModelForCausalLM.from_model(model, steering=adapters)
    steered.set_steering(None)
    return bare.eval(), steered.eval(), list(adapters), int(model.config.vocab_size)


@contextlib.contextmanager
def engine(model: Any, tokens: int) -> Iterator[Any]:
    """An engine with room for all requests of a round."""
    generation = GenerationConfig(max_new_tokens=tokens, eos_token_id=-1, do_sample=False)
    config = ContinuousBatchingConfig(num_blocks=64, page_size=64, max_batch_tokens=1024)
    with model.continuous_batching_context_manager(generation, continuous_batching_config=config) as manager:
        yield manager


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """What some work gives, with its wall and processor seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - wall, time.process_time() - processor


def packed(manager: Any, prompts: list[list[int]], steerings: list[str] | None) -> dict[int, list[int]]:
    """Answers of an engine, by place."""
    names = {}
    for place, prompt in enumerate(prompts):
        own = {} if steerings is None else {"steering": steerings[place]}
        names[manager.add_request(prompt, **own)] = place
    answers: dict[int, list[int]] = {}
    while len(answers) < len(prompts):
        output = manager.get_result(timeout=60)
        if output is None or output.error is not None:
            raise RuntimeError(f"The engine failed: {output and output.error}")
        answers[names[output.request_id]] = output.generated_tokens
    return answers


def measure(shape: str, requests: int, tokens: int, rounds: int) -> str:
    """One row of the table."""
    bare, steered, adapters, vocabulary = models_of(shape)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(8, vocabulary, (24 + i % 17,), generator=generator).tolist() for i in range(requests)]
    steerings = [adapters[i % len(adapters)] for i in range(requests)]

    def alone() -> list[list[int]]:
        return [
            steered.generate(
                torch.tensor([prompt]), steering=name, max_new_tokens=tokens, do_sample=False, eos_token_id=None
            )[0, len(prompt) :].tolist()
            for prompt, name in zip(prompts, steerings, strict=True)
        ]

    wall, processor, packed_rate, alone_rate, gain = [], [], [], [], []
    with engine(bare, tokens) as bare_engine, engine(steered, tokens) as steered_engine:
        packed(bare_engine, prompts, None), packed(steered_engine, prompts, steerings)
        for round_ in range(rounds):
            runs = {
                "bare": lambda: packed(bare_engine, prompts, None),
                "steered": lambda: packed(steered_engine, prompts, steerings),
            }
            order = list(runs) if round_ % 2 else list(runs)[::-1]
            found = {name: timed(runs[name]) for name in order}
            wall.append(found["bare"][1] / found["steered"][1])
            processor.append(found["bare"][2] / found["steered"][2])
            answers, seconds, _ = timed(alone)
            same = sum(found["steered"][0][i] == answer for i, answer in enumerate(answers))
            print(f"{shape}: round {round_}: steered / bare {wall[-1]:.3f}, {same} of {requests} as alone", flush=True)
            packed_rate.append(requests * tokens / found["steered"][1])
            alone_rate.append(requests * tokens / seconds)
            gain.append(packed_rate[-1] / alone_rate[-1])
    cells = [
        ratio(wall),
        ratio(processor),
        f"{statistics.median(packed_rate):.0f}",
        f"{statistics.median(alone_rate):.0f}",
        ratio(gain),
    ]
    return f"| {shape} | {' | '.join(cells)} |"


def ratio(values: list[float]) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["llama-57m", "playground"])
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--page", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(shape, asked.requests, asked.tokens, asked.rounds) for shape in asked.shapes]
    asked.page.write_text(
        PAGE.format(
            head=f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}",
            rows="\n".join(rows),
            requests=asked.requests,
            tokens=asked.tokens,
            rounds=asked.rounds,
            version=transformers.__version__,
            torch=torch.__version__.split("+")[0],
        )
    )
    print(asked.page.read_text())


if __name__ == "__main__":
    main()
