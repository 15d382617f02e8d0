"""What cannot be honoured is refused with the right code, by the field's name, and touches nobody else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from server_toys import Served

from finesteer_hf.serving.http.fields import NOT_DONE


CHAT = {"model": "playground", "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 4}
TEXT = {"model": "playground", "prompt": "Say hello.", "max_tokens": 4}
IMAGE = [{"type": "image_url", "image_url": {"url": "data:,"}}]


def post(served: Served, body: Any, path: str = "/v1/chat/completions", **headers: str) -> Any:
    content = body if isinstance(body, (str, bytes)) else json.dumps(body)
    headers = {"Content-Type": "application/json", **headers}
    with served.http() as client:
        return client.post(path, content=content, headers=headers)


def refused(answer: Any, status: int, param: str | None) -> str:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    return error["message"]


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"audio": {"voice": "x", "format": "mp3"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"store": True}, "store"),
        ({"store": 0}, "store"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"temprature": 0.5}, "temprature"),
        ({"min_p": None}, "min_p"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "0"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": True}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"logit_bias": {"the": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 5}, "max_tokens"),
        ({"max_tokens": 4096}, "max_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"extra": 1}}, "stream_options.extra"),
        ({"messages": []}, "messages"),
        ({"messages": "Say hello."}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": IMAGE}]}, "messages.content"),
        ({"messages": [{"role": "user", "content": "x", "name": "bob"}]}, "messages.name"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages.tool_calls"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "long " * 400}]}, "messages"),
        ({"steering": 3}, "steering"),
        ({"steering": ["truthful", "truthful"]}, "steering"),
        ({"steering": {"truthful": "1"}}, "steering"),
        ({"steering_scale": "2"}, "steering_scale"),
        ({"model": "playground:truthful", "steering": "safety"}, "steering"),
        ({"model": "playground:truthful", "steering": None}, "steering"),
        ({"model": "playground:truthful", "steering": ["truthful", "safety"]}, "steering"),
        ({"model": None}, "model"),
    ],
)
def test_a_chat_request_that_cannot_be_honoured(playground: Served, more: dict[str, Any], param: str) -> None:
    message = refused(post(playground, {**CHAT, **more}), 400, param)
    assert message and "Traceback" not in message


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [5, "a"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [99999]}, "prompt"),
        ({"prompt": [[5], [99999]]}, "prompt"),
        ({"prompt": ["x"] * 300}, "prompt"),
        ({"prompt": [5] * 256}, "prompt"),
        ({"prompt": "x " * 20_000}, "prompt"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "!"}, "suffix"),
        ({"echo": True}, "echo"),
        ({"messages": []}, "messages"),
        ({"steering": {"truthful": 1, "truthful@v1": 1}}, None),
    ],
)
def test_a_completion_request_that_cannot_be_honoured(playground: Served, more: dict[str, Any], param: str) -> None:
    refused(post(playground, {**TEXT, **more}, "/v1/completions"), 400, param)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe{}",
        b'{"model": "playground", "messages": [}',
        json.dumps({**CHAT, "temperature": float("nan")}),
        json.dumps({**CHAT, "steering": {"truthful": float("inf")}}),
        b"[" * 100_000,
        b'{"seed": ' + b"1" * 10_000 + b"}",
    ],
)
def test_a_malformed_body(playground: Served, body: bytes) -> None:
    answer = post(playground, body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_another_content_type(playground: Served) -> None:
    answer = post(playground, CHAT, **{"Content-Type": "text/plain"})
    assert "application/json" in refused(answer, 400, None)


@pytest.mark.parametrize(
    "model", ["gpt-4", "", "playground:", "playground:nobody", "playground:truthful@v9", "Playground"]
)
def test_an_unknown_model_lists_those_that_there_are(playground: Served, model: str) -> None:
    message = refused(post(playground, {**CHAT, "model": model}), 404, "model")
    assert "playground:truthful" in message


def test_an_unknown_adapter(playground: Served) -> None:
    message = refused(post(playground, {**CHAT, "steering": ["truthful", "nobody"]}), 404, "steering")
    assert "'nobody'" in message and "truthful" in message


def test_an_unknown_path_and_method(playground: Served) -> None:
    refused(post(playground, CHAT, "/v1/embeddings"), 404, None)
    with playground.http() as client:
        refused(client.get("/v1/chat/completions"), 405, None)


def test_every_refused_field_has_a_value_that_asks_for_nothing(playground: Served) -> None:
    for name, neutral in NOT_DONE.items():
        assert neutral, name
    chat = {**CHAT, **{name: neutral[-1] for name, neutral in NOT_DONE.items()}}
    assert post(playground, chat).status_code == 200
    text = {**TEXT, **{name: neutral[0] for name, neutral in NOT_DONE.items()}}
    assert post(playground, text, "/v1/completions").status_code == 200


def test_refused_requests_leave_nothing_behind(playground: Served) -> None:
    assert playground.settled()
    assert post(playground, CHAT).status_code == 200
