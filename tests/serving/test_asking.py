"""What a request may ask for, how, and what is refused before anything is queued."""

from __future__ import annotations

import threading

import pytest
import torch
from engines import NEW_TOKENS, at, constant, engine, engine_config, results
from transformers import GenerationConfig
from transformers.generation.configuration_utils import CompileConfig

from finesteer_hf import AngularConfig, ConstantVector, ContrastiveConfig, FASBConfig, SADIConfig
from finesteer_hf.errors import AdapterNotFoundError, UnsupportedModelError
from finesteer_hf.serving.sampling import Sampling
from finesteer_hf.testing.conformance import fit_on_toy


GREEDY = GenerationConfig(max_new_tokens=NEW_TOKENS, eos_token_id=-1, do_sample=False)


def batch(model, prompts, **kwargs):
    out = model.generate_batch(prompts, GREEDY, engine_config(), **kwargs)
    return [output.generated_tokens for output in out.values()]


def test_generate_batch_steers_one_for_all_or_one_for_each(model, prompts, alone):
    few = prompts[:3]
    assert batch(model, few) == [alone(i, None) for i in range(3)]
    assert batch(model, few, steering="caa-all") == [alone(i, "caa-all") for i in range(3)]
    assert batch(model, few, steering="caa-all", steering_scale=0.5) == [alone(i, "caa-all", 0.5) for i in range(3)]
    own = ["caa-all", None, "finesteer-generated"]
    assert batch(model, few, steering=own) == [alone(i, own[i]) for i in range(3)]
    scales = [0.5, 0.0, 1.5]
    want = [alone(i, own[i], scales[i]) for i in range(3)]
    assert batch(model, few, steering=own, steering_scale=scales) == want
    stack = {"early-all": 1.0, "finesteer-generated": 1.0}
    assert batch(model, few, steering=stack) == [alone(i, stack) for i in range(3)]


def test_outputs_say_what_the_gates_said(model, prompts):
    out = list(model.generate_batch(prompts[:5], GREEDY, engine_config(), steering="finesteer-all").values())
    for output, prompt in zip(out, prompts, strict=False):
        ids = torch.tensor([prompt])
        want = model.generate(
            ids, steering="finesteer-all", max_new_tokens=1, output_steering=True, return_dict_in_generate=True
        ).steering["finesteer-all"]
        said = output.steering["finesteer-all"]
        assert said["gate"] == pytest.approx(float(want["gate"]), abs=1e-5)
        assert said["score"] == pytest.approx(float(want["score"]), abs=1e-4)
        assert said["experts"] == pytest.approx(want["experts"][0].tolist(), abs=1e-4)
        assert said["fired"] == (float(want["gate"]) > 0) and said["scale"] == 1.0


def test_what_is_active_holds_for_requests_that_name_nothing(model, prompts, alone):
    few = prompts[:2]
    with model.steering("caa-all"):
        assert batch(model, few) == [alone(i, "caa-all") for i in range(2)]
        assert batch(model, few, steering=None) == [alone(i, None) for i in range(2)]
    model.set_steering("caa-all")
    try:
        assert batch(model, few) == [alone(i, "caa-all") for i in range(2)]
        with model.disable_steering():
            assert batch(model, few) == [alone(i, None) for i in range(2)]
    finally:
        model.set_steering(None)
    with model.steering_with([ConstantVector("resid_post[1]", torch.ones(32) * 9)]):
        got = batch(model, few)
        want = model.generate(torch.tensor(few[:1]), max_new_tokens=NEW_TOKENS, do_sample=False)
    assert got[0] == want[0, len(few[0]) :].tolist() != alone(0, None)


def test_a_manager_that_is_begun_in_a_block_steers_with_it_whoever_adds_requests(model, prompts, alone):
    with model.steering("caa-all"), engine(model) as manager:
        ids = []
        thread = threading.Thread(target=lambda: ids.append(manager.add_request(prompts[0])))
        thread.start()
        thread.join()
        ids.append(manager.add_request(prompts[1]))
        with model.steering("constant-all"):
            ids.append(manager.add_request(prompts[2]))
        got = results(manager, ids)
    want = [alone(0, "caa-all"), alone(1, "caa-all"), alone(2, "constant-all")]
    assert [got[i].generated_tokens for i in ids] == want


def test_a_block_that_is_left_says_nothing_of_an_older_manager(model, prompts, alone):
    with engine(model) as manager:
        with model.steering("caa-all"):
            first = manager.add_request(prompts[0])
        second = manager.add_request(prompts[0])
        got = results(manager, [first, second])
    assert got[first].generated_tokens == alone(0, "caa-all")
    assert got[second].generated_tokens == alone(0, None)


def test_generate_with_a_paged_cache_steers_each_row(model, prompts, alone):
    few = [prompt[:6] for prompt in prompts[:2]]
    settings = {"max_new_tokens": 4, "do_sample": False}
    want = model.generate(torch.tensor(few), steering=["caa-all", None], **settings)
    config = GenerationConfig(**settings, eos_token_id=-1)
    config.continuous_batching_config = engine_config()
    out = model.generate(torch.tensor(few), config, steering=["caa-all", None], cache_implementation="paged")
    # transformers puts an axis before the rows.
    assert out[0].tolist() == want.tolist()


@pytest.mark.parametrize(
    "arguments", [{"steering_processor": []}, {"output_steering": True}, {"temprature": 1.0}], ids=str
)
def test_generate_batch_swallows_no_keyword(model, prompts, arguments):
    with pytest.raises(TypeError, match=rf"{next(iter(arguments))}.*steering_scale"):
        model.generate_batch(prompts[:1], max_new_tokens=2, **arguments)


