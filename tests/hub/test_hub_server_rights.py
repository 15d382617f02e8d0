"""The loopback Hub as huggingface_hub sees it: rights, accounts, errors."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import (
    HfApi,
    hf_hub_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


def test_private_repositories_are_for_members(api: HfApi, hub: HubServer, tmp_path: Path) -> None:
    hub.add_user("guest", "hf_guest")
    api.create_repo("org/secret", private=True)
    api.upload_file(path_or_fileobj=b"s", path_in_repo="a.txt", repo_id="org/secret")
    assert Path(hf_hub_download("org/secret", "a.txt")).read_bytes() == b"s"
    for token in ("hf_guest", False):
        with pytest.raises(RepositoryNotFoundError):
            HfApi(token=token).model_info("org/secret")
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download("org/secret", "a.txt", token=token, cache_dir=tmp_path / "other")
        assert not list(HfApi(token=token).list_models(search="secret"))
    assert [info.id for info in api.list_models(search="secret")] == ["org/secret"]
    api.update_repo_settings("org/secret", private=False)
    assert HfApi(token=False).model_info("org/secret").private is False


def test_accounts(api: HfApi) -> None:
    assert api.whoami()["name"] == "user"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(token="hf_wrong").whoami()
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_repo("somebody/else")
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(token=False).create_repo("org/a")


def test_errors_have_the_types_that_clients_expect(api: HfApi, hub: HubServer) -> None:
    hub.commit("org/a", {"a.txt": "one"})
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("org/none")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("org/a", "a.txt", revision="none")
    with pytest.raises(RevisionNotFoundError):
        api.upload_file(path_or_fileobj=b"x", path_in_repo="a.txt", repo_id="org/a", revision="none")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("org/a")
    assert api.create_repo("org/a", exist_ok=True).repo_id == "org/a"
    api.delete_repo("org/a")
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo("org/a")
    assert not api.repo_exists("org/a")
