"""Adapter folders and repos made to do harm: refused with a clear error, without memory, code or files outside."""

from __future__ import annotations

import json
import os
import pickle
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_files import safetensors
from hub_server import HubServer
from safetensors.torch import save_file
from small_adapters import WIDTH, small_adapter

from finesteer_hf import SteeredModelForCausalLM, SteeringAdapter, SteeringConfig
from finesteer_hf.errors import AdapterFileError, AdapterMismatchError, NoAdapterError, SteeringError
from finesteer_hf.interop import load_vectors


CORPUS = Path(__file__).parent / "corpus"
CONFIG, WEIGHTS = "steering_config.json", "steering_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound adapter's folder."""
    return small_adapter().save_pretrained(tmp_path / "adapter")


def load(folder: Path) -> SteeringAdapter:
    return SteeringAdapter.from_pretrained(folder)


def rewrite(folder: Path, **changes: Any) -> None:
    """Change fields of a config; the hash of the tensors is left out, as whoever replaces both files would."""
    path = folder / CONFIG
    data = {**json.loads(path.read_text()), **changes}
    data.pop("weights_sha256")
    path.write_text(json.dumps(data))


# What was found to hang, to take memory, to raise what users should not see, or to be read otherwise than it looks


@pytest.mark.parametrize("path", sorted(CORPUS.iterdir()), ids=lambda path: path.name)
def test_files_that_were_found_to_do_harm(folder: Path, path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    foreign = path.suffix not in (".json", ".safetensors") or ".steering-lite" in path.suffixes
    if path.suffix == ".json":
        (folder / CONFIG).write_bytes(path.read_bytes())
    elif not foreign:
        rewrite(folder)
        (folder / WEIGHTS).write_bytes(path.read_bytes())
    with pytest.raises(AdapterFileError):
        load_vectors(path) if foreign else load(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


# Configs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 1_000_000, "not readable JSON"),
        ('{"a":' * 200_000, "not readable JSON"),
        ('{"steering_type": "CONSTANT", "hidden_size": ' + "9" * 10_000 + "}", "not readable JSON"),
        ('{"steering_type": "CONSTANT", "steering_type": "CAA"}', "repeated"),
        ('{"steering_type": "CONSTANT", "fit": {"a": {"b": 1, "b": 2}}}', "repeated"),
        ('{"steering_type": "CONSTANT", "strength": NaN}', "not a JSON number"),
        ('{"steering_type": "CONSTANT", "strength": 1e999}', "not a JSON number"),
        ('{"steering_type": "CONSTANT", "fit": {"a": -1e999}}', "not a JSON number"),
        ('{"steering_type": "CONSTANT", "positions": "\\ud800"}', "not readable JSON"),
        ("null", "must hold a JSON object"),
        ("", "not readable JSON"),
        ("\ufeff{}", "not readable JSON"),
        ('{"steering_type": ["CONSTANT"]}', "string `steering_type`"),
        ('{"steering_type": "../../evil"}', "Unknown steering_type"),
        ('{"steering_type": "os:system"}', "Unknown steering_type"),
        ('{"steering_type": "CONSTANT", "format_version": 2}', "format_version 2"),
        ('{"steering_type": "CONSTANT", "format_version": true}', "format_version True"),
        ('{"steering_type": "CONSTANT", "format_version": 0}', "format_version 0"),
        ('{"steering_type": "CONSTANT", "requires": [["x"]]}', "list of feature names"),
        ('{"steering_type": "CONSTANT", "requires": ["teleport"]}', "does not understand: ['teleport']"),
        ('{"steering_type": "CONSTANT", "hidden_size": "16"}', "`hidden_size`"),
        ('{"steering_type": "CONSTANT", "hidden_size": true}', "`hidden_size`"),
        ('{"steering_type": "CONSTANT", "layers": [true]}', "`layers`"),
        ('{"steering_type": "CONSTANT", "layers": 3}', "`layers`"),
        ('{"steering_type": "CONSTANT", "layers": [-1]}', "counts from 0"),
        ('{"steering_type": "CONSTANT", "layers": [0, 0]}', "names a block twice"),
        ('{"steering_type": "CONSTANT", "site": "logits"}', "`site`"),
        ('{"steering_type": "CONSTANT", "fit": []}', "`fit`"),
        ('{"steering_type": "CONSTANT", "weights_sha256": 3}', "`weights_sha256`"),
        ('{"steering_type": "CONSTANT", "layers": [0]}', "no hidden_size"),
        ('{"steering_type": "CONSTANT", "fit": {"a": [' + "[]," * 210_000 + "[]]}}", "lists and objects"),
    ],
)
def test_configs_are_refused_before_the_tensors_are_touched(folder: Path, text: str, message: str) -> None:
    (folder / CONFIG).write_text(text, encoding="utf-8")
    (folder / WEIGHTS).write_bytes(b"")
    with pytest.raises(SteeringError) as caught:
        load(folder)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 2_000


