"""The commands' options are those of the functions; settings are separate from what a fit writes."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from evaluation_toys import half_plane_adapter
from typer.testing import CliRunner

import finesteer_hf
from finesteer_hf import CAAConfig, SteeringAdapter, fit_steering
from finesteer_hf.adapters.registry import get_steering_method, steering_methods
from finesteer_hf.cli.commands import app
from finesteer_hf.cli.common import load
from finesteer_hf.cli.fit import make_config
from finesteer_hf.cli.options import BENCHMARK, FIT, LOAD, OptionsOf
from finesteer_hf.evaluation.data.benchmarks import BENCHMARKS, load_benchmark
from finesteer_hf.testing.toy import toy_model, toy_preferences, toy_tokenizer


runner = CliRunner(env={"COLUMNS": "200"})


def written_fields(method: str) -> list[str]:
    config_cls = get_steering_method(method).config_cls
    return [f.name for f in dataclasses.fields(config_cls) if f.name not in config_cls.setting_fields()]


@pytest.mark.parametrize(("options", "function"), [(FIT, fit_steering), (LOAD, load), (BENCHMARK, load_benchmark)])
def test_options_are_the_keyword_parameters_of_the_function(options: OptionsOf, function: Any) -> None:
    real = {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    hints = get_type_hints(function)
    found = {parameter.name: parameter for parameter in options.parameters()}
    assert list(found) == list(real)
    for name, parameter in found.items():
        assert parameter.default == real[name].default, name
        assert parameter.help, name
        # What is no scalar, such as a data set, is a text on the command line.
        assert parameter.optional == (
            type(None) in get_args(hints[name]) or (hints[name] is Any and "dataset" in name)
        )
        if parameter.choices:
            literal = next(
                hint for hint in (hints[name], *get_args(hints[name])) if set(parameter.choices) <= set(get_args(hint))
            )
            assert parameter.choices == get_args(literal)


def test_every_option_is_shown() -> None:
    output = runner.invoke(app, ["fit", "--help"]).output
    for name in inspect.signature(fit_steering).parameters:
        if name not in ("model", "tokenizer", "train_dataset", "config"):
            assert f"--{name.replace('_', '-')}" in output
    for option in ("--device-map", "--dtype", "--quantization", "--revision", "--model-arg"):
        for command in ("fit", "eval", "generate"):
            assert option in runner.invoke(app, [command, "--help"]).output


def test_the_help_of_eval_names_the_existing_benchmarks() -> None:
    # Said twice, for the help does not wait for what loads them.
    assert f"{', '.join(BENCHMARKS)}." in " ".join(runner.invoke(app, ["eval", "--help"]).output.split())
    with pytest.raises(ValueError, match="limit must be at least 1"):
        load_benchmark("playground", limit=0)


@pytest.fixture
def base(tmp_path: Path) -> str:
    """A toy model's folder."""
    toy_model().save_pretrained(tmp_path / "base")
    toy_tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def test_options_reach_the_fit(base: str, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row | {"category": f"k{i % 4}"}) for i, row in enumerate(toy_preferences())))
    arguments = [
        "fit",
        base,
        str(rows),
        "--out",
        str(tmp_path / "a"),
        "--method",
        "caa",
        "--set",
        "layer=1",
        "--set",
        "strength=1.0",
    ]
    options = ["--split", "group", "--max-rows", "none", "--general", "none", "--batch-size", "4", "--seed", "3"]
    result = runner.invoke(app, [*arguments, *options, "--answer-end", "exclude", "--no-progress"])
    assert result.exit_code == 0, result.output
    fit = SteeringAdapter.from_pretrained(tmp_path / "a").config.fit
    assert (fit["split"], fit["max_rows"], fit["general_data"]) == ("group", None, None)
    assert (fit["seed"], fit["answer_end"]) == (3, "exclude")
    wrong = runner.invoke(app, [*arguments, "--max-rows", "many"])
    assert wrong.exit_code == 2 and "<int|none>" in wrong.output


def test_models_are_loaded_according_to_the_options(base: str) -> None:
    model, _ = load(base, dtype="float16", device_map="cpu", model_arg=["attn_implementation=eager"])
    assert model.dtype is torch.float16 and model.config._attn_implementation == "eager"
    assert load(base, device_map='{"": "cpu"}')[0].device.type == "cpu"
    with pytest.raises(ValueError, match="--device-map or --quantization"):
        load(base, device="cpu", device_map="auto")
    with pytest.raises(ValueError, match="unexpected keyword argument 'colour'"):
        load(base, model_arg=["colour=1"])
    with pytest.raises(ValueError, match=r"--model-arg 'colour': write name=value"):
        load(base, model_arg=["colour"])


