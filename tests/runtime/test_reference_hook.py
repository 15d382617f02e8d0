"""Parity with a plain forward hook, and counts: added ops, host syncs, hooks."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from finesteer_hf import ConstantVector, Decision, SteeredModelForCausalLM, SteeringProcessor
from finesteer_hf.sites import Site
from finesteer_hf.testing.bench import Bench
from finesteer_hf.testing.toy import toy_model


SITE = Site("resid_post", 1)
VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(5)) * 2


@contextlib.contextmanager
def reference_hook(model, vector=VECTOR, start=0, stop=10**9):
    """Add a vector to the columns `start` to `stop` of the sequence, told apart by the cache's length."""
    position = {"past": 0}

    def clock(module, args, kwargs):
        cache = kwargs.get("past_key_values")
        position["past"] = int(cache.get_seq_length()) if cache is not None else 0

    def add(module, args, output):
        columns = torch.arange(output.shape[1]) + position["past"]
        return output + vector * ((columns >= start) & (columns < stop)).float()[None, :, None]

    handles = [
        model.model.register_forward_pre_hook(clock, with_kwargs=True),
        model.model.layers[SITE.layer].register_forward_hook(add),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def generate(model, inputs, **kwargs):
    settings = {"max_new_tokens": 8, "do_sample": False, **kwargs}
    return model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture
def inputs(model):
    prompts = torch.randint(6, 54, (3, 9), generator=torch.Generator().manual_seed(0))
    return Bench(model, list(prompts), 1.0, [], []).batch([0, 1, 2])


SETTINGS = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "chunks": {"prefill_chunk_size": 4},
    # Older versions of transformers look up nothing without an end of sequence; this one lies outside of the vocabulary.
    "lookup": {"prompt_lookup_num_tokens": 3, "eos_token_id": 1000},
    "guidance": {"guidance_scale": 1.5},
}


POSITIONS = {"all": (0, 10**9), "prompt": (0, 9), "generated": (8, 10**9)}


# With guidance the unconditional sequence has positions of its own, which a plain hook cannot tell apart; `all` has all.
@pytest.mark.parametrize(
    ("setting", "positions"),
    [(setting, own) for setting in SETTINGS for own in POSITIONS if setting != "guidance" or own == "all"],
)
def test_positions_match_a_plain_hook(model, inputs, setting, positions):
    kwargs, (start, stop) = SETTINGS[setting], POSITIONS[positions]
    if setting == "lookup":
        inputs = {name: value[:1] for name, value in inputs.items()}
    base = generate(model, inputs, **kwargs)
    with reference_hook(model, start=start, stop=stop):
        expected = generate(model, inputs, **kwargs)
    got = generate(model, inputs, steering_processor=[ConstantVector(SITE, VECTOR, positions=positions)], **kwargs)
    assert got == expected
    assert got != base


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_write_is_in_the_dtype_of_the_stream(inputs, dtype):
    model = toy_model().to(dtype)
    SteeredModelForCausalLM.from_model(model)
    with torch.no_grad():
        with reference_hook(model, vector=VECTOR.to(dtype)):
            # The mask of the reference is fp32; cast its sum back.
            handle = model.model.layers[1].register_forward_hook(lambda m, i, o: o.to(dtype))
            expected = model(**inputs).logits
            handle.remove()
        with model.steering_with([ConstantVector(SITE, VECTOR)]):
            got = model(**inputs).logits
    assert torch.equal(got, expected)


class Gated(SteeringProcessor):
    """Fires for rows whose state has a positive first coordinate."""

    def __init__(self, read: Site, write: Site, threshold: float = 0.0) -> None:
        self.reads, self.writes, self.threshold = (read,), (write,), threshold

    def decide(self, queries):
        state = queries[self.reads[0]]
        return Decision({self.writes[0]: state * 2}, (state[:, 0] > self.threshold).float(), {"score": state[:, 0]})


def test_a_closed_gate_leaves_the_row_bit_identical(model, inputs):
    with torch.no_grad():
        base = model(**inputs).logits
        with model.steering_with([Gated(SITE, SITE, threshold=1e9)]):
            assert torch.equal(model(**inputs).logits, base)


def test_adding_minus_zero_changes_no_bit():
    values = torch.tensor([0.0, -0.0, 1e-45, -1.5, float("inf")])
    assert torch.equal((values + -0.0).view(torch.int32), values.view(torch.int32))
    assert not torch.equal((values + 0.0).view(torch.int32), values.view(torch.int32))


def unsteered_state(model, inputs, site):
    """The prompt's last state, read with a plain hook and no steering."""
    seen = []
    with model.disable_steering(), torch.no_grad():
        handle = model.model.layers[site.layer].register_forward_hook(lambda m, i, o: seen.append(o[:, -1]))
        model(**inputs)
        handle.remove()
    return seen[0]


def test_each_adapter_of_a_stack_decides_from_the_unsteered_prompt(model, inputs):
    """T13: an earlier write must not change what a later adapter reads."""
    early, late = (
        Gated(Site("resid_post", 0), Site("resid_post", 0), -1e9),
        Gated(Site("resid_post", 2), Site("resid_post", 2)),
    )
    out = model.generate(
        **inputs,
        max_new_tokens=2,
        steering_processor=[early, late],
        output_steering=True,
        return_dict_in_generate=True,
    )
    expected = unsteered_state(model, inputs, Site("resid_post", 2))[:, 0]
    torch.testing.assert_close(out.steering["processor_1"]["score"], expected)


