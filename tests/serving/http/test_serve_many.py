"""Many clients at once; what goes wrong for one of them touches no other."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import socket
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from server_toys import QUESTIONS, Served, eventually, serving, toy_engine

from finesteer_hf.serving.http.app import ServerSettings


pytestmark = pytest.mark.filterwarnings("ignore:Steering adapter .* fitted on")
CASES = list(
    itertools.islice(itertools.cycle(itertools.product(QUESTIONS, (None, "truthful", "safety"), (1.0, 0.4))), 64)
)


async def ask(client: Any, question: str, steering: str | None, scale: float, stream: bool) -> str:
    answer = await client.chat.completions.create(
        model="playground",
        messages=[{"role": "user", "content": question}],
        max_tokens=24,
        temperature=0,
        stream=stream,
        extra_body={"steering": steering, "steering_scale": scale},
    )
    if not stream:
        return answer.choices[0].message.content
    return "".join([chunk.choices[0].delta.content or "" async for chunk in answer])


def test_64_clients_with_mixed_adapters_get_what_generate_says(playground: Served, alone: Any) -> None:
    expected = [alone(question, steering, scale, 24) for question, steering, scale in CASES]
    assert len({*expected}) > len(QUESTIONS)

    async def everyone() -> list[str]:
        async with playground.async_client() as client:
            return await asyncio.gather(*(ask(client, *case, stream=i % 2 == 0) for i, case in enumerate(CASES)))

    assert asyncio.run(everyone()) == expected
    assert playground.settled()


def hang_up(served: Served, body: dict[str, Any], after: int) -> None:
    """Send a request, read some bytes of the answer, and close the connection without a word."""
    content = json.dumps(body).encode()
    port = httpx.URL(served.url).port
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        if after:
            connection.recv(after)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 4])
def test_a_client_that_hangs_up_cancels_its_answers(toy: Served, stream: bool, n: int) -> None:
    body = {
        "model": "toy",
        "messages": [{"role": "user", "content": "sun1 sea2"}],
        "max_tokens": 240,
        "stream": stream,
        "n": n,
    }
    tokens, gone = toy.engine.manager.stats.tokens, hung_up(toy)
    hang_up(toy, body, after=200 if stream else 0)
    assert eventually(lambda: hung_up(toy) == gone + 1)
    assert toy.settled()
    assert toy.engine.manager.stats.tokens - tokens < n * 240


def hung_up(served: Served) -> float:
    """How many clients the server has seen hang up."""
    with served.http() as client:
        text = client.get("/metrics").text
    return sum(float(line.split()[-1]) for line in text.splitlines() if "requests_total{" in line and '"499"' in line)


@pytest.fixture(scope="module")
def toy(toy_folders: dict[str, Path]) -> Any:
    with serving(toy_engine(toy_folders), ServerSettings("toy")) as served:
        yield served


def test_a_method_that_raises_fails_its_own_requests(toy: Served) -> None:
    async def everyone() -> list[Any]:
        async with toy.async_client() as client:

            async def one(number: int) -> int:
                model = "toy:raising" if number % 4 == 3 else "toy:one"
                answer = await client.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": f"sun{number % 12} sea3"}],
                    max_tokens=20,
                    temperature=0,
                    n=1 + number % 2,
                )
                return answer.usage.completion_tokens

            return await asyncio.gather(*map(one, range(24)), return_exceptions=True)

    results = asyncio.run(everyone())
    for number, result in enumerate(results):
        if number % 4 == 3:
            assert isinstance(result, openai.InternalServerError)
            assert result.body["code"] == "request_failed"  # type: ignore[index]
        else:
            assert result == 20 * (1 + number % 2)
    assert toy.engine.alive and toy.settled()


def test_a_stream_of_a_method_that_raises_ends_with_the_error(toy: Served) -> None:
    stream = toy.client().chat.completions.create(
        model="toy:raising", messages=[{"role": "user", "content": "sun1"}], max_tokens=4, stream=True
    )
    with pytest.raises(openai.APIError, match="failed inside the engine"):
        list(stream)
    assert toy.settled()


def test_what_goes_wrong_touches_nobody_else(playground: Served, alone: Any) -> None:
    """Good requests beside clients that hang up, malformed bodies, prompts too long and unknown adapters."""
    chance = random.Random(0)

    async def bad(client: httpx.AsyncClient) -> int:
        kind = chance.randrange(4)
        body: dict[str, Any] = {"model": "playground", "messages": [{"role": "user", "content": QUESTIONS[0]}]}
        if kind == 0:
            try:
                await client.post("/v1/chat/completions", json={**body, "max_tokens": 200, "n": 2}, timeout=0.01)
            except httpx.TimeoutException:
                pass
            return 499
        body |= [{"model": "playground:nobody"}, {"max_tokens": 10_000}, {"messages": 7}][kind - 1]
        return (await client.post("/v1/chat/completions", json=body)).status_code

    async def everyone() -> tuple[list[str], list[int]]:
        async with (
            playground.async_client() as client,
            httpx.AsyncClient(base_url=playground.url, trust_env=False, timeout=60) as rough,
        ):
            good = [ask(client, *case, stream=i % 2 == 0) for i, case in enumerate(CASES[:32])]
            done = await asyncio.gather(*good, *(bad(rough) for _ in range(32)))
            return done[:32], done[32:]  # type: ignore[return-value]

    texts, codes = asyncio.run(everyone())
    assert texts == [alone(question, steering, scale, 24) for question, steering, scale in CASES[:32]]
    assert {*codes} == {400, 404, 499}
    assert playground.settled()


def test_an_adapter_is_replaced_under_load(toy_folders: dict[str, Path]) -> None:
    adapters = {"a": toy_folders["one"]}
    message = [{"role": "user", "content": "sun1 sea2 oak3"}]
    with serving(toy_engine(adapters), ServerSettings("toy")) as served:
        client = served.client()

        def one(**kwargs: Any) -> str:
            answer = client.chat.completions.create(
                model="toy:a", messages=message, max_tokens=60, temperature=0, **kwargs
            )
            return answer.choices[0].message.content

        old = one()
        catalogue = served.engine.catalogue

        async def everyone() -> list[Any]:
            async with served.async_client() as many:

                async def stream() -> tuple[str, str]:
                    chunks = await many.chat.completions.create(
                        model="toy:a", messages=message, max_tokens=60, temperature=0, stream=True
                    )
                    text, version = "", ""
                    async for chunk in chunks:
                        text += chunk.choices[0].delta.content or ""
                        if chunk.choices[0].finish_reason:
                            version = chunk.steering["a"]["version"]
                    return text, version

                begun = [asyncio.create_task(stream()) for _ in range(8)]
                await asyncio.to_thread(eventually, lambda: served.engine.in_flight == 8)
                await asyncio.to_thread(catalogue.add, "a", str(toy_folders["two"]), replace=True)
                later = [asyncio.create_task(stream()) for _ in range(8)]
                return await asyncio.gather(*begun, *later)

        results = asyncio.run(everyone())
        new = one()
        assert new != old
        assert results == [(old, "v1")] * 8 + [(new, "v2")] * 8
        assert [each.key for each in catalogue.offered()] == ["a@v2"]
        assert list(served.engine.model.steering_adapters) == ["a@v2"]
