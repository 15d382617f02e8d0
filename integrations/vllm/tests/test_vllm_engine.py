"""Requests in packed batches say what each says alone with finesteer_hf, whatever runs beside them."""

from __future__ import annotations

import importlib
import random

import fake_vllm
import pytest
import torch

from finesteer_hf import SteeredModelForCausalLM
from finesteer_hf.testing.toy import toy_model


NAMES = (None, "several", "mixture", "official", "always", "caa", "constant")
TOKENS = 10


@pytest.fixture(scope="module")
def reference(toy_adapters):
    model = SteeredModelForCausalLM.from_model(toy_model())
    for name, adapter in toy_adapters.items():
        model.load_steering(adapter, name)
    model.set_steering(None)

    def alone(prompt: list[int], name: str | None, scale: float, tokens: int = TOKENS) -> list[int]:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            steering=name,
            steering_scale=scale,
            max_new_tokens=tokens,
            do_sample=False,
        )
        return out[0, len(prompt) :].tolist()

    return alone


def start(vllm, folders: dict[str, str] | None, **kwargs) -> fake_vllm.Engine:
    """An engine as a server starts it: the plugin is registered, then the worker's extension is imported."""
    import finesteer_vllm.plugin

    finesteer_vllm.plugin.register()
    if folders is not None:
        importlib.import_module("finesteer_vllm.worker")
    return fake_vllm.Engine(vllm, fake_vllm.vllm_config(folders), toy_model(), **kwargs)


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of 2 to 40 tokens, some with a beginning in common; half of them of the adapters' own words."""
    rng = random.Random(seed)
    shared = [rng.randrange(6, 54) for _ in range(11)]
    result = []
    for number in range(count):
        words = range(6, 30) if number % 2 else range(30, 54)
        own = [2, 4, *(rng.choice(words) for _ in range(rng.randrange(1, 28))), 5]
        result.append([*shared, *own] if number % 3 == 0 else own)
    return result


def extra(name: str | None, scale: float) -> dict:
    return {} if name is None else {"steering": name, "steering_scale": scale}


def test_packed_requests_say_what_each_says_alone(vllm, exported, reference) -> None:
    engine = start(vllm, exported)
    rng, asked = random.Random(1), {}
    for number, prompt in enumerate(prompts(70)):
        name, scale = NAMES[number % len(NAMES)], rng.choice([1.0, 1.0, 0.5, 2.0, -1.0])
        asked[str(number)] = (prompt, name, scale)
        engine.add(str(number), prompt, TOKENS, **extra(name, scale))
    answers = engine.run()
    wanted = {key: reference(*request) for key, request in asked.items()}
    assert answers == wanted
    changed = [key for key, (prompt, name, _) in asked.items() if name and wanted[key] != reference(prompt, None, 1.0)]
    assert len(changed) > 20
    assert engine.runner._finesteer.decisions == sum(name is not None for _, name, _ in asked.values())
    assert engine.hits > 0


@pytest.mark.parametrize("share", [True, False])
def test_requests_that_are_put_back_keep_their_decision(vllm, exported, reference, share) -> None:
    engine = start(vllm, exported, share=share, rows=3)
    asked = {}
    for number, prompt in enumerate(prompts(24, seed=2)):
        name = NAMES[1 + number % (len(NAMES) - 1)]
        asked[str(number)] = (prompt, name, 1.0)
        engine.add(str(number), prompt, TOKENS, steering=name)
    rng, put_back, past_query = random.Random(3), 0, 0
    while engine.waiting or engine.running:
        engine.step()
        going = [live for live in engine.running if live.outputs]
        if going and rng.random() < 0.4:
            live = rng.choice(going)
            engine.put_back(live.request.request_id)
            put_back += 1
            past_query += engine._found(live)[0] >= len(live.request.prompt_token_ids)
    assert engine.answers == {key: reference(*request) for key, request in asked.items()}
    assert put_back > 20 and (past_query > 5) == share


