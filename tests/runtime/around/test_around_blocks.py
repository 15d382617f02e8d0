"""Blocks and threads: a block is its own thread's, and is left in any order."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from steered_tiny import greedy, plain, query_shift, some_prompts, steer_tiny, tiny_llama

from finesteer_hf.errors import BlockElsewhereWarning
from finesteer_hf.runtime.blocks import BLOCK


def in_thread(function: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What a function returns in a new thread, and what it was warned of there."""
    result: list[Any] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        thread = threading.Thread(target=lambda: result.append(function()))
        thread.start()
        thread.join()
    return result[0], [str(w.message) for w in caught if w.category is BlockElsewhereWarning]


def compiled(model: Any, ids: torch.Tensor) -> torch.Tensor:
    if model._compiled_call_impl is None:
        model.compile(backend="eager")
    return plain(model, ids)


@pytest.mark.parametrize("call", [greedy, plain, pytest.param(compiled, marks=pytest.mark.slow)])
def test_a_thread_that_is_started_in_a_block_is_told_that_it_does_not_inherit_it(call: Any) -> None:
    ids = some_prompts()
    model = steer_tiny(tiny_llama(), query_shift(), query_shift("head_out[2]", seed=2))
    model.set_steering(None)
    unsteered = call(model, ids)
    with model.steering("a", scale=2.0):
        steered = call(model, ids)
        for number in range(2):
            said, told = in_thread(lambda: call(model, ids))
            assert torch.equal(said, unsteered)
            assert len(told) == (number == 0), "once per block"
        with model.disable_steering():
            assert in_thread(lambda: call(model, ids))[1] == [], (
                "the block steers with nothing, and so does the thread"
            )
    assert not torch.equal(steered, unsteered)
    assert in_thread(lambda: call(model, ids))[1] == []
    model.set_steering("b")
    with model.disable_steering():
        (message,) = in_thread(lambda: call(model, ids))[1]
    assert "'b': 1.0" in message and "steers with nothing" in message and "copy_context" in message


def test_a_thread_that_says_what_it_steers_with_is_not_warned() -> None:
    ids = some_prompts()
    model = steer_tiny(tiny_llama(), query_shift(), query_shift("head_out[2]", seed=2))
    want = greedy(model, ids, steering="b")

    def own_block() -> torch.Tensor:
        with model.steering("b"):
            return greedy(model, ids)

    with model.steering("b"):
        context = contextvars.copy_context()
        for call in (
            lambda: greedy(model, ids, steering="b"),
            own_block,
            lambda: context.run(greedy, model, ids),
        ):
            said, told = in_thread(call)
            assert torch.equal(said, want) and told == []

        async def inherits() -> Any:
            return await asyncio.to_thread(greedy, model, ids)

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(asyncio.run(inherits()), want)
    assert torch.equal(context.run(greedy, model, ids), want), "a copied context keeps the block that it was copied in"
    assert model.active_steering == {"a": 1.0}


def block_in_a_generator(model: Any, selection: Any) -> Iterator[None]:
    with model.steering(selection):
        yield


def test_a_block_in_a_generator_that_another_thread_closes_is_left() -> None:
    ids = some_prompts()
    model = steer_tiny(tiny_llama(), query_shift())
    want = greedy(model, ids)
    generator = block_in_a_generator(model, None)
    next(generator)
    assert model.active_steering == {}
    in_thread(generator.close)
    assert model.active_steering == {"a": 1.0}
    assert torch.equal(greedy(model, ids), want)
    assert model._steering.blocks.blocks == []
    with model.steering(None):
        pass
    assert BLOCK.get() is None


def test_blocks_in_generators_are_left_in_any_order() -> None:
    model = steer_tiny(tiny_llama(), query_shift(), query_shift("head_out[2]", seed=2))
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)):
        generators = [block_in_a_generator(model, selection) for selection in (None, "b", {"b": 2.0})]
        for generator in generators:
            next(generator)
        active = [{}, {"b": 1.0}, {"b": 2.0}]
        for number in order:
            generators[number].close()
            active[number] = None  # type: ignore[call-overload]
            left = [a for a in active if a is not None]
            assert model.active_steering == (left[-1] if left else {"a": 1.0})
        assert BLOCK.get() is None and model._steering.blocks.blocks == []


def test_a_block_that_a_task_leaves_for_another_is_left() -> None:
    model = steer_tiny(tiny_llama(), query_shift())

    async def blocks() -> Any:
        with model.disable_steering():
            yield

    async def main() -> None:
        generator = blocks()
        await anext(generator)
        assert model.active_steering == {}
        await asyncio.create_task(generator.aclose())
        assert model.active_steering == {"a": 1.0}

    asyncio.run(main())
