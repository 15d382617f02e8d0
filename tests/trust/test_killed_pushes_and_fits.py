"""A push or a fit that is killed at any moment loses nothing and leaves nothing half done.

What is killed is a fork of this process: its imports are done, so that a random moment falls into the work itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_fixtures import forget_connections
from hub_server import Fault, HubServer
from small_adapters import small_adapter
from typer.testing import CliRunner

from finesteer_hf import SteeringAdapter
from finesteer_hf.adapters.adapter import tensors_equal
from finesteer_hf.cli.commands import app
from finesteer_hf.fitting.capture import store
from finesteer_hf.testing.toy import toy_general_prompts, toy_model, toy_preferences, toy_tokenizer


# Which kill of twenty; two of them are quick enough for every run.
MOMENTS = [number if number < 2 else pytest.param(number, marks=pytest.mark.slow) for number in range(20)]


class Child:
    """A fork that does something and ends."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.pid = os.fork()
        if not self.pid:
            code = 1
            with contextlib.suppress(BaseException):
                work()
                code = 0
            os._exit(code)

    def kill(self) -> bool:
        """Kill it; returns whether it was still running."""
        os.kill(self.pid, signal.SIGKILL)
        return os.WIFSIGNALED(os.waitpid(self.pid, 0)[1])

    def wait(self) -> None:
        assert os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]) == 0


