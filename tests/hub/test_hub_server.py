"""The loopback Hub as huggingface_hub sees it: files, revisions, rights, cards, lists."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import huggingface_hub
import pytest
from hub_fixtures import run_client
from hub_server import HubServer
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    ModelCardData,
    constants,
    file_exists,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RevisionNotFoundError,
)
from packaging.version import Version


LFS_BYTES = 12 << 20
HUB = Version(huggingface_hub.__version__)


def card(base: str, **fields: str) -> str:
    lines = [f"{name}: {value}" for name, value in {"base_model": base, **fields}.items()]
    return "---\n" + "\n".join(lines) + "\n---\n# Card\n"


# Uploads and downloads


def test_a_folder_with_a_large_lfs_file_comes_back_the_same(api: HfApi, hub: HubServer, folder: Path) -> None:
    weights = os.urandom(LFS_BYTES)
    (folder / "model.safetensors").write_bytes(weights)
    url = api.create_repo("org/a")
    assert (url.repo_id, url.repo_type, url.endpoint) == ("org/a", "model", hub.url)
    info = api.upload_folder(repo_id="org/a", folder_path=folder)

    assert hub.requests.count("PUT /lfs/") == 1
    assert hub.requests.matching("PUT /lfs/")[0].received == LFS_BYTES
    assert info.oid == hub.commits("org/a")[0].sha
    assert hub.files("org/a")["model.safetensors"] == weights
    local = Path(snapshot_download("org/a"))
    assert local.name == info.oid
    assert (local / "model.safetensors").read_bytes() == weights
    assert (local / "sub/notes.txt").read_text() == "notes"
    assert api.list_repo_files("org/a") == [".gitattributes", "config.json", "model.safetensors", "sub/notes.txt"]


def test_unchanged_files_make_no_commit_and_stored_objects_are_not_sent_twice(
    api: HfApi, hub: HubServer, folder: Path
) -> None:
    api.create_repo("org/a")
    first = api.upload_folder(repo_id="org/a", folder_path=folder)
    assert api.upload_folder(repo_id="org/a", folder_path=folder).oid == first.oid
    assert len(hub.commits("org/a")) == 2

    api.create_repo("org/b")
    hub.requests.clear()
    api.upload_folder(repo_id="org/b", folder_path=folder)
    assert hub.requests.count("PUT") == 0
    assert hub.files("org/b")["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_a_cached_file_costs_one_head_request_and_none_by_commit(hub_client: HubServer) -> None:
    sha = hub_client.commit("org/a", {"a.txt": "one"})
    path = hf_hub_download("org/a", "a.txt")
    assert hub_client.requests.lines == [f"{method} /org/a/resolve/main/a.txt" for method in ("HEAD", "GET")]
    hub_client.requests.clear()
    assert hf_hub_download("org/a", "a.txt") == path
    assert hub_client.requests.lines == ["HEAD /org/a/resolve/main/a.txt"]
    hub_client.requests.clear()
    assert hf_hub_download("org/a", "a.txt", revision=sha) == path
    assert len(hub_client.requests) == 0
    hub_client.commit("org/a", {"a.txt": "two"})
    assert Path(hf_hub_download("org/a", "a.txt")).read_text() == "two"


def test_missing_files_are_remembered_by_commit(hub_client: HubServer) -> None:
    sha = hub_client.commit("org/a", {"a.txt": "one"})
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("org/a", "none.txt")
    assert Path(constants.HF_HUB_CACHE, "models--org--a", ".no_exist", sha, "none.txt").exists()
    assert file_exists("org/a", "a.txt") and not file_exists("org/a", "none.txt")


@pytest.mark.parametrize(
    ("header", "status", "expected"),
    [
        ("bytes=2-4", 206, b"234"),
        ("bytes=7-", 206, b"789"),
        ("bytes=-2", 206, b"89"),
        ("bytes=5-99", 206, b"56789"),
        ("bytes=10-", 416, b""),
        ("lines=1-2", 200, b"0123456789"),
    ],
)
def test_ranges(hub_client: HubServer, header: str, status: int, expected: bytes) -> None:
    from huggingface_hub.utils import get_session

    hub_client.commit("org/a", {"digits": "0123456789"})
    response = get_session().get(f"{hub_client.url}/org/a/resolve/main/digits", headers={"Range": header})
    assert (response.status_code, response.content) == (status, expected)


def test_data_sets_have_their_own_name_space(api: HfApi, hub: HubServer, folder: Path) -> None:
    hub.commit("org/a", {"a.txt": "model"})
    api.create_repo("org/a", repo_type="dataset")
    api.upload_folder(repo_id="org/a", folder_path=folder, repo_type="dataset")
    assert "a.txt" not in api.list_repo_files("org/a", repo_type="dataset")
    path = hf_hub_download("org/a", "model.safetensors", repo_type="dataset")
    assert Path(path).read_bytes() == (folder / "model.safetensors").read_bytes()
    assert api.dataset_info("org/a").id == "org/a"


def test_files_travel_in_the_commit_with_xet_on_when_nothing_is_lfs(tmp_path: Path, folder: Path) -> None:
    with HubServer(lfs=()) as hub:
        code = f"""
            from huggingface_hub import HfApi
            api = HfApi()
            api.create_repo("org/a")
            result = api.upload_folder(repo_id="org/a", folder_path={str(folder)!r}).oid
        """
        assert run_client(code, hub, env={"HF_HUB_DISABLE_XET": "0"}) == hub.commits("org/a")[0].sha
        assert hub.requests.count("PUT") == 0
        assert hub.files("org/a")["model.safetensors"] == (folder / "model.safetensors").read_bytes()
        assert not hub.crashes


# Revisions


def test_tags_branches_refs_and_history(api: HfApi, hub: HubServer) -> None:
    api.create_repo("org/a")
    first = hub.commit("org/a", {"a.txt": "one"}, message="first")
    api.create_tag("org/a", tag="v1", revision=first)
    api.create_branch("org/a", branch="dev/x")
    hub.commit("org/a", {"a.txt": "two"}, message="second")
    api.upload_file(path_or_fileobj=b"dev", path_in_repo="a.txt", repo_id="org/a", revision="dev/x")

    def text(revision: str | None = None) -> str:
        return Path(hf_hub_download("org/a", "a.txt", revision=revision)).read_text()

    assert [text(), text("v1"), text("dev/x"), text(first)] == ["two", "one", "dev", "one"]
    refs = api.list_repo_refs("org/a")
    assert {ref.name for ref in refs.branches} == {"main", "dev/x"}
    assert [(ref.name, ref.ref, ref.target_commit) for ref in refs.tags] == [("v1", "refs/tags/v1", first)]
    assert [commit.title for commit in api.list_repo_commits("org/a")] == ["second", "first", "initial commit"]
    assert api.model_info("org/a", revision="v1").sha == first
    assert Path(snapshot_download("org/a", revision="v1")).name == first
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag("org/a", tag="v1")
    api.create_tag("org/a", tag="v1", exist_ok=True)
    assert hub.repo("org/a").tags["v1"].sha == first
    api.delete_tag("org/a", tag="v1")
    api.delete_branch("org/a", branch="dev/x")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("org/a", revision="v1")
    with pytest.raises(HfHubHTTPError, match="main branch"):
        api.delete_branch("org/a", branch="main")


def test_a_stale_parent_is_refused_and_nothing_changes(api: HfApi, hub: HubServer) -> None:
    old = hub.commit("org/a", {"a.txt": "one"})
    new = hub.commit("org/a", {"a.txt": "two"})
    add = CommitOperationAdd("a.txt", b"three")
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
        api.create_commit("org/a", [add], commit_message="stale", parent_commit=old)
    assert error.value.response.status_code == 412
    assert hub.commits("org/a")[0].sha == new
    api.create_commit("org/a", [CommitOperationAdd("a.txt", b"three")], commit_message="fresh", parent_commit=new)
    assert hub.files("org/a")["a.txt"] == b"three"


def test_one_commit_adds_and_deletes(api: HfApi, hub: HubServer) -> None:
    hub.commit("org/a", {"old/1.txt": "1", "old/2.txt": "2", "b.txt": "b"})
    deletions = [CommitOperationDelete(path) for path in ("old/", "b.txt")]
    api.create_commit("org/a", [CommitOperationAdd("new.txt", b"n"), *deletions], commit_message="swap")
    assert sorted(hub.files("org/a")) == [".gitattributes", "new.txt"]
    with pytest.raises(EntryNotFoundError):
        api.delete_file("b.txt", "org/a")


def test_a_pull_request_is_a_revision_of_its_own(hub_client: HubServer) -> None:
    hub_client.add_user("guest", "hf_guest")
    hub_client.commit("org/a", {"a.txt": "one"})
    guest = HfApi(token="hf_guest")
    add = CommitOperationAdd("a.txt", b"two")
    info = guest.create_commit("org/a", [add], commit_message="proposal", create_pr=True)
    assert (info.pr_revision, info.pr_num) == ("refs/pr/1", 1)
    assert Path(hf_hub_download("org/a", "a.txt", revision="refs/pr/1")).read_text() == "two"
    assert Path(hf_hub_download("org/a", "a.txt")).read_text() == "one"
    pulls = guest.list_repo_refs("org/a", include_pull_requests=True).pull_requests
    assert [(pull.ref, pull.target_commit) for pull in pulls or []] == [("refs/pr/1", info.oid)]
    with pytest.raises(HfHubHTTPError, match="403"):
        guest.upload_file(path_or_fileobj=b"x", path_in_repo="a.txt", repo_id="org/a")


# Cards and lists


def test_model_info_and_lists_read_the_card(api: HfApi, hub: HubServer) -> None:
    steering = card("org/base", base_model_relation="adapter", library_name="finesteer_hf", tags="[steering]")
    hub.commit("org/steer", {"README.md": steering, "steering.safetensors": b"w"})
    hub.commit("user/lora", {"README.md": card("org/base"), "adapter_config.json": '{"task_type": "CAUSAL_LM"}'})
    hub.commit("user/tuned", {"README.md": card("org/base", license="mit")})
    info = api.model_info("org/steer", files_metadata=True)
    assert info.card_data is not None and info.card_data.base_model == "org/base"
    assert info.library_name == "finesteer_hf"
    assert {"finesteer_hf", "steering", "base_model:org/base", "base_model:adapter:org/base"} <= {*(info.tags or [])}
    assert [(file.rfilename, file.size) for file in info.siblings or []][-1] == ("steering.safetensors", 1)
    assert "base_model:finetune:org/base" in (api.model_info("user/tuned").tags or [])

    def ids(**query: object) -> set[str]:
        return {model.id for model in api.list_models(**query)}  # type: ignore[arg-type]

    assert ids(filter="base_model:adapter:org/base") == {"org/steer", "user/lora"}
    assert ids(filter=["base_model:adapter:org/base", "finesteer_hf"]) == {"org/steer"}
    assert ids(filter="base_model:org/base", author="user") == {"user/lora", "user/tuned"}
    assert ids(search="TUN") == {"user/tuned"}
    assert [model.id for model in api.list_models(sort="last_modified", limit=2)] == ["user/tuned", "user/lora"]
    assert next(iter(api.list_models(search="steer", cardData=True))).card_data == info.card_data
    assert api.model_info("org/steer", expand=["sha"]).sha == hub.commits("org/steer")[0].sha


def test_long_lists_come_in_pages(api: HfApi, hub: HubServer) -> None:
    hub.page_size = 2
    hub.commit("org/a", {f"{name}.txt": name for name in "bcade"})
    for name in "xyz":
        hub.commit(f"org/{name}", {"a.txt": name})
    assert api.list_repo_files("org/a") == [".gitattributes", *(f"{name}.txt" for name in "abcde")]
    assert len(list(api.list_models(author="org"))) == 4
    assert len(list(api.list_models(author="org", limit=3))) == 3
    assert hub.requests.count("GET /api/models/org/a/tree") == 3


@pytest.mark.skipif(
    HUB < Version("2"), reason="clients before 2.0 check a card at huggingface.co, whatever the endpoint"
)
def test_model_card_push_and_the_check_of_its_metadata(api: HfApi, hub: HubServer) -> None:
    api.create_repo("org/a")
    content = ModelCard(f"---\n{ModelCardData(base_model='org/base', license='mit').to_yaml()}\n---\n# Hello\n")
    content.push_to_hub("org/a")
    loaded = ModelCard.load("org/a")
    assert (loaded.data.base_model, loaded.text.strip()) == ("org/base", "# Hello")
    with pytest.raises(ValueError, match="/home/me/model"):
        api.upload_file(path_or_fileobj=card("/home/me/model").encode(), path_in_repo="README.md", repo_id="org/a")
    assert len(hub.commits("org/a")) == 2


def test_tree_and_paths_info(api: HfApi, hub: HubServer) -> None:
    hub.commit("org/a", {"sub/deep/x.txt": "x", "sub/w.safetensors": b"12345", "a.txt": "a"})
    assert [item.path for item in api.list_repo_tree("org/a")] == [".gitattributes", "a.txt", "sub"]
    inside = [item.path for item in api.list_repo_tree("org/a", "sub", recursive=True)]
    assert inside == ["sub/deep", "sub/deep/x.txt", "sub/w.safetensors"]
    weights, sub = api.get_paths_info("org/a", ["sub/w.safetensors", "none", "sub"])
    assert (weights.path, weights.size, weights.lfs.size) == ("sub/w.safetensors", 5, 5)  # type: ignore[union-attr]
    assert sub.path == "sub"
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree("org/a", "none"))


def test_many_clients_at_once(hub_client: HubServer) -> None:
    """Of commits on the same parent one wins; without a parent none gets lost."""
    parent = hub_client.commit("org/a", {"a.txt": "one"})
    outcomes: list[int] = []

    def work(number: int) -> None:
        api = HfApi()
        content = str(number).encode()
        try:
            operations = [CommitOperationAdd("race.txt", content)]
            api.create_commit("org/a", operations, commit_message="race", parent_commit=parent)
            outcomes.append(200)
        except HfHubHTTPError as error:
            outcomes.append(error.response.status_code)
        api.upload_file(path_or_fileobj=content * 100, path_in_repo=f"{number}.safetensors", repo_id="org/a")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [200] + [412] * 7
    assert {f"{number}.safetensors" for number in range(8)} <= set(hub_client.files("org/a"))


def test_paths_that_leave_the_repository_are_refused_from_clients_only(api: HfApi, hub: HubServer) -> None:
    hub.commit("org/a", {"../evil.txt": "x"})
    assert "../evil.txt" in api.list_repo_files("org/a")
    add = CommitOperationAdd("fine.txt", b"x")
    add.path_in_repo = "../evil2.txt"
    with pytest.raises(HfHubHTTPError, match="Invalid path"):
        api.create_commit("org/a", [add], commit_message="evil")
