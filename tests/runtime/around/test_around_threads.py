"""Many threads, one model: the steering of a call belongs to the call."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from steered_tiny import greedy, hooks_of, plain, query_shift, some_prompts, steer_tiny, tiny_llama
from test_around_blocks import in_thread

from finesteer_hf.errors import BlockElsewhereWarning
from finesteer_hf.runtime.current import CURRENT


THREADS, CALLS = 8, 200


def test_two_hundred_generations_in_eight_threads() -> None:
    model = steer_tiny(
        tiny_llama(),
        query_shift("resid_post[1]"),
        query_shift("head_out[2]", seed=2),
        query_shift("resid_pre[1]", "resid_post[2]", seed=3),
    )
    own = query_shift("resid_post[3]", seed=4).build()
    choices: list[dict[str, Any]] = [
        {"steering": "a"},
        {"steering": None},
        {"steering": {"a": 0.5, "b": -1.0}},
        {"steering": ["c", None]},
        {"steering": "b", "steering_scale": [0.0, 2.0]},
        {"steering": ["a", {"b": 2.0}]},
        {"steering_processor": [own]},
        {"steering": "c", "num_beams": 2},
    ]
    jobs = [(choice, seed) for choice in range(len(choices)) for seed in range(3)]

    def answer(choice: int, seed: int) -> torch.Tensor:
        return greedy(model, some_prompts(tokens=4 + seed, seed=seed), max_new_tokens=3, **choices[choice])

    want = {job: answer(*job) for job in jobs}
    assert len({tuple(tokens.flatten().tolist()) for tokens in want.values()}) > len(jobs) // 2
    hooks = hooks_of(model)
    order = random.Random(0)
    calls = [order.choice(jobs) for _ in range(CALLS)]
    started = threading.Barrier(THREADS)

    def work(number: int) -> list[bool]:
        started.wait()
        return [torch.equal(answer(*job), want[job]) for job in calls[number::THREADS]]

    with ThreadPoolExecutor(THREADS) as pool:
        results = [same for part in pool.map(work, range(THREADS)) for same in part]
    assert len(results) == CALLS and all(results)
    assert hooks_of(model) == hooks
    assert CURRENT.get() is None


def test_plain_forwards_and_blocks_in_threads() -> None:
    ids = some_prompts()
    model = steer_tiny(tiny_llama(), query_shift("resid_post[1]"), query_shift("head_out[2]", seed=2))
    blocks: list[Any] = ["a", "b", None, {"a": -1.0, "b": 2.0}]

    @torch.no_grad()
    def logits(selection: Any) -> torch.Tensor:
        with model.steering(selection):
            return model(input_ids=ids).logits

    want = [logits(selection) for selection in blocks]

    def work(number: int) -> bool:
        return all(torch.equal(logits(blocks[number % 4]), want[number % 4]) for _ in range(10))

    with ThreadPoolExecutor(THREADS) as pool:
        assert all(pool.map(work, range(THREADS)))


def test_a_block_is_seen_by_its_own_thread_only() -> None:
    ids = some_prompts()
    model = steer_tiny(tiny_llama(), query_shift())
    steered, unsteered = greedy(model, ids), greedy(model, ids, steering=None)
    with ThreadPoolExecutor(1) as pool:
        with model.disable_steering():
            assert torch.equal(greedy(model, ids), unsteered)
            with pytest.warns(BlockElsewhereWarning):
                assert torch.equal(pool.submit(greedy, model, ids).result(), steered)
            assert pool.submit(lambda: model.active_steering).result() == {"a": 1.0}
        assert torch.equal(greedy(model, ids), steered)


def test_adapters_come_and_go_while_others_generate() -> None:
    ids = some_prompts()
    model = steer_tiny(tiny_llama(), query_shift())
    want = greedy(model, ids)
    done = threading.Event()

    def change() -> int:
        changes = 0
        while not done.is_set():
            model.load_steering(query_shift("head_out[2]", seed=changes), "guest")
            model.delete_steering("guest")
            changes += 1
        return changes

    with ThreadPoolExecutor(3) as pool:
        changer = pool.submit(change)
        try:
            answers = list(pool.map(lambda _: greedy(model, ids, steering="a"), range(16)))
        finally:
            done.set()
        assert changer.result() > 0
    assert all(torch.equal(answer, want) for answer in answers)
    assert hooks_of(model) == {"model": 2, "model.layers.1": 1}


# -- what may happen beside a call ------------------------------------------------------------------------------------


def test_status_can_be_looked_at_while_adapters_come_and_go() -> None:
    """Each adapter that is looked at lets another thread load and delete one, as the scheduler might."""
    model = steer_tiny(tiny_llama(), query_shift(), query_shift(), query_shift())
    loads = []

    def load_and_delete() -> None:
        name = f"guest{len(loads)}"
        loads.append(name)
        model.load_steering(query_shift("head_out[2]", seed=len(loads)), name)
        if len(loads) % 3:
            model.delete_steering(name)

    class LookedAt(type(query_shift())):  # type: ignore[misc]
        source = property(lambda self: in_thread(load_and_delete)[0])

    for name in "abc":
        model.steering_adapters[name].__class__ = LookedAt
    status = model.steering_status()
    assert [adapter.name for adapter in status.adapters] == ["a", "b", "c"]
    assert len(loads) == 3 and "guest2" in model.steering_adapters


@pytest.mark.parametrize("change", ["delete", "replace"])
def test_a_call_keeps_the_adapter_that_it_began_with(change: str) -> None:
    ids = some_prompts(rows=1)
    model = steer_tiny(tiny_llama(), query_shift(), query_shift("head_out[2]", seed=2))
    want = greedy(model, ids, steering="b")

    class Meddler:
        def put(self, value: torch.Tensor) -> None:
            if change == "replace":
                model.load_steering(query_shift("resid_post[3]", seed=5), "b")
            elif "b" in model.steering_adapters:
                model.delete_steering("b")

        def end(self) -> None:
            pass

    assert torch.equal(greedy(model, ids, steering="b", streamer=Meddler()), want)
    assert hooks_of(model) == {"model": 2, "model.layers.1": 1} | (
        {"model.layers.3": 1} if change == "replace" else {}
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_fork_while_another_thread_holds_the_locks() -> None:
    ids = some_prompts()
    model = steer_tiny(tiny_llama(), query_shift())
    want = greedy(model, ids)
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with model._steering.lock, model._steering.compiled.lock, model.disable_steering():
            held.set()
            release.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if not child:
        status = 1
        with contextlib.suppress(BaseException):
            signal.alarm(60)
            warnings.simplefilter("error")
            model.load_steering(query_shift("head_out[2]", seed=2), "b")
            model.delete_steering("b")
            model._steering.sync_compiled()
            status = 0 if torch.equal(greedy(model, ids), want) else 2
        os._exit(status)
    try:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        release.set()
        holder.join()


@pytest.mark.slow
def test_memory_stays_flat_over_two_thousand_calls_with_loads_and_deletes() -> None:
    ids = some_prompts(rows=1, tokens=4)
    model = steer_tiny(tiny_llama(), query_shift())
    own = query_shift("resid_post[3]", seed=4).build()

    def work(calls: int) -> None:
        for number in range(calls // 4):
            model.load_steering(query_shift("head_out[2]", seed=number), f"guest{number}")
            with model.steering(["a", f"guest{number}"]):
                greedy(model, ids, max_new_tokens=2)
                plain(model, ids)
            greedy(model, ids, max_new_tokens=1, steering={f"guest{number}": 2.0})
            greedy(model, ids, max_new_tokens=1, steering_processor=[own])
            model.delete_steering(f"guest{number}")
            if number % 50 == 0:
                with pytest.raises(KeyboardInterrupt):
                    _interrupted_forward(model, ids)

    def count() -> tuple[int, int]:
        gc.collect()
        tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
        return len(gc.get_objects()), tensors

    work(200)
    objects, tensors = count()
    work(2000)
    more_objects, more_tensors = count()
    assert more_tensors <= tensors
    assert more_objects - objects < 200


def _interrupted_forward(model: Any, ids: torch.Tensor) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[2].register_forward_pre_hook(interrupt)
    try:
        plain(model, ids)
    finally:
        handle.remove()
