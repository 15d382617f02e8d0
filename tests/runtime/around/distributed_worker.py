"""Run by torchrun on two ranks: `distributed_worker.py BASE_FOLDER RESULT_FILE`.

Rank 0 writes what it found as tensors and JSON; the test compares it with one process's answers.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


sys.path.insert(0, str(Path(__file__).parent))

from steered_tiny import greedy, hooks_of, query_shift, some_prompts
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from finesteer_hf.errors import UnsupportedModelError
from finesteer_hf.model.auto import SteeredModelForCausalLM


RESIDUAL = [("resid_post[1]", None), ("resid_pre[2]", None), ("resid_pre[1]", "resid_post[2]")]
OWN_PROMPTS = [some_prompts(rows=1, seed=seed) for seed in (10, 11)]


def agree(tokens: torch.Tensor) -> bool:
    """Whether all ranks have the same tokens."""
    gathered = [torch.empty_like(tokens) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tokens)
    return all(torch.equal(tokens, other) for other in gathered)


def answers_of(model: Any) -> dict[str, list[Any]]:
    """Greedy tokens for each residual adapter, set and unset, and for rows of their own."""
    ids = some_prompts()
    for number, (write, read) in enumerate(RESIDUAL):
        model.load_steering(query_shift(write, read, seed=number), f"r{number}")
    answers = {f"r{number}": greedy(model, ids, steering=f"r{number}") for number in range(len(RESIDUAL))}
    answers["none"] = greedy(model, ids, steering=None)
    answers["rows"] = greedy(model, ids, steering=["r0", None])
    answers["both"] = greedy(model, ids, steering=["r2", {"r0": 1.0, "r1": 0.5}])
    answers["stack"] = greedy(model, ids, steering={"r1": 1.0, "r0": 1.0})
    return answers


def tensor_parallel(base: str) -> dict[str, Any]:
    model = SteeredModelForCausalLM.from_pretrained(base, distributed_config=DistributedConfig(tp_plan="auto"))
    answers = answers_of(model)
    hooks = hooks_of(model)
    try:
        model.load_steering(query_shift("head_out[1]"), "heads")
        refusal = ""
    except UnsupportedModelError as error:
        refusal = str(error)
    return {
        "ranks_agree": all(agree(tokens) for tokens in answers.values()),
        "answers": answers,
        "refusal": refusal,
        "nothing_added": hooks_of(model) == hooks and "heads" not in model.steering_adapters,
    }


def shard(model: Any) -> Any:
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def fsdp(base: str) -> dict[str, Any]:
    steered_first = SteeredModelForCausalLM.from_model(AutoModelForCausalLM.from_pretrained(base))
    sharded_first = SteeredModelForCausalLM.from_model(shard(AutoModelForCausalLM.from_pretrained(base)))
    shard(steered_first)
    result: dict[str, Any] = {"ranks_agree": True}
    for name, model in (("answers", sharded_first), ("answers_steered_first", steered_first)):
        answers = answers_of(model)
        result["ranks_agree"] &= all(agree(tokens) for tokens in answers.values())
        result[name] = answers
    # Data parallel ranks have prompts of their own; alone, one of these two would need a pass that the other does not.
    model = sharded_first
    model.load_steering(query_shift("resid_pre[1]", gated=True, seed=7), "gated")
    own = greedy(model, OWN_PROMPTS[dist.get_rank()], steering={"gated": 1.0, "r0": 1.0})
    gathered = [torch.empty_like(own) for _ in range(2)]
    dist.all_gather(gathered, own)
    result["own_prompts"] = {str(i): tokens for i, tokens in enumerate(gathered)}
    model.load_steering(query_shift("head_out[1]"), "heads")
    result["heads"] = {"heads": greedy(model, some_prompts(), steering="heads")}
    # Gradients of a sharded, steered model.
    model.set_steering("r0")
    model.train()
    model(input_ids=some_prompts(), labels=some_prompts()).loss.backward()
    norm = model.model.layers[0].mlp.up_proj.weight.grad.full_tensor().norm()
    result["gradient_norm"] = norm.item()
    model.eval()
    unloaded = model.unload_steering()
    result["unloaded"] = {"none": greedy(unloaded, some_prompts())}
    result["hooks_left"] = sorted(
        name for name, module in unloaded.named_modules() if any("finesteer" in str(h) for h in every_hook(module))
    )
    try:
        steered_first.unload_steering()
        result["unload_refusal"] = ""
    except UnsupportedModelError as error:
        result["unload_refusal"] = str(error)
    return result


def every_hook(module: torch.nn.Module) -> list[Any]:
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return [type(getattr(hook, "__self__", hook)).__module__ for hook in hooks]


def main() -> None:
    base, result_file = sys.argv[1:]
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    result = {"fsdp": fsdp(base), "tensor_parallel": tensor_parallel(base)}
    if dist.get_rank() == 0:
        Path(result_file).write_text(json.dumps(result, default=lambda value: value.tolist()))
    dist.barrier()
    dist.destroy_process_group()
    # Interpreter shutdown of gloo's threads is not what is tested.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
