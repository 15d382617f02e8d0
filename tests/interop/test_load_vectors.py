"""Other libraries' files: written in their formats, read, and compared with a plain hook."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_adapters import LAYERS, PROMPT, WIDTH, small_adapter, tiny_llama

from finesteer_hf import SteeredModelForCausalLM, SteeringAdapter
from finesteer_hf.adapters.adapter import tensors_equal
from finesteer_hf.adapters.algebra import combine, constant_vectors
from finesteer_hf.errors import AdapterFileError
from finesteer_hf.interop import load_vectors, save_gguf
from finesteer_hf.method_api import SteeringMethod
from finesteer_hf.processors import Decision, QueryStates
from finesteer_hf.sites import Site


Vectors = dict[int, np.ndarray]


@pytest.fixture
def vectors() -> Vectors:
    rng = np.random.default_rng(0)
    return {layer: rng.standard_normal(WIDTH).astype(np.float32) for layer in range(LAYERS)}


def write_gguf(path: Path, vectors: dict[Any, np.ndarray], architecture: str = "controlvector") -> Path:
    """As repeng's export does."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", len(vectors))
    for layer, vector in vectors.items():
        writer.add_tensor(f"direction.{layer}", vector)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_svec(path: Path, vectors: Vectors, nested: bool) -> Path:
    """As CAST (flat, with explained variances) or AISteer360 (nested) does."""
    directions = {str(layer): [v.tolist()] if nested else v.tolist() for layer, v in vectors.items()}
    extra = {} if nested else {"explained_variances": {str(layer): 0.5 for layer in vectors}}
    path.write_text(json.dumps({"model_type": "llama", "directions": directions, **extra}))
    return path


def write_steer_file(path: Path, vectors: Vectors, factor: float = 1.0, as_list: bool = False, **changes: Any) -> Path:
    """As lm-eval's `steered` model reads it."""
    entries = {
        f"layers.{layer}": {
            "steering_vector": torch.from_numpy(v)[None],
            "steering_coefficient": factor,
            "action": "add",
            "bias": None,
            **changes,
        }
        for layer, v in vectors.items()
    }
    torch.save([{"hookpoint": k, **v} for k, v in entries.items()] if as_list else entries, path)
    return path


def write_steering_lite(path: Path, vectors: Vectors, prefix: str = "", **config: Any) -> Path:
    """As steering-lite's `Vector.save` does."""
    cfg = {"method": "mean_diff", "layers": None, "target": "residual", "coeff": 1.0, "dtype": "float32", **config}
    tensors = {f"layer{layer}.{prefix}v": torch.from_numpy(v) for layer, v in vectors.items()}
    save_file(tensors, path, metadata={"cfg": json.dumps(cfg)})
    return path


def hooked_logits(vectors: Vectors, at_input: bool, factor: float = 1.0) -> torch.Tensor:
    """Logits of the tiny model with the vectors added by plain hooks."""
    model = tiny_llama()
    for layer, vector in vectors.items():
        delta, block = factor * torch.from_numpy(vector), model.model.layers[layer]
        if at_input:
            block.register_forward_pre_hook(lambda _, args, d=delta: (args[0] + d, *args[1:]))
        else:
            block.register_forward_hook(lambda _, __, out, d=delta: out + d)
    return model(PROMPT).logits


def steered_logits(adapter: SteeringAdapter) -> torch.Tensor:
    return SteeredModelForCausalLM.from_model(tiny_llama(), steering=adapter)(PROMPT).logits


CASES: dict[str, Any] = {
    "repeng.gguf": (lambda p, v: write_gguf(p, v), False, 1.0),
    "half.gguf": (lambda p, v: write_gguf(p, {k: x.astype(np.float16) for k, x in v.items()}), False, 1.0),
    "cast.svec": (lambda p, v: write_svec(p, v, nested=False), True, 1.0),
    "aisteer.svec": (lambda p, v: write_svec(p, v, nested=True), False, 1.0),
    "lm_eval.pt": (lambda p, v: write_steer_file(p, v, factor=0.5), False, 0.5),
    "lm_eval_list.pt": (lambda p, v: write_steer_file(p, v, factor=-2, as_list=True), False, -2.0),
    "lite.safetensors": (lambda p, v: write_steering_lite(p, v, coeff=0.25), False, 0.25),
    "lite_shared.safetensors": (lambda p, v: write_steering_lite(p, v, "shared.", method="pca"), False, 1.0),
    "lite_group.safetensors": (
        lambda p, v: write_steering_lite(p, {k: np.stack([x / 2, x / 2]) for k, x in v.items()}, "stacked."),
        False,
        1.0,
    ),
}


@pytest.mark.parametrize(("write", "at_input", "factor"), CASES.values(), ids=CASES)
def test_a_file_steers_as_a_plain_hook_does(
    tmp_path: Path, request: pytest.FixtureRequest, vectors: Vectors, write: Any, at_input: bool, factor: float
) -> None:
    path = write(tmp_path / request.node.callspec.id, vectors)
    adapter = load_vectors(path)
    tolerance = 2e-2 if path.name == "half.gguf" else 1e-5
    expected = hooked_logits(vectors, at_input, factor)
    torch.testing.assert_close(steered_logits(adapter), expected, rtol=tolerance, atol=tolerance)
    assert adapter.config.steering_type == "CONSTANT" and adapter.config.fit["imported"]["file"] == path.name
    adapter.save_pretrained(tmp_path / "saved")
    assert tensors_equal(SteeringAdapter.from_pretrained(tmp_path / "saved").tensors, adapter.tensors)


