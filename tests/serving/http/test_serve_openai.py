"""The official client, on the playground."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from server_toys import QUESTIONS, Served


BATS = QUESTIONS[0]


def chat(content: str) -> Any:
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize("steering", [None, "truthful", "safety"])
@pytest.mark.parametrize("by", ["name", "version", "field"])
def test_a_chat_says_what_generate_says(playground: Served, alone: Any, steering: str | None, by: str) -> None:
    model = "playground"
    fields = {}
    if by == "field":
        fields = {"extra_body": {"steering": steering}}
    elif steering is not None:
        model += f":{steering}" + ("@v1" if by == "version" else "")
    answer = playground.client().chat.completions.create(
        model=model, messages=chat(BATS), max_tokens=48, temperature=0, **fields
    )
    assert answer.choices[0].message.content == alone(BATS, steering)
    assert answer.choices[0].finish_reason == "stop"
    ids = alone.chat_ids(BATS)
    tokens = alone.tokens(ids, steering, 1.0, 48)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), len(tokens))
    said = answer.steering
    assert set(said) == (set() if steering is None else {steering if by != "version" else f"{steering}@v1"})
    for report in said.values():
        assert report["version"] == "v1" and report["scale"] == 1.0
        assert report["fired"] == (report["gate"] > 0) == (steering == "truthful")


def test_a_scale_and_a_stack(playground: Served, alone: Any) -> None:
    def ask(**fields: Any) -> Any:
        return playground.client().chat.completions.create(
            model="playground", messages=chat(BATS), max_tokens=48, temperature=0, extra_body=fields
        )

    assert ask(steering="truthful", steering_scale=0.3).choices[0].message.content == alone(BATS, "truthful", 0.3)
    assert alone(BATS, "truthful", 0.3) != alone(BATS, "truthful")
    stacked = ask(steering={"truthful": 0.5, "safety": 1.0}, steering_scale=2.0)
    assert {name: report["scale"] for name, report in stacked.steering.items()} == {"truthful": 1.0, "safety": 2.0}
    assert stacked.choices[0].message.content == alone(BATS, (("truthful", 1.0), ("safety", 2.0)))


def test_a_stream_is_the_same_answer_and_ends_with_what_the_gate_said(playground: Served, alone: Any) -> None:
    stream = playground.client().chat.completions.create(
        model="playground:truthful",
        messages=chat(BATS),
        max_tokens=48,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == alone(BATS, "truthful")
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    last = [chunk for chunk in chunks if chunk.choices][-1]
    assert last.choices[0].finish_reason == "stop"
    assert last.steering["truthful"]["fired"] is True
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 5
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_without_include_usage_every_chunk_has_a_choice(playground: Served) -> None:
    stream = playground.client().chat.completions.create(
        model="playground", messages=chat(BATS), max_tokens=5, stream=True
    )
    assert all(len(chunk.choices) == 1 for chunk in stream)


@pytest.mark.parametrize("stream", [False, True])
def test_completions_of_text_and_of_tokens(playground: Served, alone: Any, stream: bool) -> None:
    ids = [list(alone.chat_ids(question)) for question in QUESTIONS[:3]]
    answer = playground.client().completions.create(
        model="playground:truthful", prompt=ids, max_tokens=48, temperature=0, stream=stream
    )
    texts = {0: "", 1: "", 2: ""}
    said: Any = None
    for part in answer if stream else [answer]:
        for choice in part.choices:
            texts[choice.index] += choice.text
        said = getattr(part, "steering", None) or said
    assert list(texts.values()) == [alone(question, "truthful") for question in QUESTIONS[:3]]
    assert [each["truthful"]["fired"] for each in said] == [True, True, False]
    written = alone.tokenizer.apply_chat_template(chat(BATS), add_generation_prompt=True, tokenize=False)
    answer = playground.client().completions.create(model="playground", prompt=written, max_tokens=48, temperature=0)
    assert answer.choices[0].text == alone(BATS)


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_the_answer_before_them(playground: Served, alone: Any, stream: bool) -> None:
    whole = alone(BATS, "truthful")
    # Across tokens: the middle of one word to the middle of another.
    stop = whole[len(whole) // 2 - 4 : len(whole) // 2 + 4]
    answer = playground.client().chat.completions.create(
        model="playground:truthful",
        messages=chat(BATS),
        max_tokens=48,
        temperature=0,
        stop=["never said", stop],
        stream=stream,
    )
    text, reason = "", None
    for part in answer if stream else [answer]:
        choice = part.choices[0]
        text += (choice.delta.content or "") if stream else choice.message.content
        reason = choice.finish_reason or reason
    assert (text, reason) == (whole[: whole.index(stop)], "stop")
    assert playground.settled()


def test_length_ends_an_answer(playground: Served) -> None:
    answer = playground.client().chat.completions.create(model="playground", messages=chat(BATS), max_tokens=3)
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 3)


def test_seeds_repeat_every_answer_of_a_request(playground: Served) -> None:
    def ask(seed: int, **fields: Any) -> list[str]:
        answer = playground.client().chat.completions.create(
            model="playground:truthful", messages=chat(BATS), max_tokens=24, temperature=1.5, n=3, seed=seed, **fields
        )
        return [choice.message.content for choice in answer.choices]

    first = ask(7)
    assert len(set(first)) == 3
    assert ask(7) == first
    assert ask(8) != first
    grown = ["", "", ""]
    for chunk in ask_stream(playground, seed=7):
        for choice in chunk.choices:
            grown[choice.index] += choice.delta.content or ""
    assert grown == first


def ask_stream(playground: Served, seed: int) -> Any:
    return playground.client().chat.completions.create(
        model="playground:truthful",
        messages=chat(BATS),
        max_tokens=24,
        temperature=1.5,
        n=3,
        seed=seed,
        stream=True,
    )


def test_logprobs_of_a_chat(playground: Served, alone: Any) -> None:
    ask = {"model": "playground:truthful", "messages": chat(BATS), "max_tokens": 48, "temperature": 0}
    ask |= {"logprobs": True, "top_logprobs": 3}
    answer = playground.client().chat.completions.create(**ask)
    entries = answer.choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == answer.choices[0].message.content
    for entry in entries:
        # Greedy: the chosen token is the likeliest.
        assert entry.top_logprobs[0].token == entry.token and entry.top_logprobs[0].logprob == entry.logprob
        assert len(entry.top_logprobs) == 3 and entry.logprob <= 0
    streamed = [
        entry
        for chunk in playground.client().chat.completions.create(**ask, stream=True)
        for entry in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in entries]


def test_logprobs_of_a_completion(playground: Served, alone: Any) -> None:
    answer = playground.client().completions.create(
        model="playground", prompt=list(alone.chat_ids(BATS)), max_tokens=48, temperature=0, logprobs=2
    )
    found = answer.choices[0].logprobs
    assert "".join(found.tokens) == answer.choices[0].text
    assert found.text_offset == [len("".join(found.tokens[:n])) for n in range(len(found.tokens))]
    assert all(len(top) == 2 for top in found.top_logprobs)


def test_a_token_that_is_banned_or_wanted(playground: Served, alone: Any) -> None:
    first = alone.tokens(alone.chat_ids(BATS), None, 1.0, 48)[0]
    ask = {"model": "playground", "messages": chat(BATS), "max_tokens": 8, "temperature": 0}
    without = playground.client().chat.completions.create(**ask, logit_bias={str(first): -100})
    assert not without.choices[0].message.content.startswith(alone.tokenizer.decode([first]))
    wanted = playground.client().chat.completions.create(**ask, logit_bias={"1331": 100})
    assert wanted.choices[0].message.content == alone.tokenizer.decode([1331] * 8)
    penal = playground.client().chat.completions.create(**ask, logit_bias={"1331": 30}, frequency_penalty=2.0)
    assert penal.choices[0].message.content.startswith(alone.tokenizer.decode([1331] * 3))


def test_a_conversation_goes_on(playground: Served) -> None:
    client = playground.client()
    first = client.chat.completions.create(model="playground", messages=chat(BATS), max_tokens=48, temperature=0)
    # The message as the client got it, with its empty fields.
    turns = [*chat(BATS), first.choices[0].message, *chat("Are you sure?")]
    second = client.chat.completions.create(model="playground", messages=turns, max_tokens=8, temperature=0)
    assert second.usage.prompt_tokens > first.usage.total_tokens


def test_parts_of_text_and_the_system_role(playground: Served) -> None:
    def ask(system: str, content: Any) -> str:
        answer = playground.client().chat.completions.create(
            model="playground",
            messages=[{"role": system, "content": "Be brief."}, {"role": "user", "content": content}],
            max_tokens=16,
            temperature=0,
        )
        return answer.choices[0].message.content

    parts = [{"type": "text", "text": BATS[:5]}, {"type": "text", "text": BATS[5:]}]
    assert ask("developer", parts) == ask("system", BATS)


def test_models_are_the_base_and_what_steers_it(playground: Served) -> None:
    client = playground.client()
    names = [model.id for model in client.models.list()]
    assert names[0] == "playground"
    assert {"playground:truthful", "playground:truthful@v1", "playground:safety"} <= {*names}
    assert client.models.retrieve("playground:safety").id == "playground:safety"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_fields_that_ask_for_nothing_change_nothing(playground: Served, alone: Any) -> None:
    answer = playground.client().chat.completions.create(
        model="playground",
        messages=chat(BATS),
        max_completion_tokens=48,
        temperature=0,
        user="somebody",
        metadata={"a": "b"},
        tools=[],
        response_format={"type": "text"},
        store=False,
    )
    assert answer.choices[0].message.content == alone(BATS)


@pytest.mark.parametrize("fields", [{"max_tokens": 1}, {"max_tokens": 48, "stop": ["C", "A", "e"]}])
def test_several_answers_that_end_with_their_first_token(playground: Served, fields: dict[str, Any]) -> None:
    answer = playground.client().chat.completions.create(
        model="playground:truthful", messages=chat(BATS), n=4, seed=1, **fields
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert all(
        choice.finish_reason == ("length" if fields["max_tokens"] == 1 else "stop") for choice in answer.choices
    )
    assert playground.settled()
