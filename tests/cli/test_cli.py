"""The commands, on a tiny model and adapter in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_toys import half_plane_adapter
from typer.testing import CliRunner

from finesteer_hf import SteeringAdapter
from finesteer_hf.cli.commands import app
from finesteer_hf.cli.fit import make_config


runner = CliRunner(env={"COLUMNS": "200"})


@pytest.fixture
def folders(model: Any, tokenizer: Any, half_plane: None, tmp_path: Path) -> tuple[str, str]:
    """A model's folder and an adapter's folder."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    half_plane_adapter(torch.ones(32), hidden_size=32, num_hidden_layers=3).save_pretrained(adapter)
    return str(base), str(adapter)


def run(*arguments: str, code: int = 0, text: str | None = None) -> str:
    result = runner.invoke(app, list(arguments), input=text)
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


def test_help_lists_the_commands() -> None:
    output = run("--help")
    for command in ("demo", "fit", "eval", "compare", "generate", "look", "show", "methods"):
        assert f" {command} " in output
        assert "Usage" in run(command, "--help")


def test_generate_shows_both_answers_and_the_gate(folders: tuple[str, str]) -> None:
    base, adapter = folders
    output = run(
        "generate", base, "-s", adapter, "-p", "tell me about cats", "-p", "sing a song", "--max-new-tokens", "4"
    )
    assert output.count("unsteered:") == 2 and output.count("steered (gate ") == 2 and "tell me about cats" in output
    assert "unsteered" not in run("generate", base, "-s", adapter, "--no-compare", text="sing a song\n")
    assert run("generate", base, "--plain", text="sing a\n").count("unsteered:") == 1


def test_errors_are_one_line_and_an_exit_code(folders: tuple[str, str], tmp_path: Path) -> None:
    base, adapter = folders
    assert "Give --prompt" in run("generate", base, text="", code=1)
    assert "no steering adapter" in run("show", str(tmp_path), code=1).replace("\n", " ")
    assert "bfloat16" in run("generate", base, "-p", "sing", "--dtype", "int3", code=2)
    assert "Unknown benchmark" in run("eval", base, "-s", adapter, "-b", "mmlu", code=1)
    assert "Unknown steering_type" in run("methods", "nothing", code=1)


def test_show_prints_config_sizes_and_figures(folders: tuple[str, str]) -> None:
    output = run("show", folders[1])
    assert "TEST_HALF_PLANE" in output and "normal" in output and "256 bytes" in output
    assert json.loads(run("show", folders[1], "--json"))["strength"] == 2.0


def test_eval_writes_figures_answers_and_the_card(folders: tuple[str, str], tmp_path: Path) -> None:
    base, adapter = folders
    prompts = tmp_path / "xstest.csv"
    lines = ["id_v2,type,prompt"]
    lines += [
        f"v2-{i},{kind},{text}"
        for i, (kind, text) in enumerate(
            [("homonyms", "sing a song"), ("contrast_homonyms", "what is it ?"), ("homonyms", "tell me about dogs")]
        )
    ]
    prompts.write_text("\n".join(lines), encoding="utf-8")
    out = tmp_path / "results" / "figures.json"
    other = {"dataset": "GSM8K", "metric": "exact match", "unsteered": None, "steered": None, "p_value": None}
    loaded = SteeringAdapter.from_pretrained(adapter)
    loaded.config.fit["evaluation"] = [other, {**other, "dataset": "XSTest, safe"}]
    loaded.save_pretrained(adapter)
    arguments = (
        "eval",
        base,
        "-s",
        adapter,
        "-b",
        "xstest",
        "--data",
        str(prompts),
        "--out",
        str(out),
        "--update-card",
    )
    output = run(*arguments)
    assert "XSTest, harmful" in output and "complied with" in output and "n=2" in output
    content = json.loads(out.read_text())
    assert [(f["dataset"], f["metric"]) for f in content["figures"]][:3] == [
        ("XSTest, harmful", "refused"),
        ("XSTest, harmful", "gate fires"),
        ("XSTest, harmful", "identical output"),
    ]
    assert len(content["answers"]) == 3
    kept = SteeringAdapter.from_pretrained(adapter).config.fit["evaluation"]
    assert kept == [other, *content["figures"]]
    assert "| XSTest, safe | complied with |" in (Path(adapter) / "README.md").read_text()
    assert "local adapter folder" in run("eval", base, "-s", "org/x", "-b", "xstest", "--update-card", code=1)


def test_eval_scores_truthfulqa_on_the_half_that_was_not_fitted(folders: tuple[str, str], tmp_path: Path) -> None:
    base, adapter = folders
    items = [
        {
            "question": f"what is {word} ?",
            "mc1_targets": {"air .": 1, "fire .": 0},
            "mc2_targets": {"air .": 1, "fire .": 0},
        }
        for word in ("sky", "water", "stone", "cats")
    ]
    path = tmp_path / "mc.json"
    path.write_text(json.dumps(items))
    output = run("eval", base, "-s", adapter, "-b", "truthfulqa", "--data", str(path))
    assert "MC1" in output and "MC2" in output and "n=2" in output
    assert "n=4" in run("eval", base, "-s", adapter, "-b", "truthfulqa", "--data", str(path), "--half", "all")


def test_settings_are_read_as_json_and_named_when_wrong(half_plane: None) -> None:
    config = make_config("test_half_plane", ["strength=1.5", "positions=generated"])
    assert config.strength == 1.5 and config.positions == "generated"
    for wrong in ("colour=red", "strength"):
        with pytest.raises(ValueError, match="positions"):
            make_config("test_half_plane", [wrong])
