"""For any config and tensor file, for every method: it steers `generate`, or an error of the package says why."""

from __future__ import annotations

import copy
import json
import resource
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from computing_time import at_most
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from finesteer_hf import SteeredModelForCausalLM, SteeringAdapter
from finesteer_hf.adapters.config import SteeringConfig
from finesteer_hf.adapters.registry import get_steering_method, steering_methods
from finesteer_hf.adapters.tensor_files import Free, Indices
from finesteer_hf.errors import AdapterFileError, AdapterMismatchError, SteeringError
from finesteer_hf.testing.toy import toy_model


SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "base_model_type": "llama"}
HEADS: dict[str, Any] = {"attention_heads": 4, "heads": [[0, 1], [2, 0], [2, 3]], **SIZES}
GATE: dict[str, Any] = {"read_site": "resid_post[1]", "subspace_rank": 4, **SIZES}
EXPERTS: dict[str, Any] = {"layer": 1, "num_experts": 2, "residual_rank": 3, "strength": 2.0, "positions": "all"}
FITTED: dict[str, dict[str, Any]] = {
    "ALPHASTEER": dict(layers=[1, 2], strength=0.5, **SIZES),
    "ANGULAR": dict(layers=[0, 1], angle=90.0, strength=1.0, **SIZES),
    "ANGULAR selective": dict(mode="selective", layers=[1], angle=90.0, strength=1.0, **SIZES),
    "BIPO": dict(layer=1, strength=1.0, **SIZES),
    "CAA": dict(layer=1, strength=1.0, **SIZES),
    "CAST": dict(
        layers=[1, 2],
        condition_layers=[0, 1],
        thresholds=[0.1, 0.2],
        comparators=["above", "below"],
        strength=1.0,
        **SIZES,
    ),
    "CAST several": dict(
        layers=[1, 2],
        conditions=["a", "b"],
        behaviors=["a", "*"],
        behavior_strengths=[1.0, -1.0],
        rules=["if C1 then B1", "if C2 and not C1 then B2"],
        condition_layers=[[0], [0, 1]],
        thresholds=[0.1, 0.2, 0.1],
        comparators=["above", "below", "above"],
        requires=["conditions_and_behaviors"],
        strength=1.0,
        **SIZES,
    ),
    "CAST prompt mean": dict(
        layers=[0],
        condition_layers=[0, 1],
        thresholds=[0.1, 0.2],
        comparators=["above", "below"],
        condition_pool="mean",
        requires=["prompt_mean"],
        strength=1.0,
        **SIZES,
    ),
    "CONSTANT": dict(layers=[0, 2], **SIZES),
    "CONSTANT heads": dict(layers=[0, 2], site="head_out", **SIZES),
    "CONTRASTIVE": dict(layer=1, vector_strength=2.0, strength=1.0, **SIZES),
    "FASB": dict(strength=2.0, backtrack=2, **HEADS),
    "FASB gated": dict(
        strength=2.0, gate="quantile", gate_score="ser", **HEADS, read_site="resid_post[1]", subspace_rank=4
    ),
    "FINESTEER": dict(gate_score="t2q", experts="mixture", write_site="resid_post[1]", **EXPERTS, **GATE),
    "FINESTEER paper": dict(
        gate="logistic",
        gate_score="ser",
        experts="paper",
        hidden_dim=8,
        key_dim=8,
        write_site="resid_post[1]",
        **EXPERTS,
        **GATE,
    ),
    "FINESTEER several": dict(
        gate_score="state",
        experts="reduced_rank",
        write_site=["resid_post[1]", "resid_pre[2]"],
        requires=["several_write_sites"],
        **{**EXPERTS, "num_experts": 1},
        **GATE,
    ),
    "FLORAIN": dict(layer=1, rank=3, strength=1.0, attention_heads=4, **SIZES),
    "INFERALIGNER": dict(layers=[1, 2], strength=1.0, **SIZES),
    "ITI": dict(strength=2.0, **HEADS),
    "REPS": dict(layer=1, strength=1.0, **SIZES),
    "SADI": dict(elements="head", element_layers=[0, 2], num_elements=2, attention_heads=4, strength=1.0, **SIZES),
    "SADI hidden": dict(
        elements="hidden", element_layers=[1], num_elements=2, strength=1.0, compat="official", **SIZES
    ),
    "SADI neurons": dict(
        elements="neurons", element_layers=[1], num_elements=2, strength=1.0, requires=["elements:neurons"], **SIZES
    ),
    "SWAI": dict(strength=1.0, **SIZES),
    "TAD": dict(layer=1, strength=1.0, **SIZES),
    "TAD recurrent": dict(
        layer=1, strength=1.0, gate="soft", recurrence=2, requires=["gate:soft", "recurrence"], **SIZES
    ),
    "TASKDRIVEN": dict(layer=1, attention_heads=4, strength=1.0, **SIZES),
    "TRUTHFLOW": dict(layer=1, rank=3, width=8, levels=3, steps=3, strength=1.0, **SIZES),
    "WAS": dict(read_layers=[0], layers=[1, 2], width=4, strength=1.0, **SIZES),
}
CONFIGS = {
    name: SteeringConfig.from_dict({"steering_type": name.partition(" ")[0], **f}) for name, f in FITTED.items()
}
FREE = {"head_size": 8, "neurons": 64}


