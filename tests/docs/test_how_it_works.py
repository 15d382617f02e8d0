"""The page on how it works: its code runs on the model and the adapters that ship."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from finesteer_hf import SteeredModelForCausalLM, playground


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "how_it_works.md").read_text(encoding="utf-8")


def test_the_code_runs_and_leaves_the_base() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    # The page names a repo; the adapter that ships is in a folder.
    block = block.replace("org/llama3-finesteer-safe", str(ROOT / "hub_cards" / "playground-safety"))
    tokenizer = AutoTokenizer.from_pretrained(playground.model_path(), padding_side="left")
    chats = [[{"role": "user", "content": text}] for text in ("Are bats blind?", "Say hello.", "What is two and two?")]
    encode: dict[str, Any] = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    inputs = tokenizer.apply_chat_template(chats[0], **encode)
    model = SteeredModelForCausalLM.from_pretrained(
        "playground", steering=str(ROOT / "hub_cards" / "playground-truthful")
    )
    model.generation_config.max_new_tokens = 8
    before = model(**inputs, prompt_lengths=inputs["attention_mask"].sum(1)).logits
    names: dict[str, Any] = {
        "model": model,
        "inputs": inputs,
        "batch": tokenizer.apply_chat_template(chats, padding=True, **encode),
        "lengths": inputs["attention_mask"].sum(1),
    }
    exec(compile(block, "docs/how_it_works.md", "exec"), names)
    assert names["out"].steering["default"]["gate"].shape == (1,)
    plain, _ = playground.load()
    assert torch.equal(names["base"](**inputs).logits, plain(**inputs).logits)
    assert not torch.equal(before, plain(**inputs).logits), "the adapter did nothing on the page's prompt"
