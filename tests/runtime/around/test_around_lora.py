"""LoRA before, after, merged and unmerged: what a plain hook on the outermost module does."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from steered_tiny import (
    BUILDERS,
    greedy,
    hooks_of,
    query_shift,
    reference,
    site_module,
    some_prompts,
    steer_tiny,
    tiny_llama,
)

from finesteer_hf.adapters.adapter import SteeringAdapter, active_lora_names
from finesteer_hf.model.auto import SteeredModelForCausalLM


SITES = ["resid_post[1]", "resid_pre[2]", "head_out[1]"]
TARGETS = {"llama": ["q_proj", "v_proj", "o_proj"], "gpt2": ["c_attn", "c_proj"]}


def lora_config(kind: str = "llama") -> LoraConfig:
    return LoraConfig(
        r=4, lora_alpha=8, target_modules=TARGETS[kind], task_type="CAUSAL_LM", fan_in_fan_out=kind == "gpt2"
    )


def shake(model: torch.nn.Module, adapter: str, seed: int) -> None:
    """Give a LoRA weights of a seed that matter; PEFT begins with the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"lora_A.{adapter}." in name or f"lora_B.{adapter}." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


@pytest.fixture(scope="module")
def lora_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Saved LoRAs: `one` and `two` for the Llama, `gpt2` for the GPT-2; and the Llama itself as `base`."""
    folders = {}
    for name, kind, seed in (("one", "llama", 1), ("two", "llama", 2), ("gpt2", "gpt2", 3)):
        model = BUILDERS[kind]()
        folder = tmp_path_factory.mktemp(name)
        base = tmp_path_factory.mktemp(f"{name}-base")
        model.save_pretrained(base)
        model.name_or_path = str(base)
        peft_model = get_peft_model(model, lora_config(kind))
        shake(peft_model, "default", seed)
        peft_model.save_pretrained(folder)
        folders[name] = str(folder)
        folders.setdefault("base", str(base))
    return folders


def expected(model: Any, adapter: SteeringAdapter, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens and logits of an unsteered model with the plain hook."""
    with reference(model, adapter, ids), torch.no_grad():
        return greedy(model, ids), model(input_ids=ids).logits


def check(model: Any, want: tuple[torch.Tensor, torch.Tensor], ids: torch.Tensor) -> None:
    tokens, logits = want
    with torch.no_grad():
        got = model(input_ids=ids).logits
    torch.testing.assert_close(got, logits, rtol=0, atol=0)
    assert torch.equal(greedy(model, ids), tokens)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("site", SITES)
def test_every_way_to_a_lora_steers_as_the_plain_hook(kind: str, site: str, lora_folders: dict[str, str]) -> None:
    folder = lora_folders["one" if kind == "llama" else "gpt2"]
    ids, adapter = some_prompts(), query_shift(site)
    plain = PeftModel.from_pretrained(BUILDERS[kind](), folder)
    want = expected(plain, adapter, ids)
    unsteered = greedy(plain, ids)
    assert not torch.equal(want[0], unsteered)

    after = PeftModel.from_pretrained(steer_tiny(BUILDERS[kind](), adapter), folder)
    check(after, want, ids)

    before = SteeredModelForCausalLM.from_model(PeftModel.from_pretrained(BUILDERS[kind](), folder), steering=adapter)
    assert isinstance(before, PeftModel)
    check(before, want, ids)

    for steered in (after, before):
        with steered.disable_steering():
            assert torch.equal(greedy(steered, ids), unsteered)
        assert torch.equal(greedy(steered, ids, steering=None), unsteered)

    bare = BUILDERS[kind]()
    bare.load_adapter(folder)
    if not torch.equal(greedy(bare, ids), unsteered):
        pytest.skip("load_adapter of this transformers, with this PEFT, loses the LoRA unsteered, too")
    native = steer_tiny(BUILDERS[kind](), adapter)
    native.load_adapter(folder)
    check(native, want, ids)