def sound_tensors(config: SteeringConfig) -> dict[str, torch.Tensor]:
    """Tensors of the declared shapes, with values that a fit could have written."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, shape in get_steering_method(config.steering_type).method_cls.tensor_shapes(config).items():
        sizes = [
            FREE.get(axis.name, 32 if axis.name.startswith("width") else 6)
            if isinstance(axis, Free)
            else int(axis or 6)
            for axis in shape
        ]
        if isinstance(shape, Indices):
            many = torch.arange(max(1, torch.Size(sizes).numel())).reshape(sizes)
            made[name] = many % 2 if name == "mask" else many
            continue
        values = torch.randn(sizes, generator=generator)
        positive = name.startswith("gate.") or name.endswith(("norm.running_var", "scale", "sigma"))
        if name == "plane":
            values = torch.linalg.qr(values.T).Q.T.contiguous()
        made[name] = values.abs().flatten().sort().values.reshape(sizes) if positive else values
    return made


SOUND = {name: (config.to_dict(), sound_tensors(config)) for name, config in CONFIGS.items()}
NASTY: Any = (
    st.sampled_from(
        [10**9, -1, 0, 1, 2, 7, 2**31, 2**63, 10**40, 1e38, -1e38, 1e-300, 0.0, True, None, [], {}, "", "auto"]
    )
    | st.sampled_from(
        ["resid_post[9]", "resid_pre[-1]", "head_out[1]", "kl:0", "norm:1e9", "official", "all", "paper", "state"]
    )
    | st.lists(st.integers(-2, 5) | st.sampled_from([10**9, True, "x"]), max_size=4)
    | st.just([[0, 10**9]])
    | st.just([[10**9, 0]])
    | st.just(list(range(100_000)))
)


def spoil(tensor: torch.Tensor, how: str) -> torch.Tensor:
    """A tensor of another dtype, shape or size, or with other values."""
    value: dict[str, Any] = {
        "int64": lambda: tensor.long(),
        "float32": lambda: tensor.float(),
        "float64": lambda: tensor.double(),
        "float16": lambda: tensor.half(),
        "bool": lambda: tensor.bool(),
        "nan": lambda: torch.full_like(tensor.float(), float("nan")),
        "huge": lambda: torch.full_like(tensor, 3e38 if tensor.is_floating_point() else 2**62),
        "tiny": lambda: torch.full_like(tensor, 1e-45 if tensor.is_floating_point() else -(2**62)),
        "zero": lambda: torch.zeros_like(tensor),
        "negative": lambda: -tensor.abs() - 1,
        "longer": lambda: torch.cat([tensor, tensor]) if tensor.ndim else tensor[None],
        "wider": lambda: torch.cat([tensor, tensor], -1) if tensor.ndim else tensor[None],
        "empty": lambda: tensor[:0] if tensor.ndim else tensor[None][:0],
        "flat": lambda: tensor.flatten(),
        "deeper": lambda: tensor[..., None],
        "turned": lambda: tensor.mT if tensor.ndim > 1 else tensor.flip(0) if tensor.ndim else tensor,
    }
    return value[how]().contiguous()


WAYS = ("int64 float32 float64 float16 bool nan huge tiny zero negative longer wider empty flat deeper turned").split()


MODEL = toy_model()
PROMPTS = torch.tensor([[2, 4, 7, 9, 30, 5], [0, 0, 2, 4, 20, 5]])


def steer_with(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """Load, generate and score; returns the outcome."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    model = copy.copy(MODEL)
    try:
        (folder / "steering_config.json").write_text(json.dumps(config))
        save_file(dict(tensors), folder / "steering_model.safetensors")
        with warnings.catch_warnings(), at_most(5.0):
            warnings.simplefilter("ignore")
            steered = SteeredModelForCausalLM.from_model(model)
            try:
                steered.load_steering(str(folder))
            except SteeringError as error:
                assert len(str(error)) < 5_000
                return "refused"
            finally:
                shutil.rmtree(folder)
            mask = (PROMPTS != 0).long()
            shown = {"output_steering": True, "return_dict_in_generate": True}
            try:
                steered.generate(PROMPTS, attention_mask=mask, max_new_tokens=4, do_sample=False, **shown)
                with torch.no_grad():
                    steered(PROMPTS, attention_mask=mask, prompt_lengths=[4, 4])
            except ValueError as error:
                # Numbers of the right form may still be too large for the model, which shows when they are added.
                if not str(error).startswith("What steering adds at"):
                    raise
                return "refused"
            return "steered"
    finally:
        if "_steering" in model.__dict__:
            model.unload_steering()


