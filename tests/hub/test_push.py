"""Push adapters to the loopback Hub."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_fixtures import client_of
from hub_server import Fault, HubServer
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.utils._runtime import is_xet_available
from small_adapters import small_adapter, tiny_llama

from finesteer_hf import SteeredModelForCausalLM, SteeringAdapter
from finesteer_hf.adapters.adapter import tensors_equal
from finesteer_hf.errors import PushConflictError, PushError
from finesteer_hf.hub import branches, push, push_adapter


FILES = {"steering_config.json", "steering_model.safetensors", "README.md"}


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (push, branches):
        monkeypatch.setattr(module, "PAUSES", (0.0, 0.0))


def card(hub: HubServer, repo_id: str, path: str = "README.md", revision: str = "main") -> ModelCard:
    return ModelCard(hub.files(repo_id, revision)[path].decode())


def weights(hub: HubServer, repo_id: str, revision: str = "main") -> bytes:
    return hub.files(repo_id, revision)["steering_model.safetensors"]


# What a push is


def test_a_push_is_one_commit_with_card_and_metadata(hub_client: HubServer) -> None:
    commit = small_adapter().push_to_hub("org/a", commit_message="First", commit_description="Why")
    made = hub_client.commits("org/a")
    assert [c.title for c in made] == ["First", "initial commit"]
    assert (made[0].message, made[0].sha) == ("Why", commit.oid)
    assert set(hub_client.files("org/a")) == FILES | {".gitattributes"}
    data = card(hub_client, "org/a").data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("finesteer_hf", "text-generation")
    assert (data["base_model"], data["base_model_relation"]) == ("org/tiny", "adapter")
    assert {"steering", "constant"} <= set(data["tags"])
    tags = HfApi().model_info("org/a").tags or []
    assert {"base_model:adapter:org/tiny", "finesteer_hf", "constant"} <= set(tags)
    assert 'steering="org/a"' in card(hub_client, "org/a").text


def test_versions_are_pulled_by_tag_branch_and_commit(hub_client: HubServer) -> None:
    one, two, three = (small_adapter(seed) for seed in range(3))
    first = one.push_to_hub("org/a", tag="v1")
    second = two.push_to_hub("org/a", tag="v2")
    third = three.push_to_hub("org/a", revision="next/idea")
    expected = {
        "org/a": two,
        "org/a@v1": one,
        "org/a@v2": two,
        f"org/a@{first.oid}": one,
        f"org/a@{second.oid}": two,
        "org/a@next/idea": three,
        f"org/a@{third.oid[:8]}": three,
    }
    for name, adapter in expected.items():
        pulled = SteeringAdapter.from_pretrained(name)
        assert tensors_equal(pulled.tensors, adapter.tensors), name
        assert pulled.config == adapter.config
    assert SteeringAdapter.from_pretrained("org/a", revision="v1").revision == first.oid
    assert set(hub_client.repo("org/a").branches) == {"main", "next/idea"}


def test_a_tag_that_exists_is_refused_before_the_commit(hub_client: HubServer) -> None:
    small_adapter(0).push_to_hub("org/a", tag="v1")
    before = hub_client.commits("org/a")
    with pytest.raises(ValueError, match=r"already has a tag 'v1'.*Nothing was pushed.*delete_tag"):
        small_adapter(1).push_to_hub("org/a", tag="v1")
    assert hub_client.commits("org/a") == before


def test_the_same_adapter_again_makes_no_commit_but_a_tag(hub_client: HubServer) -> None:
    first = small_adapter().push_to_hub("org/a", tag="v1")
    again = small_adapter().push_to_hub("org/a", tag="v1.0")
    assert again.oid == first.oid
    assert len(hub_client.commits("org/a")) == 2
    assert hub_client.repo("org/a").tags["v1.0"].sha == first.oid


def test_a_pull_request_leaves_the_branch_alone(hub: HubServer, tmp_path: Path) -> None:
    hub.add_user("guest", "hf_guest")
    with client_of(hub, tmp_path / "owner"):
        small_adapter(0).push_to_hub("org/a")
    head = hub.commits("org/a")[0]
    with client_of(hub, tmp_path / "guest", token="hf_guest"):
        with pytest.raises(PushError, match=r"does not let this token write to org/a.*create_pr=True"):
            small_adapter(1).push_to_hub("org/a")
        commit = small_adapter(1).push_to_hub("org/a", create_pr=True)
        assert commit.pr_revision == "refs/pr/1"
        pulled = SteeringAdapter.from_pretrained("org/a", revision="refs/pr/1")
        assert tensors_equal(pulled.tensors, small_adapter(1).tensors)
    assert hub.commits("org/a")[0] is head


def test_private_is_for_new_repos(hub_client: HubServer) -> None:
    small_adapter().push_to_hub("org/secret", private=True)
    assert hub_client.repo("org/secret").private
    small_adapter(1).push_to_hub("org/secret", private=True)
    small_adapter().push_to_hub("org/open")
    commits = hub_client.commits("org/open")
    with pytest.raises(ValueError, match=r"exists and is public.*update_repo_settings"):
        small_adapter(1).push_to_hub("org/open", private=True)
    assert hub_client.commits("org/open") == commits


def test_a_name_without_namespace_is_the_users_own(hub_client: HubServer, tmp_path: Path) -> None:
    small_adapter().save_pretrained(tmp_path / "mine", push_to_hub=True)
    assert FILES < set(hub_client.files("user/mine"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"repo_id": "org/a@v1"}, "is not a Hub id"),
        ({"repo_id": "../a"}, "Repo id must"),
        ({"tag": "v 1"}, "is not a valid name"),
        ({"tag": "a..b"}, "is not a valid name"),
        ({"revision": ""}, "is not a valid name"),
        ({"tag": "v1", "create_pr": True}, "merge the pull request first"),
        ({"subfolder": "../x"}, "inside the repo"),
        ({"subfolder": "/x"}, "inside the repo"),
        ({"subfolder": "x/"}, "inside the repo"),
    ],
)
def test_bad_arguments_are_refused_before_any_request(
    hub_client: HubServer, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        push_adapter(small_adapter(), **{"repo_id": "org/a", **arguments})
    assert not hub_client.requests.lines


def test_damaged_tensors_are_not_pushed(hub_client: HubServer) -> None:
    adapter = small_adapter()
    adapter.tensors["vectors.0"][3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        adapter.push_to_hub("org/a")
    assert not hub_client.requests.lines


def test_a_model_pushes_the_adapter_that_is_named(hub_client: HubServer) -> None:
    model = SteeredModelForCausalLM.from_model(tiny_llama(), steering={"a": small_adapter(1), "b": small_adapter(2)})
    with pytest.raises(ValueError, match=r"Name the adapter to push; loaded: \['a', 'b'\]"):
        model.push_steering_to_hub("org/a")
    commit = model.push_steering_to_hub("org/a", "b", tag="v1", revision="dev", subfolder="b")
    model.load_steering("org/a/b@v1", "c")
    assert model.steering_adapters["c"].revision == commit.oid
    assert tensors_equal(model.steering_adapters["c"].tensors, small_adapter(2).tensors)


# The card


def test_the_card_is_merged_into_the_repos_own(hub_client: HubServer) -> None:
    theirs = "---\nlicense: mit\ntags:\n- mine\n---\n# My adapters\n\nWritten by hand.\n"
    hub_client.commit("org/a", {"README.md": theirs, "notes.txt": "kept"})
    small_adapter(0).push_to_hub("org/a")
    small_adapter(1).push_to_hub("org/a")
    merged = card(hub_client, "org/a")
    assert merged.data.license == "mit"
    assert {"mine", "steering"} <= set(merged.data.tags or [])
    assert merged.text.count("finesteer_hf:start") == 1
    assert "# My adapters\n\nWritten by hand." in merged.text
    assert hub_client.files("org/a")["notes.txt"] == b"kept"


def test_a_card_that_cannot_be_read_is_not_changed(hub_client: HubServer) -> None:
    theirs = "---\n- a\n- list\n---\nText\n"
    hub_client.commit("org/a", {"README.md": theirs})
    with pytest.warns(UserWarning, match="left unchanged"):
        small_adapter().push_to_hub("org/a")
    assert "steering_config.json" in hub_client.files("org/a")
    assert hub_client.files("org/a")["README.md"].decode() == theirs


def test_a_base_that_is_not_on_the_hub_does_not_break_the_push(hub_client: HubServer, tmp_path: Path) -> None:
    small_adapter(base_model_name_or_path="playground", fit={"data": {"id": str(tmp_path)}}).push_to_hub("org/a")
    text = hub_client.files("org/a")["README.md"].decode()
    assert "base_model" not in yaml.safe_load(re.split(r"^---$", text, flags=re.M)[1])
    assert str(tmp_path.parent) not in text


def test_adapters_share_a_repo_in_folders(hub_client: HubServer) -> None:
    hub_client.commit("org/many", {"README.md": "# Mine\n"})
    small_adapter(0).push_to_hub("org/many", subfolder="true")
    small_adapter(1).push_to_hub("org/many", subfolder="kind/v2")
    assert {"true/README.md", "kind/v2/steering_config.json"} < set(hub_client.files("org/many"))
    root = card(hub_client, "org/many")
    assert root.data.base_model == "org/tiny" and root.text.strip() == "# Mine"
    assert 'steering="org/many/kind/v2"' in card(hub_client, "org/many", "kind/v2/README.md").text
    for name, kwargs in (
        ("org/many/kind/v2", {}),
        ("org/many", {"subfolder": "kind/v2"}),
        ("org/many/kind/v2@main", {}),
    ):
        pulled = SteeringAdapter.from_pretrained(name, **kwargs)
        assert tensors_equal(pulled.tensors, small_adapter(1).tensors)
    small_adapter(2).push_to_hub("org/many2", subfolder="x")
    assert "[x](x/README.md)" in card(hub_client, "org/many2").text


# Others, and accidents


def test_a_commit_of_other_files_is_not_in_the_way(hub_client: HubServer) -> None:
    small_adapter(0).push_to_hub("org/a")
    hub_client.faults.add(Fault("POST .*/commit/", "stale_parent"))
    commit = small_adapter(1).push_to_hub("org/a", tag="v2")
    assert [c.title for c in hub_client.commits("org/a")][1] == "Concurrent commit"
    assert "concurrent.txt" in hub_client.files("org/a", commit.oid)
    assert tensors_equal(SteeringAdapter.from_pretrained("org/a@v2").tensors, small_adapter(1).tensors)


def test_a_readme_that_changed_during_the_push_is_merged_again(
    hub_client: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_adapter(0).push_to_hub("org/a")
    send, calls = push._Push.send, []

    def after_somebody_else(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not calls:
            hub_client.commit("org/a", {"README.md": "---\nlicense: mit\n---\nA new text.\n"})
        calls.append(args)
        return send(self, *args, **kwargs)

    monkeypatch.setattr(push._Push, "send", after_somebody_else)
    small_adapter(1).push_to_hub("org/a")
    assert len(calls) == 2
    assert card(hub_client, "org/a").data.license == "mit" and "A new text." in card(hub_client, "org/a").text


def test_of_two_simultaneous_pushes_one_wins_and_the_other_gets_an_error(hub_client: HubServer) -> None:
    small_adapter(0).push_to_hub("org/a")
    # Both look at the same head; the slower commit arrives at a branch that has moved.
    hub_client.faults.add(Fault("POST .*/commit/", "slow", seconds=1.0))
    outcomes: dict[int, Any] = {}
    # Made here: their random numbers come from a generator that threads share.
    pushed = {seed: small_adapter(seed) for seed in (1, 2)}

    def client(seed: int) -> None:
        try:
            outcomes[seed] = pushed[seed].push_to_hub("org/a", tag=f"v{seed}")
        except Exception as error:
            outcomes[seed] = error

    adapters = [threading.Thread(target=client, args=(seed,)) for seed in (1, 2)]
    for thread in adapters:
        thread.start()
    for thread in adapters:
        thread.join()
    lost = [seed for seed, outcome in outcomes.items() if isinstance(outcome, Exception)]
    assert len(lost) == 1
    with pytest.raises(PushConflictError, match=r"Someone else pushed.*Nothing was pushed"):
        raise outcomes[lost[0]]
    won = 3 - lost[0]
    assert set(hub_client.repo("org/a").tags) == {f"v{won}"}
    assert len(hub_client.commits("org/a")) == 3
    assert tensors_equal(SteeringAdapter.from_pretrained("org/a").tensors, pushed[won].tensors)
    small_adapter(lost[0]).push_to_hub("org/a", tag=f"v{lost[0]}")
    assert len(hub_client.commits("org/a")) == 4


TRANSIENT = {
    "commit answers 503": Fault("POST .*/commit/", "status", status=503),
    "commit is dropped": Fault("POST .*/commit/", "drop"),
    "answer of the commit is lost": Fault("POST .*/commit/", "drop_after", bytes=0),
    "preupload answers 500": Fault("POST .*/preupload/", "status", status=500),
    "upload is dropped": Fault("PUT /lfs/", "drop_upload", bytes=10),
    "upload answers 500": Fault("PUT /lfs/", "status", status=500),
    "upload arrives by half": Fault("PUT /lfs/", "truncate_upload", bytes=100),
    "tag answers 500": Fault("POST .*/tag/", "status", status=500),
    "answer of the tag is lost": Fault("POST .*/tag/", "drop_after", bytes=0),
}


@pytest.mark.parametrize("fault", TRANSIENT.values(), ids=TRANSIENT)
def test_a_single_failure_is_retried(hub_client: HubServer, fault: Fault) -> None:
    small_adapter(0).push_to_hub("org/a")
    hub_client.faults.add(fault)
    commit = small_adapter(1).push_to_hub("org/a", tag="v2")
    assert not hub_client.faults.pending()
    assert hub_client.repo("org/a").tags["v2"].sha == commit.oid == hub_client.commits("org/a")[0].sha
    assert len(hub_client.commits("org/a")) == 3
    assert tensors_equal(SteeringAdapter.from_pretrained("org/a@v2").tensors, small_adapter(1).tensors)


LASTING = {
    "commit answers 503": Fault("POST .*/commit/", "status", status=503, times=None),
    "commit is dropped": Fault("POST .*/commit/", "drop", times=None),
    "upload answers 500": Fault("PUT /lfs/", "status", status=403, times=None),
    "upload arrives by half": Fault("PUT /lfs/", "truncate_upload", bytes=100, times=None),
    "commit is refused": Fault("POST .*/commit/", "status", status=403, times=None),
}


@pytest.mark.parametrize("fault", LASTING.values(), ids=LASTING)
def test_a_lasting_failure_is_reported_and_leaves_the_hub_unchanged(hub_client: HubServer, fault: Fault) -> None:
    small_adapter(0).push_to_hub("org/a", tag="v1")
    before = hub_client.files("org/a"), hub_client.commits("org/a")
    hub_client.faults.add(fault)
    with pytest.raises(PushError, match=r"[Nn]othing was pushed"):
        small_adapter(1).push_to_hub("org/a", tag="v2")
    assert (hub_client.files("org/a"), hub_client.commits("org/a")) == before
    assert set(hub_client.repo("org/a").tags) == {"v1"}
    assert tensors_equal(SteeringAdapter.from_pretrained("org/a").tensors, small_adapter(0).tensors)


def test_a_tag_that_cannot_be_created_is_reported_with_the_commit(hub_client: HubServer) -> None:
    hub_client.faults.add(Fault("POST .*/tag/", "status", status=500, times=None))
    with pytest.raises(PushError, match=r"was pushed to org/a as commit \w{40}, but the tag 'v1' was not created"):
        small_adapter().push_to_hub("org/a", tag="v1")
    assert FILES < set(hub_client.files("org/a"))


def test_round_trip_with_xet_turned_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The loopback Hub has no xet storage, so it takes every file inside the commit.
    with HubServer(lfs=()) as hub, client_of(hub, tmp_path / "home"):
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
        assert is_xet_available()
        commit = small_adapter().push_to_hub("org/a", tag="v1")
        pulled = SteeringAdapter.from_pretrained("org/a@v1")
        assert tensors_equal(pulled.tensors, small_adapter().tensors) and pulled.revision == commit.oid
        assert not hub.crashes
        assert hub.requests.count("xet") == 0
