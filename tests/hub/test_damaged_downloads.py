"""Downloads that go wrong are asked for again, or refused; nothing damaged is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hub_server import Fault, HubServer
from huggingface_hub import constants, snapshot_download
from small_adapters import small_adapter

from finesteer_hf import SteeringAdapter
from finesteer_hf.adapters.adapter import tensors_equal
from finesteer_hf.errors import AdapterFileError, NoAdapterError
from finesteer_hf.hub import integrity


load = SteeringAdapter.from_pretrained


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity, "PAUSE", 0.0)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("HEAD .*config", "status", status=503),
        Fault("GET .*config", "status", status=502),
        Fault("HEAD .*config", "drop"),
        Fault("GET .*safetensors", "drop"),
        Fault("GET .*safetensors", "slow", seconds=0.3),
    ],
    ids=lambda fault: f"{fault.match} {fault.kind}",
)
def test_a_hub_that_stumbles_once_is_asked_again(repo: HubServer, fault: Fault) -> None:
    repo.faults.add(fault)
    assert tensors_equal(load("org/a@v1").tensors, small_adapter(1).tensors)
    assert not repo.faults.pending()


def test_a_hub_that_keeps_stumbling_is_told_from_a_missing_adapter(repo: HubServer) -> None:
    repo.faults.add(Fault("HEAD .*config", "drop", times=None))
    with pytest.raises(ConnectionError, match=r"'org/a' at revision 'v1' could not be downloaded"):
        load("org/a@v1")
    repo.faults.clear()
    repo.faults.add(Fault("HEAD .*safetensors", "status", status=403, error_code="GatedRepo"))
    with pytest.raises(NoAdapterError, match="org/a is gated"):
        load("org/a@v1")


@pytest.mark.parametrize("file", ["steering_config.json", "steering_model.safetensors"])
@pytest.mark.parametrize("kind", ["corrupt", "wrong_etag", "drop_after", "wrong_size"])
def test_a_download_that_goes_wrong_once_is_repeated(repo: HubServer, file: str, kind: Any) -> None:
    method = {"wrong_etag": "HEAD", "wrong_size": "HEAD"}.get(kind, "GET")
    repo.faults.add(Fault(f"{method} .*{file}", kind))
    adapter = load("org/a@v1")
    assert not repo.faults.pending()
    assert tensors_equal(adapter.tensors, small_adapter(1).tensors)
    assert adapter.revision == repo.repo("org/a").tags["v1"].sha


@pytest.mark.parametrize("file", ["steering_config.json", "steering_model.safetensors"])
@pytest.mark.parametrize(("kind", "what"), [("corrupt", "content"), ("wrong_size", "size")])
def test_a_file_that_stays_damaged_is_refused_and_not_kept(repo: HubServer, file: str, kind: Any, what: str) -> None:
    repo.faults.add(Fault(f".*{file}", kind, times=None))
    with pytest.raises(AdapterFileError, match=rf"{file} of org/a was downloaded twice with (a )?{what} other"):
        load("org/a@v1")
    assert not [path for path in Path(constants.HF_HUB_CACHE).rglob(file) if path.is_file()]
    repo.faults.clear()
    assert tensors_equal(load("org/a@v1").tensors, small_adapter(1).tensors)


def test_a_cache_that_was_damaged_heals_or_says_so(repo: HubServer) -> None:
    load("org/a@v1")
    [path] = Path(constants.HF_HUB_CACHE).rglob("steering_model.safetensors")
    blob = path.resolve()
    blob.chmod(0o644)
    content = bytearray(blob.read_bytes())
    content[-1] ^= 0xFF
    blob.write_bytes(content)
    with pytest.raises(AdapterFileError, match="damaged in the cache"):
        load("org/a@v1", local_files_only=True)
    assert tensors_equal(load("org/a@v1").tensors, small_adapter(1).tensors)


def test_a_snapshot_folder_loads_and_its_damage_is_seen(repo: HubServer) -> None:
    folder = Path(snapshot_download("org/a", revision="v1"))
    assert tensors_equal(load(str(folder)).tensors, small_adapter(1).tensors)
    blob = (folder / "steering_model.safetensors").resolve()
    blob.chmod(0o644)
    content = bytearray(blob.read_bytes())
    content[-1] ^= 0x01
    blob.write_bytes(content)
    with pytest.raises(AdapterFileError, match="is not the file that its config was saved with"):
        load(str(folder))
