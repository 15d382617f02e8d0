"""The routes of OpenAI's API."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from finesteer_hf.serving.engine import Ask
from finesteer_hf.serving.http.answers import Answer, Endpoint
from finesteer_hf.serving.http.asks import Served
from finesteer_hf.serving.http.errors import ApiError
from finesteer_hf.serving.http.fields import ChatRequest, CompletionRequest
from finesteer_hf.serving.http.flow import Flow, Limits
from finesteer_hf.serving.http.guard import CLIENT_GONE, client_of
from finesteer_hf.serving.http.records import TokenTexts


def openai_routes(served: Served, limits: Limits) -> APIRouter:
    """Chat, completions and models.

    Args:
        served: the engine and its names.
        limits: how much is taken at once.
    """
    router = APIRouter(prefix="/v1")
    texts = TokenTexts(served.engine.tokenizer)
    started = int(time.time())

    def model_entry(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": started, "owned_by": "finesteer"}

    @router.get("/models")
    async def models() -> dict[str, Any]:
        """The base and, as `base:adapter` and `base:adapter@version`, what it can be steered with."""
        return {"object": "list", "data": [model_entry(name) for name in served.model_names()]}

    @router.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        if name not in served.model_names():
            raise ApiError(404, f"The model {name!r} does not exist.", param="model", code="model_not_found")
        return model_entry(name)

    @router.post("/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Response:
        """Answer a chat."""
        steering = served.steering_of(body)
        ask = served.ask(body, await served.chat_prompt(body.messages), steering)
        return await answer("chat", request, body, [ask])

    @router.post("/completions")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Continue a prompt, or several."""
        steering = served.steering_of(body)
        if len(body.prompts) * (body.n or 1) > limits.most:
            raise ApiError(400, f"This server gives at most {limits.most} answers to a request.", param="prompt")
        prompts = [await served.completion_prompt(prompt) for prompt in body.prompts]
        return await answer("completions", request, body, [served.ask(body, prompt, steering) for prompt in prompts])

    async def answer(
        endpoint: Endpoint, request: Request, body: ChatRequest | CompletionRequest, asks: Sequence[Ask]
    ) -> Response:
        log = request.scope["finesteer.log"]
        log |= {"model": body.model, "stream": bool(body.stream), "answers": sum(ask.n for ask in asks)}
        flow = Flow(served.engine, limits, client_of(request.scope), log)
        generations = flow.submit(asks)
        identity = f"{'chatcmpl' if endpoint == 'chat' else 'cmpl'}-{uuid.uuid4().hex}"
        told = Answer(
            endpoint,
            identity,
            body.model,
            generations,
            texts,
            recorded=body.recorded is not None,
            include_usage=body.stream_options is not None and body.stream_options.include_usage,
        )
        if body.stream:
            return EventStream(told, flow)
        try:
            whole = await while_connected(request, told.whole(flow))
        finally:
            flow.close()
        if whole is None:
            log["status"] = CLIENT_GONE
            return Response(status_code=CLIENT_GONE)
        return JSONResponse(whole)

    return router


class EventStream(StreamingResponse):
    """Server-sent events of an answer; however it ends, nothing goes on for a client that is gone."""

    def __init__(self, told: Answer, flow: Flow) -> None:
        super().__init__(told.chunks(flow), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._flow = flow

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if not all(generation.over for generation in self._flow.generations):
                self._flow.log["status"] = CLIENT_GONE
            self._flow.close()


async def while_connected(request: Request, work: Any) -> Any:
    """The result of a coroutine; None, and the coroutine is cancelled, if the client hangs up first."""

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(hung_up())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
