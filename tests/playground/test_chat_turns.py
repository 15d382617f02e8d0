"""Chats of several turns: the gate decides at each turn's query, whatever it decided before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finesteer_hf import SteeredModelForCausalLM, playground
from finesteer_hf.evaluation.data.playground_eval import general_prompts, target_prompts
from finesteer_hf.processors import QueryStates


ADAPTER = str(Path(__file__).resolve().parents[2] / "hub_cards" / "playground-truthful")
pytestmark = pytest.mark.filterwarnings("ignore:Steering adapter:UserWarning")
Chat = list[dict[str, Any]]


@pytest.fixture(scope="module")
def model() -> Any:
    base, _ = playground.load()
    return SteeredModelForCausalLM.from_model(base, steering=ADAPTER)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return playground.load()[1]


def inputs_of(tokenizer: Any, chat: Chat) -> Any:
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def reply(model: Any, tokenizer: Any, chat: Chat, **settings: Any) -> tuple[float, Any]:
    """The gate of a chat's last query, and what `generate` gave."""
    out = model.generate(
        **inputs_of(tokenizer, chat), max_new_tokens=16, do_sample=False, output_steering=True,
        return_dict_in_generate=True, **settings,
    )  # fmt: skip
    return float(out.steering["default"]["gate"][0]), out


def said(tokenizer: Any, chat: Chat, out: Any) -> Chat:
    """The chat with the reply."""
    text = tokenizer.decode(out.sequences[0, inputs_of(tokenizer, chat)["input_ids"].shape[1] :])
    return [*chat, {"role": "assistant", "content": text.removesuffix("<|end|>")}]


@torch.no_grad()
def gate_by_hand(model: Any, tokenizer: Any, chat: Chat) -> float:
    """The decision on unsteered states that plain hooks read at the last token of the template."""
    processor = model.steering_adapters["default"].build()
    states, hooks = {}, []
    for site in processor.reads:
        assert site.kind == "resid_post"

        def look(module: Any, args: Any, output: Any, site: Any = site) -> None:
            states[site] = output[:, -1].float()

        hooks.append(model.model.layers[site.layer].register_forward_hook(look))
    try:
        with model.disable_steering():
            model(**inputs_of(tokenizer, chat))
    finally:
        for hook in hooks:
            hook.remove()
    return float(processor.decide(QueryStates(states, 1, torch.device("cpu"))).gate[0])


def test_each_turn_has_a_gate_of_its_own(model, tokenizer):
    questions, general = target_prompts("truthful", limit=8), general_prompts(limit=8)
    later = []
    for number, (question, harmless) in enumerate(zip(questions, general, strict=True)):
        gate, out = reply(model, tokenizer, question.prompt)
        assert gate > 0.9
        chat = said(tokenizer, question.prompt, out)

        # A harmless second turn: the first one's gate is not carried over. Where it is 0, the answer is the base's.
        turn = [*chat, *harmless.prompt]
        gate, out = reply(model, tokenizer, turn)
        assert gate < 0.1 and gate == pytest.approx(gate_by_hand(model, tokenizer, turn), abs=1e-5)
        if gate == 0:
            plain = model.generate(**inputs_of(tokenizer, turn), max_new_tokens=16, do_sample=False, steering=None)
            assert torch.equal(out.sequences, plain)

        # A second turn on the topic, after either.
        turn = [*(chat if number % 2 else said(tokenizer, turn, out)), *questions[number - 1].prompt]
        gate, _ = reply(model, tokenizer, turn)
        assert gate == pytest.approx(gate_by_hand(model, tokenizer, turn), abs=1e-5)
        later.append(gate)
    # The gate was fitted on single turns, and opens on some of these queries only.
    assert max(later) > 0.5 and min(later) < max(later)


def test_a_chat_that_continues_from_its_cache_decides_again(model, tokenizer):
    opened = []
    for question, second in zip(
        target_prompts("truthful", limit=8), target_prompts("truthful", limit=8)[::-1], strict=True
    ):
        _, out = reply(model, tokenizer, question.prompt)
        turn = [*said(tokenizer, question.prompt, out), *second.prompt]
        kept = out.past_key_values.get_seq_length()
        if not torch.equal(inputs_of(tokenizer, turn)["input_ids"][0, :kept], out.sequences[0, :kept]):
            # The reply was cut off or is written otherwise in the template.
            continue
        gate, _ = reply(model, tokenizer, turn, past_key_values=out.past_key_values)
        assert gate == pytest.approx(gate_by_hand(model, tokenizer, turn), abs=1e-4)
        opened.append(gate)
    assert len(opened) > 3 and max(opened) > 0.3
