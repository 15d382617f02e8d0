"""Fixtures for tests of the loopback Hub and its clients."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import HfApi


@pytest.fixture
def api(hub_client: HubServer) -> HfApi:
    """A client of `hub`, signed in as `user`."""
    return HfApi()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder to upload: two text files, one of them in a sub-folder, and 4 KiB of weights."""
    path = tmp_path / "folder"
    (path / "sub").mkdir(parents=True)
    (path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    (path / "sub" / "notes.txt").write_text("notes")
    (path / "model.safetensors").write_bytes(os.urandom(4096))
    return path
