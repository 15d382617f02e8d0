"""Fixtures: one server on the playground that tests leave as it was, and what `generate` says to the same prompts."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from server_toys import ADAPTERS, Served, playground_engine, save_raising_adapter, serving, toy_adapter

from finesteer_hf import SteeredModelForCausalLM
from finesteer_hf.playground.shipped import load
from finesteer_hf.serving.http.app import ServerSettings
from finesteer_hf.serving.http.guard import Keys


class Alone:
    """The playground by itself: greedy answers of `generate`, steered with a name, or pairs of name and scale."""

    def __init__(self) -> None:
        model, self.tokenizer = load()
        self.model = SteeredModelForCausalLM.from_model(model, steering=ADAPTERS)
        self.tokens = functools.cache(self._tokens)

    def _tokens(self, ids: tuple[int, ...], steering: Any, scale: float, length: int) -> list[int]:
        prompt = torch.tensor([ids])
        out = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=length,
            do_sample=False,
            steering=dict(steering) if isinstance(steering, tuple) else steering,
            steering_scale=scale,
        )
        return out[0, len(ids) :].tolist()

    def chat_ids(self, question: str) -> tuple[int, ...]:
        chat = [{"role": "user", "content": question}]
        return tuple(self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))

    def __call__(self, question: str, steering: Any = None, scale: float = 1.0, length: int = 48) -> str:
        tokens = self.tokens(self.chat_ids(question), steering, scale if steering else 1.0, length)
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.fixture(scope="session")
def alone() -> Any:
    return Alone()


@pytest.fixture(scope="session")
def playground() -> Iterator[Served]:
    """The playground, with an admin token and without an API key."""
    with serving(playground_engine(), ServerSettings("playground"), Keys(admin="admin-token")) as served:
        yield served


@pytest.fixture(scope="session")
def toy_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of the toy model in folders: two that work, one that raises."""
    root = tmp_path_factory.mktemp("toys")
    for seed, name in enumerate(("one", "two")):
        toy_adapter(seed).save_pretrained(root / name)
    save_raising_adapter(root / "raising")
    return {name: root / name for name in ("one", "two", "raising")}
