"""Adapters at run time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from server_toys import ADAPTERS, Served, serving, toy_engine

from finesteer_hf import SteeringAdapter
from finesteer_hf.methods.angular import AngularConfig
from finesteer_hf.serving.http.app import ServerSettings
from finesteer_hf.serving.http.guard import Keys


pytestmark = pytest.mark.filterwarnings("ignore:Steering adapter .* fitted on")
TOKEN = {"Authorization": "Bearer admin-token"}


@contextlib.contextmanager
def toy_server(folders: dict[str, Path]) -> Iterator[Served]:
    settings = ServerSettings("toy", {"a": 2.0})
    with serving(toy_engine({"a": folders["one"]}), settings, Keys("api-key", "admin-token")) as served:
        yield served


@pytest.fixture(scope="module")
def toy(toy_folders: dict[str, Path]) -> Iterator[Served]:
    """A server whose adapters stay as they are."""
    with toy_server(toy_folders) as served:
        yield served


@pytest.fixture
def fresh(toy_folders: dict[str, Path]) -> Iterator[Served]:
    """A server of one test's own."""
    with toy_server(toy_folders) as served:
        yield served


def say(served: Served, model: str, **fields: Any) -> Any:
    answer = served.client("api-key").chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "sun1 sea2"}],
        max_tokens=12,
        temperature=0,
        extra_body=fields,
    )
    return answer.choices[0].message.content, answer.steering


def test_versions_come_and_go(fresh: Served, toy_folders: dict[str, Path]) -> None:
    one, two = str(toy_folders["one"]), str(toy_folders["two"])
    with fresh.http(headers=TOKEN) as admin:
        first, said = say(fresh, "toy:a")
        assert said["a"]["version"] == "v1"
        made = admin.post("/admin/adapters", json={"name": "a", "source": two})
        assert (made.status_code, made.json()["version"], made.json()["current"]) == (201, "v2", True)
        second, said = say(fresh, "toy:a")
        assert said["a"]["version"] == "v2" and second != first
        assert say(fresh, "toy:a@v1")[0] == first
        # A name and a field that mean the same adapter agree.
        assert say(fresh, "toy:a", steering="a@v2")[0] == second
        with pytest.raises(Exception, match="give one"):
            say(fresh, "toy:a", steering="a@v1")
        # Another version in place of the current one: the current one goes.
        put = admin.put("/admin/adapters/a", json={"source": one, "version": "final"})
        assert put.status_code == 200
        listed = admin.get("/admin/adapters").json()["adapters"]
        assert [(each["name"], each["version"], each["current"]) for each in listed] == [
            ("a", "v1", False),
            ("a", "final", True),
        ]
        assert say(fresh, "toy:a@final")[0] == first
        # The same label again: replaced where it stands.
        assert admin.put("/admin/adapters/a", json={"source": two, "version": "final"}).status_code == 200
        assert say(fresh, "toy:a@final")[0] == second
        assert admin.delete("/admin/adapters/a@final").json() == {"dropped": ["a@final"]}
        assert say(fresh, "toy:a")[1]["a"]["version"] == "v1"
        assert admin.delete("/admin/adapters/a").status_code == 200
        assert fresh.engine.model.steering_adapters == {}
        assert admin.delete("/admin/adapters/a").status_code == 404
        assert admin.put("/admin/adapters/a", json={"source": one}).status_code == 404


def test_the_default_is_for_the_base_name_alone(toy: Served) -> None:
    _, said = say(toy, "toy")
    assert said["a"]["scale"] == 2.0
    assert say(toy, "toy", steering_scale=0.5)[1]["a"]["scale"] == 1.0
    assert say(toy, "toy:a")[1]["a"]["scale"] == 1.0
    text, said = say(toy, "toy", steering=None)
    assert said == {} and text != say(toy, "toy")[0]


