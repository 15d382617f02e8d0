"""TRL's LoRA on the same data, on a tiny model: trained once, loaded the second time."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.real.real_conditions import Condition
from benchmarks.real.real_lora import Training, train
from finesteer_hf.evaluation.measures.prompts import as_chat


pytest.importorskip("trl", reason="LoRA is trained by TRL: pip install -e '.[train]'")
SETTINGS = Training(rank=2, epochs=2, rows=4, learning_rate=1e-2)
ROWS = [
    {
        "prompt": as_chat(f"tell me about {what}"),
        "chosen": [{"role": "assistant", "content": "it is air"}],
        "rejected": [{"role": "assistant", "content": "sorry , no"}],
        "id": f"row-{what}",
        "category": "all",
    }
    for what in ("cats", "dogs", "fire", "water")
]


@pytest.mark.parametrize("how", ["dpo", "sft"])
def test_lora(how: Any, model: Any, tokenizer: Any, tmp_path: Path) -> None:
    base = copy.deepcopy(model)
    trained, facts = train(copy.deepcopy(model), tokenizer, ROWS, how, tmp_path / "lora", SETTINGS)
    assert facts["seconds"]["fit"] > 0 and facts["parameters"] > 0
    assert not trained.training
    condition = Condition(trained, tokenizer, lora=True)
    ids = torch.tensor([condition.prompt_ids("tell me about cats")])
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        with condition.on():
            changed = trained(input_ids=ids).logits
        with condition.base().on():
            torch.testing.assert_close(trained(input_ids=ids).logits, plain)
    assert (changed - plain).abs().max() > 1e-3
    again, facts = train(copy.deepcopy(model), tokenizer, ROWS, how, tmp_path / "lora", SETTINGS)
    assert facts["reused"]
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, changed)
