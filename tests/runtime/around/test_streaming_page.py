"""The page on streaming: its code runs and steers as described."""

from __future__ import annotations

import contextlib
import re
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from steered_tiny import greedy, query_shift, some_prompts, steer_tiny, tiny_llama
from test_around_outputs import tiny_tokenizer

from finesteer_hf.errors import BlockElsewhereWarning


PAGE = (Path(__file__).parents[3] / "docs" / "streaming.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Names for the page's code: a model with an adapter `safe` that is not active, its tokenizer and a prompt."""
    model = steer_tiny(tiny_llama(eos_token_id=95), query_shift())
    model.load_steering(model.steering_adapters["a"], "safe")
    model.delete_steering("a")
    ids = some_prompts(rows=1)
    model.generation_config.eos_token_id = None
    names = {"model": model, "tokenizer": tiny_tokenizer(), "inputs": {"input_ids": ids}}
    # The page asks for texts that are longer than the tiny model is wide.
    generate = type(model).generate
    monkeypatch.setattr(type(model), "generate", lambda self, **kw: generate(self, **{**kw, "max_new_tokens": 8}))
    return names


def run(names: dict[str, Any], *numbers: int) -> None:
    for number in numbers:
        exec(compile(BLOCKS[number], f"docs/streaming.md, block {number}", "exec"), names)


def text_of(names: dict[str, Any], **steering: Any) -> str:
    ids = names["inputs"]["input_ids"]
    tokens = greedy(names["model"], ids, **steering)[0, ids.shape[1] :]
    return names["tokenizer"].decode(tokens, skip_special_tokens=True)


def test_the_call_names_its_steering(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(names, 0)
    want = text_of(names, steering="safe", steering_scale=1.5)
    assert capsys.readouterr().out.strip() == want != text_of(names)


def test_a_block_is_not_inherited_and_the_thread_says_so(
    names: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run(names, 0)
    capsys.readouterr()
    with pytest.warns(BlockElsewhereWarning):
        run(names, 1)
    assert capsys.readouterr().out.strip() == text_of(names)


def test_the_warning_can_be_an_error(names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run(names, 0)
    raised: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    stream = names["stream"]
    with warnings.catch_warnings(), names["model"].steering("safe"):
        run(names, 2)
        monkeypatch.setattr(
            "transformers.TextIteratorStreamer.__next__", lambda self: (_ for _ in ()).throw(StopIteration)
        )
        with contextlib.suppress(RuntimeError):
            list(stream(names["model"], names["tokenizer"], names["inputs"]))
    assert [type(r.exc_value) for r in raised] == [BlockElsewhereWarning]


def test_a_copied_context_takes_the_block_along(names: dict[str, Any]) -> None:
    names["Thread"] = threading.Thread
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(names, 3)
    ids = names["inputs"]["input_ids"]
    assert torch.equal(names["tokens"], greedy(names["model"], ids, steering="safe"))


def test_a_judge_in_the_loop_is_unsteered(names: dict[str, Any]) -> None:
    model, seen = names["model"], []
    handle = model.model.layers[1].register_forward_hook(lambda *args: seen.append(args[2][:, -1]))
    run(names, 4)
    handle.remove()
    assert len(seen) == 16, "a step and its judge"
    ids = names["inputs"]["input_ids"]
    out = greedy(model, ids, steering="safe")
    want: list[torch.Tensor] = []
    handle = model.model.layers[1].register_forward_hook(lambda *args: want.append(args[2][:, -1]))
    for end in range(ids.shape[1] + 1, out.shape[1] + 1):
        model(input_ids=out[:, :end])
    handle.remove()
    assert all(torch.equal(judge, plain) for judge, plain in zip(seen[1::2], want, strict=True))
