"""Constant vectors as plain tensors: what is written, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small_adapters import small_adapter, tiny_llama, tokens_of

from finesteer_hf import SteeredModelForCausalLM
from finesteer_hf.errors import AdapterFileError
from finesteer_hf.interop import load_vectors, save_tensors


def written(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> Path:
    save_file(tensors, str(path), metadata={"format": "finesteer_hf.vectors", **metadata})
    return path


def test_what_is_read_back_steers_as_what_was_written(tmp_path: Path) -> None:
    adapter = small_adapter(1, strength=1.5, positions="generated")
    path = save_tensors(adapter, tmp_path / "v.safetensors")
    with safe_open(str(path), framework="pt") as file:
        assert set(file.keys()) == {"resid_post[0]", "resid_post[1]"}
        assert torch.equal(file.get_tensor("resid_post[0]"), 1.5 * adapter.tensors["vectors.0"])
    back = load_vectors(path)
    assert (back.config.strength, back.config.positions) == (1.0, "generated")
    model = SteeredModelForCausalLM.from_model(tiny_llama())
    model.load_steering(adapter, "own")
    model.load_steering(back, "back")
    assert tokens_of(model, steering="own") == tokens_of(model, steering="back") != tokens_of(model, steering=None)


def test_a_file_without_metadata_is_read_by_its_format(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    save_file({"resid_pre[3]": torch.ones(4)}, str(path))
    with pytest.raises(AdapterFileError, match="steering-lite"):
        load_vectors(path)
    assert [str(site) for site in load_vectors(path, "tensors").build().writes] == ["resid_pre[3]"]


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"layer3": torch.ones(4)}, {}, "not named as a site"),
        ({"resid_pre[1]": torch.ones(4), "resid_post[1]": torch.ones(4)}, {}, "has one"),
        ({"resid_pre[1]": torch.ones(2, 4)}, {}, "several directions"),
        ({"resid_pre[1]": torch.full((4,), torch.nan)}, {}, "NaN"),
        ({"resid_pre[99999999]": torch.ones(4)}, {}, "layer"),
        ({"resid_pre[1]": torch.ones(4)}, {"positions": "odd"}, "positions='odd'"),
        ({"attention[1]": torch.ones(4)}, {}, "cannot be read as an adapter"),
    ],
)
def test_other_files_are_refused(
    tensors: dict[str, torch.Tensor], metadata: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(AdapterFileError, match=message):
        load_vectors(written(tmp_path / "v.safetensors", tensors, **metadata))


def test_the_name_ends_in_safetensors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.safetensors"):
        save_tensors(small_adapter(1), tmp_path / "v.pt")
