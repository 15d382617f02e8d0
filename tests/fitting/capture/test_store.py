"""The content of a store after any interruption, including a kill."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fitting_toys import random_rows, small_model
from safetensors.numpy import load_file

from finesteer_hf.fitting.capture.identity import model_identity
from finesteer_hf.fitting.capture.jobs import make_jobs
from finesteer_hf.fitting.capture.reader import CaptureCount, CapturedBatch, StateReader
from finesteer_hf.fitting.capture.store import MANIFEST, ActivationStore
from finesteer_hf.fitting.data.encoding import EncodedRow, Passage
from finesteer_hf.fitting.fit import capture_missing
from finesteer_hf.fitting.progress import FitProgress
from finesteer_hf.method_api import CaptureRequest
from finesteer_hf.sites import Site


resource = pytest.importorskip("resource", reason="kills and limits are those of POSIX")

SITE, OTHER = Site("resid_post", 1), Site("resid_pre", 3)
IDENTITY = {"fingerprint": "f" * 64}


def fill(folder: Path | None, rows: Any, request: CaptureRequest, **settings: Any) -> tuple[CaptureCount, np.ndarray]:
    """Capture what a folder lacks; returns what was done and all states of the rows."""
    model = small_model("llama")
    with ActivationStore(folder, model_identity(model), **settings) as store:
        reader = StateReader(model, request, batch_size=4, share_prompts=True)
        capture_missing(reader, request, make_jobs(rows), store, FitProgress(False))
        states = [
            store.get((site, pool), [row.prompt if pool == "query" else row.chosen for row in rows])
            for site in request.sites
            for pool in request.pools
        ]
        return reader.count, np.concatenate(states, axis=1)


def batch(numbers: range, site: Site = SITE) -> CapturedBatch:
    prompts = tuple(Passage((3, n)) for n in numbers)
    return CapturedBatch(prompts, (), {(site, "query"): np.array([[n, n + 0.5] for n in numbers], dtype=np.float32)})


def test_stored_states_are_not_read_again(tmp_path: Path) -> None:
    rows, request = random_rows(10), CaptureRequest((SITE,))
    first, states = fill(tmp_path, rows, request)
    again, same = fill(tmp_path, rows, request)
    assert first.passes > 0 and again.passes == 0
    np.testing.assert_array_equal(states, same)
    in_memory, same = fill(None, rows, request)
    assert in_memory.passes == first.passes
    np.testing.assert_array_equal(states, same)


def test_rows_and_sites_that_come_later_are_added(tmp_path: Path) -> None:
    rows = random_rows(10)
    fill(tmp_path, rows[:6], CaptureRequest((SITE,)))
    more_rows, _ = fill(tmp_path, rows, CaptureRequest((SITE,)))
    assert more_rows.tokens < fill(None, rows, CaptureRequest((SITE,)))[0].tokens
    more_sites, both = fill(tmp_path, rows, CaptureRequest((SITE, OTHER), ("query", "answer_mean", "answer_last")))
    assert more_sites.passes > 0
    subset, _ = fill(tmp_path, rows[3:], CaptureRequest((OTHER,), ("answer_last",)))
    assert subset.passes == 0
    _, expected = fill(None, rows, CaptureRequest((SITE, OTHER), ("query", "answer_mean", "answer_last")))
    np.testing.assert_allclose(both, expected, rtol=1e-4, atol=1e-5)


def test_another_model_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    rows, request = random_rows(4), CaptureRequest((SITE,))
    fill(tmp_path, rows, request)
    other = small_model("llama", seed=1)
    with ActivationStore(tmp_path, model_identity(other)) as store:
        assert store.lacks(rows[0].prompt, [(SITE, "query")])
    assert len([folder for folder in tmp_path.iterdir() if folder.is_dir()]) == 2


def test_one_changed_weight_is_another_model() -> None:
    model = small_model("llama")
    before = model_identity(model)["fingerprint"]
    assert before == model_identity(small_model("llama"))["fingerprint"]
    model.model.layers[2].mlp.up_proj.weight.data.mul_(1.01)
    assert model_identity(model)["fingerprint"] != before


def test_quantised_weights_are_told_apart() -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    found = []
    for seed in (0, 0, 1):
        model = small_model("llama", seed=seed)
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        # What is not quantised is the same in all three.
        fixed = {name: value for name, value in model.named_parameters() if not hasattr(value, "qdata")}
        for value in fixed.values():
            value.data.fill_(1.0)
        found.append(model_identity(model)["fingerprint"])
    assert found[0] == found[1] != found[2]


def test_states_can_be_forgotten_on_request(tmp_path: Path) -> None:
    rows, request = random_rows(4), CaptureRequest((SITE,))
    first, _ = fill(tmp_path, rows, request)
    again, _ = fill(tmp_path, rows, request, resume=False)
    assert again.passes == first.passes


def test_states_are_held_back_until_a_shard_is_full(tmp_path: Path) -> None:
    with ActivationStore(tmp_path, IDENTITY, shard_bytes=100) as store:
        for start in range(0, 40, 5):
            store.add(batch(range(start, start + 5)))
        assert store.folder is not None
        # 40 bytes a batch: three make a shard.
        assert len(list(store.folder.glob("shard-*"))) == 2
        wanted = [Passage((3, n)) for n in (39, 0, 17, 17)]
        np.testing.assert_array_equal(store.get((SITE, "query"), wanted)[:, 0], [39, 0, 17, 17])
        assert len(list(store.folder.glob("shard-*"))) == 3
    manifest = json.loads((store.folder / MANIFEST).read_text())
    assert sum(entry["prompts"] for entry in manifest["shards"]) == 40


def in_a_fork(run: Callable[[], None]) -> tuple[int, str]:
    """Run a function in a forked process: its exit code (minus the signal that killed it) and its error."""
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        try:
            run()
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
            os._exit(1)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        error = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), error


# The first manifest, the first shard, the manifest that names it, and so on.
@pytest.mark.parametrize("at", [1, 2, 3, 6, 7])
def test_a_killed_capture_continues_without_loss_or_duplicates(tmp_path: Path, at: int) -> None:
    def die() -> None:
        replace, calls = os.replace, itertools.count(1)

        def dying(source: Any, target: Any) -> None:
            if next(calls) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = dying
        fill(tmp_path, random_rows(12), CaptureRequest((SITE,)), shard_bytes=1)

    code, error = in_a_fork(die)
    assert code == -signal.SIGKILL, error
    rows, request = random_rows(12), CaptureRequest((SITE,))
    whole, expected = fill(None, rows, request)
    resumed, states = fill(tmp_path, rows, request)
    np.testing.assert_allclose(states, expected, rtol=1e-4, atol=1e-5)
    # A forward fills a shard: the replacements before the kill say how many of these were complete.
    complete = max(0, at - 2) // 2
    assert resumed.passes == whole.passes - complete
    again, _ = fill(tmp_path, rows, request)
    assert again.passes == 0
    folder = next(path for path in tmp_path.iterdir() if path.is_dir())
    manifest = json.loads((folder / MANIFEST).read_text())
    assert {path.name for path in folder.glob("*shard*")} == {entry["file"] for entry in manifest["shards"]}
    assert sum(entry["prompts"] for entry in manifest["shards"]) == len({row.prompt for row in rows})


def states_on_disk(folder: Path) -> dict[tuple[bytes, str], bytes]:
    """Every state of a store, byte for byte, by passage and name; duplicates fail."""
    found: dict[tuple[bytes, str], bytes] = {}
    for manifest in folder.glob(f"*/{MANIFEST}"):
        for entry in json.loads(manifest.read_text())["shards"]:
            arrays = load_file(manifest.parent / entry["file"])
            for name in entry["states"]:
                digests = arrays["prompts" if name.endswith("query") else "answers"]
                for digest, values in zip(digests, arrays[name], strict=True):
                    assert (digest.tobytes(), name) not in found
                    found[digest.tobytes(), name] = values.tobytes()
    return found


@pytest.mark.parametrize(
    "moment", [number if number < 2 else pytest.param(number, marks=pytest.mark.slow) for number in range(10)]
)
def test_a_capture_killed_at_a_random_moment_leaves_the_store_of_an_undisturbed_one(
    tmp_path: Path, moment: int
) -> None:
    header = tuple(range(20, 31))

    def headed(passage: Passage) -> Passage:
        start = None if passage.answer_start is None else passage.answer_start + len(header)
        return Passage((*header, *passage.ids), start)

    # What all prompts begin with is read once, however few of them are left.
    rows = [EncodedRow(headed(row.prompt), headed(row.chosen), headed(row.rejected)) for row in random_rows(80)]
    request = CaptureRequest((SITE, OTHER))

    def run() -> None:
        fill(tmp_path / "killed", rows, request, shard_bytes=1)

    started = time.monotonic()
    fill(tmp_path / "whole", rows, request, shard_bytes=1)
    duration = time.monotonic() - started
    process = os.fork()
    if not process:
        run()
        os._exit(0)
    time.sleep(random.Random(moment).uniform(0.1, 0.9) * duration)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    fill(tmp_path / "killed", rows, request, shard_bytes=1)
    assert states_on_disk(tmp_path / "killed") == states_on_disk(tmp_path / "whole")


def test_only_the_changes_of_a_data_set_are_read(tmp_path: Path) -> None:
    rows, request = random_rows(10), CaptureRequest((SITE,))
    fill(tmp_path, rows, request)
    edited = Passage((*rows[3].prompt.ids, 7, 8, 9), len(rows[3].prompt.ids))
    changed = [*rows[:3], replace(rows[3], chosen=edited), *rows[4:]]
    again, states = fill(tmp_path, changed, request)
    assert 0 < again.tokens <= 2 * len(edited.ids)
    np.testing.assert_allclose(states, fill(None, changed, request)[1], rtol=1e-4, atol=1e-5)


def test_memory_does_not_grow_with_the_states(tmp_path: Path) -> None:
    width, rows, step = 512, 20_000, 500
    tracemalloc.start()
    try:
        with ActivationStore(tmp_path, IDENTITY, shard_bytes=1 << 20) as store:
            for start in range(0, rows, step):
                prompts = tuple(Passage((3, number)) for number in range(start, start + step))
                values = np.full((step, width), start, dtype=np.float32)
                store.add(CapturedBatch(prompts, (), {(SITE, "query"): values}))
            few = store.get((SITE, "query"), [Passage((3, rows - 1)), Passage((3, 0))])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(few[:, 0], [rows - step, 0])
    # 41 MB of states; what stays is a place for each row, some 300 bytes whatever the width.
    assert peak < 6 * (1 << 20) + 400 * rows < rows * width * 4 / 2


def test_an_interrupt_keeps_what_was_captured(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ActivationStore(tmp_path, IDENTITY) as store:
        store.add(batch(range(5)))
        raise KeyboardInterrupt
    with ActivationStore(tmp_path, IDENTITY) as store:
        assert not store.lacks(Passage((3, 4)), [(SITE, "query")])


def test_a_damaged_shard_is_captured_again(tmp_path: Path) -> None:
    rows, request = random_rows(12), CaptureRequest((SITE,))
    whole, expected = fill(tmp_path, rows, request, shard_bytes=1)
    folder = next(path for path in tmp_path.iterdir() if path.is_dir())
    shard = sorted(folder.glob("shard-*"))[0]
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.warns(UserWarning, match="damaged"):
        resumed, states = fill(tmp_path, rows, request)
    assert 0 < resumed.passes < whole.passes
    np.testing.assert_allclose(states, expected, rtol=1e-4, atol=1e-5)


def test_a_full_disk_leaves_the_old_files(tmp_path: Path) -> None:
    with ActivationStore(tmp_path, IDENTITY, shard_bytes=1) as store:
        store.add(batch(range(5)))

    def overflow() -> None:
        # No file may grow beyond this: what a full disk does, without filling one.
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        with ActivationStore(tmp_path, IDENTITY, shard_bytes=1) as store:
            store.add(batch(range(5, 1000)))

    code, error = in_a_fork(overflow)
    assert code == 1 and error.startswith("OSError") and "could not be written" in error and "make room" in error
    with ActivationStore(tmp_path, IDENTITY) as store:
        assert store.folder is not None
        assert len(list(store.folder.glob("*shard*"))) == 1
        assert not store.lacks(Passage((3, 4)), [(SITE, "query")])
        assert store.lacks(Passage((3, 5)), [(SITE, "query")])


def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    def refused() -> None:
        if os.geteuid() == 0:
            os.setuid(65534)  # root may write to read-only folders
        ActivationStore(tmp_path, IDENTITY)

    tmp_path.chmod(0o500)
    code, error = in_a_fork(refused)
    tmp_path.chmod(0o700)
    assert code == 1 and error.startswith("PermissionError") and "give another store_dir" in error
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="another store_dir"):
        ActivationStore(tmp_path / "file", IDENTITY)


def test_two_processes_do_not_write_to_one_store(tmp_path: Path) -> None:
    with ActivationStore(tmp_path, IDENTITY), pytest.raises(OSError, match="Another process"):
        ActivationStore(tmp_path, IDENTITY)


def test_missing_states_are_named(tmp_path: Path) -> None:
    with ActivationStore(tmp_path, IDENTITY) as store:
        store.add(batch(range(5)))
        with pytest.raises(KeyError, match=r"resid_pre\[3\]/query"):
            store.get((OTHER, "query"), [Passage((3, 1))])
