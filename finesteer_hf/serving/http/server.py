"""Running the application: uvicorn, and a shutdown that lets running requests finish."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from finesteer_hf.serving.engine import Engine, running
from finesteer_hf.serving.http.logs import LOGGER


def bound(host: str, port: int) -> socket.socket:
    """A socket at an address, which listens only once the server is ready; port 0 takes a free one.

    Raises:
        ValueError: if the address cannot be had.
    """
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except OSError as error:
        made.close()
        raise ValueError(
            f"{host} port {port} cannot be listened on: {error.strerror}. Give --host or --port."
        ) from error
    return made


class DrainingServer(uvicorn.Server):
    """A server that on SIGTERM or ctrl-C first answers what it has taken, and new requests with 503.

    A second signal ends it at once.

    Args:
        app: the application.
        engine: its engine.
        listening: the socket that it answers on; see `bound`.
        drain_seconds: how long running requests may take after the signal.
    """

    def __init__(self, app: FastAPI, engine: Engine, listening: socket.socket, drain_seconds: float) -> None:
        # The engine is started here and not by the application's lifespan, whose errors uvicorn only logs.
        config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=5)
        super().__init__(config)
        self._engine, self._listening, self._drain_seconds = engine, listening, drain_seconds
        self._signalled = False
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run_engine_and_serve(self, on_start: Callable[[str], None]) -> None:
        """Start the engine, serve until a signal, stop the engine.

        Args:
            on_start: called with the address, once requests are taken.

        Raises:
            EngineDownError: if the engine cannot start.
        """
        self._loop, self._on_start = asyncio.get_running_loop(), on_start
        async with running(self._engine):
            await self.serve(sockets=[self._listening])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say where."""
        await super().startup(sockets)
        if not self.should_exit:
            host, port = self._listening.getsockname()[:2]
            self._on_start(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; uvicorn has this called for SIGTERM and SIGINT."""
        if self._signalled or self._loop is None:
            self.should_exit = self.force_exit = True
            return
        self._signalled = True
        # The signal may have come in the middle of what the loop does.
        self._loop.call_soon_threadsafe(self._begin_to_drain)

    def _begin_to_drain(self) -> None:
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        LOGGER.info("draining", extra={"fields": {"in_flight": self._engine.in_flight}})
        cancelled = await self._engine.drain(self._drain_seconds)
        LOGGER.info("drained", extra={"fields": {"cancelled": cancelled}})
        self.should_exit = True