def test_generate_batch_raises_what_its_requests_raise(model, prompts):
    with pytest.raises(AdapterNotFoundError, match="'nobody'"):
        batch(model, prompts[:2], steering=["caa-all", "nobody"])
    with pytest.raises(ValueError, match="3 entries for 2 prompts"):
        batch(model, prompts[:2], steering=[None] * 3)
    with pytest.raises(ValueError, match="99 is not a token id"):
        batch(model, [[7, 99]])


REFUSED = {
    "angular": (AngularConfig(layers=[1]), "maps the state of each token"),
    "sadi": (SADIConfig(), "maps the state of each token"),
    "fasb": (FASBConfig(num_heads=2), "takes generated tokens back|maps the state"),
    "contrastive": (ContrastiveConfig(), "compares with the unsteered model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_packed_batch_cannot_do_is_refused_by_name(model, prompts, name):
    config, reason = REFUSED[name]
    model.load_steering(fit_on_toy(config)[2], name)
    model.set_steering(None)
    try:
        with engine(model) as manager:
            with pytest.raises(UnsupportedModelError, match=rf"'{name}'.*({reason}).*generate\(steering='{name}'\)"):
                manager.add_request(prompts[0], steering=name)
            # The engine goes on.
            results(manager, [manager.add_request(prompts[0])])
    finally:
        model.delete_steering(name)


def test_what_would_end_the_engine_is_refused_at_the_door(model, prompts):
    with engine(model, num_blocks=12) as manager:
        for wrong, message in (
            ({"input_ids": []}, "has no tokens"),
            ({"input_ids": [7, 54]}, "54 is not a token id.*0 to 53"),
            ({"input_ids": [7, -1]}, "-1 is not a token id"),
            ({"input_ids": [7] * 90, "max_new_tokens": 7}, "do not fit into the engine's cache of 96 tokens"),
            ({"input_ids": [7], "max_new_tokens": 0}, "at least 1"),
            ({"input_ids": [7], "steering": "caa-all", "steering_scale": float("nan")}, "finite"),
            ({"input_ids": [7], "steering": {"caa-all": float("inf")}}, "finite"),
        ):
            with pytest.raises(ValueError, match=message):
                manager.add_request(**wrong)
        for wrong, message in (
            ({"num_return_sequences": 0}, "num_return_sequences must be at least 1"),
            ({"request_id": "mine__child#0"}, "returned sequences"),
        ):
            with pytest.raises(ValueError, match=message):
                manager.add_request([7], **wrong)
        with pytest.raises(TypeError, match=r"\['temprature'\].*sampling"):
            manager.add_request([7], temprature=1.0)
        assert not manager.session.requests and manager.queue_length() == (0, 0)
        results(manager, [manager.add_request([7] * 90, max_new_tokens=6)])
    with pytest.raises(RuntimeError, match=r"stopping.*not taken"):
        manager.add_request(prompts[0])


def test_an_answer_without_a_limit_ends_where_the_cache_does(model, prompts):
    with engine(model, {"max_new_tokens": None}, num_blocks=12) as manager:
        name = manager.add_request([7] * 50)
        other = manager.add_request(prompts[0], max_new_tokens=3)
        got = results(manager, [name, other])
    assert len(got[name].generated_tokens) == 96 - 50 and len(got[other].generated_tokens) == 3


def test_the_models_context_is_a_limit(model):
    with engine(model) as manager, pytest.raises(ValueError, match="the model's context of 256"):
        manager.add_request([7] * 255, max_new_tokens=2)


@pytest.mark.parametrize(
    "setting", [{"use_async_batching": True}, {"varlen_compile_config": CompileConfig()}], ids=str
)
def test_engines_that_skip_hooks_serve_unsteered_requests_only(model, prompts, setting):
    manager = model.init_continuous_batching(GREEDY, engine_config(**setting))
    with pytest.raises(UnsupportedModelError, match=rf"{next(iter(setting))}.*without the hooks"):
        manager.add_request(prompts[0], steering="caa-all")
    assert not manager.session.requests


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -1}, "greedy"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"logprobs": -1}, "logprobs"),
        ({"temperature": float("nan")}, "finite"),
    ],
)
def test_sampling_is_checked(wrong, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**wrong)


def test_an_adapter_replaced_or_deleted_in_flight_still_steers_its_requests(model, prompts, alone):
    model.load_steering(at(constant(layer=1), "all"), "moving")
    want = model.generate(torch.tensor([prompts[0]]), steering="moving", max_new_tokens=40, do_sample=False)
    with engine(model) as manager:
        with manager.pause():
            first = manager.add_request(prompts[0], steering="moving", max_new_tokens=40)
            model.load_steering(at(constant(layer=2, scale=9.0), "all"), "moving")
            second = manager.add_request(prompts[0], steering="moving", max_new_tokens=40)
            new = model.generate(torch.tensor([prompts[0]]), steering="moving", max_new_tokens=40, do_sample=False)
            model.delete_steering("moving")
            with pytest.raises(AdapterNotFoundError):
                manager.add_request(prompts[0], steering="moving")
        got = results(manager, [first, second])
    length = len(prompts[0])
    assert got[first].generated_tokens == want[0, length:].tolist()
    assert got[second].generated_tokens == new[0, length:].tolist() != want[0, length:].tolist()
