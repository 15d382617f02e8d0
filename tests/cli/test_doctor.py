"""`finesteer doctor`: what it says about this machine, models and adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_toys import half_plane_adapter, tiny_llama
from small_adapters import small_adapter
from transformers import GPT2Config, MambaConfig, T5Config
from typer.testing import CliRunner

from finesteer_hf.adapters.algebra import constant_adapter
from finesteer_hf.cli.commands import app
from finesteer_hf.cli.doctor.adapter_checks import compiled_decoding, continuous_batching, decoding
from finesteer_hf.processors import SteeringProcessor
from finesteer_hf.serving.contract import problems
from finesteer_hf.sites import Site


def run(*arguments: str, code: int = 0) -> Any:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["doctor", *arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def states(*arguments: str, code: int = 0) -> dict[str, dict[str, tuple[str, str]]]:
    """State and detail of each check, by part and name."""
    found = json.loads(run(*arguments, "--json", code=code).stdout)
    return {
        part: {check["name"]: (check["state"], check["detail"]) for check in found[part]}
        for part in ("model", "adapter")
        if part in found
    }


@pytest.fixture
def base(tokenizer: Any, tmp_path: Path) -> str:
    """A folder with a model's config and tokenizer, without weights."""
    folder = tmp_path / "base"
    tiny_llama(len(tokenizer)).config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def of_other(config: Any, base: str) -> str:
    """The folder with another config."""
    config.save_pretrained(base)
    return base


def test_without_a_model_it_says_what_is_here() -> None:
    result = run()
    for word in ("transformers", "default device", "hub cache", "bitsandbytes"):
        assert word in result.stdout
    facts = json.loads(run("--json").stdout)["environment"]
    assert facts["torch"] == torch.__version__ and "signed in" in facts


def test_a_model_is_looked_at_without_its_weights(base: str) -> None:
    assert not list(Path(base).glob("*.safetensors"))
    model = states(base)["model"]
    assert model["steering"] == ("yes", "3 blocks, residual stream 32 wide")
    works = ("heads (head_out)", "neurons (mlp_act)", "chat template", "compiled decoding", "backtracking")
    assert {model[name][0] for name in works} == {"yes"}
    assert model["continuous batching"][0] == ("no" if problems() else "yes")
    assert model["attention weights"][0] == model["tensor parallel"][0] == "partly"
    eager = states(base, "--model-arg", "attn_implementation=eager")["model"]
    assert eager["attention weights"][0] == "yes"


def test_models_that_can_do_less(base: str) -> None:
    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
    mamba = states(of_other(MambaConfig(state_size=4, **small), base))["model"]
    assert mamba["heads (head_out)"][0] == mamba["continuous batching"][0] == "no"
    assert mamba["backtracking"][0] == "partly" and mamba["steering"][0] == "yes"
    Path(base, "chat_template.jinja").unlink()
    plain = states(of_other(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4), base))["model"]
    assert plain["tensor parallel"][0] == "no" and "--plain" in plain["chat template"][1]
    encoder = run(of_other(T5Config(vocab_size=64, d_model=32, num_layers=1), base), code=1)
    assert "error:" in encoder.stderr


def test_an_adapter_that_fits(base: str, half_plane: None, tmp_path: Path) -> None:
    adapter = half_plane_adapter(torch.ones(32), hidden_size=32, num_hidden_layers=3, positions="generated")
    folder = str(adapter.save_pretrained(tmp_path / "adapter"))
    found = states(base, "-s", folder)["adapter"]
    # It names no base, so its sizes alone are compared.
    assert found["fits the model"][0] == "yes"
    assert {found[name][0] for name in ("one pass", "generate", "compiled decoding")} == {"yes"}
    assert found["continuous batching"][0] == ("no" if problems() else "yes")
    assert found["GGUF"][0] == "no" and "depends on it" in found["GGUF"][1]
    assert "steers resid_post[1]" in found["adapter"][1]


def test_an_adapter_of_another_model_ends_with_1(base: str, half_plane: None, tmp_path: Path) -> None:
    adapter = half_plane_adapter(torch.ones(16), hidden_size=16, num_hidden_layers=3)
    folder = str(adapter.save_pretrained(tmp_path / "adapter"))
    state, detail = states(base, "-s", folder, code=1)["adapter"]["fits the model"]
    assert state == "no" and "hidden size 16" in detail
    other = half_plane_adapter(torch.ones(32), hidden_size=32, base_model_name_or_path="org/b", lora=["l"])
    other.config.fit["chat_template_sha256"] = "0" * 64
    found = states(base, "-s", str(other.save_pretrained(tmp_path / "other")))["adapter"]
    assert found["fits the model"][0] == found["LoRA"][0] == found["chat template"][0] == "partly"
    assert "org/b" in found["fits the model"][1]


def test_exports_are_tried(base: str, tmp_path: Path) -> None:
    folder = str(small_adapter(1).save_pretrained(tmp_path / "one"))
    found = states("-s", folder)["adapter"]
    assert found["vLLM"][0] == "partly" and "--positions generated" in found["vLLM"][1]
    # llama.cpp has no vector for block 0.
    assert found["GGUF"][0] == "no"
    inner = constant_adapter({Site("head_out", 1): torch.ones(8)})
    found = states("-s", str(inner.save_pretrained(tmp_path / "two")))["adapter"]
    assert found["tensor parallel"][0] == found["vLLM"][0] == "no"


def test_methods_that_take_back_or_map() -> None:
    class TakesBack(SteeringProcessor):
        lookback = 4

    class Maps(SteeringProcessor):
        maps = (Site("resid_post", 1),)

    assert (decoding(TakesBack()).state, compiled_decoding(TakesBack()).state) == ("partly", "no")
    assert continuous_batching(TakesBack(), None).state == "no"
    assert compiled_decoding(Maps()).state == "partly" and continuous_batching(Maps(), None).state == "no"
