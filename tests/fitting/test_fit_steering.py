"""`fit_steering` from rows to an adapter, with a method of a few lines."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mean_method import GENERAL, SITE, MeanConfig, MeanMethod, chat_rows, fit

from finesteer_hf import SteeredModelForCausalLM
from finesteer_hf.adapters.fingerprint import fingerprint
from finesteer_hf.adapters.registry import _REGISTRY, register_steering_method
from finesteer_hf.errors import DatasetError
from finesteer_hf.fitting import DatasetWarning, default_general_prompts, fit_steering
from finesteer_hf.fitting.capture import captured
from finesteer_hf.fitting.data.splits import PARTS
from finesteer_hf.fitting.data.templating import chat_template_hash
from finesteer_hf.method_api import Part
from finesteer_hf.testing.toy import toy_model, toy_tokenizer


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register_steering_method("TEST_MEAN", config_cls=MeanConfig, method_cls=MeanMethod)
    yield
    del _REGISTRY["TEST_MEAN"]


def test_the_adapter_says_what_it_was_fitted_on() -> None:
    model = toy_model()
    model.config._name_or_path = "org/toy"
    model.config._commit_hash = "abc"
    adapter = fit(model=model, seed=3)
    config = adapter.config
    assert (config.base_model_name_or_path, config.base_model_revision) == ("org/toy", "abc")
    assert (config.base_model_type, config.hidden_size, config.num_hidden_layers) == ("llama", 32, 3)
    assert config.lora == [] and config.base_model_fingerprint == fingerprint(toy_model())
    found = config.fit
    assert found["data"]["rows"] == 40 and len(found["data"]["sha256"]) == 64 and found["data"]["id"] is None
    assert found["rows"] == {"fit": 24, "calibration": 8, "validation": 8}
    assert found["general_rows"] == {"fit": 18, "calibration": 6, "validation": 6}
    assert found["dtype"] == "float32"
    assert found["seed"] == 3 and found["held_out"] and found["split"] == "prompt"
    assert found["chat_template_sha256"] == chat_template_hash(toy_tokenizer())
    assert set(found["versions"]) >= {"torch", "transformers", "finesteer-hf"}
    assert len(found["report"]["bottlenecks"]) == 2
    json.dumps(config.to_dict(), allow_nan=False)


def test_it_loads_and_steers(tmp_path: Path) -> None:
    adapter = fit()
    adapter.save_pretrained(tmp_path)
    model = SteeredModelForCausalLM.from_model(toy_model(), steering=str(tmp_path))
    ids = torch.tensor([[2, 4, 7, 5]])
    steered = model(input_ids=ids).logits
    with model.disable_steering():
        assert not torch.equal(model(input_ids=ids).logits, steered)


def test_the_model_is_untouched() -> None:
    model = toy_model().train()
    before, kind = copy.deepcopy(model.state_dict()), type(model)
    fit(model=model)
    assert type(model) is kind and model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_data_holds_each_row_in_its_place() -> None:
    fit()
    data = MeanMethod.data
    model, tokenizer = toy_model(), toy_tokenizer()
    states = model(
        input_ids=torch.tensor(
            [tokenizer.apply_chat_template(r["prompt"], add_generation_prompt=True)["input_ids"] for r in chat_rows()]
        ),
        output_hidden_states=True,
    ).hidden_states
    expected = states[2][:, -1].detach().numpy()
    parts = [data.query(SITE, part) for part in ("fit", "calibration", "validation")]
    order = [int(np.abs(expected - row).sum(1).argmin()) for part in parts for row in part]
    assert sorted(order) == list(range(40))
    np.testing.assert_allclose(np.concatenate(parts), expected[order], rtol=1e-4, atol=1e-4)
    assert data.prompts("fit").shape == (24,) and len(set(data.prompts("fit"))) == 24
    assert data.general(SITE, "fit").shape == (18, 32)
    assert data.chosen(SITE, "validation", "answer_last").shape == (8, 32)


def test_categories_and_texts_follow_the_rows_however_they_are_split() -> None:
    rows = [{**row, "category": f"kind {number % 4}"} for number, row in enumerate(chat_rows())]
    kind_of = {row["prompt"][0]["content"]: row["category"] for row in rows}
    for split in ("prompt", "group"):
        fit(rows, split=split)
        data = MeanMethod.data
        texts = [data.texts("prompt", part) for part in PARTS]
        assert sorted(text for part in texts for text in part) == sorted(kind_of)
        for part, of_part in zip(PARTS, texts, strict=True):
            kinds = data.kinds(part)
            assert kinds is not None and kinds.tolist() == [kind_of[text] for text in of_part]
    assert sorted(text for part in PARTS for text in data.texts("general", part)) == sorted(GENERAL)
    assert len(data.texts("general", "fit")) == len(data.general(SITE, "fit"))
    fit()
    assert MeanMethod.data.kinds("fit") is None


def test_states_come_in_chunks_of_a_few_rows_each(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(captured, "CHUNK_ROWS", 7)
    parts: tuple[Part, ...] = ("fit", "calibration")
    for store in (None, tmp_path):
        fit(store_dir=store)
        data = MeanMethod.data
        for side, pool in product(("query", "general", "chosen", "rejected"), ("answer_mean", "answer_last")):
            of_answers = side in ("chosen", "rejected")
            whole = [getattr(data, side)(SITE, part, *((pool,) if of_answers else ())) for part in parts]
            chunks = list(data.chunks(side, SITE, parts, pool))  # type: ignore[arg-type]
            assert {len(chunk) for chunk in chunks[:-1]} == {7} and 0 < len(chunks[-1]) <= 7
            assert np.array_equal(np.concatenate(chunks), np.concatenate(whole))
    fit(general_dataset=None)
    assert list(MeanMethod.data.chunks("general", SITE, parts)) == []


def test_one_seed_gives_one_adapter() -> None:
    one, two, other = fit(seed=1), fit(seed=1), fit(seed=2)
    assert torch.equal(one.tensors["vector"], two.tensors["vector"])
    assert not torch.equal(one.tensors["vector"], other.tensors["vector"])


def test_validation_rows_of_ones_own_are_the_validation_part() -> None:
    rows = chat_rows(60)
    adapter = fit(rows[:40], eval_dataset=rows[40:])
    assert adapter.config.fit["rows"] == {"fit": 30, "calibration": 10, "validation": 20}
    assert adapter.config.fit["eval_data"]["rows"] == 20
    with pytest.warns(DatasetWarning, match="eval_dataset: rows 0, 1 .*also in train_dataset; left out"):
        adapter = fit(rows[:40], eval_dataset=rows[38:])
    assert adapter.config.fit["rows"]["validation"] == 20
    with pytest.raises(DatasetError, match="no prompt that is not also"):
        fit(rows[:40], eval_dataset=rows[:5])


def test_categories_are_held_out_on_request() -> None:
    rows = [{**row, "category": f"kind{i % 10}"} for i, row in enumerate(chat_rows())]
    adapter = fit(rows, split="group")
    assert adapter.config.fit["split"] == "group"
    parts = [set(MeanMethod.data.groups(part)) for part in ("fit", "calibration", "validation")]
    assert [len(part) for part in parts] == [6, 2, 2] and len(set.union(*parts)) == 10
    fit(rows)
    assert len(MeanMethod.data.groups("fit")) == len(set(MeanMethod.data.groups("fit"))) == 24


def test_a_store_serves_the_next_fit(tmp_path: Path) -> None:
    first = fit(store_dir=tmp_path)
    assert first.config.fit["capture"]["passes"] > 0
    again = fit(store_dir=str(tmp_path))
    assert again.config.fit["capture"]["passes"] == 0
    assert torch.equal(first.tensors["vector"], again.tensors["vector"])
    assert fit(store_dir=tmp_path, config=MeanConfig(head=True)).config.fit["capture"]["passes"] > 0
    assert fit(store_dir=tmp_path, resume=False).config.fit["capture"] == first.config.fit["capture"]


def test_general_prompts_take_the_form_of_the_rows() -> None:
    tokenizer = toy_tokenizer()
    tokenizer.add_tokens(["<system>"], special_tokens=True)
    system = {"role": "system", "content": "sea11"}
    rows = [{**row, "prompt": [system, *row["prompt"]]} for row in chat_rows()]
    model = toy_model()
    model.resize_token_embeddings(len(tokenizer))
    fit(rows, tokenizer=tokenizer, model=model)
    first = MeanMethod.data.general_prompts[0].ids  # type: ignore[attr-defined]
    assert tokenizer.decode(list(first)) == "<bos> <system> sea11 <user> sea0 sea0 <assistant>"


def test_general_prompts_that_are_training_prompts_are_dropped() -> None:
    with pytest.warns(DatasetWarning, match=r"general_dataset: row 30 .*it should be steered"):
        adapter = fit(general_dataset=[*GENERAL, chat_rows()[0]["prompt"][0]["content"]])
    assert sum(adapter.config.fit["general_rows"].values()) == 30


def test_one_class_has_no_general_states_but_its_side_effects_are_measured() -> None:
    adapter = fit(general_dataset=None)
    data = MeanMethod.data
    assert data.general(SITE, "fit").shape == (0, 32)
    assert adapter.config.fit["general_rows"] is None and adapter.config.fit["general_data"] is None
    assert data.dose.prompts  # type: ignore[attr-defined]


def test_the_packaged_general_prompts_are_many_and_different() -> None:
    prompts = default_general_prompts()
    assert len(prompts) >= 160 and len({p.lower() for p in prompts}) == len(prompts)
    assert all(prompt == prompt.strip() and prompt for prompt in prompts)
    lengths = np.array([len(prompt.split()) for prompt in prompts])
    assert lengths.min() <= 4 and lengths.max() >= 40
    adapter = fit(general_dataset="default")
    assert adapter.config.fit["general_data"]["id"] == "default"


def test_too_few_prompts_are_fitted_and_said() -> None:
    with pytest.warns(DatasetWarning, match="in-sample"):
        adapter = fit(chat_rows(3))
    assert not adapter.config.fit["held_out"]
    assert adapter.config.fit["rows"] == {"fit": 3, "calibration": 3, "validation": 3}


def test_findings_are_warned_of_and_kept() -> None:
    rows = [*chat_rows(), chat_rows()[0]]
    with pytest.warns(DatasetWarning, match="repeat an earlier one: row 40"):
        adapter = fit(rows)
    assert any("row 40" in finding for finding in adapter.config.fit["lint"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", DatasetWarning)
        # too few general prompts to say that their form, which are other words, tells them apart
        assert fit(general_dataset=GENERAL[:12]).config.fit["lint"] == []


def test_bad_data_is_refused_before_the_model_runs() -> None:
    model = toy_model()

    def fail(module: Any, args: Any) -> None:
        raise AssertionError("the model ran")

    model.register_forward_pre_hook(fail)
    model.model.register_forward_pre_hook(fail)
    for rows in ([], chat_rows(1), [{**chat_rows()[0], "chosen": ""}, *chat_rows()]):
        with pytest.raises(DatasetError):
            fit_steering(model, toy_tokenizer(), rows, MeanConfig(), progress=False)
    with pytest.raises(DatasetError, match="general_dataset"):
        fit(model=model, general_dataset=[{"text": "sun0"}])
    with pytest.raises(ValueError, match="batch_size"):
        fit(model=model, batch_size=-1)
    with pytest.raises(TypeError, match="SteeringConfig"):
        fit(model=model, config={"layer": 1})


def test_lora_is_read_and_recorded() -> None:
    from peft import LoraConfig, get_peft_model

    peft_model = get_peft_model(toy_model(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapter = fit(model=peft_model)
    assert adapter.config.lora == ["default"]
    assert not torch.allclose(adapter.tensors["vector"], fit().tensors["vector"], atol=1e-3)


def test_rows_with_overflowing_states_are_named() -> None:
    model, tokenizer = toy_model(), toy_tokenizer()
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids("sun3")] = float("inf")
    with pytest.raises(DatasetError, match=r"train_dataset: rows .*3.*NaN or infinite"):
        fit(model=model)


def test_of_many_rows_a_sample_of_prompts_is_fitted() -> None:
    with pytest.warns(DatasetWarning, match="train_dataset has 144 rows; 60 of them are used") as found:
        adapter = fit((row for row in chat_rows(144)), max_rows=60, eval_dataset=chat_rows(20)[5:])
    assert not any("eval_dataset has" in str(warning.message) for warning in found)
    provenance = adapter.config.fit
    assert (provenance["data"]["rows"], provenance["data"]["taken"], provenance["max_rows"]) == (144, 60, 60)
    assert (provenance["general_data"]["rows"], provenance["general_data"]["taken"]) == (30, 30)
    assert provenance["data"]["sha256"] == fit(chat_rows(144)).config.fit["data"]["sha256"]
    assert sum(provenance["rows"].values()) - provenance["rows"]["validation"] == 60
    assert provenance["lint"][0].startswith("train_dataset has 144 rows")
    with pytest.warns(DatasetWarning, match="general_dataset has 30 rows; 20 of them"):
        fit(chat_rows(20), max_rows=20)


def test_a_limit_that_is_not_reached_changes_nothing(tmp_path: Path) -> None:
    expected = fit(chat_rows())
    for rows in (chat_rows(), iter(chat_rows())):
        adapter = fit(rows, max_rows=40)
        assert torch.equal(adapter.tensors["vector"], expected.tensors["vector"])
        assert adapter.config.fit["lint"] == expected.config.fit["lint"]
    few = fit(chat_rows(144), max_rows=40, store_dir=tmp_path)
    more = fit(chat_rows(144), max_rows=80, store_dir=tmp_path)
    whole = fit(chat_rows(144), max_rows=80)
    assert few.config.fit["capture"]["tokens"] > 0
    # What the smaller sample has read is not read again; a few rows are, to see whether prompts can be shared.
    assert more.config.fit["capture"]["tokens"] < 0.75 * whole.config.fit["capture"]["tokens"]


def test_messages_name_the_rows_of_the_data_set_not_of_the_sample() -> None:
    model, tokenizer = toy_model(), toy_tokenizer()
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids("sun3")] = float("inf")
    rows = chat_rows(144)
    bad = [i for i, row in enumerate(rows) if "sun3" in row["prompt"][0]["content"].split()]
    with pytest.raises(DatasetError, match=r"train_dataset: rows? .*NaN or infinite") as failure:
        fit(rows, model=model, max_rows=60)
    named = str(failure.value).split("train_dataset: row")[1].split("(counted")[0]
    assert {int(number) for number in re.findall(r"\d+", named.split("and")[0])} <= set(bad)


def test_progress_is_silent_or_seen(capsys: pytest.CaptureFixture[str]) -> None:
    fit(progress=False)
    assert capsys.readouterr().out == ""


def test_packaged_prompts_that_do_not_fit_are_left_out() -> None:
    adapter = fit(general_dataset="default", max_length=30)
    assert 100 < adapter.config.fit["general_data"]["rows"] < len(default_general_prompts())
    with pytest.raises(DatasetError, match=r"general_dataset: row 1 .*at most 30"):
        fit(general_dataset=["sun0", "sun0 " * 40], max_length=30)