def test_every_method_is_here() -> None:
    module = {name: get_steering_method(name).method_cls.__module__ for name in steering_methods()}
    ours = {name for name, where in module.items() if where.startswith("finesteer_hf.methods.")}
    assert ours == {name.partition(" ")[0] for name in CONFIGS}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_mutated_steers_before(name: str) -> None:
    assert steer_with(*SOUND[name]) == "steered"


@pytest.mark.parametrize("name", CONFIGS)
def test_any_change_steers_or_is_refused(name: str) -> None:
    config, tensors = SOUND[name]

    @settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
    @given(
        changes=st.dictionaries(st.sampled_from(sorted(set(config) - {"fit"})), NASTY, max_size=2),
        dropped=st.sets(st.sampled_from(sorted(config)), max_size=1),
        ways=st.dictionaries(st.sampled_from(sorted(tensors)), st.sampled_from(WAYS), max_size=2),
    )
    def fuzz(changes: dict[str, Any], dropped: set[str], ways: dict[str, str]) -> None:
        data = {key: value for key, value in {**config, **changes}.items() if key not in dropped}
        steer_with(data, {key: spoil(value, ways[key]) if key in ways else value for key, value in tensors.items()})

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fuzz()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 * 1024


@pytest.mark.parametrize("name", CONFIGS)
def test_each_tensor_in_each_wrong_form(name: str) -> None:
    """Every dtype and shape other than the declared one is refused at load."""
    config, tensors = SOUND[name]
    # A flow's levels hold the same over and over.
    for key, tensor in list(tensors.items())[:8]:
        for how in WAYS:
            spoiled = spoil(tensor, how)
            found = steer_with(config, {**tensors, key: spoiled})
            if spoiled.dtype != tensor.dtype or spoiled.ndim != tensor.ndim or how in ("nan", "empty"):
                assert found == "refused", (key, how)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_number_out_of_bounds_is_refused(name: str) -> None:
    config, tensors = SOUND[name]
    for key, value in config.items():
        if isinstance(value, int) and not isinstance(value, bool) and key != "format_version":
            for number in (10**9, -1, 10**40):
                steer_with({**config, key: number}, tensors)
    for key in ("hidden_size", "num_hidden_layers", "attention_heads"):
        if config.get(key) is not None:
            for number in (-1, 0, 10**9):
                assert steer_with({**config, key: number}, tensors) == "refused", (key, number)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("TRUTHFLOW", {"levels": 10**9}, "levels must be from"),
        ("TRUTHFLOW", {"steps": 10**9}, "steps must be from"),
        ("TRUTHFLOW", {"width": 10**9}, "width must be from"),
        ("FASB", {"attention_heads": 10**9}, "attention_heads must be from 1 to 4096"),
        ("ITI", {"attention_heads": 10**9}, "attention_heads must be from 1 to 4096"),
        ("ITI", {"attention_heads": 4096, "heads": [[layer, 0] for layer in range(9_000)]}, "ITI"),
        ("CAA", {"hidden_size": -1}, "hidden_size must be from 1 to"),
        ("CAA", {"num_hidden_layers": 10**9}, "num_hidden_layers must be from 1 to"),
        ("CAA", {"layer": 10**9}, "layer must be less than"),
        ("ANGULAR", {"layers": list(range(200_000))}, "at least one block"),
    ],
)
def test_settings_that_hung_or_used_up_memory_are_refused_by_name(
    name: str, changes: dict[str, Any], message: str
) -> None:
    config, _ = SOUND[name]
    with at_most(1.0), pytest.raises(AdapterFileError, match=message):
        adapter = SteeringAdapter(SteeringConfig.from_dict({**config, **changes}), {})
        adapter.tensors = {"directions": torch.ones(9_000, 8), "sigma": torch.ones(9_000)}
        replace(adapter, config=replace(adapter.config, num_hidden_layers=None)).build()


def test_heads_of_another_size_are_found_at_load() -> None:
    config, tensors = SOUND["TASKDRIVEN"]
    model = SteeredModelForCausalLM.from_model(toy_model())
    adapter = SteeringAdapter(SteeringConfig.from_dict(config), {"shifts": torch.ones(4, 16)})
    with pytest.raises(AdapterMismatchError, match=r"together \[64\] wide at head_out\[1\]; this model's are 32"):
        model.load_steering(adapter)
    assert model.steering_adapters == {} and tensors["shifts"].shape == (4, 8)
