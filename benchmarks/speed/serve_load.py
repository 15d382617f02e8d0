"""`finesteer serve` under load: N clients for M minutes, with clients that hang up and requests that are refused.

    python -m benchmarks.speed.serve_load                                     # the playground, ten minutes
    python -m benchmarks.speed.serve_load --minutes 2 --clients 16 --model out/real/model

Each answer that can be compared is compared with `generate` of the same prompt, steering and scale. The page is written to
benchmarks/results/serve_load.md, a section for each model; `--page ""` writes none.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai

from benchmarks.speed.served_process import PROMPTS, Server, expected_answers, server_process


ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "benchmarks" / "results" / "serve_load.md"
HEAD = """# The server under load

Written by `python -m benchmarks.speed.serve_load`. Each client asks again as soon as it is answered: 85% good requests
(mixed adapters and scales, streamed; a fifth of them sampled, two answers each); the rest hang up or ask for something that
cannot be done. An adapter is replaced by itself every five seconds. Latencies are the client's, on the machine that also
runs the clients; the load is that of the machine while it ran, other work included.

"""
# How often a client does something else than a good request; what it then expects.
TROUBLE = 0.15


@dataclass
class Result:
    """What came out.

    Attributes:
        seconds: how long it ran.
        answers: good requests that were answered.
        tokens: generated tokens of those.
        latencies: seconds of each.
        compared, wrong: answers that were compared with `generate`, and those that differ.
        errors: refused and abandoned requests by kind, all of them meant.
        unexpected: errors that were not meant.
        memory_start, memory_end: resident bytes of the server, after a warm-up and when all is done.
    """

    seconds: float = 0.0
    answers: int = 0
    tokens: int = 0
    latencies: list[float] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)
    compared: int = 0
    wrong: list[Any] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    unexpected: list[str] = field(default_factory=list)
    memory_start: int = 0
    memory_end: int = 0


def drive(server: Server, options: argparse.Namespace) -> Result:
    """Load a server with mixed requests, and compare its answers."""
    expected = expected_answers(server.model, server.adapters, options.length)
    return asyncio.run(drive_clients(server, options, expected))


async def drive_clients(server: Server, options: argparse.Namespace, expected: Mapping[Any, str]) -> Result:
    result = Result()
    async with (
        openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=120) as client,
        httpx.AsyncClient(base_url=server.url, timeout=120, trust_env=False) as rough,
    ):
        # Caches and allocators take what they keep in the first requests.
        warm = time.monotonic() + min(20.0, options.minutes * 60 / 4)
        await asyncio.gather(
            *(
                one_client(number, client, rough, expected, options, warm, Result())
                for number in range(options.clients)
            )
        )
        result.memory_start = server.memory
        begun = time.monotonic()
        end = begun + options.minutes * 60
        await asyncio.gather(
            *(one_client(number, client, rough, expected, options, end, result) for number in range(options.clients)),
            swap_adapters(rough, server, end),
        )
        result.seconds = time.monotonic() - begun
        for _ in range(100):
            if "finesteer_answers_in_flight 0.0" in (await rough.get("/metrics")).text:
                break
            await asyncio.sleep(0.1)
        else:
            result.unexpected.append("answers are left in flight")
        result.memory_end = server.memory
    return result


async def one_client(
    number: int,
    client: openai.AsyncOpenAI,
    rough: httpx.AsyncClient,
    expected: Mapping[Any, str],
    options: argparse.Namespace,
    end: float,
    result: Result,
) -> None:
    """Ask until the time is up."""
    chance = random.Random(number)
    while time.monotonic() < end:
        try:
            if chance.random() < TROUBLE:
                result.errors[await make_trouble(rough, chance)] += 1
            else:
                await ask(client, chance, expected, options.length, result)
        except Exception as error:
            result.unexpected.append(f"{type(error).__name__}: {error}")
            await asyncio.sleep(0.2)


async def ask(
    client: openai.AsyncOpenAI, chance: random.Random, expected: Mapping[Any, str], length: int, result: Result
) -> None:
    """One good request: greedy and compared, or sampled with several answers."""
    prompt, name, scale = key = chance.choice(list(expected))
    sampled, begun = chance.random() < 0.2, time.monotonic()
    stream = await client.chat.completions.create(
        model=f"base:{name}" if name else "base",
        messages=[{"role": "user", "content": prompt}],
        max_tokens=length,
        temperature=1.0 if sampled else 0.0,
        n=2 if sampled else 1,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"steering_scale": scale},
    )
    text, first = "", None
    async for chunk in stream:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            first = first or (time.monotonic() if choice.delta.content else None)
        if chunk.usage:
            result.tokens += chunk.usage.completion_tokens
    result.answers += 1
    result.latencies.append(time.monotonic() - begun)
    result.first_tokens.append((first or time.monotonic()) - begun)
    if not sampled:
        result.compared += 1
        if text != expected[key]:
            result.wrong.append((key, text, expected[key]))


async def make_trouble(rough: httpx.AsyncClient, chance: random.Random) -> str:
    """A request that fails by itself: the client hangs up, or asks for what cannot be.

    Raises:
        RuntimeError: if it is answered with anything else.
    """
    body: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": chance.choice(PROMPTS)}]}
    kind = chance.choice(("hung up", "400", "404", "400"))
    if kind == "hung up":
        with contextlib.suppress(httpx.TimeoutException):
            await rough.post("/v1/chat/completions", json={**body, "n": 2, "max_tokens": 150}, timeout=0.05)
        return kind
    wrong = {
        "400": chance.choice(({"max_tokens": 10**6}, {"tools": [{}]}, {"messages": 1})),
        "404": {"steering": "none"},
    }
    answer = await rough.post("/v1/chat/completions", json={**body, **wrong[kind]})
    if str(answer.status_code) != kind:
        raise RuntimeError(f"{wrong[kind]} was answered with {answer.status_code}")
    return kind


async def swap_adapters(rough: httpx.AsyncClient, server: Server, end: float) -> None:
    """Replace an adapter by itself again and again: nobody may notice."""
    headers = {"Authorization": "Bearer load"}
    while server.adapters and time.monotonic() < end:
        name, folder = next(iter(server.adapters.items()))
        answer = await rough.put(f"/admin/adapters/{name}", json={"source": folder}, headers=headers)
        answer.raise_for_status()
        await asyncio.sleep(min(5.0, max(end - time.monotonic(), 0.0)))


def section(name: str, options: argparse.Namespace, result: Result) -> str:
    """The part of the page about one run."""

    def quantiles(values: Sequence[float]) -> str:
        if len(values) < 2:
            return "-"
        cuts = statistics.quantiles(values, n=100)
        return f"{cuts[49]:.2f} s / {cuts[94]:.2f} s"

    rows = [
        ("CPU cores, load of the machine", f"{os.cpu_count()}, {os.getloadavg()[1]:.1f}"),
        ("clients, minutes", f"{options.clients}, {result.seconds / 60:.1f}"),
        ("answered requests", f"{result.answers:,}"),
        ("latency, p50 / p95", quantiles(result.latencies)),
        ("time to first text, p50 / p95", quantiles(result.first_tokens)),
        ("generated tokens a second", f"{result.tokens / result.seconds:.0f}"),
        ("answers identical to `generate`", f"{result.compared - len(result.wrong):,} of {result.compared:,}"),
        ("hung up, refused with 400, with 404", ", ".join(f"{result.errors[k]:,}" for k in ("hung up", "400", "404"))),
        ("other errors", f"{len(result.unexpected):,}"),
        ("server's memory, start / end", f"{result.memory_start / 2**20:.0f} / {result.memory_end / 2**20:.0f} MiB"),
    ]
    lines = [
        f"## {name}\n",
        "| what | measured |",
        "| --- | --- |",
        *(f"| {what} | {value} |" for what, value in rows),
    ]
    return "\n".join(lines) + "\n"


def write_page(path: Path, text: str) -> None:
    """Put a section into the page, in place of the one of the same model."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    parts = {part.split("\n", 1)[0]: f"## {part}" for part in old.split("\n## ")[1:]}
    parts[text.split("\n", 1)[0].removeprefix("## ")] = text
    path.write_text(HEAD + "\n".join(part.rstrip("\n") + "\n" for part in parts.values()), encoding="utf-8")


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="playground", help="playground, a folder or a Hub id")
    parser.add_argument("--name", default=None, help="the model's on the page")
    parser.add_argument(
        "--adapters", nargs="*", default=[], help="name=folder; by default those that ship for the model"
    )
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--length", type=int, default=48, help="most tokens of an answer")
    parser.add_argument("--page", default=str(PAGE))
    parser.add_argument("--log", type=Path, default=ROOT / "out" / "serve_load.log", help="the server's log")
    options = parser.parse_args(arguments)
    options.name = options.name or options.model
    return options


def main() -> None:
    options = parse_options()
    family = "playground" if options.model == "playground" else "smollm2"
    shipped = {name: str(ROOT / "hub_cards" / f"{family}-{name}") for name in ("truthful", "safety")}
    adapters = dict(text.split("=", 1) for text in options.adapters) or shipped
    options.log.parent.mkdir(parents=True, exist_ok=True)
    with server_process(options.model, adapters, options.log) as server:
        result = drive(server, options)
    text = section(options.name, options, result)
    print(text)
    for problem in [*result.wrong[:5], *result.unexpected[:5]]:
        print(problem)
    if options.page:
        write_page(Path(options.page), text)
    sys.exit(bool(result.wrong or result.unexpected))


if __name__ == "__main__":
    main()