def test_a_giant_config_is_not_read(folder: Path) -> None:
    with (folder / CONFIG).open("wb") as file:
        file.truncate(10 * 1024**3)
    with pytest.raises(AdapterFileError, match=r"has 10737418240 bytes; at most"):
        load(folder)
    with pytest.raises(AdapterFileError, match="at most"):
        SteeringConfig.from_pretrained(folder)


# Tensors


def test_declared_sizes_take_no_memory(folder: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rewrite(folder, hidden_size=2**38, layers=[0])
    whole = {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}
    for content in (
        safetensors({"vectors.0": whole}),
        safetensors({"vectors.0": {**whole, "data_offsets": [0, 64]}}, bytes(64)),
        safetensors({"vectors.0": {**whole, "shape": [2**32, 2**32]}}, bytes(64)),
        safetensors("{}", length=2**40),
        safetensors("{}", length=2**63),
        safetensors(" " * 1000 + "{}"),
    ):
        (folder / WEIGHTS).write_bytes(content)
        with pytest.raises(AdapterFileError):
            load(folder)
    # A real file of 1 GiB (a hole on disk) whose tensors are not the ones called for.
    rewrite_small = {"hidden_size": WIDTH, "layers": [0, 1]}
    small_adapter().save_pretrained(folder)
    rewrite(folder, **rewrite_small)
    header = safetensors({"vectors.0": {"dtype": "F32", "shape": [2**28], "data_offsets": [0, 2**30]}})
    with (folder / WEIGHTS).open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 2**30)
    with pytest.raises(AdapterFileError, match="does not match its config"):
        load(folder)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 64 * 1024, f"{(after - before) / 1024:.0f} MiB were taken"


def test_tensors_that_are_not_what_the_config_calls_for(folder: Path) -> None:
    rewrite(folder)
    good = {f"vectors.{layer}": torch.ones(WIDTH) for layer in range(2)}
    entry = {"dtype": "F32", "shape": [WIDTH], "data_offsets": [0, 64]}
    cases: list[tuple[Any, str]] = [
        ({**good, "vectors.0": torch.full((WIDTH,), float("nan"))}, "NaN or infinity"),
        ({**good, "vectors.1": torch.full((WIDTH,), float("-inf"))}, "NaN or infinity"),
        ({**good, "vectors.1": torch.ones(WIDTH, dtype=torch.float64)}, "dtype F64"),
        ({**good, "vectors.1": torch.ones(WIDTH, dtype=torch.bool)}, "dtype BOOL"),
        ({**good, "vectors.1": torch.ones(WIDTH + 1)}, "has shape (17,)"),
        ({**good, "vectors.1": torch.ones(WIDTH, 1)}, "has shape (16, 1)"),
        ({**good, "../evil": torch.ones(1)}, "unexpected ['../evil']"),
        ({"vectors.0": torch.ones(WIDTH)}, "missing ['vectors.1']"),
        (safetensors('{"vectors.0": %s, "vectors.0": %s}' % ((json.dumps(entry),) * 2), bytes(64)), "repeated"),
        (safetensors({"vectors.0": entry, "vectors.1": entry}, bytes(64)), "no safetensors file"),
        (safetensors("[" * 100_000), "no safetensors file"),
        (pickle.dumps(good), "no safetensors file"),
        (b"", "no safetensors file"),
        (b"\0" * 7, "no safetensors file"),
    ]
    for content, message in cases:
        if isinstance(content, dict):
            save_file(content, folder / WEIGHTS)
        else:
            (folder / WEIGHTS).write_bytes(content)
        with pytest.raises(AdapterFileError) as caught:
            load(folder)
        assert message in str(caught.value)


def test_a_file_cut_anywhere_is_refused(folder: Path) -> None:
    rewrite(folder)
    content = (folder / WEIGHTS).read_bytes()
    for length in range(0, len(content), 7):
        (folder / WEIGHTS).write_bytes(content[:length])
        with pytest.raises(AdapterFileError):
            load(folder)


def test_a_file_that_was_replaced_is_seen(folder: Path, tmp_path: Path) -> None:
    small_adapter(1).save_pretrained(tmp_path / "other")
    os.replace(tmp_path / "other" / WEIGHTS, folder / WEIGHTS)
    with pytest.raises(AdapterFileError, match="is not the file that its config was saved with"):
        load(folder)


