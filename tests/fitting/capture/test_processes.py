"""Several processes write the same store as one, and return the same adapter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate import PartialState
from safetensors.numpy import load_file

from finesteer_hf import CAAConfig, SteeringAdapter, fit_steering, playground
from finesteer_hf.fitting.capture.processes import Processes
from finesteer_hf.fitting.capture.store import MANIFEST


SCRIPT = """
import sys, warnings
from finesteer_hf import CAAConfig, fit_steering, playground
warnings.simplefilter("ignore")
model, tokenizer = playground.load()
rows = playground.preference_rows("truthful", "fit")[::20]
folder, out, vector = sys.argv[1:]
config = CAAConfig(layer=2, strength=1.0, vector=vector)
from finesteer_hf.fitting.capture.processes import Processes
me = Processes.current(cpu=True)
assert me.count == 2, me
adapter = fit_steering(model, tokenizer, rows, config, progress=False, store_dir=folder or None)
adapter.save_pretrained(f"{out}-{me.index}")
"""


def test_shares_cover_everything_once() -> None:
    shares = [Processes(index, 3).share(range(10)) for index in range(3)]
    assert sorted(item for share in shares for item in share) == list(range(10))
    assert Processes().share([1, 2]) == [1, 2] and Processes().gather([1]) == [1]
    assert Processes.current(cpu=True) == Processes()


def test_a_state_of_one_process_under_a_launcher_of_several_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    PartialState._reset_state()
    PartialState()
    try:
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(RuntimeError, match=r"2 processes.*PartialState\(cpu=True\)"):
            Processes.current(cpu=True)
    finally:
        PartialState._reset_state()


def stored(folder: Path) -> dict[tuple[bytes, str], np.ndarray]:
    """All states of a store by passage and name."""
    manifest = json.loads(next(folder.glob(f"*/{MANIFEST}")).read_text())
    found = {}
    for entry in manifest["shards"]:
        arrays = load_file(next(folder.glob("*")) / entry["file"])
        for name in entry["states"]:
            for digest, values in zip(
                arrays["prompts" if name.endswith("query") else "answers"], arrays[name], strict=True
            ):
                assert (digest.tobytes(), name) not in found
                found[digest.tobytes(), name] = values
    return found


# With `--cpu`, accelerate starts a single process unless MPI starts it; `--multi_gpu` starts several wherever it runs, and
# where there is no GPU, or the model is not on it, they join by gloo.
ACCELERATE = "accelerate.commands.accelerate_cli launch --multi_gpu --num_processes 2 --num_machines 1"
LAUNCHERS = {
    "accelerate": f"{ACCELERATE} --mixed_precision no --dynamo_backend no --main_process_port 0".split(),
    "torchrun": "torch.distributed.run --standalone --nproc_per_node 2".split(),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "on_disk", "vector"),
    [("accelerate", True, "answers"), ("torchrun", False, "answers"), ("torchrun", True, "gradient")],
)
def test_two_processes_write_the_store_of_one(tmp_path: Path, launcher: str, on_disk: bool, vector: str) -> None:
    (tmp_path / "fit.py").write_text(SCRIPT)
    folder = tmp_path / "two" if on_disk else ""
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            *LAUNCHERS[launcher],
            *map(str, (tmp_path / "fit.py", folder, tmp_path / "adapter", vector)),
        ],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    model, tokenizer = playground.load()
    rows = playground.preference_rows("truthful", "fit")[::20]
    config = CAAConfig(layer=2, strength=1.0, vector=vector)
    alone = fit_steering(model, tokenizer, rows, config, progress=False, store_dir=tmp_path / "one")
    if on_disk:
        two, one = stored(tmp_path / "two"), stored(tmp_path / "one")
        assert two.keys() == one.keys()
        for key, values in one.items():
            np.testing.assert_allclose(two[key], values, rtol=1e-4, atol=1e-5)
        manifest = next((tmp_path / "two").glob(f"*/{MANIFEST}"))
        assert {path.name.split("-")[1] for path in manifest.parent.glob("shard-*")} == {"0", "1"}
        assert not list(manifest.parent.glob("manifest-*"))
    for index in range(2):
        adapter = SteeringAdapter.from_pretrained(str(tmp_path / f"adapter-{index}"))
        # Each process reads two rows twice, to see whether prompts can be shared; apart from that nothing is read twice.
        ratio = adapter.config.fit["capture"]["tokens"] / alone.config.fit["capture"]["tokens"]
        assert 1 <= ratio < 1.1
        for name, tensor in alone.tensors.items():
            np.testing.assert_allclose(adapter.tensors[name], tensor, rtol=1e-4, atol=1e-5)