def test_quantisation_asks_transformers_for_it(base: str) -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match="bitsandbytes"):
            load(base, quantization="4bit")
    else:
        assert load(base, quantization="8bit")[0].is_loaded_in_8bit


@pytest.mark.parametrize("method", steering_methods())
def test_what_a_fit_writes_cannot_be_set(method: str) -> None:
    written = written_fields(method)
    names = [f.name for f in dataclasses.fields(get_steering_method(method).config_cls)]
    assert {name for name in names if name.startswith("base_model_")} <= set(written)
    assert {"hidden_size", "num_hidden_layers", "lora", "fit", "requires"} <= set(written)
    for name in written:
        with pytest.raises(ValueError, match=f"{name} is written by the fit"):
            make_config(method, [f"{name}=7"])


def test_settings_have_their_declared_type() -> None:
    assert make_config("fasb", ["adaptive=false", "threshold=0.3"]).settings()["adaptive"] is False
    for wrong in ("adaptive=yes", "num_heads=1.5", "num_heads=many", 'layers={"a": 1}'):
        with pytest.raises(ValueError, match=wrong.partition("=")[0]):
            make_config("fasb", [wrong])


@pytest.mark.parametrize(
    "written", [{"hidden_size": 32}, {"base_model_name_or_path": "org/x"}, {"lora": ["a"]}, {"fit": {"note": 1}}]
)
def test_a_fit_refuses_a_config_that_sets_what_it_writes(written: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(written))}.*written by the fit"):
        fit_steering(toy_model(), toy_tokenizer(), toy_preferences(), CAAConfig(layer=1, **written), progress=False)


def test_the_settings_of_a_fitted_config_can_be_fitted_again() -> None:
    data: Any = (toy_model(), toy_tokenizer(), toy_preferences())
    arguments: dict[str, Any] = {"general_dataset": None, "progress": False}
    first = fit_steering(*data, CAAConfig(layer=1, strength=1.0), **arguments)
    with pytest.raises(ValueError, match=r"config\.settings\(\)"):
        fit_steering(*data, first.config, **arguments)
    again = fit_steering(*data, CAAConfig(**first.config.settings()), **arguments)
    assert torch.equal(first.tensors["vector"], again.tensors["vector"])


@pytest.mark.parametrize("method", steering_methods())
def test_every_config_is_imported_from_the_top(method: str) -> None:
    config_cls = get_steering_method(method).config_cls
    assert getattr(finesteer_hf, config_cls.__name__) is config_cls
    assert config_cls.__name__ in finesteer_hf.__all__ and config_cls.__name__ in dir(finesteer_hf)


def test_a_new_method_needs_no_second_list(half_plane: None) -> None:
    config_cls = type(half_plane_adapter(torch.ones(4)).config)
    assert getattr(finesteer_hf, config_cls.__name__) is config_cls


def test_names_for_type_checkers_are_those_at_run_time() -> None:
    source = inspect.getsource(finesteer_hf)
    block = source[source.index("if TYPE_CHECKING:") : source.index("__version__")]
    homes = {name: f"finesteer_hf.{home}" for name, home in finesteer_hf._HOME_OF.items()}
    for name, home in homes.items():
        assert name in block and f"from {home} import" in block
    with pytest.raises(AttributeError, match="no attribute 'NoSuchConfig'"):
        finesteer_hf.NoSuchConfig  # noqa: B018


def test_a_fit_puts_words_and_an_example_on_its_card(base: str, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in toy_preferences()))
    arguments = ["fit", base, str(rows), "-o", str(tmp_path / "a"), "--method", "caa", "--set", "layer=1"]
    arguments += ["--set", "strength=3.0", "--about", "Says oaks.", "--example", "sun1 sun2", "--general", "none"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    fit = SteeringAdapter.from_pretrained(tmp_path / "a").config.fit
    (example,) = fit["examples"]
    assert fit["about"] == "Says oaks." and example["prompt"] == "sun1 sun2"
    assert example["unsteered"] != example["steered"]
    card = (tmp_path / "a" / "README.md").read_text()
    assert "Says oaks. It moves" in card and f"| **steered** | {example['steered'][:20]}" in card