def test_missing_settings_can_be_given(tmp_path: Path, vectors: Vectors) -> None:
    path = write_svec(tmp_path / "v.json", vectors, nested=False)
    with pytest.raises(ValueError, match=r"v\.json has no known extension.*\.gguf"):
        load_vectors(path)
    with pytest.raises(ValueError, match=r"Unknown format 'npz'.*svec"):
        load_vectors(path, "npz")
    adapter = load_vectors(
        path, "svec", site="resid_post", strength=2.0, positions="generated", num_hidden_layers=LAYERS
    )
    assert [str(site) for site in constant_vectors(adapter)] == ["resid_post[0]", "resid_post[1]"]
    assert (adapter.config.strength, adapter.config.positions, adapter.config.base_model_type) == (
        2.0,
        "generated",
        "llama",
    )
    with pytest.raises(AdapterFileError, match="out of range"):
        load_vectors(path, "svec", num_hidden_layers=1)
    with pytest.raises(FileNotFoundError):
        load_vectors(tmp_path / "none.gguf")


# Out again


def test_gguf_round_trip_keeps_every_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    adapter = combine([small_adapter()], [1.0])
    adapter.config.layers = [1, 5]
    adapter.config.num_hidden_layers = None
    adapter.tensors = {f"vectors.{layer}": torch.randn(WIDTH) for layer in (1, 5)}
    again = load_vectors(save_gguf(adapter, tmp_path / "v.gguf"))
    assert tensors_equal(again.tensors, adapter.tensors)
    assert again.config.base_model_type == "llama"
    scaled = load_vectors(save_gguf(adapter * 0.5, tmp_path / "half.gguf"))
    assert torch.equal(scaled.tensors["vectors.5"], adapter.tensors["vectors.5"] * 0.5)
    # The input of a block is the output of the one before.
    shifted = load_vectors(write_svec(tmp_path / "v.svec", {3: np.ones(4, np.float32)}, nested=False))
    assert list(load_vectors(save_gguf(shifted, tmp_path / "s.gguf")).tensors) == ["vectors.2"]
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    assert bytes(reader.fields["general.architecture"].parts[-1]) == b"controlvector"
    assert [tensor.name for tensor in reader.tensors] == ["direction.1", "direction.5"]


class Gated(SteeringMethod):
    """A constant vector behind a gate."""

    writes = (Site("resid_post", 1),)

    def decide(self, queries: QueryStates) -> Decision:
        return Decision({self.writes[0]: torch.ones(1, WIDTH)}, gate=torch.ones(1))


class Reading(Gated):
    reads = (Site("resid_post", 0),)


class Mapping(Gated):
    writes = ()
    maps = (Site("resid_post", 1),)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Gated, "has a gate"),
        (Reading, r"reads the query at resid_post\[0\]"),
        (Mapping, "maps the stream"),
    ],
)
def test_query_dependent_adapters_are_not_control_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: type[SteeringMethod], message: str
) -> None:
    adapter = small_adapter()
    monkeypatch.setattr(SteeringAdapter, "build", lambda self: method(self.config, self.tensors))
    for action in (lambda: save_gguf(adapter, tmp_path / "v.gguf"), lambda: adapter + adapter):
        with pytest.raises(ValueError, match=message):
            action()
    # Where a sum was asked for, there is something else to do.
    with pytest.raises(ValueError, match="set_steering"):
        adapter + adapter
    assert not list(tmp_path.iterdir())


def test_what_a_control_vector_cannot_express_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot steer resid_post\[0\].*from 1 on"):
        save_gguf(small_adapter(), tmp_path / "v.gguf")
    with pytest.raises(ValueError, match=r"positions='prompt'; a control vector is added at all tokens"):
        save_gguf(small_adapter(positions="prompt"), tmp_path / "v.gguf")
    with pytest.raises(ValueError, match=r"must end in \.gguf"):
        save_gguf(small_adapter(), tmp_path / "v.bin")
    assert not list(tmp_path.iterdir())


# Refused on the way in


