"""Everything else that reads or copies a model: recorded outputs, foreign hooks, copies, files, pipelines."""

from __future__ import annotations

import copy
import io
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from steered_tiny import (
    BUILDERS,
    LAYERS,
    VOCAB,
    greedy,
    hooks_of,
    query_shift,
    reference,
    some_prompts,
    steer_tiny,
    tiny_llama,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TextIteratorStreamer, pipeline

from finesteer_hf.model.auto import SteeredModelForCausalLM, steered
from finesteer_hf.model.verbs import SteeringMixin


SITES = [("resid_pre[1]", None), ("head_out[1]", None), ("resid_post[1]", None), ("resid_post[1]", "resid_post[2]")]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


# -- recorded outputs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recorded_before", [True, False], ids=["recorded-before", "recorded-after"])
@pytest.mark.parametrize(("write", "read"), SITES)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_hidden_states_and_attentions_are_the_steered_ones(
    kind: str, write: str, read: str | None, recorded_before: bool
) -> None:
    ids, adapter = some_prompts(), query_shift(write, read)
    wanted = {"output_hidden_states": True, "output_attentions": True}
    plain, model = BUILDERS[kind](), BUILDERS[kind]()
    for each in (plain, model):
        each.set_attn_implementation("eager")
    with torch.no_grad():
        before = (model if recorded_before else plain)(input_ids=ids, **wanted)
        model = steer_tiny(model, adapter)
        with reference(plain, adapter, ids):
            want = plain(input_ids=ids, **wanted)
        got = model(input_ids=ids, **wanted)
    assert len(got.hidden_states) == LAYERS + 1 and len(got.attentions) == LAYERS
    for name in ("hidden_states", "attentions"):
        for index, (one, other) in enumerate(zip(got[name], want[name], strict=True)):
            assert torch.equal(one, other), (name, index)
    assert not torch.equal(got.hidden_states[2], before.hidden_states[2])
    assert torch.equal(got.hidden_states[0], before.hidden_states[0])


def test_hidden_states_of_generate() -> None:
    ids, adapter = some_prompts(), query_shift()
    plain, model = tiny_llama(), steer_tiny(tiny_llama(), adapter)
    wanted = {"output_hidden_states": True, "return_dict_in_generate": True, "output_logits": True}
    with reference(plain, adapter, ids):
        want = greedy(plain, ids, **wanted)
    got = greedy(model, ids, **wanted)
    for step, other in zip(got.hidden_states, want.hidden_states, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(step, other, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(got.logits, want.logits, strict=True))


def test_foreign_hooks_see_the_steered_stream_and_stay() -> None:
    ids = some_prompts()
    model = tiny_llama()
    seen: dict[str, list[torch.Tensor]] = {"early": [], "late": []}

    def watch(name: str) -> Any:
        return lambda module, args, output: seen[name].append(output)

    block = model.model.layers[1]
    early = block.register_forward_hook(watch("early"))
    model = steer_tiny(model, query_shift())
    late = block.register_forward_hook(watch("late"))
    with torch.no_grad():
        model(input_ids=ids)
        model(input_ids=ids)
        unsteered_model = tiny_llama()
        steered_stream, again = seen["early"]
        assert torch.equal(steered_stream, again)
        assert torch.equal(steered_stream, seen["late"][0])
        model = model.unload_steering()
        logits = model(input_ids=ids).logits
        assert torch.equal(logits, unsteered_model(input_ids=ids).logits)
    assert len(seen["early"]) == len(seen["late"]) == 3
    assert not torch.equal(seen["early"][2], steered_stream)
    assert hooks_of(model) == {"model.layers.1": 2}
    early.remove()
    late.remove()
    assert hooks_of(model) == {}


def test_a_foreign_hook_may_edit_the_stream_too() -> None:
    ids, adapter = some_prompts(), query_shift()
    plain, model = tiny_llama(), tiny_llama()
    model.model.layers[1].register_forward_hook(lambda module, args, output: output * 1.5)
    model = steer_tiny(model, adapter)
    with reference(plain, adapter, ids):
        plain.model.layers[1].register_forward_hook(lambda module, args, output: output * 1.5)
        want = greedy(plain, ids)
    assert torch.equal(greedy(model, ids), want)


# -- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", ["resid_post[1]", "head_out[1]"])
@pytest.mark.parametrize("how", ["deepcopy", "torch.save"])
def test_a_copy_is_independent(how: str, write: str) -> None:
    ids, adapter = some_prompts(), query_shift(write)
    model = steer_tiny(tiny_llama(), adapter)
    answer, unsteered = greedy(model, ids), greedy(model, ids, steering=None)
    model(input_ids=ids)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert type(twin) is type(model) and twin._steering is not model._steering
    assert hooks_of(twin) == hooks_of(model)
    assert torch.equal(greedy(twin, ids), answer)

    model.unload_steering()
    assert torch.equal(greedy(twin, ids), answer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(greedy(twin, ids), answer)
    assert torch.equal(greedy(twin, ids, steering=None), unsteered)
    twin.load_steering(query_shift("resid_pre[2]"), "other")
    twin.unload_steering()
    assert hooks_of(twin) == {}
    assert torch.equal(greedy(twin, ids), unsteered)


# -- files ------------------------------------------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_save_pretrained_writes_the_base(kind: str, tmp_path: Path) -> None:
    BUILDERS[kind]().save_pretrained(tmp_path / "plain")
    model = steer_tiny(BUILDERS[kind](), query_shift("head_out[1]"), query_shift("resid_post[2]"))
    greedy(model, some_prompts())
    model.save_pretrained(tmp_path / "steered")
    assert files_of(tmp_path / "steered") == files_of(tmp_path / "plain")
    assert json.loads((tmp_path / "steered" / "config.json").read_text())["architectures"] == [
        type(BUILDERS[kind]()).__name__
    ]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "steered")
    assert not isinstance(again, SteeringMixin)


def test_the_module_tree_is_the_base_models() -> None:
    plain, model = tiny_llama(), steer_tiny(tiny_llama(), query_shift("head_out[1]"))
    greedy(model, some_prompts())
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in plain.named_buffers()]
    assert isinstance(model, type(plain)) and type(model).__name__ == type(plain).__name__
    assert repr(model) == repr(plain)
    assert model.config.to_dict() == plain.config.to_dict()
    assert steered(model) and not steered(plain)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_unloading_gives_the_base_back(kind: str, tmp_path: Path) -> None:
    ids, model = some_prompts(), BUILDERS[kind]()
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    for round_ in range(4):
        model = steer_tiny(model, query_shift("head_out[1]"), query_shift("resid_post[2]"))
        model.load_steering(query_shift("resid_pre[1]", seed=round_), "c")
        model.load_steering(query_shift("resid_pre[2]", seed=round_), "c")
        model.set_steering(["a", "b", "c"])
        greedy(model, ids)
        model.delete_steering("b")
        model(input_ids=ids)
        base = model.unload_steering()
        assert base is model and type(model) is type(BUILDERS[kind]())
        assert hooks_of(model) == {}
        assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    plain = BUILDERS[kind]()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    model.save_pretrained(tmp_path / "unloaded")
    plain.save_pretrained(tmp_path / "plain")
    assert files_of(tmp_path / "unloaded") == files_of(tmp_path / "plain")


def test_hooks_are_counted() -> None:
    model = steer_tiny(tiny_llama(), query_shift("resid_post[1]"), query_shift("resid_post[1]", "head_out[0]", seed=2))
    two_sites = {"model": 2, "model.layers.0.self_attn.o_proj": 1, "model.layers.1": 1}
    assert hooks_of(model) == two_sites
    model.load_steering(query_shift("resid_post[1]", seed=3), "a")
    assert hooks_of(model) == two_sites
    with model.steering_with([query_shift("resid_post[1]").build(), query_shift("resid_post[3]").build()]):
        assert hooks_of(model) == two_sites | {"model.layers.3": 1}
    assert hooks_of(model) == two_sites
    greedy(model, some_prompts(), steering_processor=[query_shift("resid_pre[1]").build()])
    assert hooks_of(model) == two_sites
    model.delete_steering("b")
    assert hooks_of(model) == {"model": 2, "model.layers.1": 1}
    model.delete_steering("a")
    assert hooks_of(model) == {"model": 2}


# -- pipelines and streams --------------------------------------------------------------------------------------------


def test_text_generation_pipeline_steers_with_what_is_set() -> None:
    tokenizer, adapter = tiny_tokenizer(), query_shift()
    model = steer_tiny(tiny_llama(eos_token_id=None), adapter)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    prompt = "w5 w9 w40 w12"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    plain = tiny_llama(eos_token_id=None)
    with reference(plain, adapter, ids):
        want = tokenizer.decode(greedy(plain, ids)[0, ids.shape[1] :])
    unsteered = tokenizer.decode(greedy(plain, ids)[0, ids.shape[1] :])

    def ask(**kwargs: Any) -> str:
        settings = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
        # Older pipelines keep the space between prompt and answer.
        return generator(prompt, **settings, **kwargs)[0]["generated_text"].lstrip()

    assert ask() == want != unsteered
    assert ask(steering=None) == unsteered
    assert ask(steering_scale=0.0) == unsteered
    model.set_steering(None)
    assert ask() == unsteered
    assert ask(steering="a") == want


def test_streaming_from_a_thread_with_its_own_steering() -> None:
    tokenizer, ids, adapter = tiny_tokenizer(), some_prompts(rows=1), query_shift()
    model = steer_tiny(tiny_llama(), adapter)
    model.set_steering(None)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    texts = {}
    for steering in ("a", None):
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        arguments = {"input_ids": ids, "streamer": streamer, "steering": steering, **settings}
        thread = threading.Thread(target=model.generate, kwargs=arguments)
        thread.start()
        texts[steering] = "".join(streamer)
        thread.join()
        assert texts[steering] == tokenizer.decode(greedy(model, ids, steering=steering)[0, ids.shape[1] :])
    assert texts["a"] != texts[None]


def test_from_model_is_in_place_and_can_be_repeated() -> None:
    model = tiny_llama()
    once = SteeredModelForCausalLM.from_model(model, steering={"a": query_shift()})
    twice = SteeredModelForCausalLM.from_model(once, steering={"b": query_shift("head_out[1]")})
    assert model is once is twice
    assert model.active_steering == {"a": 1.0} and set(model.steering_adapters) == {"a", "b"}
    assert hooks_of(model)["model"] == 2
