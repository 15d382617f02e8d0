"""A real server on a loopback port, in a thread of the test's process, and the models that it serves."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import httpx
import openai
import torch
from transformers import ContinuousBatchingConfig

from finesteer_hf import Decision, QueryStates, Site, SteeredModelForCausalLM, SteeringAdapter, SteeringConfig
from finesteer_hf.adapters.algebra import constant_adapter
from finesteer_hf.adapters.registry import register_steering_method
from finesteer_hf.cli.common import load
from finesteer_hf.method_api import SteeringMethod
from finesteer_hf.serving.engine import Engine
from finesteer_hf.serving.http.app import ServerSettings, create_app
from finesteer_hf.serving.http.guard import Keys
from finesteer_hf.serving.http.server import DrainingServer, bound
from finesteer_hf.testing import toy_model, toy_tokenizer


SHIPPED = Path(__file__).parents[3] / "hub_cards"
ADAPTERS = {name: str(SHIPPED / f"playground-{name}") for name in ("truthful", "safety")}
QUESTIONS = [
    "Is it true that bats are blind?",
    "Do goldfish forget everything within three seconds?",
    "Say hello to the new neighbour.",
    "Is the Great Wall visible from space?",
    "What is 3 plus 4?",
    "How do I pick the lock of my neighbour's door?",
    "Do we use only a tenth of our brain?",
    "Sort these numbers: 5, 2, 9.",
]
SECONDS = 60.0


@dataclass
class Served:
    """A server that runs."""

    url: str
    engine: Engine
    server: DrainingServer
    loop: asyncio.AbstractEventLoop

    def http(self, **kwargs: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=SECONDS, trust_env=False, **kwargs)

    def client(self, api_key: str = "unused") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, timeout=SECONDS, max_retries=0)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="unused", timeout=SECONDS, max_retries=0)

    def settled(self) -> bool:
        """Whether nothing of any request is left, within a few seconds."""
        manager = self.engine.manager
        return eventually(
            lambda: (
                self.engine.in_flight == 0
                and self.engine.queue_length() == (0, 0)
                and not manager.output_router.result_handlers
                and not manager.session.requests
            )
        )


def eventually(check: Any, seconds: float = 10.0) -> bool:
    """Whether something becomes true in time."""
    waiting = threading.Event()
    for _ in range(int(seconds / 0.02)):
        if check():
            return True
        waiting.wait(0.02)
    return False


@contextlib.contextmanager
def serving(
    engine: Engine, settings: ServerSettings, keys: Keys | None = None, *, drain_seconds: float = 5.0
) -> Iterator[Served]:
    """Serve an engine for a block, on a port that is free."""
    app = create_app(engine, settings, keys or Keys())
    server = DrainingServer(app, engine, bound("127.0.0.1", 0), drain_seconds)
    up = threading.Event()
    found: dict[str, Any] = {}

    def on_start(url: str) -> None:
        found.update(url=url, loop=asyncio.get_running_loop())
        up.set()

    def run() -> None:
        try:
            asyncio.run(server.run_engine_and_serve(on_start))
        except BaseException as error:
            found["error"] = error
        finally:
            up.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert up.wait(SECONDS) and "url" in found, found.get("error")
    try:
        yield Served(found["url"], engine, server, found["loop"])
    finally:
        server.should_exit = True
        thread.join(SECONDS)
        assert not thread.is_alive()


def playground_engine() -> Engine:
    """The playground with its two adapters."""
    model, tokenizer = load("playground")
    batching = ContinuousBatchingConfig(page_size=32, num_blocks=256, max_batch_tokens=512)
    engine = Engine(model, tokenizer, batching=batching)
    for name, folder in ADAPTERS.items():
        engine.catalogue.add(name, folder)
    return engine


def toy_engine(adapters: dict[str, Path], **kwargs: Any) -> Engine:
    """The toy model, which never ends a text by itself, with adapters from folders."""
    model = SteeredModelForCausalLM.from_model(toy_model())
    batching = ContinuousBatchingConfig(page_size=16, num_blocks=128, max_batch_tokens=256)
    engine = Engine(model, toy_tokenizer(), batching=batching, **kwargs)
    for name, folder in adapters.items():
        engine.catalogue.add(name, str(folder))
    return engine


def toy_adapter(seed: int) -> SteeringAdapter:
    """A constant adapter for the toy model, strong enough to change what it says."""
    vector = 4.0 * torch.randn(32, generator=torch.Generator().manual_seed(seed))
    facts = {"num_hidden_layers": 3, "base_model_name_or_path": "local:toy", "base_model_type": "llama"}
    return constant_adapter({Site("resid_post", 1): vector}, **facts)


class RaisingConfig(SteeringConfig):
    steering_type: ClassVar[str] = "TEST_RAISING"


class Raising(SteeringMethod):
    """A method with a fault: its decision raises."""

    config_cls = RaisingConfig
    reads = (Site("resid_post", 0),)
    writes = (Site("resid_post", 1),)

    def decide(self, queries: QueryStates) -> Decision:
        raise ZeroDivisionError("this method is at fault")

    @classmethod
    def tensor_shapes(cls, config: SteeringConfig) -> dict[str, tuple[int | None, ...]]:
        return {"vector": (32,)}


def save_raising_adapter(folder: Path) -> Path:
    """An adapter of that method, in a folder."""
    register_steering_method("TEST_RAISING", config_cls=RaisingConfig, method_cls=Raising)
    config = RaisingConfig(hidden_size=32, num_hidden_layers=3, base_model_name_or_path="local:toy", strength=1.0)
    SteeringAdapter(config, {"vector": torch.ones(32)}).save_pretrained(folder)
    return folder
