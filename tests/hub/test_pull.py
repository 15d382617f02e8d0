"""Load adapters from the loopback Hub: which requests, which commit, which errors."""

from __future__ import annotations

import runpy
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hub_fixtures import client_of
from hub_server import HubServer
from huggingface_hub import constants
from small_adapters import LAYERS, PROMPT, small_adapter, tiny_llama, tokens_of

import finesteer_hf
from finesteer_hf import SteeredModelForCausalLM, SteeringAdapter, SteeringConfig
from finesteer_hf.adapters.adapter import tensors_equal
from finesteer_hf.errors import NoAdapterError
from finesteer_hf.hub import integrity
from finesteer_hf.hub.generate_code import write_custom_generate


@contextmanager
def requests_of(hub: HubServer) -> Iterator[list[str]]:
    """The requests that a block makes."""
    hub.requests.clear()
    lines: list[str] = []
    yield lines
    lines += hub.requests.lines


def load(name: str, **kwargs: Any) -> SteeringAdapter:
    return SteeringAdapter.from_pretrained(name, **kwargs)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity, "PAUSE", 0.0)


# Requests


def test_requests_of_cold_warm_and_offline_loads(repo: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with requests_of(repo) as cold:
        adapter = load("org/a@v1")
    commit = repo.repo("org/a").tags["v1"].sha
    config, weights = "steering_config.json", "steering_model.safetensors"
    assert cold == [
        f"HEAD /org/a/resolve/v1/{config}",
        f"GET /org/a/resolve/v1/{config}",
        f"HEAD /org/a/resolve/{commit}/{weights}",
        f"GET /org/a/resolve/{commit}/{weights}",
    ]
    with requests_of(repo) as warm:
        again = load("org/a@v1")
    assert warm == [f"HEAD /org/a/resolve/v1/{config}"]
    with requests_of(repo) as none:
        load(f"org/a@{commit}")
        load("org/a", revision=commit)
        load("org/a@v1", local_files_only=True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        offline = load("org/a@v1")
    assert none == []
    assert adapter.revision == again.revision == offline.revision == commit


def test_a_config_alone_takes_no_weights(repo: HubServer) -> None:
    with requests_of(repo) as lines:
        config = SteeringConfig.from_pretrained("org/a", revision="v1")
    assert config.steering_type == "CONSTANT" and len(lines) == 2
    assert not any("safetensors" in line for line in lines)


def test_a_model_and_its_adapter_without_requests(repo: HubServer, tmp_path: Path) -> None:
    tiny_llama().push_to_hub("org/tiny")
    first = SteeredModelForCausalLM.from_pretrained("org/tiny", steering="org/a@v1")
    with requests_of(repo) as lines:
        second = SteeredModelForCausalLM.from_pretrained("org/tiny", steering="org/a@v1", local_files_only=True)
    assert lines == []
    assert tokens_of(first) == tokens_of(second)


# One commit


def test_every_file_comes_from_the_commit_of_the_config(repo: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from finesteer_hf.hub import pull

    before = repo.repo("org/a").resolve("main").sha
    download = pull.download

    def while_somebody_pushes(repo_id: str, path: str, **kwargs: Any) -> Path:
        local = download(repo_id, path, **kwargs)
        if path == "steering_config.json":
            files = {name: repo.files("org/a", "v1")[name] for name in ("steering_model.safetensors", path)}
            repo.commit("org/a", files, message="meanwhile")
        return local

    monkeypatch.setattr(pull, "download", while_somebody_pushes)
    adapter = load("org/a")
    assert adapter.revision == before != repo.commits("org/a")[0].sha
    assert tensors_equal(adapter.tensors, small_adapter(2).tensors)


def test_status_and_report_say_where_it_came_from(repo: HubServer) -> None:
    model = SteeredModelForCausalLM.from_model(tiny_llama())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = model.load_steering("org/a@v1", "first")
    commit = repo.repo("org/a").tags["v1"].sha
    assert report.revision == commit
    status = model.steering_status()
    assert (status.adapters[0].source, status.adapters[0].revision) == ("org/a@v1", commit)
    assert f"from org/a@v1 (commit {commit[:12]})" in str(status)


def test_the_revision_of_the_base_is_not_the_adapters(repo: HubServer) -> None:
    tiny_llama(0).push_to_hub("org/tiny")
    tagged = repo.commits("org/tiny")[0].sha
    repo.tag("org/tiny", "base-1")
    tiny_llama(1).push_to_hub("org/tiny")
    model = SteeredModelForCausalLM.from_pretrained(
        "org/tiny", revision="base-1", steering="org/a", steering_revision="v1"
    )
    assert tokens_of(model, steering=None) == tokens_of(tiny_llama(0)) != tokens_of(tiny_llama(1))
    assert tensors_equal(model.steering_adapters["default"].tensors, small_adapter(1).tensors)
    # Without a model_id: the base that the adapter names, at the commit that it names.
    small_adapter(3, base_model_revision=tagged).push_to_hub("org/b")
    model = SteeredModelForCausalLM.from_pretrained(None, steering="org/b")
    assert tokens_of(model, steering=None) == tokens_of(tiny_llama(0))
    assert tokens_of(model) != tokens_of(tiny_llama(0))


# Errors that teach


def test_what_is_missing_is_named_with_what_exists(
    repo: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small_adapter().push_to_hub("org/many", subfolder="true")
    small_adapter().push_to_hub("org/many", subfolder="kind")
    repo.commit("org/lora", {"adapter_config.json": "{}"})
    repo.commit("org/model", {"config.json": "{}"})
    repo.commit("org/other", {"notes.txt": "none"})
    expected = {
        "org/none": r"no repo 'org/none' on the Hub, or it is private and this token may not read it",
        "org/a@v3": r"org/a has no revision 'v3'\. Tags: 'v1', 'v2'; branches: 'main'",
        "org/many": r"Steering adapters in it: 'kind', 'true'; give subfolder=",
        "org/many/false": r"org/many/false has no steering adapter.*'kind', 'true'",
        "org/lora": r"holds a PEFT adapter: load that with AutoModelForCausalLM",
        "org/model": r"holds a model: give it as the model",
        "org/other": r"Files in it: '\.gitattributes', 'notes\.txt'",
        "/no/such/folder": r"no folder '/no/such/folder', and it is not a Hub id",
        "../x": r"no folder '\.\./x'",
        "./org/a": r"no folder",
        "a b": r"no folder",
    }
    for name, message in expected.items():
        with pytest.raises(FileNotFoundError, match=message):
            load(name)
    with pytest.raises(NoAdapterError, match=r"not in the cache, and local_files_only=True"):
        load("org/other", local_files_only=True)


def test_private_repos_need_a_token(hub: HubServer, tmp_path: Path) -> None:
    with client_of(hub, tmp_path / "owner"):
        small_adapter().push_to_hub("org/secret", private=True)
    hub.add_user("guest", "hf_guest")
    with client_of(hub, tmp_path / "visitor", token=""):
        with pytest.raises(NoAdapterError, match=r"private and no token was sent.*hf auth login"):
            load("org/secret")
        assert load("org/secret", token=hub.token).revision
    with client_of(hub, tmp_path / "guest", token="hf_guest"):
        with pytest.raises(NoAdapterError, match=r"this token may not read it"):
            load("org/secret")


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("org/a@v1", {"revision": "v2"}, "names revision 'v1', but revision='v2' was given"),
        ("org/a@", {}, "ends in '@'"),
        ("org/a", {"revision": "a b"}, "is not a valid name"),
        ("org/a", {"subfolder": "../../x"}, "inside the repo"),
        ("org/a/x", {"subfolder": "y"}, "names folder 'x'"),
    ],
)
def test_arguments_that_contradict_are_refused_before_any_request(
    hub_client: HubServer, name: str, kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(name, **kwargs)
    assert not hub_client.requests.lines


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    small_adapter().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no revisions"):
        load(str(tmp_path), revision="v1")


# Swap


def test_a_newer_revision_takes_the_place_of_a_running_one(repo: HubServer) -> None:
    model = SteeredModelForCausalLM.from_model(tiny_llama(), steering={"a": load("org/a@v1")})
    old = tokens_of(model)
    handles = {site: (hook, handle) for site, (hook, handle) in model._steering.site_hooks.items()}
    texts = []

    class SwapMidway:
        """A streamer: it is called between two tokens of a call in flight."""

        def put(self, value: Any) -> None:
            texts.append(value)
            if len(texts) == 3:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    model.load_steering("org/a@v2", "a")

        def end(self) -> None:
            pass

    assert tokens_of(model, streamer=SwapMidway()) == old
    assert model.active_steering == {"a": 1.0}
    new = tokens_of(model)
    fresh = SteeredModelForCausalLM.from_model(tiny_llama(), steering=load("org/a@v2"))
    assert new == tokens_of(fresh) != old
    # The same hooks: a compiled graph that goes through them stays what it is.
    assert all(model._steering.site_hooks[site] == pair for site, pair in handles.items())
    assert len(model._steering.site_hooks) == LAYERS
    assert [hook.references for hook, _ in model._steering.site_hooks.values()] == [1] * LAYERS


def test_adapters_are_found_by_base_method_and_author(repo: HubServer) -> None:
    small_adapter().push_to_hub("user/b")
    small_adapter(base_model_name_or_path="org/large").push_to_hub("org/c")
    small_adapter().push_to_hub("org/d", private=True)
    repo.commit("org/lora", {"README.md": "---\nbase_model: org/tiny\nbase_model_relation: adapter\n---\n"})

    def names(*args: Any, **kwargs: Any) -> set[str]:
        return {found.repo_id for found in finesteer_hf.list_adapters(*args, **kwargs)}

    assert names("org/tiny") == {"org/a", "user/b", "org/d"}
    assert names("org/tiny", token=False) == {"org/a", "user/b"}
    assert names("org/large") == {"org/c"} and names("org/none") == set()
    assert names(author="org", method="CONSTANT") == {"org/a", "org/c", "org/d"}
    assert names(method="FINESTEER") == set()
    assert len(finesteer_hf.list_adapters(limit=2)) == 2
    [found] = finesteer_hf.list_adapters("org/large")
    assert (found.base_models, found.private) == (("org/large",), False)
    assert "constant" in found.tags
    with pytest.raises(ValueError, match="not a Hub id"):
        finesteer_hf.list_adapters("/home/me/model")


# One repo, two lives


def test_a_lora_and_a_steering_adapter_share_a_repo(repo: HubServer) -> None:
    from peft import LoraConfig, get_peft_model

    tiny_llama().push_to_hub("org/tiny")
    base = SteeredModelForCausalLM.from_pretrained("org/tiny")
    tuned = get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    tuned.push_to_hub("org/both")
    before = set(repo.files("org/both"))
    small_adapter(lora=["default"]).push_to_hub("org/both", tag="v1")
    assert before < set(repo.files("org/both"))
    model = SteeredModelForCausalLM.from_pretrained("org/both", steering="org/both@v1")
    tuned.load_steering(small_adapter(lora=["default"]), "x")
    assert tokens_of(model) == tokens_of(tuned, steering="x")
    assert tokens_of(model, steering=None) == tokens_of(tuned, steering=None) != tokens_of(tiny_llama())


def test_plain_transformers_steers_with_the_repos_own_code(repo: HubServer, tmp_path: Path) -> None:
    small_adapter(7).push_to_hub("org/code", custom_generate=True, tag="v1")
    assert b"ADAPTER = 'org/code'" in repo.files("org/code")["custom_generate/generate.py"]
    model = tiny_llama()
    plain, base_class = tokens_of(model), type(model)
    steered = SteeredModelForCausalLM.from_model(tiny_llama(), steering=small_adapter(7))
    custom = {"custom_generate": "org/code", "trust_remote_code": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert tokens_of(model, **custom) == tokens_of(steered) != plain
        assert tokens_of(model, steering_scale=0.5, **custom) == tokens_of(steered, steering_scale=0.5)
        assert tokens_of(model, steering_scale=-2.0, revision="v1", **custom) == tokens_of(
            steered, steering_scale=-2.0
        )
    assert tokens_of(model) == plain and type(model) is base_class
    with pytest.raises(ValueError, match=r"already steered.*load_steering"):
        tokens_of(steered, **custom)
    # A folder does not know its name on the Hub.
    small_adapter(7).save_pretrained(tmp_path / "saved", custom_generate=True)
    local = {"custom_generate": str(tmp_path / "saved"), "trust_remote_code": True}
    with pytest.raises(ValueError, match="Name the adapter"):
        tokens_of(model, **local)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert tokens_of(model, steering_adapter=str(tmp_path / "saved"), **local) == tokens_of(steered)
    assert PROMPT.shape == (1, 4)


def test_code_without_the_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_custom_generate(tmp_path, "org/a")
    assert path.relative_to(tmp_path).as_posix() == "custom_generate/generate.py"
    names = runpy.run_path(str(path))
    assert names["ADAPTER"] == "org/a"
    monkeypatch.setitem(sys.modules, "finesteer_hf.custom_generate", None)
    with pytest.raises(ImportError, match=r"pip install finesteer-hf"):
        names["generate"](None)
