"""Habits from PEFT that no other test covers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from small_adapters import LAYERS, PROMPT, small_adapter, tiny_llama, tokens_of
from transformers import CompileConfig

from finesteer_hf import Site, SteeredModelForCausalLM, SteeringAdapter, SteeringProcessor
from finesteer_hf.adapters.adapter import tensors_equal
from finesteer_hf.adapters.algebra import combine, constant_adapter, constant_vectors
from finesteer_hf.adapters.fingerprint import fingerprint
from finesteer_hf.adapters.tensor_files import write_tensors
from finesteer_hf.errors import AdapterFileError


# The tiny model has no name that is that of the adapters' base.
pytestmark = pytest.mark.filterwarnings("ignore:Steering adapter .* loaded on '(LlamaForCausalLM|local.base)'")


@pytest.fixture
def model() -> Any:
    """The tiny Llama with two constant adapters, `a` active."""
    return SteeredModelForCausalLM.from_model(tiny_llama(), steering={"a": small_adapter(1), "b": small_adapter(2)})


@torch.no_grad()
def logits(model: Any, **kwargs: Any) -> torch.Tensor:
    return model(input_ids=PROMPT, **kwargs).logits


def test_an_adapters_name_is_in_none_of_its_files(model: Any, tmp_path: Path) -> None:
    model.load_steering(small_adapter(1), "the.vectors.0")
    model.save_steering(tmp_path, "the.vectors.0")
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".safetensors"}
    with safe_open(tmp_path / "steering_model.safetensors", "pt") as file:
        assert set(file.keys()) == set(small_adapter(1).tensors)
    model.load_steering(str(tmp_path), "x")
    assert tensors_equal(model.steering_adapters["x"].tensors, small_adapter(1).tensors)


def test_tensors_of_other_names_are_an_error_or_reported(model: Any, tmp_path: Path) -> None:
    folder = small_adapter(1).save_pretrained(tmp_path)
    tensors = small_adapter(1).tensors
    # As another program writes it, which states no hash.
    config = folder / "steering_config.json"
    stated = json.loads(config.read_text())
    del stated["weights_sha256"]
    config.write_text(json.dumps(stated))
    write_tensors(folder / "steering_model.safetensors", {**tensors, "left.over": torch.ones(3)})
    with pytest.raises(AdapterFileError, match=r"unexpected \['left.over'\]"):
        model.load_steering(str(folder), "x")
    report = model.load_steering(str(folder), "x", strict=False)
    assert (report.adapter_name, report.unexpected_keys) == ("x", ("left.over",))
    assert tokens_of(model, steering="x") == tokens_of(model, steering="a")
    write_tensors(folder / "steering_model.safetensors", dict(list(tensors.items())[:1]))
    messages = {}
    model.config._name_or_path = "org/tiny"
    for strict in (None, True, False):
        with pytest.raises(AdapterFileError, match=r"missing \['vectors.1'\]") as found:
            model.load_steering(str(folder), "y", strict=strict)
        messages[strict] = str(found.value)
    assert messages[None] == messages[True] and "strict" not in messages[None]
    assert "strict=False ignores undeclared tensors" in messages[False]
    assert "y" not in model.steering_adapters


def test_what_is_left_out_is_in_no_adapter(model: Any, tmp_path: Path) -> None:
    """For every source, dtype and value: it neither steers nor is saved."""
    surplus = {"left.over": torch.full((3,), torch.nan, dtype=torch.bfloat16), "b": torch.ones(2)}
    mixed = SteeringAdapter(small_adapter(1).config, {**small_adapter(1).tensors, **surplus})
    with pytest.raises(AdapterFileError, match=r"unexpected \['b', 'left.over'\]"):
        model.load_steering(mixed, "object")
    folder = small_adapter(1).write_files(tmp_path / "mixed")
    write_tensors(folder / "steering_model.safetensors", mixed.tensors)
    config = json.loads((folder / "steering_config.json").read_text())
    (folder / "steering_config.json").write_text(json.dumps({**config, "weights_sha256": None}))
    assert SteeringAdapter.from_pretrained(folder, strict=False).unexpected_keys == ("b", "left.over")
    for name, source in {"object": mixed, "folder": str(folder)}.items():
        assert model.load_steering(source, name, strict=False).unexpected_keys == ("b", "left.over")
        assert tensors_equal(model.steering_adapters[name].tensors, small_adapter(1).tensors)
        assert tokens_of(model, steering=name) == tokens_of(model, steering="a")
        model.save_steering(tmp_path / name, name)
        assert model.load_steering(str(tmp_path / name), name).unexpected_keys == ()
    assert set(mixed.tensors) > set(surplus)
    loaded = SteeredModelForCausalLM.from_pretrained(
        tiny_llama_at(tmp_path / "base"), steering=str(folder), steering_kwargs={"strict": False}
    )
    assert tensors_equal(loaded.steering_adapters["default"].tensors, small_adapter(1).tensors)


def tiny_llama_at(folder: Path) -> Path:
    tiny_llama().save_pretrained(folder)
    return folder


def test_another_base_of_the_same_shape_is_an_error_where_warnings_are() -> None:
    fitted = small_adapter(base_model_fingerprint=fingerprint(tiny_llama(0)))
    model = SteeredModelForCausalLM.from_model(tiny_llama(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="other weights"):
            model.load_steering(fitted)
    assert not model.steering_adapters and not model.active_steering
    with pytest.warns(UserWarning, match="other weights"):
        report = model.load_steering(fitted)
    assert report.warnings and model.active_steering == {"default": 1.0}


def test_a_stack_acts_in_its_order_with_its_scales(model: Any) -> None:
    model.set_steering({"b": -0.5, "a": 2.0})
    assert list(model.active_steering.items()) == [("b", -0.5), ("a", 2.0)]
    stacked = logits(model)
    model.load_steering(combine([small_adapter(2), small_adapter(1)], [-0.5, 2.0]), "sum")
    with model.steering("sum"):
        torch.testing.assert_close(logits(model), stacked, rtol=1e-4, atol=1e-5)
    with model.steering("a"):
        assert not torch.allclose(logits(model), stacked, atol=1e-2)


def test_layers_have_scales_of_their_own_by_algebra(model: Any) -> None:
    factors = [0.5, -2.0]
    vectors = constant_vectors(small_adapter(1))
    scaled = {site: factors[site.layer] * vector for site, vector in vectors.items()}
    plain = tiny_llama()
    handles = [
        plain.model.layers[site.layer].register_forward_hook(lambda m, i, out, v=vector: out + v)  # type: ignore[misc]
        for site, vector in scaled.items()
    ]
    want = logits(plain)
    for handle in handles:
        handle.remove()
    model.load_steering(constant_adapter(scaled, num_hidden_layers=LAYERS), "scaled")
    with model.steering("scaled"):
        assert torch.equal(logits(model), want)
    assert not torch.equal(logits(model), want)


class Slice(SteeringProcessor):
    """Adds a vector to the columns `start` to `stop` of a sequence."""

    def __init__(self, site: Site, vector: torch.Tensor, start: int, stop: int) -> None:
        self.maps, self.vector, self.columns = (site,), vector, range(start, stop)

    def transform(self, site: Site, hidden: torch.Tensor, view: Any) -> torch.Tensor:
        here = torch.arange(view.first_column, view.first_column + hidden.shape[1])
        chosen = (here >= self.columns.start) & (here < self.columns.stop)
        return hidden + view.scale * self.vector * chosen[None, :, None]


@pytest.mark.parametrize("how", [{}, {"prefill_chunk_size": 3}, {"use_cache": False}], ids=str)
def test_any_slice_of_positions_is_a_processor_of_a_few_lines(model: Any, how: dict[str, Any]) -> None:
    model.set_steering(None)
    site, vector = Site("resid_post", 0), 5 * small_adapter(1).tensors["vectors.0"]
    # Two columns of the prompt and two of the answer.
    got = tokens_of(model, steering_processor=[Slice(site, vector, 2, 6)], **how)

    def add(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        columns = torch.arange(output.shape[1])
        return output + vector * ((columns >= 2) & (columns < 6))[None, :, None]

    plain = tiny_llama()
    plain.model.layers[0].register_forward_hook(add)
    assert got == tokens_of(plain, use_cache=False) != tokens_of(model)


def test_scales_swaps_and_switching_off_recompile_nothing(model: Any) -> None:
    config = CompileConfig(fullgraph=True, mode="default", backend="eager")
    config._compile_all_devices = True  # type: ignore[assignment]
    compiled = {"cache_implementation": "static", "compile_config": config}
    model.delete_steering("b")
    torch._dynamo.reset()
    assert tokens_of(model, steering_scale=4.0, **compiled) == tokens_of(model, steering_scale=4.0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert tokens_of(model, steering_scale=-1.5, **compiled) == tokens_of(model, steering_scale=-1.5)
        assert tokens_of(model, steering=None, **compiled) == tokens_of(tiny_llama())
        with model.disable_steering():
            assert tokens_of(model, **compiled) == tokens_of(tiny_llama())
        before = tokens_of(model, steering_scale=4.0)
        model.load_steering(small_adapter(3), "a")
        after = tokens_of(model, steering_scale=4.0, **compiled)
        assert after == tokens_of(model, steering_scale=4.0) != before


def test_disabled_the_recorded_states_are_the_bases(model: Any) -> None:
    with torch.no_grad():
        want = tiny_llama()(input_ids=PROMPT, output_hidden_states=True).hidden_states
        steered = model(input_ids=PROMPT, output_hidden_states=True).hidden_states
        with model.disable_steering(), model.steering("b"), model.disable_steering():
            got = model(input_ids=PROMPT, output_hidden_states=True).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not torch.equal(steered[1], want[1])
    assert model.active_steering == {"a": 1.0}


def test_status_says_what_steers_where_and_whether_it_is_compiled(model: Any) -> None:
    model.set_steering({"a": 2.0})
    tokens_of(model)
    status = model.steering_status()
    a, b = status.adapters
    assert (a.name, a.scale, a.strength, b.scale) == ("a", 2.0, 1.0, None)
    assert a.writes == tuple(f"resid_post[{layer}]" for layer in range(LAYERS)) == status.hooks
    assert (a.devices, b.devices, status.compiled) == (("cpu",), ("cpu",), False)
    assert "copied to cpu" in str(status) and "compiled" not in str(status)
    model.compile(backend="eager")
    assert model.steering_status().compiled and "; compiled" in str(model.steering_status())


def test_generate_tells_how_large_what_was_added_is(model: Any) -> None:
    plain, seen = tiny_llama(), []
    plain.model.layers[0].register_forward_hook(lambda m, i, out: seen.append(out[:, -1]))
    logits(plain)
    vector = small_adapter(1).tensors["vectors.0"]
    only = constant_adapter({Site("resid_post", 0): vector}, num_hidden_layers=LAYERS)
    model.load_steering(only, "one")
    out = model.generate(
        PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        steering="one",
        steering_scale=0.5,
        output_steering=True,
        return_dict_in_generate=True,
        max_new_tokens=2,
    )
    want = 0.5 * vector.norm() / seen[0].norm()
    torch.testing.assert_close(out.steering["one"]["relative_norm"], want[None])
