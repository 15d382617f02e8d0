"""The application: routes, what every request passes, and errors in one shape."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from finesteer_hf.errors import SteeringError
from finesteer_hf.serving.engine import Engine, running
from finesteer_hf.serving.http.admin import admin_routes
from finesteer_hf.serving.http.asks import Served
from finesteer_hf.serving.http.errors import error_response, error_word, retry_headers
from finesteer_hf.serving.http.flow import Limits
from finesteer_hf.serving.http.guard import Guard, Keys
from finesteer_hf.serving.http.metrics import CONTENT_TYPE, Metrics
from finesteer_hf.serving.http.openai import openai_routes


@dataclass(frozen=True)
class ServerSettings:
    """What a server is told at start.

    Attributes:
        name: the base model's name in requests.
        default: adapters with their scales for requests to that name that say nothing of steering.
        max_body: most bytes of a body.
        max_requests: most answers in flight, those that wait included.
        max_per_client: most of one address; None: no limit of its own.
    """

    name: str
    default: Mapping[str, float] | None = None
    max_body: int = 1 << 20
    max_requests: int = 256
    max_per_client: int | None = None


def create_app(engine: Engine, settings: ServerSettings, keys: Keys, *, changeable: bool = True) -> FastAPI:
    """Make the application of an engine, which the application's lifespan starts and stops.

    Args:
        engine: what answers.
        settings: names and limits.
        keys: who is let in.
        changeable: whether adapters can be changed while it runs.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with running(engine):
            yield

    # No pages of documentation: they fetch scripts from elsewhere. The schema is at /openapi.json.
    app = FastAPI(title="finesteer", docs_url=None, redoc_url=None, lifespan=lifespan)
    served = Served(engine, settings.name, settings.default)
    metrics = Metrics(engine)
    app.include_router(openai_routes(served, Limits(settings.max_requests, settings.max_per_client)))
    app.include_router(admin_routes(engine.catalogue, changeable))

    @app.get("/health")
    async def health() -> Response:
        """Whether the engine's thread runs; restart the server if not."""
        return state(engine.alive, "ok", "the engine's thread does not run")

    @app.get("/ready")
    async def ready() -> Response:
        """Whether requests are taken."""
        return state(engine.ready, "ready", "starting or shutting down")

    @app.get("/metrics")
    async def scrape() -> Response:
        """What Prometheus reads."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    async def told(request: Request, error: Any) -> Response:
        request.scope["finesteer.log"]["error"] = error_word(error)
        return error_response(error)

    for kind in (HTTPException, RequestValidationError, SteeringError):
        app.add_exception_handler(kind, told)
    paths = frozenset(app.openapi()["paths"])
    app.add_middleware(Guard, keys=keys, max_body=settings.max_body, metrics=metrics, paths=paths)
    return app


def state(fine: bool, word: str, otherwise: str) -> JSONResponse:
    """The answer to a probe."""
    status = 200 if fine else 503
    return JSONResponse({"status": word if fine else otherwise}, status, headers=retry_headers(status))