@pytest.mark.parametrize("site", SITES)
def test_prompt_lengths_reach_the_model_through_peft(site: str, lora_folders: dict[str, str]) -> None:
    ids, adapter = some_prompts(tokens=9), query_shift(site)
    plain = PeftModel.from_pretrained(tiny_llama(), lora_folders["one"])
    lengths = torch.tensor([4, 6])
    with reference(plain, adapter, ids, query=lengths - 1), torch.no_grad():
        want = plain(input_ids=ids).logits
    steered = PeftModel.from_pretrained(steer_tiny(tiny_llama(), adapter), lora_folders["one"])
    with torch.no_grad():
        got = steered(input_ids=ids, prompt_lengths=lengths).logits
        last = steered(input_ids=ids).logits
    assert torch.equal(got, want)
    assert not torch.equal(got, last)


@pytest.mark.parametrize("site", SITES)
def test_merged_and_unloaded(site: str, lora_folders: dict[str, str]) -> None:
    ids, adapter = some_prompts(), query_shift(site)
    plain = PeftModel.from_pretrained(tiny_llama(), lora_folders["one"])
    steered = PeftModel.from_pretrained(steer_tiny(tiny_llama(), adapter), lora_folders["one"])
    check(steered, expected(plain, adapter, ids), ids)

    for model in (plain, steered):
        model.merge_adapter()
    check(steered, expected(plain, adapter, ids), ids)
    for model in (plain, steered):
        model.unmerge_adapter()
    check(steered, expected(plain, adapter, ids), ids)

    merged = copy.deepcopy(steered).merge_and_unload()
    check(merged, expected(copy.deepcopy(plain).merge_and_unload(), adapter, ids), ids)
    assert merged.active_steering == {"a": 1.0}

    base = steered.unload()
    check(base, expected(plain.unload(), adapter, ids), ids)
    base.unload_steering()
    assert hooks_of(base) == {}


def test_head_hook_sits_on_the_outermost_module_and_nowhere_else() -> None:
    ids, adapter = some_prompts(), query_shift("head_out[1]")
    steered = steer_tiny(tiny_llama(), adapter)
    bare = site_module(steered, "head_out[1]")
    wrapped = get_peft_model(steered, lora_config())
    greedy(wrapped, ids)
    outer = site_module(wrapped, "head_out[1]")
    assert outer is not bare
    assert (len(bare._forward_pre_hooks), len(outer._forward_pre_hooks)) == (0, 1)
    base = wrapped.unload()
    base(input_ids=ids)
    assert (len(bare._forward_pre_hooks), len(outer._forward_pre_hooks)) == (1, 0)


def test_two_loras_switched(lora_folders: dict[str, str]) -> None:
    ids, adapter = some_prompts(), query_shift("head_out[1]")
    plain = PeftModel.from_pretrained(tiny_llama(), lora_folders["one"], adapter_name="one")
    plain.load_adapter(lora_folders["two"], "two")
    steered = PeftModel.from_pretrained(steer_tiny(tiny_llama(), adapter), lora_folders["one"], adapter_name="one")
    steered.load_adapter(lora_folders["two"], "two")
    answers = []
    for name in ("one", "two", "one"):
        plain.set_adapter(name)
        steered.set_adapter(name)
        assert active_lora_names(steered) == [name]
        want = expected(plain, adapter, ids)
        check(steered, want, ids)
        answers.append(want[1])
    assert not torch.equal(answers[0], answers[1])
    with plain.disable_adapter(), steered.disable_adapter():
        assert active_lora_names(steered) == []
        check(steered, expected(plain, adapter, ids), ids)
    plain.base_model.set_adapter(["one", "two"])
    steered.base_model.set_adapter(["one", "two"])
    assert active_lora_names(steered) == ["one", "two"]
    check(steered, expected(plain, adapter, ids), ids)