@pytest.mark.parametrize(
    ("body", "status", "match"),
    [
        ({"name": "a", "source": "no/such folder"}, 400, ""),
        ({"name": "a"}, 400, "source"),
        ({"name": "a b", "source": "{one}"}, 400, "cannot be an adapter's name"),
        ({"name": "a:b", "source": "{one}"}, 400, "cannot be an adapter's name"),
        ({"name": "b", "source": "{one}", "version": "1/2"}, 400, "cannot be an adapter's name"),
        ({"name": "a", "source": "{one}", "version": "v1"}, 409, "is loaded already"),
        ({"name": "b", "source": "{one}", "extra": 1}, 400, "Unknown field"),
        ({"name": "b", "source": "{other}"}, 400, ""),
        ({"name": "b", "source": "{angular}"}, 400, "cannot be served"),
    ],
)
def test_what_cannot_be_loaded_changes_nothing(
    toy: Served, toy_folders: dict[str, Path], tmp_path: Path, body: dict[str, Any], status: int, match: str
) -> None:
    facts = {"hidden_size": 32, "num_hidden_layers": 3, "base_model_name_or_path": "local:toy", "strength": 1.0}
    config = AngularConfig(layers=[1], angle=30.0, **facts)
    SteeringAdapter(config, {"plane": torch.eye(2, 32)}).save_pretrained(tmp_path)
    places = {"one": toy_folders["one"], "other": ADAPTERS["truthful"], "angular": tmp_path}
    body = {key: value.format(**places) if isinstance(value, str) else value for key, value in body.items()}
    with toy.http(headers=TOKEN) as admin:
        answer = admin.post("/admin/adapters", json=body)
        assert answer.status_code == status, answer.text
        assert match in answer.json()["error"]["message"]
        assert [each["version"] for each in admin.get("/admin/adapters").json()["adapters"]] == ["v1"]
    assert list(toy.engine.model.steering_adapters) == ["a@v1"]


def test_keys(toy: Served) -> None:
    def status(path: str, key: str | None) -> int:
        headers = {} if key is None else {"Authorization": key}
        with toy.http() as client:
            return client.get(path, headers=headers).status_code

    for key in (None, "Bearer", "Bearer wrong", "Basic api-key", "Bearer api-keys", "Bearer admin-token"):
        assert status("/v1/models", key) == 401
    assert status("/v1/models", "Bearer api-key") == status("/v1/models", "bearer api-key") == 200
    for key in (None, "Bearer api-key", "Bearer wrong"):
        assert status("/admin/adapters", key) == 401
    assert status("/health", None) == status("/ready", None) == status("/metrics", None) == 200
    answer = httpx.post(f"{toy.url}/v1/completions", headers={"Authorization": b"Bearer \xff"}, trust_env=False)
    assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"


def test_administration_is_off_without_a_token(toy_folders: dict[str, Path]) -> None:
    with serving(toy_engine({}), ServerSettings("toy")) as served, served.http() as client:
        answer = client.post("/admin/adapters", json={"name": "a", "source": "x"}, headers=TOKEN)
        assert answer.status_code == 403
        assert "FINESTEER_ADMIN_TOKEN" in answer.json()["error"]["message"]


def test_empty_keys_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINESTEER_API_KEY", "")
    with pytest.raises(ValueError, match="FINESTEER_API_KEY is set and empty"):
        Keys.from_environment()
    monkeypatch.setenv("FINESTEER_API_KEY", "secret-key")
    keys = Keys.from_environment()
    assert (keys.api, keys.admin) == ("secret-key", None)
    assert "secret" not in repr(keys)


def test_a_damaged_adapter_is_refused(toy: Served, toy_folders: dict[str, Path], tmp_path: Path) -> None:
    adapter = SteeringAdapter.from_pretrained(str(toy_folders["one"]))
    adapter.save_pretrained(tmp_path)
    (tmp_path / "steering_model.safetensors").write_bytes(b"\0" * 100)
    with toy.http(headers=TOKEN) as admin:
        answer = admin.post("/admin/adapters", json={"name": "b", "source": str(tmp_path)})
    assert answer.status_code == 400
