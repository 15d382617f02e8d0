"""Many threads, one model: the steering of a call belongs to the call."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from steered_tiny import greedy, hooks_of, query_shift, some_prompts, steer_tiny, tiny_llama

from finesteer_hf.session import _CURRENT


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
    assert _CURRENT.get() is None


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