def test_a_download_is_no_larger_than_its_config_says(hub_client: HubServer, tmp_path: Path) -> None:
    small_adapter().push_to_hub("org/a")
    for place, name in ((WEIGHTS, "org/weights"), (CONFIG, "org/config")):
        files = {path: hub_client.files("org/a")[path] for path in (CONFIG, WEIGHTS)}
        padded = files[place] + b" " * (20 << 20)
        hub_client.commit(name, {**files, place: padded})
        hub_client.requests.clear()
        with pytest.raises(AdapterFileError, match=r"has 209\d+ bytes or more; at most \d+ are allowed"):
            SteeringAdapter.from_pretrained(name)
        # Config first, and of what is too large only the head was read: nothing of it stays in the cache.
        assert hub_client.requests.lines[0].rpartition("/")[2] == CONFIG
        assert not any(path.stat().st_size > 1 << 20 for path in (tmp_path / "hf_home").rglob("*") if path.is_file())
    # A config that is refused costs no tensors at all.
    hub_client.commit("org/odd", {CONFIG: json.dumps({"steering_type": "CONSTANT", "layers": [0]}), WEIGHTS: b"x"})
    hub_client.requests.clear()
    with pytest.raises(AdapterFileError, match="no hidden_size"):
        SteeringAdapter.from_pretrained("org/odd")
    assert not any(WEIGHTS in line for line in hub_client.requests.lines)


def test_a_base_of_another_width_is_seen_before_the_tensors_are_fetched(hub_client: HubServer) -> None:
    from small_adapters import tiny_llama

    small_adapter().push_to_hub("org/a")
    config = {**json.loads(hub_client.files("org/a")[CONFIG]), "hidden_size": 1 << 20}
    hub_client.commit("org/wide", {CONFIG: json.dumps(config), WEIGHTS: hub_client.files("org/a")[WEIGHTS]})
    hub_client.requests.clear()
    model = SteeredModelForCausalLM.from_model(tiny_llama())
    with pytest.raises(AdapterMismatchError, match="hidden size 1048576"):
        model.load_steering("org/wide")
    assert not any(WEIGHTS in line for line in hub_client.requests.lines)


# Files and code


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_links_out_of_the_folder_are_refused(folder: Path, tmp_path: Path, file: str) -> None:
    outside = tmp_path / "outside"
    os.replace(folder / file, outside)
    (folder / file).symlink_to(outside)
    with pytest.raises(AdapterFileError, match="is a link to a file outside"):
        load(folder)
    (folder / file).unlink()
    (folder / file).symlink_to("/dev/zero")
    with pytest.raises(NoAdapterError, match=f"has no {file}"):
        load(folder)
    (folder / file).unlink()
    (folder / file).symlink_to(folder / file)
    with pytest.raises(NoAdapterError):
        load(folder)
    (folder / file).unlink()
    os.mkfifo(folder / file)
    with pytest.raises(NoAdapterError):
        load(folder)


def test_a_link_inside_the_folder_is_fine(folder: Path) -> None:
    (folder / "files").mkdir()
    os.replace(folder / WEIGHTS, folder / "files" / "one")
    (folder / WEIGHTS).symlink_to("files/one")
    assert set(load(folder).tensors) == {"vectors.0", "vectors.1"}


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


def test_nothing_else_in_a_repo_is_opened(hub_client: HubServer, tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    bomb = pickle.dumps(Bomb(marker))
    code = f"open({str(marker)!r}, 'w')"
    small_adapter().push_to_hub("org/a")
    names = ("pytorch_model.bin", "adapter_model.bin", "steering_model.pt", "steering_model.bin", "training_args.bin")
    hub_client.commit(
        "org/a",
        {
            **dict.fromkeys(names, bomb),
            **dict.fromkeys(("modeling.py", "custom_generate/generate.py", "__init__.py", "setup.py"), code),
            "../evil": "x",
            "../../steering_config.json": "{}",
        },
    )
    hub_client.requests.clear()
    adapter = SteeringAdapter.from_pretrained("org/a")
    adapter.build()
    assert {line.rpartition("/")[2] for line in hub_client.requests.lines} == {CONFIG, WEIGHTS}
    adapter.save_pretrained(tmp_path / "saved")
    assert not marker.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"hf_home", "saved"}
    for path in (tmp_path / "saved").iterdir():
        assert path.is_file() and not path.is_symlink()


def test_a_bomb_in_place_of_the_tensors_does_not_go_off(folder: Path, tmp_path: Path) -> None:
    rewrite(folder)
    marker = tmp_path / "it-ran"
    (folder / WEIGHTS).write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(AdapterFileError):
        load(folder)
    torch.save({"layers.0": Bomb(marker)}, tmp_path / "steer.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Bomb(marker)))
    for name in ("steer.pt", "old.pt"):
        with pytest.raises(AdapterFileError):
            load_vectors(tmp_path / name)
    assert not marker.exists()


def test_a_save_that_fails_leaves_the_old_adapter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finesteer_hf.adapters import tensor_files

    def full_disk(tensors: Any, path: Any, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_files, "save_file", full_disk)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(OSError, match="No space left"):
        small_adapter(1).save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    adapter = small_adapter(1)
    adapter.tensors["vectors.0"][0] = float("inf")
    with pytest.raises(AdapterFileError):
        adapter.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
