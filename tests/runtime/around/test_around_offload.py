"""Weights on the CPU or on disk, parameters on `meta`: steering is the same as in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from steered_tiny import greedy, hooks_of, query_shift, reference, some_prompts, steer_tiny, tiny_llama

from finesteer_hf.model.auto import SteeredModelForCausalLM


CPU = torch.device("cpu")
MIXED_MAP = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "disk",
    "model.layers.3": "cpu",
    "model.norm": "disk",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}
# The last reads after it writes: the prompt is read in a pass that is stopped early.
SITES = [("resid_post[1]", "resid_post[1]"), ("head_out[2]", "head_out[2]"), ("resid_post[1]", "resid_post[2]")]


def to_cpu(model: Any, folder: Path) -> None:
    cpu_offload(model, execution_device=CPU)


def to_disk(model: Any, folder: Path) -> None:
    disk_offload(model, str(folder), execution_device=CPU)


def to_map(model: Any, folder: Path) -> None:
    dispatch_model(model, MIXED_MAP, main_device="cpu", offload_dir=str(folder), force_hooks=True)


def devices_of(model: Any) -> dict[str, str]:
    return {name: str(parameter.device) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("offload", "write", "read"), [*((to_map, *site) for site in SITES), (to_cpu, *SITES[2]), (to_disk, *SITES[2])]
)
def test_offloaded_before_and_after(offload: Any, write: str, read: str, tmp_path: Path) -> None:
    ids, adapter = some_prompts(), query_shift(write, read)
    plain = tiny_llama()
    unsteered = greedy(plain, ids)
    with reference(plain, adapter, ids):
        want, logits = greedy(plain, ids), plain(input_ids=ids).logits
    assert not torch.equal(want, unsteered)

    first_steered = steer_tiny(tiny_llama(), adapter)
    offload(first_steered, tmp_path / "a")
    first_offloaded = tiny_llama()
    offload(first_offloaded, tmp_path / "b")
    first_offloaded = steer_tiny(first_offloaded, adapter)
    for model in (first_steered, first_offloaded):
        resting = devices_of(model)
        assert "meta" in resting.values()
        assert torch.equal(greedy(model, ids), want)
        assert devices_of(model) == resting
        assert torch.equal(model(input_ids=ids).logits, logits)
        assert devices_of(model) == resting
        assert torch.equal(greedy(model, ids, steering=None), unsteered)
        base = model.unload_steering()
        assert torch.equal(greedy(base, ids), unsteered)
        assert hooks_of(base) == {}


@pytest.mark.parametrize("device_map", [{"": "cpu"}, MIXED_MAP], ids=["cpu", "cpu-and-disk"])
def test_one_line_with_a_device_map(device_map: dict[str, str], tmp_path: Path) -> None:
    ids, adapter = some_prompts(), query_shift("resid_post[1]", "resid_post[2]")
    plain = tiny_llama()
    plain.save_pretrained(tmp_path / "base")
    with reference(plain, adapter, ids):
        want = greedy(plain, ids)
    model = SteeredModelForCausalLM.from_pretrained(
        tmp_path / "base", steering=adapter, device_map=device_map, offload_folder=str(tmp_path / "offload")
    )
    assert torch.equal(greedy(model, ids), want)
    assert torch.equal(greedy(model, ids), want)


def test_an_early_stop_frees_parameters_that_blocks_hold(tmp_path: Path) -> None:
    # Accelerate gives a module's own parameters back after its forward, which an early stop cuts short.
    model = tiny_llama()
    for block in model.model.layers:
        block.register_parameter("scale", torch.nn.Parameter(torch.ones(1)))
    model = steer_tiny(model, query_shift("resid_post[1]", "head_out[2]"))
    ids = some_prompts()
    want = greedy(model, ids)
    cpu_offload(model, execution_device=CPU)
    resting = devices_of(model)
    for _ in range(2):
        assert torch.equal(greedy(model, ids), want)
        assert devices_of(model) == resting
