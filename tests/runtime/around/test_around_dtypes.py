"""Half precision and quantised weights: the vector is computed in float32 and added in the stream's dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from steered_tiny import BUILDERS, greedy, query_shift, reference, some_prompts, steer_tiny, tiny_llama


SITES = [("resid_post[1]", None), ("head_out[2]", None), ("resid_pre[2]", "resid_post[2]")]


def check(plain: Any, model: Any, write: str, read: str | None, **config: Any) -> None:
    """Steer `model`, and compare it with `plain` under the plain hook: bit for bit, and off again."""
    ids, adapter = some_prompts(), query_shift(write, read, **config)
    unsteered = greedy(plain, ids)
    with reference(plain, adapter, ids), torch.no_grad():
        want, logits = greedy(plain, ids), plain(input_ids=ids).logits
    assert not torch.equal(want, unsteered)
    steered = steer_tiny(model, adapter)
    with torch.no_grad():
        assert torch.equal(steered(input_ids=ids).logits, logits)
    assert torch.equal(greedy(steered, ids), want)
    assert torch.equal(greedy(steered, ids, steering_scale=0.0), unsteered)


@pytest.mark.parametrize(("write", "read"), SITES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_half_and_double_precision(kind: str, dtype: torch.dtype, write: str, read: str | None) -> None:
    check(BUILDERS[kind]().to(dtype), BUILDERS[kind]().to(dtype), write, read)


@pytest.mark.parametrize(("write", "read"), SITES)
def test_autocast(write: str, read: str | None) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        check(tiny_llama(), tiny_llama(), write, read)


@pytest.mark.parametrize(("write", "read"), SITES)
def test_dynamically_quantised_linears(write: str, read: str | None) -> None:
    def quantised() -> Any:
        return torch.ao.quantization.quantize_dynamic(tiny_llama(), {torch.nn.Linear}, dtype=torch.qint8)

    check(quantised(), quantised(), write, read)


@pytest.mark.parametrize(("write", "read"), SITES)
def test_torchao_int8_weights(write: str, read: str | None, tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    from transformers import AutoModelForCausalLM, TorchAoConfig

    tiny_llama().save_pretrained(tmp_path)
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    plain, model = (AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config) for _ in range(2))
    check(plain, model, write, read)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("write", "read"), SITES)
def test_bitsandbytes_weights(write: str, read: str | None, bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    # On a CPU with bfloat16, 4 bits are packed in blocks of 64.
    tiny_llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    plain, model = (
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map={"": "cpu"})
        for _ in range(2)
    )
    check(plain, model, write, read, hidden_size=64)
