"""The other clients of the loopback Hub: `hf`, PEFT, transformers; and the fixtures that connect them."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_fixtures import client_of, run_client, run_command
from hub_server import HubServer
from huggingface_hub import HfApi, constants, file_exists, hf_hub_download


def test_the_hf_command_uploads_and_downloads(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    program = shutil.which("hf") or str(Path(sys.executable).with_name("hf"))
    done = run_command([program, "upload", "org/cli", str(folder), "."], hub)
    assert done.returncode == 0, done.stderr
    assert set(hub.files("org/cli")) == {".gitattributes", "config.json", "model.safetensors", "sub/notes.txt"}
    done = run_command([program, "download", "org/cli", "--local-dir", str(tmp_path / "out")], hub, token="")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_transformers_and_peft_push_and_load(hub_client: HubServer) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    tokens = torch.arange(6)[None]
    tiny = LlamaForCausalLM(config).eval()
    tiny.push_to_hub("org/tiny")
    base = AutoModelForCausalLM.from_pretrained("org/tiny").eval()
    torch.testing.assert_close(base(tokens).logits, tiny(tokens).logits)
    assert "safetensors" in (HfApi().model_info("org/tiny").tags or [])

    tuned = get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    tuned.push_to_hub("org/lora")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("org/tiny"), "org/lora").eval()
    torch.testing.assert_close(loaded(tokens).logits, tuned(tokens).logits)
    assert not torch.allclose(loaded(tokens).logits, tiny(tokens).logits)
    both = AutoModelForCausalLM.from_pretrained("org/lora").eval()
    torch.testing.assert_close(both(tokens).logits, tuned(tokens).logits)


# The fixtures


def test_the_settings_of_this_process_come_back(hub: HubServer, tmp_path: Path) -> None:
    def settings() -> tuple:
        names = ("ENDPOINT", "HF_HUB_CACHE", "HF_HOME", "HF_TOKEN_PATH", "HF_HUB_DISABLE_XET", "HF_HUB_OFFLINE")
        kept = [getattr(constants, name) for name in names]
        return (*kept, huggingface_hub.hf_api.api.endpoint, os.environ.get("HF_ENDPOINT"), os.environ.get("HF_TOKEN"))

    before = settings()
    with pytest.raises(RuntimeError), client_of(hub, tmp_path / "home"):
        assert constants.ENDPOINT == hub.url and huggingface_hub.whoami()["name"] == "user"
        import huggingface_hub.cli.auth as auth  # copies the endpoint when it is imported

        assert auth.ENDPOINT == hub.url
        raise RuntimeError
    assert settings() == before
    assert auth.ENDPOINT == constants.ENDPOINT


def test_a_stopped_hub_does_not_answer(hub_client: HubServer) -> None:
    sha = hub_client.commit("org/a", {"a.txt": "one"})
    path = hf_hub_download("org/a", "a.txt")
    hub_client.stop()
    assert hf_hub_download("org/a", "a.txt", revision=sha) == path
    with pytest.raises(Exception, match="refused"):
        file_exists("org/a", "a.txt")


def test_a_client_process_sees_only_this_hub(hub: HubServer) -> None:
    code = """
        from huggingface_hub import constants, whoami
        result = [constants.ENDPOINT, constants.HF_HUB_DISABLE_XET, whoami()["name"]]
    """
    assert run_client(code, hub) == [hub.url, True, "user"]
    assert hub.requests.lines == ["GET /api/whoami-v2"]
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run_client("1 / 0", hub)
