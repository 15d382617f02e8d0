"""Limits, keys in logs, metrics, shutting down, and an engine that dies."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from server_toys import Served, eventually, serving, toy_engine

from finesteer_hf.serving.http.app import ServerSettings, create_app
from finesteer_hf.serving.http.guard import Keys
from finesteer_hf.serving.http.logs import LOGGER, JsonLines


pytestmark = pytest.mark.filterwarnings("ignore:Steering adapter .* fitted on")
MESSAGES: Any = [{"role": "user", "content": "sun1 sea2 oak3"}]
BODY = {"model": "toy", "messages": MESSAGES, "max_tokens": 4}


def stream(served: Served, tokens: int = 240, key: str = "unused", **more: Any) -> Any:
    """A stream that has begun."""
    chunks = served.client(key).chat.completions.create(
        model="toy", messages=MESSAGES, max_tokens=tokens, stream=True, **more
    )
    next(chunks)
    return chunks


@pytest.fixture
def small(toy_folders: dict[str, Path]) -> Iterator[Served]:
    settings = ServerSettings("toy", max_body=4096, max_requests=4, max_per_client=3)
    with serving(toy_engine({"one": toy_folders["one"]}, max_length=250), settings, drain_seconds=30.0) as served:
        yield served


def test_a_body_that_is_too_large(small: Served) -> None:
    long = {**BODY, "user": "x" * 5000}
    with small.http() as client:
        for content in (json.dumps(long), iter([b'{"user": "', b"x" * 5000, b'"}'])):
            answer = client.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
            assert answer.status_code == 413, answer.text
            assert answer.json()["error"]["code"] == "body_too_large"
        assert client.post("/v1/chat/completions", json=BODY).status_code == 200


def test_places_are_limited_and_given_back(small: Served) -> None:
    with small.http() as client:
        many = client.post("/v1/chat/completions", json={**BODY, "n": 4})
        assert many.status_code == 400 and "at most 3" in many.json()["error"]["message"]
        open_streams = [stream(small), stream(small), stream(small)]
        answer = client.post("/v1/chat/completions", json=BODY)
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "client_queue_full")
        assert int(answer.headers["Retry-After"]) >= 1
        for each in open_streams:
            each.close()
        assert small.settled()
        assert client.post("/v1/chat/completions", json={**BODY, "n": 3}).status_code == 200


def test_the_queue_is_limited(toy_folders: dict[str, Path]) -> None:
    with serving(toy_engine({}), ServerSettings("toy", max_requests=2)) as served, served.http() as client:
        kept = [stream(served), stream(served)]
        with pytest.raises(openai.RateLimitError) as caught:
            stream(served)
        assert caught.value.code == "queue_full"
        assert client.get("/metrics").status_code == 200
        for each in kept:
            each.close()


def test_the_length_of_prompt_and_answer_is_limited(small: Served) -> None:
    with small.http() as client:
        over = client.post("/v1/chat/completions", json={**BODY, "max_tokens": 245})
        assert over.status_code == 400 and over.json()["error"]["code"] == "context_length_exceeded"
        # Without a limit of its own an answer may have the rest.
        rest = client.post("/v1/chat/completions", json={"model": "toy", "messages": MESSAGES})
        assert rest.json()["usage"]["total_tokens"] == 250


def test_ids_are_the_servers_own(small: Served) -> None:
    with small.http() as client:
        answers = [client.post("/v1/chat/completions", json=BODY, headers={"X-Request-ID": "mine"}) for _ in range(2)]
    ids = {answer.headers["x-request-id"] for answer in answers} | {answer.json()["id"] for answer in answers}
    assert len(ids) == 4 and "mine" not in ids


def test_two_requests_in_flight_with_one_id_of_the_client(small: Served) -> None:
    async def both() -> list[int]:
        async with httpx.AsyncClient(base_url=small.url, trust_env=False, headers={"X-Request-ID": "same"}) as client:
            done = await asyncio.gather(*(client.post("/v1/chat/completions", json=BODY) for _ in range(2)))
        return [each.status_code for each in done]

    assert asyncio.run(both()) == [200, 200]


def test_logs_are_json_without_prompts_answers_and_keys(toy_folders: dict[str, Path]) -> None:
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(JsonLines().format(record))

    handler = Keep()
    LOGGER.addHandler(handler)
    level = LOGGER.level
    LOGGER.setLevel(logging.INFO)
    try:
        engine = toy_engine({"one": toy_folders["one"], "raising": toy_folders["raising"]})
        with serving(engine, ServerSettings("toy"), Keys("secret-key")) as served:
            client = served.client("secret-key")
            answer = client.chat.completions.create(model="toy:one", messages=MESSAGES, max_tokens=9, user="me")
            for model in ("toy:raising", "toy:oak3"):
                with pytest.raises(openai.APIStatusError):
                    client.chat.completions.create(model=model, messages=MESSAGES)
            with pytest.raises(openai.AuthenticationError):
                served.client("wrong-key").models.list()
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)
    found = [json.loads(line) for line in lines]
    requests = [line for line in found if line["message"] == "request"]
    assert [line["status"] for line in requests] == [200, 500, 404, 401]
    assert [line.get("error") for line in requests[1:]] == ["request_failed", "model_not_found", "invalid_api_key"]
    first = requests[0]
    assert first["model"] == "toy:one" and first["steering"] == [{"one@v1": {"fired": True, "scale": 1.0}}]
    assert (first["prompt_tokens"], first["completion_tokens"]) == (answer.usage.prompt_tokens, 9)
    assert first["seconds"] > 0 and first["first_token_seconds"] > 0 and first["client"] == "127.0.0.1"
    whole = "\n".join(lines)
    said = answer.choices[0].message.content.split()
    for secret in ("sun1", "sea2", "secret-key", "wrong-key", *said):
        assert secret not in whole


def test_metrics(small: Served) -> None:
    with small.http() as client:
        client.post("/v1/chat/completions", json={**BODY, "model": "toy:one"})
        client.post("/v1/chat/completions", json={**BODY, "model": "toy:one@v1", "steering_scale": 0})
        client.post("/v1/chat/completions", json={**BODY, "n": 0})
        client.get("/no/such/path/1")
        text = client.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['finesteer_requests_total{path="/v1/chat/completions",status="200"}']) == 2
    assert float(values['finesteer_requests_total{path="/v1/chat/completions",status="400"}']) == 1
    assert float(values['finesteer_requests_total{path="other",status="404"}']) == 1
    assert float(values["finesteer_completion_tokens_total"]) == 8
    assert float(values['finesteer_steering_decisions_total{adapter="one@v1"}']) >= 1
    assert float(values['finesteer_steering_fired_total{adapter="one@v1"}']) >= 1
    assert float(values["finesteer_first_token_seconds_count"]) == 2
    assert float(values["finesteer_up"]) == 1
    assert float(values["finesteer_answers_in_flight"]) == 0


def test_a_shutdown_lets_running_requests_finish(small: Served) -> None:
    running = stream(small)
    begin_drain(small)
    with small.http() as client:
        assert eventually(lambda: client.get("/ready").status_code == 503)
        assert client.get("/health").status_code == 200
        answer = client.post("/v1/chat/completions", json=BODY)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
        assert "Retry-After" in answer.headers
    chunks = list(running)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert eventually(lambda: not small.server.started or small.server.should_exit)


def test_a_shutdown_waits_no_longer_than_it_was_told(toy_folders: dict[str, Path]) -> None:
    with serving(toy_engine({}), ServerSettings("toy"), drain_seconds=0.0) as served:
        running = stream(served)
        begin_drain(served)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(running)


def begin_drain(served: Served) -> None:
    """What the server does on SIGTERM, in the loop that its handler runs in."""
    done = threading.Event()
    served.loop.call_soon_threadsafe(lambda: (served.server.handle_exit(15, None), done.set()))
    assert done.wait(10)


def test_an_engine_that_dies_says_so(toy_folders: dict[str, Path]) -> None:
    engine = toy_engine({"one": toy_folders["one"]})
    with serving(engine, ServerSettings("toy")) as served, served.http() as client:
        running = stream(served, extra_body={"steering": "one"})

        def broken(module: Any, inputs: Any) -> None:
            raise RuntimeError("device lost")

        handle = engine.model.get_input_embeddings().register_forward_pre_hook(broken)
        with pytest.raises(openai.APIError):
            list(running)
        assert eventually(lambda: client.get("/health").status_code == 503)
        handle.remove()
        assert client.get("/ready").status_code == 503
        answer = client.post("/v1/chat/completions", json=BODY)
        assert answer.status_code == 503
        assert "finesteer_up 0.0" in client.get("/metrics").text
        assert engine.in_flight == 0


def test_any_asgi_server_can_run_the_application(toy_folders: dict[str, Path]) -> None:
    engine = toy_engine({"one": toy_folders["one"]})
    config = uvicorn.Config(
        create_app(engine, ServerSettings("toy"), Keys()), host="127.0.0.1", port=0, log_config=None
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert eventually(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=BODY, trust_env=False, timeout=30)
        assert answer.status_code == 200
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive() and not engine.alive


def test_a_length_that_cannot_be_had_is_refused_at_start(toy_folders: dict[str, Path]) -> None:
    engine = toy_engine({}, max_length=10_000)
    with pytest.raises(ValueError, match="hold 256 tokens"):
        asyncio.run(engine.start())
    asyncio.run(engine.stop())
    assert not engine.manager.is_running()
