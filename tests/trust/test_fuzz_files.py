"""For any bytes: an adapter that loads and builds, or an error of the package."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from small_adapters import small_adapter

from finesteer_hf import SteeringAdapter
from finesteer_hf.adapters.config import read_config_file
from finesteer_hf.adapters.tensor_files import read_tensors
from finesteer_hf.errors import AdapterFileError, SteeringError
from finesteer_hf.interop import load_vectors, save_gguf
from finesteer_hf.methods.caa import CAAConfig
from finesteer_hf.methods.finesteer.config import FineSteerConfig


QUICK = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)

FITTED = FineSteerConfig(
    layer=1,
    hidden_size=8,
    write_site="resid_post[1]",
    read_site="resid_post[1]",
    gate_score="state",
    experts="reduced_rank",
    num_experts=1,
    residual_rank=2,
    subspace_rank=2,
    strength=1.0,
    positions="generated",
)
CONFIGS = [
    small_adapter().config.to_dict(),
    CAAConfig(layer=1, hidden_size=8, strength=1.0).to_dict(),
    FITTED.to_dict(),
    replace(FITTED, write_site=["resid_post[1]", "resid_post[3]"], requires=["several_write_sites"]).to_dict(),
]
KEYS = sorted({key for config in CONFIGS for key in config} | {"weights_sha256"})

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-3, 40)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["auto", "ser", "resid_post[1]", "resid_pre[99999999999]", "kl:x", "head_out[1]", "paper"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def check_folder(config: str, tensors: bytes) -> None:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        (folder / "steering_config.json").write_text(config, encoding="utf-8", errors="surrogatepass")
        (folder / "steering_model.safetensors").write_bytes(tensors)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                adapter = SteeringAdapter.from_pretrained(folder)
                adapter.build()
            except SteeringError as error:
                assert len(str(error)) < 20_000
            else:
                assert all(torch.isfinite(tensor).all() for tensor in adapter.tensors.values())
    finally:
        shutil.rmtree(folder)


@QUICK
@given(
    config=st.sampled_from(CONFIGS),
    changes=st.dictionaries(st.sampled_from(KEYS), json_values, max_size=3),
    dropped=st.sets(st.sampled_from(KEYS), max_size=2),
    shapes=st.lists(st.lists(st.integers(0, 20), max_size=2), max_size=3),
)
def test_any_change_of_a_config(
    config: dict[str, Any], changes: dict[str, Any], dropped: set[str], shapes: Any
) -> None:
    data = {key: value for key, value in {**config, **changes}.items() if key not in dropped}
    tensors = save({f"vectors.{number}": torch.ones(shape) for number, shape in enumerate(shapes)})
    check_folder(json.dumps(data), tensors)


@QUICK
@given(text=st.text(max_size=200) | json_values.map(json.dumps))
def test_any_text_as_config(text: str) -> None:
    check_folder(text, b"")


sound = small_adapter()
SOUND = save(sound.tensors)
SHAPES = sound.tensor_shapes()
SOUND_HEADER = int.from_bytes(SOUND[:8], "little")


@QUICK
@given(
    flips=st.lists(st.tuples(st.integers(0, SOUND_HEADER + 20), st.integers(0, 255)), max_size=4),
    cut=st.integers(0, len(SOUND)) | st.none(),
    extra=st.binary(max_size=16),
)
def test_any_bytes_in_a_tensor_file(flips: list[tuple[int, int]], cut: int | None, extra: bytes) -> None:
    content = bytearray(SOUND)
    for position, value in flips:
        content[position] = value
    check_bytes(bytes(content[:cut]) + extra)


@QUICK
@given(header=json_values.map(json.dumps) | st.text(max_size=100), body=st.binary(max_size=64))
def test_any_header_of_a_tensor_file(header: str, body: bytes) -> None:
    text = header.encode("utf-8", "surrogatepass")
    check_bytes(len(text).to_bytes(8, "little") + text + body)


def check_bytes(content: bytes) -> None:
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(content)
        file.flush()
        try:
            tensors, _ = read_tensors(file.name, SHAPES)
        except AdapterFileError:
            return
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == SHAPES


def gguf_bytes() -> bytes:
    adapter = small_adapter()
    adapter.config.layers, adapter.config.num_hidden_layers = [1, 2], None
    adapter.tensors = {"vectors.1": torch.ones(16), "vectors.2": torch.ones(16)}
    with tempfile.TemporaryDirectory() as folder:
        return save_gguf(adapter, Path(folder) / "v.gguf").read_bytes()


def steer_file_bytes() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "v.pt"
        entry = {"steering_vector": torch.ones(4), "steering_coefficient": 1.0, "action": "add", "bias": None}
        torch.save({"layers.1": entry}, path)
        return path.read_bytes()


FOREIGN = {
    ".gguf": gguf_bytes(),
    ".svec": json.dumps({"model_type": "llama", "directions": {"1": [1.0, 2.0]}}).encode(),
    ".pt": steer_file_bytes(),
    ".safetensors": SOUND,
}


@QUICK
@given(
    kind=st.sampled_from(sorted(FOREIGN)),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    runs=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=12)), max_size=2),
    cut=st.floats(0, 1) | st.none(),
)
def test_any_bytes_in_another_librarys_file(kind: str, flips: Any, runs: Any, cut: float | None) -> None:
    content = bytearray(FOREIGN[kind])
    for place, value in flips:
        content[int(place * len(content))] = value
    for place, run in runs:
        start = int(place * len(content))
        content[start : start + len(run)] = run
    with tempfile.NamedTemporaryFile(suffix=kind) as file:
        file.write(content if cut is None else content[: int(cut * len(content))])
        file.flush()
        try:
            adapter = load_vectors(file.name)
        except AdapterFileError:
            return
    adapter.build()


@QUICK
@given(data=st.dictionaries(st.text(max_size=8), json_values, max_size=4))
def test_a_config_file_is_read_as_it_was_written(data: dict[str, Any]) -> None:
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        try:
            file.write(json.dumps(data, allow_nan=False).encode())
        except ValueError:
            return
        file.flush()
        assert read_config_file(file.name) == data
