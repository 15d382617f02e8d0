"""A save that is killed, out of space or has unusual figures loses nothing; files follow the umask."""

from __future__ import annotations

import math
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_adapters import small_adapter

from finesteer_hf import SteeredModelForCausalLM, SteeringAdapter, SteeringConfig
from finesteer_hf.adapters.adapter import tensors_equal
from finesteer_hf.adapters.staging import replacing
from finesteer_hf.errors import AdapterFileError


TESTS = Path(__file__).resolve().parents[1]

# One process forks savers and kills each: first at every single step of a save, then at random times.
KILLER = """
import os, random, shutil, signal, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from small_adapters import small_adapter
from finesteer_hf import SteeringAdapter
from finesteer_hf.adapters.adapter import tensors_equal

folder = Path(sys.argv[1])
reports = {{"dose_response": [], "r2": 0.5}}
old, new = small_adapter(1, fit={{"report": reports}}), small_adapter(2)
old.save_pretrained(folder)
random.seed(0)
STEPS = ("replace", "unlink", "open", "mkdir", "rmdir", "fsync")


def die_at(step):
    count = 0
    def wrapped(real):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return call
    for name in STEPS:
        setattr(os, name, wrapped(getattr(os, name)))


def check(allowed):
    found = SteeringAdapter.from_pretrained(folder)
    assert any(tensors_equal(found.tensors, one.tensors) and found.config.fit == one.config.fit for one in allowed)


def leftovers():
    names = {{path.name for path in folder.iterdir()}}
    return names - {{"README.md", "steering_config.json", "steering_model.safetensors"}}


def killed(body):
    child = os.fork()
    if child == 0:
        body()
        os._exit(0)
    return child


deaths = 0
for step in range(1, 200):
    old.save_pretrained(folder)
    assert not leftovers(), leftovers()
    child = killed(lambda: (die_at(step), new.save_pretrained(folder)))
    status = os.waitpid(child, 0)[1]
    check([old, new])
    if not os.WIFSIGNALED(status):
        break
    deaths += 1
    # Saved again straight after the kill, without a sound save between.
    second = killed(lambda: (die_at(step), new.save_pretrained(folder)))
    os.waitpid(second, 0)
    check([old, new])
assert 10 < deaths < 199, deaths
check([new])


def forever():
    while True:
        new.save_pretrained(folder)
        old.save_pretrained(folder)


for _ in range(20):
    child = killed(forever)
    time.sleep(random.uniform(0.001, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    check([old, new])
old.save_pretrained(folder)
check([old])
assert not leftovers(), leftovers()
print(deaths, "steps")
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_loses_nothing(tmp_path: Path) -> None:
    script = KILLER.format(tests=str(TESTS))
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "adapter")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("steps")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="mounts are a matter of Linux")
def test_a_full_disk_is_reported_and_leaves_the_old_files(small_disk: Path) -> None:
    folder = small_adapter().save_pretrained(small_disk / "adapter")
    before = contents(small_disk)
    large = small_adapter()
    large.config.hidden_size = 1 << 16
    large.tensors = {name: torch.ones(1 << 16) for name in large.tensors}
    card = small_adapter(fit={"note": [str(number) for number in range(60_000)]})
    # The tensors do not fit, the config does not, and not one file more does.
    for adapter, target in ((large, folder), (card, folder), (large, small_disk / "new")):
        with pytest.raises(OSError, match=r"No space left to save in .*; the files there are unchanged"):
            adapter.save_pretrained(target)
        assert contents(small_disk) == before and not (small_disk / "new").exists()
    with (small_disk / "ballast").open("wb", buffering=0) as ballast, pytest.raises(OSError, match="No space left"):
        while True:
            ballast.write(b"x" * 512)
    before = contents(small_disk)
    with pytest.raises(OSError, match="the files there are unchanged"):
        small_adapter(1).save_pretrained(folder)
    assert contents(small_disk) == before
    assert tensors_equal(SteeringAdapter.from_pretrained(folder).tensors, small_adapter().tensors)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_mode_of_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        folder = small_adapter(fit={"report": {"gate_scores": {"ir": [1.0], "general": [0.0]}}}).save_pretrained(
            tmp_path / "a", custom_generate=True
        )
        with replacing(tmp_path / "b.txt") as path:
            path.write_text("x")
    finally:
        os.umask(before)
    files = [path for path in (*folder.rglob("*"), tmp_path / "b.txt") if path.is_file()]
    assert len(files) == 6 and {stat.S_IMODE(path.stat().st_mode) for path in files} == {mode}


ODD = [
    {"report": 5},
    {"report": []},
    {"report": {"dose_response": 3}},
    {"report": {"dose_response": [1, 2]}},
    {"report": {"dose_response": [{"strength": "x"}]}},
    {"report": {"gate_scores": [1]}},
    {"report": {"gate_scores": {"ir": "a", "general": None}}},
    {"report": {"gate_scores": {}}},
    {"report": {"objective": 3, "dose_response": []}},
    {"report": {"share": {"k": None, "n": "x", "value": "y", "low": [], "high": {}}}},
    {"evaluation": 3},
    {"evaluation": {"a": 1}},
    {"evaluation": [None, 3, {"metric": 4}]},
    {"evaluation": [{"dataset": 1, "metric": None, "steered": 5, "unsteered": "x", "p_value": "small"}]},
    {"evaluation": [{"dataset": "d", "metric": "m", "steered": {"value": "x", "low": 1, "high": 2}}]},
    {"data": "here", "eval_data": [], "general_data": {"id": 3}},
]


@pytest.mark.parametrize("fit", ODD, ids=str)
def test_unusual_figures_are_saved_and_shown_as_they_are(tmp_path: Path, fit: dict[str, Any]) -> None:
    folder = small_adapter(fit=fit).save_pretrained(tmp_path / "a")
    assert SteeringAdapter.from_pretrained(folder).config.fit == fit
    assert "# CONSTANT steering adapter" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, {1, 2}, torch.ones(2), b"x", {"a": {1: {2: ...}}}, {("a",): 1}, "\ud800"],
    ids=repr,
)
def test_values_without_a_json_form_are_refused_before_anything_is_written(tmp_path: Path, value: Any) -> None:
    folder = small_adapter().save_pretrained(tmp_path / "a")
    before = contents(folder)
    for target in (folder, tmp_path / "new"):
        with pytest.raises(AdapterFileError, match=r"fit.*cannot be written as JSON"):
            small_adapter(1, fit={"odd": value}).save_pretrained(target)
    assert contents(folder) == before and not (tmp_path / "new").exists()


def test_saves_of_several_threads_do_not_mix(tmp_path: Path) -> None:
    adapters = [small_adapter(seed) for seed in range(4)]
    threads = [
        threading.Thread(target=lambda a=a: [a.save_pretrained(tmp_path / "a") for _ in range(5)]) for a in adapters
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = SteeringAdapter.from_pretrained(tmp_path / "a")
    assert any(tensors_equal(found.tensors, one.tensors) for one in adapters)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "README.md",
        "steering_config.json",
        "steering_model.safetensors",
    }


def test_a_save_does_not_wait_forever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finesteer_hf.adapters import staging

    folder = small_adapter().save_pretrained(tmp_path / "a")
    with staging.Staging(folder) as other:
        # As a process would that was forked while a save was under way, and outlives it.
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        monkeypatch.setattr(staging, "PATIENCE", 0.1)
        small_adapter(1).save_pretrained(folder)
        assert other.folder.is_dir()
    try:
        monkeypatch.setattr(staging, "PATIENCE", 30.0)
        small_adapter(2).save_pretrained(folder)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert tensors_equal(SteeringAdapter.from_pretrained(folder).tensors, small_adapter(2).tensors)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_config_alone_is_saved_at_once_too(tmp_path: Path) -> None:
    path = small_adapter().config.save_pretrained(tmp_path / "deep" / "folder")
    assert SteeringConfig.from_json_file(path) == small_adapter().config
    assert [p.name for p in path.parent.iterdir()] == ["steering_config.json"]


@pytest.mark.parametrize("name", ["../evil", "../..", "a/b", "/tmp/x", "", ".", "..", "a\\b", "a\0b", "C:x", "x\n"])
def test_no_adapter_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    from small_adapters import tiny_llama

    model = SteeredModelForCausalLM.from_model(tiny_llama())
    model._steering.add("default", small_adapter())
    model._steering.add(name, small_adapter())
    with pytest.raises(ValueError, match="cannot be the name of a folder"):
        model.save_steering(tmp_path / "saved" / "here")
    assert not (tmp_path / "saved").exists()
    model.save_steering(tmp_path / "saved" / "one", name)
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {"one"}
