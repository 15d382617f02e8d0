"""Adapters for vLLM: what is written, and what is refused. The plugin's own tests read it: `integrations/vllm/tests`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_adapters import WIDTH, small_adapter

from finesteer_hf import SteeringAdapter, steering_methods
from finesteer_hf.adapters.algebra import constant_adapter
from finesteer_hf.errors import AdapterFileError
from finesteer_hf.interop import export_vllm
from finesteer_hf.interop.vllm import CONFIG_NAME, WEIGHTS_NAME, salt_of
from finesteer_hf.method_api import SteeringMethod
from finesteer_hf.methods.alphasteer import AlphaSteerConfig
from finesteer_hf.methods.caa import CAAConfig
from finesteer_hf.methods.finesteer import FineSteerConfig
from finesteer_hf.processors import Decision, QueryStates
from finesteer_hf.sites import Site


HUB_CARDS = Path(__file__).resolve().parents[2] / "hub_cards"


def read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return json.loads((folder / CONFIG_NAME).read_text()), load_file(folder / WEIGHTS_NAME)


def finesteer(**settings: Any) -> SteeringAdapter:
    """A FineSteer adapter of three blocks that is always open and has a map of rank 1."""
    config = FineSteerConfig(
        **{
            "layer": 1,
            "read_site": "resid_post[1]",
            "write_site": "resid_post[1]",
            "hidden_size": WIDTH,
            "num_hidden_layers": 3,
            "gate": "always",
            "experts": "reduced_rank",
            "num_experts": 1,
            "residual_rank": 1,
            "strength": 2.0,
            "positions": "generated",
            **settings,
        }
    )
    width = WIDTH * len(config.write_sites)
    shapes = {"mean": (WIDTH,), "down": (WIDTH, 1), "up": (1, width), "bias": (width,)}
    return SteeringAdapter(config, {f"residual.{name}": torch.randn(shape) for name, shape in shapes.items()})


def test_a_shipped_adapter_goes_out_whole(tmp_path: Path) -> None:
    adapter = SteeringAdapter.from_pretrained(HUB_CARDS / "smollm2-truthful")
    assert export_vllm(adapter, tmp_path / "new") == tmp_path / "new"
    config, tensors = read(tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [CONFIG_NAME, WEIGHTS_NAME]
    assert (config["vector"], config["score"], config["gate"]) == ("reduced_rank", "state", "stepped")
    assert config["requires"] == ["gate:stepped", "score:state", "vector:reduced_rank"]
    assert (config["read_layer"], config["write_layers"]) == (17, list(range(17, 25)))
    assert (config["strength"], config["positions"]) == (adapter.config.strength, "generated")
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert config["base_model_fingerprint"] == adapter.config.base_model_fingerprint
    assert config["chat_template_sha256"] == adapter.config.fit["chat_template_sha256"]
    assert config["weights_sha256"] == hashlib.sha256((tmp_path / "new" / WEIGHTS_NAME).read_bytes()).hexdigest()
    assert set(tensors) == {
        *("gate.weight", "gate.bias", "gate.steps", "gate.doses"),
        *(f"residual.{name}" for name in ("mean", "down", "up", "bias")),
    }
    assert torch.equal(tensors["residual.up"], adapter.tensors["residual.up"])
    # Gated, never flattened: doses of 0 and 1 are both there.
    assert tensors["gate.doses"].min() == 0 and tensors["gate.doses"].max() == 1


def test_a_constant_keeps_its_strength_apart(tmp_path: Path) -> None:
    adapter = small_adapter(strength=3.0, positions="generated")
    config, tensors = read(export_vllm(adapter, tmp_path))
    assert (config["vector"], config["read_layer"], config["write_layers"]) == ("constant", None, [0, 1])
    assert config["strength"] == 3.0
    assert torch.equal(tensors["vectors"], torch.stack([adapter.tensors["vectors.0"], adapter.tensors["vectors.1"]]))


def test_inputs_of_blocks_are_outputs_of_those_before(tmp_path: Path) -> None:
    config, _ = read(export_vllm(finesteer(compat="official", read_site="resid_pre[1]"), tmp_path))
    assert (config["read_layer"], config["write_layers"]) == (0, [1])
    # The state before the write to that very place is what an unsteered pass would read.
    config, _ = read(export_vllm(finesteer(read_site="resid_pre[2]"), tmp_path))
    assert (config["read_layer"], config["write_layers"]) == (1, [1])


def test_the_salt_is_of_all_that_the_adapter_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = finesteer()
    same = SteeringAdapter(dataclasses.replace(first.config), {name: t.clone() for name, t in first.tensors.items()})
    moved = {name: t + (name == "residual.bias") * 1e-6 for name, t in first.tensors.items()}
    variants = {
        "first": first,
        "strength": SteeringAdapter(dataclasses.replace(first.config, strength=2.5), first.tensors),
        "site": SteeringAdapter(dataclasses.replace(first.config, read_site="resid_post[0]"), first.tensors),
        "weights": SteeringAdapter(first.config, moved),
    }
    salts = {}
    for name, adapter in variants.items():
        config, _ = read(export_vllm(adapter, tmp_path / name))
        salts[name] = config["salt"]
        assert config["salt"] == salt_of(config)
    assert len(set(salts.values())) == len(variants)
    assert read(export_vllm(same, tmp_path / "same"))[0]["salt"] == salts["first"]


def test_exporting_again_replaces_both_files(tmp_path: Path) -> None:
    export_vllm(small_adapter(0, positions="generated"), tmp_path)
    config, tensors = read(export_vllm(finesteer(), tmp_path))
    assert config["vector"] == "reduced_rank" and "residual.up" in tensors


def test_no_path_of_this_machine_goes_out(tmp_path: Path) -> None:
    adapter = small_adapter(positions="generated", base_model_name_or_path=str(tmp_path / "models" / "tiny"))
    config, _ = read(export_vllm(adapter, tmp_path / "out"))
    assert config["base_model_name_or_path"] == "local:tiny"


class MeanPool(SteeringMethod[CAAConfig]):
    """Decides by a mean over the prompt."""

    query_pool = "mean"

    def decide(self, queries: QueryStates) -> Decision:
        return Decision({})


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (
            small_adapter(positions="all"),
            r"CONSTANT adapter steers positions='all'.*Fit it with positions='generated'",
        ),
        (small_adapter(positions="prompt"), "positions='prompt'"),
        (finesteer(positions="all"), "FINESTEER adapter steers positions='all'"),
        (
            constant_adapter({Site("head_out", 1): torch.ones(8)}, positions="generated"),
            r"steers inside blocks \(head_out\[1\]\).*Serve it with finesteer_hf",
        ),
        (constant_adapter({Site("mlp_act", 1): torch.ones(8)}, positions="generated"), "steers inside blocks"),
        (constant_adapter({Site("resid_pre", 0): torch.ones(8)}, positions="generated"), r"uses resid_pre\[0\]"),
        (finesteer(read_site="resid_post[2]"), "reads the output of block 2 after it has written to that of block 1"),
        (finesteer(write_site=["resid_post[1]", "resid_pre[2]"]), "vLLM has one place for both"),
        (
            SteeringAdapter(
                AlphaSteerConfig(layers=[1, 2], strength=1.0, positions="generated", hidden_size=WIDTH),
                {"refusal": torch.ones(2, WIDTH), "probe": torch.ones(2, WIDTH)},
            ),
            "ALPHASTEER adapter decides at .* by rules of its own",
        ),
    ],
)
def test_what_the_plugin_cannot_do_is_refused(tmp_path: Path, adapter: SteeringAdapter, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export_vllm(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_means_over_the_prompt_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = small_adapter(positions="generated")
    method = MeanPool(CAAConfig(layer=1, strength=1.0, positions="generated"), {})
    monkeypatch.setattr(adapter, "build", lambda: method)
    with pytest.raises(ValueError, match="CAA adapter decides by the mean over the prompt"):
        export_vllm(adapter, tmp_path)


def test_an_unfitted_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="strength"):
        export_vllm(SteeringAdapter(CAAConfig(layer=1, positions="generated"), {}), tmp_path)


def test_methods_that_change_logits_or_streams_are_refused(tmp_path: Path) -> None:
    from finesteer_hf.adapters.registry import get_steering_method
    from finesteer_hf.interop.vllm import _check_processor

    refused = []
    for name in steering_methods():
        method = get_steering_method(name).method_cls
        processor = method.__new__(method)
        processor.config = get_steering_method(name).config_cls()
        processor.maps = (Site("resid_post", 1),) if method.transform is not SteeringMethod.transform else ()
        processor.positions = "generated"
        if processor.maps or processor.acts_on_logits or processor.lookback:
            with pytest.raises(ValueError, match=f"A {name} adapter .*Serve it with finesteer_hf"):
                _check_processor(processor)
            refused.append(name)
    assert {"SWAI", "FASB", "ANGULAR", "CONTRASTIVE"} <= set(refused) and "FINESTEER" not in refused