@pytest.mark.parametrize(("fires", "passes"), [(True, 2), (False, 1)])
def test_the_extra_pass_is_run_only_if_an_earlier_write_fired(model, inputs, fires, passes):
    early = Gated(Site("resid_post", 0), Site("resid_post", 0), -1e9 if fires else 1e9)
    late = Gated(Site("resid_post", 1), Site("resid_post", 1))
    calls = [0, 0, 0]

    def count(layer):
        def hook(module, args):
            calls[layer] += 1

        return hook

    handles = [block.register_forward_pre_hook(count(layer)) for layer, block in enumerate(model.model.layers)]
    model.generate(**inputs, max_new_tokens=1, steering_processor=[early, late])
    for handle in handles:
        handle.remove()
    assert calls == [passes, passes, 1], "the extra pass must end at the deepest read site"


def test_a_read_site_after_the_write_site_takes_one_pass_to_the_read_site_first(model, inputs):
    processor = Gated(Site("resid_post", 2), Site("resid_post", 0), -1e9)
    out = model.generate(
        **inputs, max_new_tokens=2, steering_processor=[processor], output_steering=True, return_dict_in_generate=True
    )
    expected = unsteered_state(model, inputs, Site("resid_post", 2))
    torch.testing.assert_close(out.steering["processor_0"]["score"], expected[:, 0])


class OpCounter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.ops.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def decode_ops(model, inputs, **kwargs):
    """Ops of one decode step: those of five new tokens less those of four."""

    def ops(count):
        with OpCounter() as counter:
            model.generate(**inputs, max_new_tokens=count, do_sample=False, **kwargs)
        return counter.ops

    longer, shorter = ops(5), ops(4)
    step = list(longer)
    for op in shorter:
        step.remove(op)
    return step


@pytest.mark.parametrize("layers", [(1,), (0, 1, 2)])
def test_a_decode_step_has_one_added_op_a_site_and_no_sync(model, inputs, layers):
    processors = [Gated(Site("resid_post", layer), Site("resid_post", layer), -1e9) for layer in layers]
    plain = decode_ops(model, inputs)
    steered = decode_ops(model, inputs, steering_processor=processors)
    assert len(steered) == len(plain) + len(layers)
    assert steered.count("_local_scalar_dense") == plain.count("_local_scalar_dense")


def test_three_adapters_at_one_site_share_the_one_added_op(model, inputs):
    processors = [Gated(SITE, SITE, threshold) for threshold in (-1e9, 0.0, 1e9)]
    assert len(decode_ops(model, inputs, steering_processor=processors)) == len(decode_ops(model, inputs)) + 1


def test_steering_scale_zero_adds_nothing(model, inputs):
    processors = [ConstantVector(SITE, VECTOR)]
    assert len(decode_ops(model, inputs, steering_processor=processors, steering_scale=0.0)) == len(
        decode_ops(model, inputs)
    )


def test_a_single_token_prompt(model):
    """T10: a prompt of one token is a prompt."""
    inputs = {"input_ids": torch.tensor([[7]]), "attention_mask": torch.ones(1, 1, dtype=torch.long)}
    with reference_hook(model, stop=1):
        expected = generate(model, inputs)
    assert generate(model, inputs, steering_processor=[ConstantVector(SITE, VECTOR, positions="prompt")]) == expected


def test_hooks_of_a_call_are_gone_after_it(model, inputs):
    before = len(model.model.layers[1]._forward_hooks)
    generate(model, inputs, steering_processor=[ConstantVector(SITE, VECTOR)])
    assert len(model.model.layers[1]._forward_hooks) == before


@pytest.mark.parametrize("name", ["steering", "steering_scale", "steering_processor", "output_steering"])
def test_a_plain_forward_ignores_no_argument_of_generate(model, inputs, name):
    with pytest.raises(TypeError, match=rf"{name}.*with model\.steering"):
        model(**inputs, **{name: None})


def test_errors_come_before_any_forward(model, inputs):
    calls = []
    handle = model.model.register_forward_hook(lambda *a: calls.append(1))
    with pytest.raises(ValueError, match=r"nobody.*not loaded"):
        generate(model, inputs, steering="nobody")
    with pytest.raises(ValueError, match=r"3 rows|2 rows"):
        generate(model, inputs, steering_processor=[ConstantVector(SITE, VECTOR)], steering_scale=[1.0, 2.0])
    with pytest.raises(ValueError, match="return_dict_in_generate"):
        generate(model, inputs, output_steering=True)
    with pytest.raises(ValueError, match="out of range: the model has 3 layers"):
        generate(model, inputs, steering_processor=[ConstantVector("resid_post[9]", VECTOR)])
    handle.remove()
    assert not calls


def test_rows_that_are_all_padding_are_refused(model, inputs):
    mask = inputs["attention_mask"].clone()
    mask[1] = 0
    with model.steering_with([ConstantVector(SITE, VECTOR)]), pytest.raises(ValueError, match="all padding"):
        model(input_ids=inputs["input_ids"], attention_mask=mask)


@pytest.mark.parametrize("rows", ["one row", "all rows"])
def test_unsteered_a_row_that_is_all_padding_is_what_it_is_to_the_base(model, inputs, rows):
    base = toy_model()
    mask = inputs["attention_mask"].clone()
    mask[1 if rows == "one row" else slice(None)] = 0
    inputs = {"input_ids": inputs["input_ids"], "attention_mask": mask}
    want, logits = generate(base, inputs), base(**inputs).logits
    assert generate(model, inputs) == want
    with model.steering_with([ConstantVector(SITE, VECTOR)]):
        assert generate(model, inputs, steering=None) == want
        assert generate(model, inputs, steering_scale=0.0) == want
        with model.disable_steering():
            assert generate(model, inputs) == want
            assert torch.equal(model(**inputs).logits, logits)
        with pytest.raises(ValueError, match="all padding"):
            generate(model, inputs)
