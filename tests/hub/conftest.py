"""Fixtures for tests of the loopback Hub and its clients."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import HfApi, constants
from small_adapters import small_adapter


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


@pytest.fixture
def repo(hub_client: HubServer) -> HubServer:
    """A Hub with two versions of an adapter in `org/a`, the newer on main."""
    small_adapter(1).push_to_hub("org/a", tag="v1")
    small_adapter(2).push_to_hub("org/a", tag="v2")
    # What the pushes left in the cache is not what these tests are about.
    shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)
    return hub_client
