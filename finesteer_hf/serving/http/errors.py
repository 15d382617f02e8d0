"""Errors in the shape that OpenAI's clients read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from finesteer_hf.errors import AdapterNotFoundError, HubUnreachableError, SteeringError
from finesteer_hf.serving.catalogue import AdapterExistsError
from finesteer_hf.serving.generation import EngineDownError, RequestFailedError


# Seconds after which a client that was turned away may ask again.
RETRY_AFTER = 1
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    499: "client_closed_request",
    500: "server_error",
    502: "server_error",
    503: "service_unavailable",
}


class ApiError(HTTPException):
    """What a request is answered with instead of a result.

    Args:
        status: HTTP status.
        message: for who wrote the request; it may quote the request, so it is never logged.
        param: the field at fault.
        code: a word for programs.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(status, message, headers=retry_headers(status))
        self.param, self.code = param, code


def retry_headers(status: int) -> dict[str, str] | None:
    """When to come again, where that helps."""
    return {"Retry-After": str(RETRY_AFTER)} if status in (429, 503) else None


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The error object."""
    kind = TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def as_api_error(error: Exception) -> ApiError:
    """An error of the engine as what the client is told."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return validation_error(error.errors())
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, error.detail)
    if isinstance(error, EngineDownError):
        return ApiError(503, str(error), code="engine_unavailable")
    if isinstance(error, RequestFailedError):
        return ApiError(500, f"The request failed inside the engine: {error}", code="request_failed")
    if isinstance(error, AdapterExistsError):
        return ApiError(409, str(error), code="adapter_exists")
    if isinstance(error, AdapterNotFoundError):
        return ApiError(404, str(error), param="steering", code="adapter_not_found")
    if isinstance(error, HubUnreachableError):
        return ApiError(502, str(error), param="source", code="hub_unreachable")
    if isinstance(error, FieldError):
        return ApiError(400, str(error), param=error.field, code=error.code)
    if isinstance(error, SteeringError):
        return ApiError(400, str(error))
    return ApiError(500, "The server failed with this request; its log says more.", code="internal_error")


def error_word(error: Exception) -> str:
    """What the log calls an error; its text may quote the request."""
    return as_api_error(error).code or type(error).__name__


def error_response(error: Exception) -> JSONResponse:
    """An error as a response."""
    told = as_api_error(error)
    body = error_body(told.status_code, told.detail, told.param, told.code)
    return JSONResponse(body, told.status_code, headers=told.headers)


def validation_error(found: Sequence[Any]) -> ApiError:
    """The first thing that is wrong with a body, by the name of its field."""
    first: Mapping[str, Any] = found[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    kind, message = first["type"], first["msg"].removeprefix("Value error, ")
    cause = (first.get("ctx") or {}).get("error")
    if isinstance(cause, FieldError):
        return ApiError(400, str(cause), param=cause.field, code=cause.code)
    if kind == "json_invalid":
        return ApiError(400, f"The body is not valid JSON: {(first.get('ctx') or {}).get('error', message)}.")
    if not place:
        return ApiError(400, "The body must be a JSON object, sent with Content-Type: application/json.")
    if kind == "extra_forbidden":
        return ApiError(400, f"Unknown field {place!r}; it would be ignored, so it is refused.", param=place)
    return ApiError(400, f"{place}: {message}.".replace("..", "."), param=place)


class FieldError(SteeringError, ValueError):
    """A field that asks for what this server does not do."""

    def __init__(self, field: str, message: str, code: str | None = "unsupported_value") -> None:
        super().__init__(message)
        self.field, self.code = field, code


def finite(value: Any) -> Any:
    """A value for JSON, which knows no infinity: what is not finite becomes None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return value
