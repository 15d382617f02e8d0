"""The training script: a few steps from a seed give a model that loads, the same each time."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer import Typer
from typer.testing import CliRunner

from finesteer_hf.playground.train import main


def test_training_is_reproducible_and_loads(tmp_path: Path) -> None:
    app = Typer()
    app.command()(main)
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        arguments = f"--out {folder} --steps 20 --batch-size 2 --threads 1 --no-figures".split()
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    first, second = (load_file(folder / "model.safetensors") for folder in folders)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) and first[name].dtype == torch.float16 for name in first)

    model = AutoModelForCausalLM.from_pretrained(folders[0])
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    inputs.pop("token_type_ids", None)
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert output.shape[1] > inputs["input_ids"].shape[1]
