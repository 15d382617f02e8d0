"""The extra work of a steered prefill, in counts: ops, tensors of the stream's size, plans."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from finesteer_hf import ConstantVector, FineSteerConfig, SteeredModelForCausalLM, SteeringAdapter
from finesteer_hf.runtime.forwards.window import Window
from finesteer_hf.runtime.plan import Plan
from finesteer_hf.testing.toy import toy_model


WIDTH, LAYERS, TOKENS = 32, 3, 9
# 2 read the query, 2 score it, 3 look up its dose, 4 weigh the experts, 6 make the vector, 6 dose it and lay it out for the
# stream, 1 writes, 1 measures what is added and 1 looks whether it is finite.
MOST_ADDED_OPS = 26


def finesteer_adapter(seed: int = 0, **settings) -> SteeringAdapter:
    config = FineSteerConfig(
        layer=1, read_site="resid_post[1]", write_site="resid_post[1]", hidden_size=WIDTH, num_hidden_layers=LAYERS,
        base_model_type="llama", strength=1.0, gate_score="state", experts="mixture", subspace_rank=4, num_experts=4,
        residual_rank=4, **{"positions": "all", **settings},
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    shapes = SteeringAdapter(config, {}).tensor_shapes()
    tensors = {
        name: torch.randn([n if isinstance(n, int) else 20 for n in shape], generator=generator)
        for name, shape in shapes.items()
    }
    tensors["gate.calibration"] = tensors["gate.calibration"].sort().values
    tensors["gate.level"], tensors["gate.gamma"] = torch.tensor(0.05), torch.tensor(2.0)
    tensors["gate.threshold"] = tensors["gate.floor"] = torch.tensor(-1e3)
    return SteeringAdapter(config, tensors)


class Ops(TorchDispatchMode):
    """Names of the ops, and how many storages of `size` elements or more they made."""

    def __init__(self, size: int = 1 << 60) -> None:
        super().__init__()
        self.names: list[str] = []
        self.size, self.made = size, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.names.append(function.overloadpacket.__name__)
        if isinstance(out, torch.Tensor) and out.numel() >= self.size:
            given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
            self.made += out.untyped_storage().data_ptr() not in given
        return out


@pytest.fixture
def inputs():
    ids = torch.randint(6, 54, (3, TOKENS), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def ops_of(model, inputs, **kwargs):
    with Ops() as ops:
        model.generate(**inputs, max_new_tokens=1, do_sample=False, **kwargs)
    return ops.names


def test_the_added_ops_of_a_prefill_are_those_of_the_formulas(model, inputs):
    model.load_steering(finesteer_adapter())
    plain = ops_of(model, inputs, steering=None)
    steered = ops_of(model, inputs)
    assert len(steered) - len(plain) <= MOST_ADDED_OPS
    for name in ("_to_copy", "nonzero"):
        assert steered.count(name) == plain.count(name), name
    assert steered.count("_local_scalar_dense") == plain.count("_local_scalar_dense") + 1


@pytest.mark.parametrize("sites", [1, LAYERS])
@pytest.mark.parametrize("tokens", [1, 4])
def test_a_call_checks_once_that_its_addends_are_finite(model, inputs, sites, tokens):
    processors = [ConstantVector(f"resid_post[{layer}]", torch.ones(WIDTH)) for layer in range(sites)]

    def looks(**kwargs):
        with Ops() as ops:
            model.generate(**inputs, max_new_tokens=tokens, do_sample=False, **kwargs)
        return ops.names.count("_local_scalar_dense")

    assert looks(steering_processor=processors) == looks() + 1


def test_an_unsteered_call_has_the_ops_of_the_base(model, inputs):
    base = toy_model()
    inputs["attention_mask"][0, :3] = 0
    model.load_steering(finesteer_adapter())
    assert ops_of(model, inputs, steering=None) == ops_of(base, inputs)
    with model.disable_steering():
        assert ops_of(model, inputs) == ops_of(base, inputs)
        with Ops() as disabled:
            model(**inputs)
    with Ops() as plain:
        base(**inputs)
    assert disabled.names == plain.names


def test_the_plan_is_built_once_for_an_adapter_set_and_scale(model, inputs, monkeypatch):
    laid_out = []
    of = Plan.of.__func__

    def counted(cls, entries):
        laid_out.append([entry.name for entry in entries])
        return of(cls, entries)

    monkeypatch.setattr(Plan, "of", classmethod(counted))

    def count(**kwargs):
        laid_out.clear()
        for _ in range(3):
            model.generate(**inputs, max_new_tokens=2, do_sample=False, **kwargs)
        return len(laid_out)

    model.load_steering(finesteer_adapter(0), "a")
    assert count() == 1
    assert count() == 0
    assert count(steering_scale=0.5) == 1
    model.load_steering(finesteer_adapter(1), "a")
    assert count() == 1, "another adapter under the name is another plan"
    model.load_steering(finesteer_adapter(2), "b")
    assert count(steering=["a", "b", "a"]) == 3, "plans by row are laid out for their rows"
    model.set_steering({"a": 1.0, "b": 0.5})
    assert count() == 1
    model.delete_steering("b")
    assert count() == 1


def test_a_replaced_adapter_steers_from_the_next_call_on(model, inputs):
    def said():
        return model.generate(**inputs, max_new_tokens=6, do_sample=False).tolist()

    model.load_steering(finesteer_adapter(0), "a")
    first = said()
    model.load_steering(finesteer_adapter(1), "a")
    second = said()
    fresh = toy_model()
    SteeredModelForCausalLM.from_model(fresh)
    fresh.load_steering(finesteer_adapter(1), "a")
    assert second == fresh.generate(**inputs, max_new_tokens=6, do_sample=False).tolist() != first


def test_a_users_processor_may_change_its_sites_between_calls(model, inputs):
    processor = ConstantVector("resid_post[0]", torch.ones(WIDTH))

    def scores(given):
        return model.generate(
            **inputs, max_new_tokens=1, do_sample=False, steering_processor=[given], output_scores=True,
            return_dict_in_generate=True,
        ).scores[0]  # fmt: skip

    scores(processor)
    other = ConstantVector("resid_post[2]", torch.ones(WIDTH))
    processor.site, processor.writes = other.site, other.writes
    assert torch.equal(scores(processor), scores(other))


@pytest.mark.parametrize("positions", ["all", "prompt", "generated"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_write_makes_one_tensor_of_the_streams_size(model, inputs, positions, padded):
    if padded:
        inputs["attention_mask"][0, :3] = 0
    rows, tokens = inputs["input_ids"].shape
    size = rows * tokens * WIDTH
    adapter = finesteer_adapter(positions=positions)
    model.load_steering(adapter)

    def made(**kwargs):
        with Ops(size) as ops:
            model.generate(**inputs, max_new_tokens=1, do_sample=False, **kwargs)
        return ops.made

    assert made() - made(steering=None) == 1


def test_the_signature_of_a_steered_forward_is_not_rebuilt(model):
    base = model._steering_base_class
    assert type(model).forward.__signature__ == inspect.signature(base.forward)


@pytest.mark.parametrize("positions", ["all", "prompt", "generated"])
@pytest.mark.parametrize("query", [4, 8])
@pytest.mark.parametrize(("past", "tokens"), [(0, 9), (0, 4), (3, 2), (5, 3), (9, 2)])
def test_shared_columns_are_those_of_the_mask(positions, query, past, tokens):
    """Brute force over columns."""
    lengths = torch.full((2,), query + 1)
    window = Window.of(9, None, lengths)
    columns = torch.arange(past, past + tokens)
    named = {"all": columns >= 0, "prompt": columns <= query, "generated": columns >= query}[positions]
    found = torch.zeros(tokens, dtype=torch.bool)
    found[window.shared_columns(positions, past, tokens)] = True
    assert torch.equal(found, named)
    mask = window.token_mask(positions, past, tokens, torch.device("cpu"))
    assert torch.equal(named, mask[0]) if mask is not None else bool(named.all())


def test_columns_are_not_shared_where_rows_differ():
    mask = torch.ones(2, 5, dtype=torch.bool)
    assert Window.of(5, mask, None).shared_columns("all", 0, 5) == slice(0, 5)
    assert Window.of(5, mask, torch.tensor([2, 5])).shared_columns("prompt", 0, 5) is None
    mask[0, 0] = False
    padded = Window.of(5, mask, None)
    assert padded.shared_columns("all", 0, 5) is None
    assert padded.shared_columns("all", 5, 1) == slice(0, 1)
