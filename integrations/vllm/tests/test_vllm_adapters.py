"""The files: read as they were written, and refused when they were not."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from finesteer_vllm.adapters import CONFIG_NAME, UNDERSTOOD, WEIGHTS_NAME, AdapterError, read_adapter, read_config
from safetensors.torch import load_file, save_file

from finesteer_hf.interop import export_vllm, vllm


def rewrite(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **changes) -> None:
    """Change an adapter and make its hashes right again, as a hand that knows the format would."""
    content = json.loads((folder / CONFIG_NAME).read_text()) | changes
    if tensors is not None:
        save_file(tensors, folder / WEIGHTS_NAME)
        content["weights_sha256"] = hashlib.sha256((folder / WEIGHTS_NAME).read_bytes()).hexdigest()
    content["salt"] = vllm.salt_of(content)
    (folder / CONFIG_NAME).write_text(json.dumps(content))


@pytest.fixture
def folder(tmp_path: Path, toy_adapters) -> Path:
    return export_vllm(toy_adapters["several"], tmp_path)


def test_a_round_trip_keeps_everything(toy_adapters, exported) -> None:
    for name, adapter in toy_adapters.items():
        served, config, formula = read_adapter(exported[name]), adapter.config, adapter.build().formula()
        assert (served.steering_type, served.strength) == (config.steering_type, float(config.strength))
        assert (served.hidden_size, served.num_hidden_layers) == (32, 3)
        assert served.read_layer == (None if formula is None else {"mixture": 0}.get(name, 1))
        assert read_config(exported[name]) == type(served)(**{**vars(served), "tensors": {}})
        if formula is not None:
            assert (served.vector, served.score, served.gate) == (formula.vector, formula.score, formula.gate)
            assert served.tensors.keys() == formula.tensors.keys()
            assert all(torch.equal(served.tensors[key], tensor) for key, tensor in formula.tensors.items())
    assert read_config(exported["constant"]).write_layers == (0, 1)
    assert read_config(exported["several"]).write_layers == (1, 2)


def test_both_sides_name_the_same_things() -> None:
    assert (vllm.CONFIG_NAME, vllm.WEIGHTS_NAME) == (CONFIG_NAME, WEIGHTS_NAME)
    from finesteer_hf.estimators import SCORE_FUNCTIONS, VECTOR_FUNCTIONS

    assert {f"vector:{name}" for name in VECTOR_FUNCTIONS} | {f"score:{name}" for name in SCORE_FUNCTIONS} < UNDERSTOOD


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "Upgrade finesteer-vllm"),
        ({"requires": ["gate:new"]}, r"requires \['gate:new'\]"),
        ({"requires": None}, "Upgrade finesteer-vllm"),
        ({"positions": "all"}, "positions 'all'"),
        ({"format": "other"}, "format is not 'finesteer-vllm'"),
        ({"read_layer": 2}, "it reads 2 and writes"),
        ({"write_layers": []}, "must be numbers of blocks"),
        ({"write_layers": [1, 1]}, "must be numbers of blocks"),
        ({"write_layers": [1, 7]}, "of 3 blocks"),
        ({"write_layers": [1]}, "32 numbers a query"),
        ({"strength": 1e999}, "must be numbers"),
        ({"gate": None}, "do not fit each other"),
        ({"vector": "constant"}, "do not fit each other"),
        ({"vector": "mixture"}, "does not hold what"),
        ({"hidden_size": 16}, "does not hold what"),
        ({"lora": None}, "cannot be read as an adapter"),
    ],
)
def test_odd_configs_are_refused(folder: Path, changes: dict, message: str) -> None:
    rewrite(folder, **changes)
    with pytest.raises(AdapterError, match=message):
        read_adapter(folder)


def test_odd_tensors_are_refused(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_NAME)
    for name, tensor in tensors.items():
        with pytest.raises(AdapterError, match="does not hold what"):
            rewrite(folder, {key: value for key, value in tensors.items() if key != name})
            read_adapter(folder)
        with pytest.raises(AdapterError, match="no finite float32 numbers"):
            rewrite(folder, tensors | {name: tensor.double()})
            read_adapter(folder)
    with pytest.raises(AdapterError, match="no finite float32 numbers"):
        rewrite(folder, tensors | {"residual.mean": torch.full((32,), torch.nan)})
        read_adapter(folder)
    rewrite(folder, tensors)
    read_adapter(folder)


def test_files_that_are_not_each_others_are_refused(folder: Path, toy_adapters, tmp_path_factory) -> None:
    other = export_vllm(toy_adapters["always"], tmp_path_factory.mktemp("other"))
    (folder / WEIGHTS_NAME).write_bytes((other / WEIGHTS_NAME).read_bytes())
    with pytest.raises(AdapterError, match="is not the file that"):
        read_adapter(folder)


def test_a_hand_changed_config_is_refused(folder: Path) -> None:
    content = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps(content | {"strength": 30.0}))
    with pytest.raises(AdapterError, match="was changed after it was written"):
        read_config(folder)


@pytest.mark.parametrize("damage", ["gone", "cut", "no json", "list", "huge"])
def test_damaged_files_are_refused(folder: Path, damage: str) -> None:
    path = folder / (WEIGHTS_NAME if damage in ("gone", "cut") else CONFIG_NAME)
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(
            {"cut": path.read_bytes()[:100], "no json": b"{", "list": b"[]", "huge": b" " * 2_000_000}[damage]
        )
    with pytest.raises(AdapterError):
        read_adapter(folder)


def test_an_empty_folder_says_how_to_make_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"finesteer_hf\.interop\.export_vllm"):
        read_config(tmp_path)