def test_rows_with_loras_of_their_own_and_steering_of_their_own(lora_folders: dict[str, str]) -> None:
    ids, adapter = some_prompts(rows=3), query_shift("resid_post[1]")
    steered = PeftModel.from_pretrained(steer_tiny(tiny_llama(), adapter), lora_folders["one"], adapter_name="one")
    rows = ["__base__", "one", "one"]
    got = greedy(steered, ids, adapter_names=rows, steering=["a", None, "a"])
    for row, (lora, steering) in enumerate(zip(rows, ["a", None, "a"], strict=True)):
        alone = greedy(steered, ids[row : row + 1], adapter_names=[lora], steering=steering)
        assert torch.equal(got[row : row + 1], alone)


def test_one_line_with_a_lora_repo(lora_folders: dict[str, str]) -> None:
    ids, adapter = some_prompts(), query_shift("head_out[1]", lora=["default"])
    adapter.save_pretrained(lora_folders["one"])
    plain = PeftModel.from_pretrained(tiny_llama(), lora_folders["one"])
    # The LoRA and the steering adapter may share a repo.
    steered = SteeredModelForCausalLM.from_pretrained(lora_folders["one"], steering=lora_folders["one"])
    assert active_lora_names(steered) == ["default"]
    check(steered, expected(plain, adapter, ids), ids)


def test_mixed_adapters_of_peft(lora_folders: dict[str, str]) -> None:
    ids, adapter = some_prompts(), query_shift("head_out[1]")
    plain = PeftMixedModel.from_pretrained(tiny_llama(), lora_folders["one"])
    mixed = PeftMixedModel.from_pretrained(tiny_llama(), lora_folders["one"])
    steered = SteeredModelForCausalLM.from_model(mixed, steering=adapter)
    assert steered is mixed
    with reference(plain, adapter, ids):
        want = greedy(plain, ids)
    assert torch.equal(greedy(steered, ids), want)


def test_native_adapters_added_disabled_and_deleted() -> None:
    ids, adapter = some_prompts(), query_shift("head_out[1]")
    plain, steered = tiny_llama(), steer_tiny(tiny_llama(), adapter)
    for model in (plain, steered):
        model.add_adapter(lora_config(), "extra")
        shake(model, "extra", 5)
    assert active_lora_names(steered) == ["extra"]
    check(steered, expected(plain, adapter, ids), ids)
    for model in (plain, steered):
        model.disable_adapters()
    assert active_lora_names(steered) == []
    check(steered, expected(plain, adapter, ids), ids)
    for model in (plain, steered):
        model.enable_adapters()
        model.delete_adapter("extra")
    assert active_lora_names(steered) == []
    check(steered, expected(plain, adapter, ids), ids)


def test_a_lora_that_differs_from_the_one_at_fit_warns(lora_folders: dict[str, str]) -> None:
    fitted_with = query_shift(lora=["one"])
    with pytest.warns(UserWarning, match=r"fitted with LoRA \['one'\], now active: \[\]"):
        steer_tiny(tiny_llama(), fitted_with)
    wrapped = PeftModel.from_pretrained(tiny_llama(), lora_folders["one"], adapter_name="two")
    with pytest.warns(UserWarning, match=r"now active: \['two'\]"):
        SteeredModelForCausalLM.from_model(wrapped, steering=fitted_with)
    wrapped = PeftModel.from_pretrained(tiny_llama(), lora_folders["one"], adapter_name="one")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SteeredModelForCausalLM.from_model(wrapped, steering=fitted_with)


def test_unloading_steering_leaves_the_lora(lora_folders: dict[str, str]) -> None:
    ids = some_prompts()
    plain = PeftModel.from_pretrained(tiny_llama(), lora_folders["one"])
    steered = PeftModel.from_pretrained(steer_tiny(tiny_llama(), query_shift("head_out[1]")), lora_folders["one"])
    greedy(steered, ids)
    steered.unload_steering()
    assert hooks_of(steered) == hooks_of(plain) == {}
    assert torch.equal(greedy(steered, ids), greedy(plain, ids))