def wait_until(happened: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# A push


@pytest.fixture
def folders(hub_client: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Two saved adapters, the older one pushed to `org/a`; leftovers of a killed process are removed with the test."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    folders = {}
    for number, name in enumerate(("old", "new")):
        adapter = small_adapter(number, fit={"about": f"This is the {name} adapter."})
        folders[name] = adapter.save_pretrained(tmp_path / name)
    push(folders["old"])
    return folders


def push(folder: Path, **kwargs: Any) -> Any:
    forget_connections()
    return SteeringAdapter.from_pretrained(folder).push_to_hub("org/a", **kwargs)


def version_there(hub: HubServer, folders: dict[str, Path]) -> str:
    """Which of the adapters `org/a` holds; every file has to be that one's."""
    forget_connections()
    there = SteeringAdapter.from_pretrained("org/a", force_download=True)
    [name] = [
        n
        for n, folder in folders.items()
        if tensors_equal(SteeringAdapter.from_pretrained(folder).tensors, there.tensors)
    ]
    files = hub.files("org/a")
    for file in ("steering_config.json", "steering_model.safetensors"):
        assert files[file] == (folders[name] / file).read_bytes()
    assert f"This is the {name} adapter." in files["README.md"].decode()
    return name


# The upload of the tensors, the commit that takes everything, the tag that names it; and what the repo may hold then. A
# commit that has arrived whole has its effect, whether or not its client is there to hear of it.
STEPS = {"PUT /lfs/": {"old"}, "POST .*/commit/": {"old", "new"}, "POST .*/tag/": {"new"}}


@pytest.mark.parametrize("step", STEPS)
def test_a_push_killed_at_a_step_leaves_one_adapter_or_the_other(
    hub_client: HubServer, folders: dict[str, Path], step: str
) -> None:
    before = {name: contents(folder) for name, folder in folders.items()}
    hub_client.faults.add(Fault(step, "slow", seconds=0.3))
    hub_client.requests.clear()
    child = Child(lambda: push(folders["new"], tag="v2"))
    wait_until(lambda: hub_client.requests.count(step))
    assert child.kill()
    assert version_there(hub_client, folders) in ("old", "new")
    time.sleep(0.6)
    assert version_there(hub_client, folders) in STEPS[step]
    assert {name: contents(folder) for name, folder in folders.items()} == before
    # Whatever the killed push has left, the next one goes through, and no commit is made twice.
    tagged = "v2" in hub_client.repo("org/a").tags
    push(folders["new"], tag=None if tagged else "v2")
    assert version_there(hub_client, folders) == "new" and len(hub_client.commits("org/a")) == 3
    assert hub_client.repo("org/a").tags["v2"].sha == hub_client.commits("org/a")[0].sha


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_push_killed_at_a_random_moment_leaves_one_adapter_or_the_other(
    hub_client: HubServer, folders: dict[str, Path], moment: int
) -> None:
    before = {name: contents(folder) for name, folder in folders.items()}
    started = time.monotonic()
    Child(lambda: push(folders["new"])).wait()
    duration = time.monotonic() - started
    assert version_there(hub_client, folders) == "new"
    child = Child(lambda: push(folders["old"]))
    time.sleep(random.Random(moment).uniform(0.05, 0.95) * duration)
    child.kill()
    there = version_there(hub_client, folders)
    # A commit that had arrived when its client died may take effect a moment later.
    time.sleep(0.1)
    assert there == "new" or version_there(hub_client, folders) == "old"
    assert {name: contents(folder) for name, folder in folders.items()} == before
    push(folders["old"])
    assert version_there(hub_client, folders) == "old" and len(hub_client.commits("org/a")) == 4


# A fit


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of `finesteer fit`, without its folders; the store writes a shard for every forward."""
    monkeypatch.setattr(store, "SHARD_SECONDS", 0.0)
    toy_model().save_pretrained(tmp_path / "base")
    toy_tokenizer().save_pretrained(tmp_path / "base")
    rows, general = tmp_path / "rows.jsonl", tmp_path / "general.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in toy_preferences()))
    general.write_text("\n".join(json.dumps(row) for row in toy_general_prompts()))
    # Small forwards, so that there are some to be killed between.
    settings = {"layer": 1, "experts": "reduced_rank", "residual_rank": 2, "gate_score": "state", "strength": 4.0}
    given = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    return [
        "fit",
        str(tmp_path / "base"),
        str(rows),
        "--general",
        str(general),
        "--batch-size",
        "4",
        "--no-progress",
        *given,
    ]


def fit(arguments: list[str], out: Path, states: Path) -> None:
    result = CliRunner().invoke(app, [*arguments, "--out", str(out), "--store", str(states)])
    assert result.exit_code == 0, result.output


def fitted(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and config of an adapter, without its fit's time and counts."""
    adapter = SteeringAdapter.from_pretrained(folder)
    config = adapter.config.to_dict()
    config["fit"] = {name: value for name, value in config["fit"].items() if name not in ("seconds", "capture")}
    return adapter.tensors, config


def shards_of(states: Path) -> list[Path]:
    return list(states.glob("*/shard-*.safetensors"))


def assert_close(got: Any, want: Any, at: str = "adapter") -> None:
    """Compare two adapters' contents: numbers up to rounding, all else exactly."""
    if isinstance(want, torch.Tensor) or type(want) is float:
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5, msg=lambda text: f"{at}: {text}")
    elif isinstance(want, dict):
        assert got.keys() == want.keys(), at
        for key, value in want.items():
            assert_close(got[key], value, f"{at}.{key}")
    elif isinstance(want, list):
        assert len(got) == len(want), at
        for number, value in enumerate(want):
            assert_close(got[number], value, f"{at}[{number}]")
    else:
        assert got == want, at


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_fit_killed_at_random_moments_ends_as_one_that_was_left_alone(
    arguments: list[str], tmp_path: Path, moment: int
) -> None:
    old = small_adapter()
    out = old.save_pretrained(tmp_path / "out")
    started = time.monotonic()
    Child(lambda: fit(arguments, tmp_path / "whole", tmp_path / "whole-states")).wait()
    duration = time.monotonic() - started
    want_tensors, want_config = fitted(tmp_path / "whole")
    shards, chance = len(shards_of(tmp_path / "whole-states")), random.Random(moment)
    assert shards > 20
    for number in range(2):
        child = Child(lambda: fit(arguments, out, tmp_path / "states"))
        if number == 0:
            # In the midst of the capture, which is a small part of the time.
            some = chance.randrange(1, shards)
            wait_until(lambda some=some: len(shards_of(tmp_path / "states")) >= some)  # type: ignore[misc]
        else:
            time.sleep(chance.uniform(0.05, 0.95) * duration)
        child.kill()
        # What was saved there before counts until the new adapter is whole.
        tensors = SteeringAdapter.from_pretrained(out).tensors
        assert tensors_equal(tensors, old.tensors) or tensors.keys() == want_tensors.keys()
    Child(lambda: fit(arguments, out, tmp_path / "states")).wait()
    tensors, config = fitted(out)
    # What is left of a killed capture is read in other batches, which round otherwise.
    assert_close(tensors, want_tensors)
    assert_close(config, want_config)
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}
