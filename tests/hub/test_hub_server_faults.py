"""Faults of the loopback Hub, each as a real client meets it."""

from __future__ import annotations

import os
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import Fault, HubServer
from huggingface_hub import CommitOperationAdd, HfApi, constants, file_exists, hf_hub_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError
from huggingface_hub.file_download import http_get
from packaging.version import Version


resuming = pytest.mark.skipif(
    Version(huggingface_hub.__version__) < Version("1.31"), reason="older clients give up when a connection is closed"
)


@resuming
def test_a_broken_download_resumes_where_it_stopped(hub_client: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    weights = os.urandom(1 << 16)
    hub_client.commit("org/a", {"w.safetensors": weights})
    hub_client.faults.add(Fault("GET .*/w.safetensors", "drop_after", bytes=10_000))
    assert Path(hf_hub_download("org/a", "w.safetensors")).read_bytes() == weights
    first, second = hub_client.requests.matching("GET .*/w.safetensors")
    assert first.sent == 10_000
    assert (second.headers["range"], second.status, second.sent) == ("bytes=10000-", 206, len(weights) - 10_000)
    assert not hub_client.faults.pending()


def test_a_download_resumes_from_bytes_on_disk(hub_client: HubServer, tmp_path: Path) -> None:
    hub_client.commit("org/a", {"digits": "0123456789"})
    with (tmp_path / "part").open("wb") as file:
        file.write(b"01234")
        http_get(f"{hub_client.url}/org/a/resolve/main/digits", file, resume_size=5, expected_size=10)
    assert (tmp_path / "part").read_bytes() == b"0123456789"


@pytest.mark.parametrize("status", [500, 503])
def test_status_faults_end_after_their_number_of_times(hub_client: HubServer, status: int) -> None:
    hub_client.commit("org/a", {"a.txt": "one"})
    hub_client.faults.add(Fault("HEAD /org/a/resolve", "status", status=status, times=2, skip=1))
    assert file_exists("org/a", "a.txt")
    for _ in range(2):
        with pytest.raises(HfHubHTTPError, match=str(status)):
            file_exists("org/a", "a.txt")
    assert file_exists("org/a", "a.txt")
    assert [request.status for request in hub_client.requests] == [200, status, status, 200]


def test_status_faults_carry_error_codes_and_may_last(hub_client: HubServer) -> None:
    hub_client.commit("org/a", {"a.txt": "one"})
    hub_client.faults.add(Fault("/org/a/", "status", times=None, status=403, error_code="GatedRepo", message="Ask."))
    for _ in range(3):
        with pytest.raises(GatedRepoError):
            hf_hub_download("org/a", "a.txt")
    hub_client.faults.clear()
    assert Path(hf_hub_download("org/a", "a.txt")).read_text() == "one"


def test_dropped_and_slow_answers(hub_client: HubServer) -> None:
    hub_client.commit("org/a", {"a.txt": "one"})
    api = HfApi()
    hub_client.faults.add(Fault("GET /api/models/org/a$", "drop"))
    with pytest.raises(Exception, match="disconnected"):
        api.model_info("org/a")
    hub_client.faults.add(Fault("GET /api/models/org/a$", "slow", seconds=30))
    with pytest.raises(Exception, match="timed out"):
        api.model_info("org/a", timeout=0.2)
    assert api.model_info("org/a").id == "org/a"


def test_somebody_else_commits_first(api: HfApi, hub: HubServer) -> None:
    parent = hub.commit("org/a", {"a.txt": "one"})
    hub.faults.add(Fault("POST .*/commit/main", "stale_parent"))
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit("org/a", [CommitOperationAdd("a.txt", b"two")], commit_message="two", parent_commit=parent)
    assert hub.files("org/a")["a.txt"] == b"one"
    assert "concurrent.txt" in hub.files("org/a")


def test_the_answer_to_a_commit_may_get_lost(api: HfApi, hub: HubServer) -> None:
    hub.commit("org/a", {"a.txt": "one"})
    hub.faults.add(Fault("POST .*/commit/main", "drop_after", bytes=0))
    with pytest.raises(Exception, match="closed connection"):
        api.create_commit("org/a", [CommitOperationAdd("a.txt", b"two")], commit_message="two")
    assert hub.files("org/a")["a.txt"] == b"two"


@pytest.mark.parametrize("name", ["w.safetensors", "a.txt"])
def test_wrong_size_is_noticed_by_the_client(hub_client: HubServer, name: str) -> None:
    hub_client.commit("org/a", {name: b"0123456789"})
    hub_client.faults.add(Fault(f"HEAD .*/{name}", "wrong_size", bytes=3))
    with pytest.raises(OSError, match="should be of size 13 but has size 10"):
        hf_hub_download("org/a", name)
    assert Path(hf_hub_download("org/a", name)).read_bytes() == b"0123456789"


def test_wrong_hash_in_the_header_or_in_the_content(hub_client: HubServer) -> None:
    hub_client.commit("org/a", {"w.safetensors": b"0123456789", "v.safetensors": b"0123456789abc"})
    hub_client.faults.add(Fault("HEAD .*/w.safetensors", "wrong_etag"))
    assert Path(hf_hub_download("org/a", "w.safetensors")).resolve().name == "0" * 64
    hub_client.faults.add(Fault("GET .*/v.safetensors", "corrupt"))
    assert Path(hf_hub_download("org/a", "v.safetensors")).read_bytes() == b"\xcf123456789abc"


@resuming
def test_broken_and_truncated_uploads_leave_no_object(api: HfApi, hub: HubServer, tmp_path: Path) -> None:
    weights = os.urandom(1 << 16)
    (tmp_path / "w.safetensors").write_bytes(weights)
    before = hub.commit("org/a", {"a.txt": "one"})

    def upload() -> str:
        path = tmp_path / "w.safetensors"
        return api.upload_file(path_or_fileobj=path, path_in_repo="w.safetensors", repo_id="org/a").oid

    hub.faults.add(Fault("PUT /lfs/", "truncate_upload", bytes=1000))
    with pytest.raises(RuntimeError, match="Error while uploading"):
        upload()
    assert [request.status for request in hub.requests.matching("/verify")] == [422]
    assert hub.commits("org/a")[0].sha == before
    hub.faults.add(Fault("PUT /lfs/", "drop_upload", bytes=1000))
    assert upload() == hub.commits("org/a")[0].sha
    assert hub.files("org/a")["w.safetensors"] == weights
    assert [request.status for request in hub.requests.matching("PUT /lfs/")] == [200, 0, 200]
    assert not hub.faults.pending()
