"""What every request passes: its own id, keys, the size of its body, one line in the log, and an answer to any error."""

from __future__ import annotations

import hmac
import os
import time
import uuid
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finesteer_hf.serving.http.errors import ApiError, error_response, error_word
from finesteer_hf.serving.http.logs import LOGGER
from finesteer_hf.serving.http.metrics import Metrics


API_KEY, ADMIN_TOKEN = "FINESTEER_API_KEY", "FINESTEER_ADMIN_TOKEN"
# Asked every few seconds by machines: counted, not logged.
QUIET = ("/health", "/ready", "/metrics")
# The client hung up before its answer; nobody sees it but the log and the counters.
CLIENT_GONE = 499


@dataclass(frozen=True, repr=False)
class Keys:
    """The secrets that requests must bring.

    Attributes:
        api: for `/v1`; None: anyone.
        admin: for `/admin`; None: nobody.
    """

    api: str | None = None
    admin: str | None = None

    @classmethod
    def from_environment(cls) -> Keys:
        """Read both.

        Raises:
            ValueError: if one is set and empty: that would let anyone in, or nobody.
        """
        for name in (API_KEY, ADMIN_TOKEN):
            if os.environ.get(name, " ").strip() == "" and name in os.environ:
                raise ValueError(f"{name} is set and empty; give it a value or unset it.")
        return cls(os.environ.get(API_KEY), os.environ.get(ADMIN_TOKEN))

    def check(self, path: str, authorization: bytes) -> None:
        """Let a request to a path in.

        Raises:
            ApiError: 401 for a wrong key or none, 403 where nobody is let in.
        """
        if path.startswith("/admin/"):
            if self.admin is None:
                raise ApiError(403, f"Administration is off: start the server with {ADMIN_TOKEN} in its environment.")
            expected, which = self.admin, "admin token"
        elif path.startswith("/v1/") and self.api is not None:
            expected, which = self.api, "API key"
        else:
            return
        scheme, _, given = authorization.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), expected.encode()):
            raise ApiError(401, f"Wrong {which} or none; send 'Authorization: Bearer ...'.", code="invalid_api_key")


class Guard:
    """The outermost layer of the application.

    Args:
        app: what is inside.
        keys: who is let in.
        max_body: bytes of a body.
        metrics: what is counted.
        paths: the paths that there are; others are counted as one.
    """

    def __init__(self, app: ASGIApp, keys: Keys, max_body: int, metrics: Metrics, paths: frozenset[str]) -> None:
        self._app, self._keys, self._max_body = app, keys, max_body
        self._metrics, self._paths = metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status, started = time.monotonic(), 500, False
        # Never the client's X-Request-ID: two requests may bring the same.
        log: dict[str, Any] = {
            "request_id": f"req-{uuid.uuid4().hex}",
            "path": scope["path"],
            "method": scope["method"],
        }
        scope["finesteer.log"] = log
        headers = dict(scope["headers"])

        async def send_noting(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", log["request_id"].encode())]
            await send(message)

        try:
            self._keys.check(scope["path"], headers.get(b"authorization", b""))
            self._check_length(headers.get(b"content-length", b"0"))
            await self._app(scope, self._counting(receive), send_noting)
        except Exception as error:
            log["error"] = error_word(error)
            if not isinstance(error, ApiError):
                LOGGER.exception("request failed", extra={"fields": log})
            if started:
                # Half an answer is out: closing the connection is all that can be said.
                raise
            await error_response(error)(scope, receive, send_noting)
        finally:
            status = log.pop("status", status)
            seconds = time.monotonic() - begun
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.note(path, status, seconds, log)
            if path not in QUIET:
                log |= {"status": status, "seconds": round(seconds, 4), "client": client_of(scope)}
                LOGGER.info("request", extra={"fields": log})

    def _check_length(self, declared: bytes) -> None:
        if not declared.isdigit() or int(declared) > self._max_body:
            raise self._too_large()

    def _counting(self, receive: Receive) -> Receive:
        taken = 0

        async def receive_counting() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._max_body:
                raise self._too_large()
            return message

        return receive_counting

    def _too_large(self) -> ApiError:
        return ApiError(413, f"The body is larger than {self._max_body} bytes.", code="body_too_large")


def client_of(scope: Scope) -> str:
    """Address of the client; behind a proxy that uvicorn trusts, the one that the proxy names."""
    return scope["client"][0] if scope.get("client") else "unknown"
