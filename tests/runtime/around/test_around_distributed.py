"""Two ranks on one CPU: tensor parallel and FSDP2 give one process's answers, or refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from steered_tiny import greedy, query_shift, query_states, some_prompts, steer_tiny, tiny_llama


WORKER = Path(__file__).with_name("distributed_worker.py")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed"),
]


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What rank 0 of the worker wrote, by task."""
    folder = tmp_path_factory.mktemp("ranks")
    tiny_llama().save_pretrained(folder / "base")
    result = folder / "result.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER)]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(folder / "base"), str(result)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(result.read_text())


def in_one_process() -> dict[str, list[list[int]]]:
    import distributed_worker

    model = steer_tiny(tiny_llama())
    return {name: tokens.tolist() for name, tokens in distributed_worker.answers_of(model).items()}


def test_tensor_parallel(on_two_ranks: dict[str, Any]) -> None:
    result = on_two_ranks["tensor_parallel"]
    assert result["ranks_agree"]
    want = in_one_process()
    assert len({str(tokens) for tokens in want.values()}) == len(want)
    assert result["answers"] == want
    assert "tensor parallelism" in result["refusal"] and "resid_post" in result["refusal"]
    assert result["nothing_added"]


def test_fully_sharded(on_two_ranks: dict[str, Any]) -> None:
    import distributed_worker

    result = on_two_ranks["fsdp"]
    assert result["ranks_agree"]
    want = in_one_process()
    assert result["answers"] == result["answers_steered_first"] == want
    model = steer_tiny(tiny_llama())
    model.load_steering(query_shift("resid_post[1]", seed=0), "r0")
    model.load_steering(query_shift("resid_pre[1]", gated=True, seed=7), "gated")
    gates = [query_states(tiny_llama(), ids, "resid_pre[1]")[0, 0] > 0 for ids in distributed_worker.OWN_PROMPTS]
    assert gates[0] != gates[1]
    for rank, ids in enumerate(distributed_worker.OWN_PROMPTS):
        assert result["own_prompts"][str(rank)] == greedy(model, ids, steering={"gated": 1.0, "r0": 1.0}).tolist()
    model.load_steering(query_shift("head_out[1]"), "heads")
    assert result["heads"]["heads"] == greedy(model, some_prompts(), steering="heads").tolist()
    model.set_steering("r0")
    model.train()(input_ids=some_prompts(), labels=some_prompts()).loss.backward()
    gradient = model.model.layers[0].mlp.up_proj.weight.grad.norm().item()
    assert result["gradient_norm"] == pytest.approx(gradient, rel=1e-4)
    assert result["unloaded"]["none"] == want["none"] and result["hooks_left"] == []
    assert "after it was steered" in result["unload_refusal"]