@pytest.mark.parametrize("guarded", [True, False])
def test_the_next_turn_shares_nothing_steered(vllm, exported, reference, guarded, monkeypatch) -> None:
    engine = start(vllm, exported)
    if not guarded:
        # The salt that adapter and scale alone would make.
        monkeypatch.setattr(
            "finesteer_vllm.plugin.cache_salt", lambda asked, salt, prompt, given: f"{salt}{asked.scale}"
        )
    same = 0
    for number, first in enumerate(prompts(12, seed=4)):
        name = NAMES[1 + number % (len(NAMES) - 1)]
        engine.add(f"{number} first", first, TOKENS, steering=name, steering_scale=2.0)
        turn = [*first, *engine.run()[f"{number} first"], 4, 6 + number, 5]
        engine.add(f"{number} second", turn, TOKENS, steering=name, steering_scale=2.0)
        engine.add(f"{number} plain", turn, TOKENS)
        engine.run()
        assert engine.answers[f"{number} plain"] == reference(turn, None, 1.0)
        same += engine.answers[f"{number} second"] == reference(turn, name, 2.0)
    assert same == 12 if guarded else same < 12


def test_equal_prompts_share(vllm, exported, reference) -> None:
    engine, prompt = start(vllm, exported), prompts(1)[0]
    engine.add("one", prompt, TOKENS, steering="several")
    engine.run()
    assert engine.hits == 0
    engine.add("two", prompt, TOKENS, steering="several")
    engine.add("three", prompt, TOKENS, steering="several", steering_scale=0.5)
    answers = engine.run()
    assert engine.hits == (len(prompt) - 1) // fake_vllm.BLOCK * fake_vllm.BLOCK
    assert answers["one"] == answers["two"] == reference(prompt, "several", 1.0)
    assert answers["three"] == reference(prompt, "several", 0.5)


def test_unsteered_requests_are_the_base_to_the_bit(vllm, exported) -> None:
    steered, plain = start(vllm, exported), start(vllm, None)
    seen: dict[str, list[torch.Tensor]] = {"steered": [], "plain": []}
    for key, engine in (("steered", steered), ("plain", plain)):
        engine.runner.model.lm_head.register_forward_hook(
            lambda module, args, out, key=key: seen[key].append(out.clone())
        )
        for number, prompt in enumerate(prompts(8, seed=5)):
            engine.add(
                str(number),
                prompt,
                TOKENS,
                **({"steering": "several", "steering_scale": 0} if key == "steered" else {}),
            )
        engine.run()
    assert seen["steered"] and all(torch.equal(a, b) for a, b in zip(seen["steered"], seen["plain"], strict=True))


def test_a_dummy_run_leaves_rows_alone(vllm, exported, reference) -> None:
    engine, asked = start(vllm, exported), {}
    for number, prompt in enumerate(prompts(12, seed=6)):
        name = ("several", "official", "always")[number % 3]
        asked[str(number)] = (prompt, name, 1.0)
        engine.add(str(number), prompt, TOKENS, steering=name)
    while engine.running or engine.waiting:
        engine.step()
        engine.runner._dummy_run(16)
    assert engine.answers == {key: reference(*request) for key, request in asked.items()}


def test_an_id_may_come_again(vllm, exported, reference) -> None:
    engine, first = start(vllm, exported), prompts(2)[0]
    for name, scale in (("caa", 1.0), ("constant", 1.0), ("caa", 2.0), ("several", 1.0)):
        engine.add("same", first, TOKENS, steering=name, steering_scale=scale)
        assert engine.run()["same"] == reference(first, name, scale)


def test_status_says_what_is_served(vllm, exported, toy_adapters) -> None:
    engine = start(vllm, exported)
    worker = importlib.import_module("finesteer_vllm.worker").SteeringWorkerExtension()
    worker.model_runner = engine.runner
    engine.add("one", prompts(1)[0], steering="several")
    engine.run()
    status = worker.steering_status()
    assert set(status["adapters"]) == set(toy_adapters) and status["decisions"] == 1
    assert status["adapters"]["several"]["write_layers"] == [1, 2]
    assert status["adapters"]["official"]["read_layer"] == 1
