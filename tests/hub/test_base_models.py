"""An adapter's base: found by its name, identified by its weights, never by a local path."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from huggingface_hub import ModelCard, snapshot_download
from peft import LoraConfig, get_peft_model
from small_adapters import small_adapter, tiny_llama, tokens_of
from transformers import AutoModelForCausalLM

from finesteer_hf import SteeredModelForCausalLM, SteeringAdapter, playground
from finesteer_hf.adapters.adapter import tensors_equal
from finesteer_hf.adapters.base_models import PACKAGED, base_of, located, public_name
from finesteer_hf.adapters.fingerprint import CONFIG_KEY, compare, fingerprint
from finesteer_hf.errors import AdapterFileError, AdapterMismatchError
from finesteer_hf.methods.inferaligner import InferAlignerConfig


SHIPPED = Path(__file__).resolve().parents[2] / "hub_cards" / "playground-truthful"


def notes_of(model: Any, adapter: SteeringAdapter) -> tuple[str, ...]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SteeredModelForCausalLM.from_model(model).load_steering(adapter).warnings


def fitted(model: Any, **settings: Any) -> SteeringAdapter:
    return small_adapter(base_model_fingerprint=fingerprint(model), **settings)


@pytest.mark.filterwarnings("error")
def test_the_shipped_adapter_finds_its_base_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "playground").mkdir()
    model = SteeredModelForCausalLM.from_pretrained(None, steering=str(SHIPPED))
    named = SteeredModelForCausalLM.from_pretrained("playground", steering=str(SHIPPED))
    assert tensors_equal(model.state_dict(), named.state_dict())
    assert base_of(model) == ("playground", None) and located("playground") == playground.model_path()


def test_an_installation_without_the_weights_says_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PACKAGED, "playground", str(tmp_path))
    for load in (playground.load, lambda: SteeredModelForCausalLM.from_pretrained("playground")):
        with pytest.raises(FileNotFoundError, match=f"{tmp_path} has no model.safetensors.*playground.train"):
            load()


@pytest.mark.filterwarnings("error")
def test_the_same_weights_under_another_path_and_dtype_are_the_same_base(tmp_path: Path) -> None:
    folder = tmp_path / "renamed"
    shutil.copytree(playground.model_path(), folder)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        assert SteeredModelForCausalLM.from_model(model).load_steering(str(SHIPPED)).warnings == ()


def test_other_weights_of_the_same_shape_are_told_and_both_are_named(tmp_path: Path) -> None:
    tiny_llama(1).save_pretrained(tmp_path / "mine")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "mine")
    [note] = notes_of(other, fitted(tiny_llama(0)))
    assert "'org/tiny'" in note and "'local:mine'" in note and "other weights" in note and str(tmp_path) not in note
    # One weight of one matrix, in a model that has the name of the base.
    changed = tiny_llama(0)
    changed.config._name_or_path = "org/tiny"
    assert notes_of(copy.deepcopy(changed), fitted(tiny_llama(0))) == ()
    changed.lm_head.weight.data[:, 0] += 0.5
    [note] = notes_of(changed, fitted(tiny_llama(0)))
    assert "1 differ (lm_head.weight)" in note


def test_an_adapter_without_a_fingerprint_is_compared_by_name() -> None:
    model = tiny_llama()
    model.config._name_or_path = "org/tiny"
    assert notes_of(model, small_adapter()) == ()
    model = tiny_llama()
    model.config._name_or_path = "org/other"
    assert notes_of(model, small_adapter()) == ("fitted on 'org/tiny', loaded on 'org/other'",)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_fingerprint_does_not_depend_on_the_dtype(dtype: torch.dtype) -> None:
    model = tiny_llama()
    printed = fingerprint(model)
    assert len(printed) == 9 and len(json.dumps(printed)) < 1000
    cast = copy.deepcopy(model).to(dtype)
    assert compare(cast, printed).same and compare(model, fingerprint(cast)).same
    assert compare(tiny_llama(1).to(dtype), printed).differing


def test_what_cannot_be_compared_is_left_out_and_never_raises() -> None:
    model = tiny_llama()
    printed = fingerprint(model)
    with torch.device("meta"):
        nowhere = tiny_llama()
    assert compare(nowhere, printed).compared == (CONFIG_KEY,) and not compare(nowhere, printed).same
    assert list(fingerprint(nowhere)) == [CONFIG_KEY]
    # As a quantiser leaves it: packed matrices, norms and embeddings as they were.
    packed = tiny_llama()
    for module in packed.modules():
        if isinstance(module, torch.nn.Linear) and module is not packed.lm_head:
            module.weight = torch.nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    found = compare(packed, printed)
    assert found.same and 0 < len(found.compared) < len(printed)
    resized = tiny_llama()
    resized.resize_token_embeddings(70)
    assert compare(resized, printed).same
    strange = {"model.norm.weight": "nonsense", "no.such.weight": "1-a-b", CONFIG_KEY: "x"}
    assert compare(model, strange).differing == (CONFIG_KEY,)


def named(model: Any, name: str) -> Any:
    model.config._name_or_path = name
    return model


def packed(model: Any) -> Any:
    """Without comparable weights, as after a quantiser that packs everything."""
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(weight.detach().to(torch.float8_e4m3fn), requires_grad=False))
    return model


def merged(seed: int) -> Any:
    tuned = get_peft_model(tiny_llama(seed), LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False))
    return tuned.merge_and_unload()


OTHER_BASES: dict[str, Any] = {
    "other weights under another name": lambda: (
        named(tiny_llama(1), "org/other"),
        {},
        "'org/other', .* other weights",
    ),
    "other weights under the same name": lambda: (
        named(tiny_llama(1), "org/tiny"),
        {},
        "'org/tiny', .* other weights",
    ),
    "other weights without a name": lambda: (tiny_llama(1), {}, "'LlamaForCausalLM', .* other weights"),
    "a LoRA merged for good": lambda: (named(merged(0), "org/tiny"), {}, "'org/tiny', .* other weights"),
    "no fingerprint, another name": lambda: (
        named(tiny_llama(), "org/other"),
        {"base_model_fingerprint": {}},
        "loaded on 'org/other'",
    ),
    "no weight to compare, another name": lambda: (named(packed(tiny_llama()), "org/other"), {}, "on 'org/other'"),
    "another kind of model": lambda: (
        named(tiny_llama(), "org/other"),
        {"base_model_type": "qwen2"},
        "'qwen2'.*'org/other' .*'llama'",
    ),
}


@pytest.mark.parametrize("case", OTHER_BASES)
def test_strict_refuses_another_base_and_names_both(case: str, tmp_path: Path) -> None:
    base, settings, words = OTHER_BASES[case]()
    adapter = small_adapter(**{"base_model_fingerprint": fingerprint(tiny_llama(0)), **settings})
    folder = str(adapter.save_pretrained(tmp_path / "a"))
    (tmp_path / "a" / "steering_model.safetensors").write_bytes(b"not looked at before the base is")
    model = SteeredModelForCausalLM.from_model(base)
    for source in (adapter, folder):
        with pytest.raises(AdapterMismatchError, match=f"(?s)'org/tiny'.*{words}.*without strict=True"):
            model.load_steering(source, strict=True)
    assert not model.steering_adapters and not model.active_steering
    for strict in (None, False):
        with pytest.warns(UserWarning, match=words):
            report = model.load_steering(adapter, strict=strict)
        assert len(report.warnings) == 1 and report.unexpected_keys == ()


SAME_BASES: dict[str, Any] = {
    "the same name": lambda: named(tiny_llama(), "org/tiny"),
    "an unnamed base": tiny_llama,
    "another name": lambda: named(tiny_llama(), "org/mirror"),
    "half precision": lambda: tiny_llama().to(torch.bfloat16),
    "no weight to compare": lambda: named(packed(tiny_llama()), "org/tiny"),
    "a LoRA beside it": lambda: get_peft_model(tiny_llama(), LoraConfig(r=2, task_type="CAUSAL_LM")),
}


@pytest.mark.parametrize("case", SAME_BASES)
def test_strict_takes_the_base_under_any_name(case: str) -> None:
    base = SAME_BASES[case]()
    lora = ["default"] if "LoRA" in case else []
    adapter = fitted(tiny_llama(), lora=lora)
    model = SteeredModelForCausalLM.from_model(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.load_steering(adapter, strict=True).warnings == ()
        # Neither is stricter where nobody asks for it.
        assert model.load_steering(adapter).warnings == model.load_steering(adapter, strict=False).warnings == ()


def test_strict_checks_the_base_and_not_the_lora() -> None:
    tuned = get_peft_model(tiny_llama(), LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False))
    model = SteeredModelForCausalLM.from_model(tuned)
    with pytest.warns(UserWarning, match=r"fitted with LoRA \[\], now active: \['default'\]"):
        assert len(model.load_steering(fitted(tiny_llama()), strict=True).warnings) == 1


def test_strict_needs_to_know_the_base() -> None:
    model = SteeredModelForCausalLM.from_model(tiny_llama())
    nameless = small_adapter(base_model_name_or_path=None)
    with pytest.raises(AdapterMismatchError, match="neither `base_model_name_or_path` nor `base_model_fingerprint`"):
        model.load_steering(nameless, strict=True)
    assert model.load_steering(nameless).warnings == ()
    assert model.load_steering(fitted(tiny_llama(), base_model_name_or_path=None), strict=True).warnings == ()


def test_strict_works_for_every_way_to_load(tmp_path: Path) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    tiny_llama(0).save_pretrained(mine)
    tiny_llama(1).save_pretrained(other)
    folder = fitted(tiny_llama(0)).save_pretrained(tmp_path / "a")
    strict: dict[str, Any] = {"steering": str(folder), "steering_kwargs": {"strict": True}}
    assert SteeredModelForCausalLM.from_pretrained(mine, **strict).active_steering == {"default": 1.0}
    with pytest.raises(AdapterMismatchError, match=r"'org/tiny'.*'local:other'"):
        SteeredModelForCausalLM.from_pretrained(other, **strict)
    with pytest.warns(UserWarning, match=r"'org/tiny'.*'local:other'"):
        SteeredModelForCausalLM.from_pretrained(other, steering=str(folder))


def test_lora_around_the_base_does_not_change_it_and_merged_lora_does() -> None:
    printed = fingerprint(tiny_llama())
    tuned = get_peft_model(tiny_llama(), LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False))
    inner = tuned.get_base_model()
    assert compare(inner, printed).same and fingerprint(inner) == printed
    tuned.merge_adapter()
    assert not compare(inner, printed).differing
    assert compare(tuned.merge_and_unload(), printed).differing


def test_names_contain_no_path(tmp_path: Path) -> None:
    model = tiny_llama()
    cases = {
        "": None,
        "org/name": "org/name",
        "gpt2": "gpt2",
        "playground": "playground",
        str(tmp_path): f"local:{tmp_path.name}",
        playground.model_path(): "playground",
    }
    for path, name in cases.items():
        model.config._name_or_path = path
        assert base_of(model)[0] == name
    assert public_name("/home/me/models/x/") == "local:x" and public_name(r"C:\Users\me\x") == "local:x"
    assert public_name("~/x") == "local:x" and public_name("local:x") == "local:x" and public_name(None) is None


def test_no_written_file_names_a_path(tmp_path: Path) -> None:
    secret = tmp_path / "secret-home"
    data = {"id": str(secret / "rows.jsonl"), "sha256": "a" * 64}
    adapter = small_adapter(
        base_model_name_or_path=str(secret / "my-model"), fit={"data": data, "general_data": {"id": "org/rows"}}
    )
    folder = adapter.save_pretrained(tmp_path / "saved")
    assert not any(b"secret-home" in path.read_bytes() for path in folder.iterdir())
    loaded = SteeringAdapter.from_pretrained(folder)
    assert loaded.config.base_model_name_or_path == "local:my-model"
    assert loaded.config.fit == {"data": {**data, "id": "rows.jsonl"}, "general_data": {"id": "org/rows"}}
    with pytest.raises(ValueError, match=r"folder called 'my-model'.*Give model_id"):
        SteeredModelForCausalLM.from_pretrained(None, steering=loaded)


def test_other_names_that_may_be_paths_are_published_without_them(tmp_path: Path) -> None:
    config = InferAlignerConfig(
        layers=[1],
        vector="sibling",
        sibling=str(tmp_path / "aligned"),
        hidden_size=16,
        num_hidden_layers=2,
        strength=1.0,
    )
    tensors = {"srv": torch.ones(1, 16), "bias": torch.ones(1), "ssv": torch.ones(1, 16)}
    folder = SteeringAdapter(config, tensors).save_pretrained(tmp_path / "a")
    assert not any(str(tmp_path).encode() in path.read_bytes() for path in folder.iterdir())
    assert SteeringAdapter.from_pretrained(folder).config.sibling == "local:aligned"


def test_a_push_needs_a_base_that_others_can_load(hub_client: HubServer, tmp_path: Path) -> None:
    for base in (str(tmp_path), "local:mine", None):
        adapter = small_adapter(base_model_name_or_path=base)
        with pytest.raises(ValueError, match=r"base_model='org/name'"):
            adapter.push_to_hub("org/a")
        with pytest.raises(ValueError, match=r"base_model='org/name'"):
            adapter.save_pretrained(tmp_path / "s", push_to_hub=True)
        with pytest.raises(ValueError, match="not a Hub id"):
            adapter.push_to_hub("org/a", base_model="../x")
    assert not hub_client.requests.lines and not (tmp_path / "s").exists()
    adapter.push_to_hub("org/a", base_model="org/tiny")
    assert ModelCard(hub_client.files("org/a")["README.md"].decode()).data.base_model == "org/tiny"
    assert SteeringAdapter.from_pretrained("org/a").config.base_model_name_or_path == "org/tiny"
    adapter.save_pretrained(tmp_path / "b", push_to_hub=True, repo_id="org/b", base_model="org/tiny")
    assert SteeringAdapter.from_pretrained("org/b").config.base_model_name_or_path == "org/tiny"
    small_adapter(base_model_name_or_path="playground").push_to_hub("org/p")
    assert ModelCard(hub_client.files("org/p")["README.md"].decode()).data.base_model is None


def test_a_copy_of_a_repo_in_the_cache_is_that_repo(hub_client: HubServer) -> None:
    tiny_llama().push_to_hub("org/tiny")
    folder = Path(snapshot_download("org/tiny"))
    assert base_of(AutoModelForCausalLM.from_pretrained(folder)) == ("org/tiny", folder.name)
    assert base_of(AutoModelForCausalLM.from_pretrained("org/tiny"))[0] == "org/tiny"


def test_an_adapter_does_not_choose_whose_code_runs(hub_client: HubServer, tmp_path: Path) -> None:
    tiny_llama().push_to_hub("org/tiny")
    small_adapter().push_to_hub("org/a")
    with pytest.raises(ValueError, match=r"trust_remote_code.*Give model_id='org/tiny'"):
        SteeredModelForCausalLM.from_pretrained(None, steering="org/a", trust_remote_code=True)
    assert not any("org/tiny/resolve" in line for line in hub_client.requests.lines if "config.json" in line)
    model = SteeredModelForCausalLM.from_pretrained("org/tiny", steering="org/a", trust_remote_code=True)
    assert tokens_of(model) == tokens_of(SteeredModelForCausalLM.from_pretrained(None, steering="org/a"))
    # What stands in a repo is not always what our own push would write.
    for base in (str(tmp_path), "../x", "./tiny", "local:x"):
        config = small_adapter(base_model_name_or_path=base).config.to_dict()
        hub_client.commit("org/evil", {"steering_config.json": json.dumps(config)})
        hub_client.commit(
            "org/evil", {"steering_model.safetensors": hub_client.files("org/a")["steering_model.safetensors"]}
        )
        with pytest.raises((AdapterFileError, ValueError), match="Give model_id"):
            SteeredModelForCausalLM.from_pretrained(None, steering="org/evil")


def test_an_adapter_of_an_earlier_version_loads_unchanged(tmp_path: Path) -> None:
    folder = small_adapter().save_pretrained(tmp_path / "old")
    data = json.loads((folder / "steering_config.json").read_text())
    del data["base_model_fingerprint"]
    data["base_model_name_or_path"] = "/home/me/tiny"
    (folder / "steering_config.json").write_text(json.dumps(data))
    old = SteeringAdapter.from_pretrained(folder)
    assert old.config == replace(small_adapter().config, base_model_name_or_path="/home/me/tiny")
    assert notes_of(tiny_llama(), old) == ("fitted on '/home/me/tiny', loaded on 'LlamaForCausalLM'",)
