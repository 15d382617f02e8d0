"""Run by torchrun on two ranks: `two_ranks.py BASE_FOLDER ADAPTERS_FOLDER RESULT_FILE`. Rank 0 submits; both serve."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch.distributed as dist
from transformers import GenerationConfig
from transformers.distributed import DistributedConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from finesteer_hf import SteeredModelForCausalLM
from finesteer_hf.serving.sampling import Sampling


def asked(prompts: list[list[int]], steerings: list[str | None]) -> list[dict]:
    """Requests over steerings, scales and sampling."""
    draws = [None, Sampling(temperature=1.0, seed=7), Sampling(logprobs=0)]
    return [
        {"input_ids": prompt, "steering": steerings[(i + r) % len(steerings)], "sampling": draws[(i + r) % 3]}
        for r in range(4)
        for i, prompt in enumerate(prompts)
    ]


def serve(model, requests: list[dict]) -> tuple[list[list[int]], dict]:
    """The answers to some requests, in order, and the engine's counts."""
    config = ContinuousBatchingConfig(num_blocks=24, page_size=8, max_batch_tokens=24)
    generation = GenerationConfig(max_new_tokens=6, eos_token_id=-1, do_sample=False)
    with model.continuous_batching_context_manager(generation, continuous_batching_config=config) as manager:
        names = [manager.add_request(**request) for request in requests]
        outputs = {}
        while manager.is_tp_driver and len(outputs) < len(names):
            output = manager.get_result(timeout=30)
            assert output is not None and output.error is None, output
            outputs[output.request_id] = output
        # The first rank's engine tells the others when to stop.
        while not manager.is_tp_driver and manager.is_running():
            time.sleep(0.05)
        stats = vars(manager.stats)
    return [outputs[name].generated_tokens for name in names if name], stats


def main() -> None:
    base, adapters, result_file = sys.argv[1:]
    model = SteeredModelForCausalLM.from_pretrained(base, distributed_config=DistributedConfig(tp_plan="auto"))
    names = sorted(path.name for path in Path(adapters).iterdir() if path.is_dir())
    for name in names:
        model.load_steering(str(Path(adapters) / name), name)
    model.set_steering(None)
    prompts = json.loads((Path(adapters) / "prompts.json").read_text())
    answers, stats = serve(model, asked(prompts, [None, *names]))
    every: list = [None, None]
    dist.all_gather_object(every, stats)
    if dist.get_rank() == 0:
        Path(result_file).write_text(json.dumps({"answers": answers, "stats": every}))
    dist.barrier()
    sys.stdout.flush()
    # Interpreter shutdown of gloo's threads is not what is tested.
    os._exit(0)


if __name__ == "__main__":
    main()