def test_other_contents_of_known_formats_are_refused(tmp_path: Path, vectors: Vectors) -> None:
    one = {1: vectors[1]}
    plane = {"directions": {"1": [[1.0, 2.0], [3.0, 4.0]]}}
    texts = {
        "heads": (json.dumps(plane), "several directions"),
        "mixed": (json.dumps({"directions": {"1": [1.0], "2": [[1.0]]}}), "one vector for some layers"),
        "words": (json.dumps({"directions": {"1": ["a"]}}), "not a list of numbers"),
        "ragged": (json.dumps({"directions": {"1": [[1.0], [1.0, 2.0]]}}), "not a list of numbers"),
        "layer": (json.dumps({"directions": {"-1": [1.0]}}), "names layer '-1'"),
        "far": (json.dumps({"directions": {"1" * 30: [1.0]}}), "names layer"),
        "twice": (json.dumps({"directions": {"1": [1.0], "01": [1.0]}}), "layer 1 twice"),
        "nan": ('{"directions": {"1": [NaN]}}', "not a JSON number"),
        "inf": ('{"directions": {"1": [1e39]}}', "too large for float32"),
        "widths": (json.dumps({"directions": {"1": [1.0], "2": [1.0, 2.0]}}), "equally wide"),
        "other": (json.dumps({"vectors": {}}), "no `directions`"),
        "list": ("[]", "must hold a JSON object"),
        "deep": ("[" * 100_000, "not readable JSON"),
    }
    for name, (text, message) in texts.items():
        path = tmp_path / f"{name}.svec"
        path.write_text(text)
        with pytest.raises(AdapterFileError, match=message):
            load_vectors(path)
    files = {
        write_gguf(tmp_path / "model.gguf", one, "llama"): "is a GGUF of 'llama'",
        write_gguf(tmp_path / "name.gguf", {"x": vectors[1]}): "names layer 'x'",
        write_gguf(tmp_path / "plane.gguf", {1: np.ones((2, 4), np.float32)}): "several directions",
        write_gguf(tmp_path / "ints.gguf", {1: np.ones(4, np.int32)}): "stored as I32",
        write_gguf(tmp_path / "nan.gguf", {1: np.full(4, np.nan, np.float32)}): "NaN",
        write_steer_file(tmp_path / "clamp.pt", one, action="clamp"): "depends on the state",
        write_steer_file(tmp_path / "factor.pt", one, float("nan")): "not a number",
        write_steering_lite(tmp_path / "cos.safetensors", one, method="cosine_gated"): "depends on the state",
        write_steering_lite(tmp_path / "sub.safetensors", one, target_submodule="mlp"): "inside the blocks",
        write_steering_lite(tmp_path / "ridge.safetensors", one, "z."): "not part of a constant vector",
    }
    entry = {"steering_vector": torch.ones(4), "steering_coefficient": 1.0, "action": "add"}
    for name, content, message in (
        ("mlp", {"layers.1.mlp": entry}, "inside a block"),
        ("empty", {}, "not a steer file"),
        ("tensor", torch.ones(3), "not a steer file"),
        ("wide", {"layers.1": {**entry, "steering_vector": torch.ones(1).expand(1 << 40)}}, "of shape"),
        ("ints", {"layers.1": {**entry, "steering_vector": torch.ones(4, dtype=torch.int64)}}, "floating-point"),
        (
            "meta",
            {"layers.1": {**entry, "steering_vector": torch.ones(4, device="meta")}},
            "not part of a plain tensor",
        ),
    ):
        torch.save(content, tmp_path / f"{name}.pt")
        files[tmp_path / f"{name}.pt"] = message
    save_file({"a": torch.ones(2)}, tmp_path / "plain.safetensors")
    files[tmp_path / "plain.safetensors"] = "no steering-lite config"
    for path, message in files.items():
        with pytest.raises(AdapterFileError, match=message):
            load_vectors(path)


# Algebra


def test_algebra_is_that_of_the_vectors() -> None:
    a, b = small_adapter(1, strength=2.0), small_adapter(2)
    for made, expected in (
        (a + b, lambda x, y: 2 * x + y),
        (a - b, lambda x, y: 2 * x - y),
        (0.5 * a, lambda x, y: x),
        (a / 4, lambda x, y: x / 2),
        (-b, lambda x, y: -y),
        (combine([a, b, a], [0.5, -1.0, 0.25]), lambda x, y: 1.5 * x - y),
    ):
        for name in a.tensors:
            torch.testing.assert_close(made.tensors[name], expected(a.tensors[name], b.tensors[name]))
        assert made.config.strength == 1.0 and made.config.base_model_name_or_path == "org/tiny"
    both = SteeredModelForCausalLM.from_model(tiny_llama(), steering={"a": a, "b": b})
    both.set_steering(["a", "b"])
    torch.testing.assert_close(steered_logits(a + b), both(PROMPT).logits)


def test_adapters_that_cannot_be_combined_say_why() -> None:
    with pytest.raises(ValueError, match="differ in positions"):
        small_adapter() + small_adapter(positions="prompt")
    with pytest.raises(ValueError, match="differ in num_hidden_layers"):
        small_adapter() + small_adapter(num_hidden_layers=4)
    with pytest.warns(UserWarning, match="different bases"):
        assert (
            small_adapter() + small_adapter(base_model_name_or_path="org/b")
        ).config.base_model_name_or_path is None
    with pytest.raises(ValueError, match="one weight each"):
        combine([small_adapter()], [1.0, 2.0])
    with pytest.raises(ValueError, match="finite"):
        small_adapter() * float("inf")
    with pytest.raises(TypeError):
        small_adapter() + 1  # type: ignore[operator]
    with pytest.raises(ValueError, match="made elsewhere"):
        small_adapter().build().needs(small_adapter().config, None)  # type: ignore[arg-type]
