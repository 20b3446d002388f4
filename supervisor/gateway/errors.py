"""Every way a request can fail, and how it is told to the client.

One table maps those of ``api.errors`` and the gateway's own to a status, an OpenAI error type and a code. The
types are those that llama-server itself sends (tools/server/server-common.cpp, ``format_error_response``), so that a
client sees one vocabulary whether the gateway or the runner answers. Other APIs tell the same errors in an envelope of
their own: each has an ``ErrorTeller``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from types import MappingProxyType
from typing import Any, Final

from aiohttp import web

from supervisor.api.errors import (
    AcquireError,
    BadModel,
    CannotFit,
    ClientLimit,
    LoadFailed,
    LoadTimeout,
    PlannerFailed,
    QueueFull,
    QueueTimeout,
    ShuttingDown,
    UnknownDevice,
    UnknownModel,
    WrongRole,
)
from supervisor.gateway.events import sse_event


class RequestError(Exception):
    """The gateway itself refuses the request. The text is one line for the client; ``param`` names what is wrong."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class BadRequest(RequestError):
    """The body is not a JSON object with a usable ``model``."""


class Unauthorized(RequestError):
    """No key, or one that nobody has."""


class Forbidden(RequestError):
    """A browser page of another origin, or a Host that is not this machine."""


class NotPermitted(RequestError):
    """The key is good, and its holder may not do this."""


class RunnerLost(Exception):
    """The runner died, or cut the connection, while it worked on this request. The text tells its story."""


@dataclass(frozen=True, slots=True)
class ErrorRule:
    """One row of the table: which error, under which condition, becomes what.

    ``retry_after_s`` holds where the error itself names no time; None: trying again as it is cannot help.
    """

    error: type[Exception]
    status: int
    type: str
    code: str
    retry_after_s: float | None = None
    only_if: Callable[[Any], bool] = lambda _: True


# The first row that matches holds.
RULES: Final = (
    ErrorRule(BadRequest, 400, "invalid_request_error", "invalid_request"),
    ErrorRule(Unauthorized, 401, "authentication_error", "invalid_api_key"),
    ErrorRule(Forbidden, 403, "permission_error", "origin_not_allowed"),
    ErrorRule(NotPermitted, 403, "permission_error", "not_permitted"),
    ErrorRule(UnknownModel, 404, "not_found_error", "model_not_found"),
    ErrorRule(UnknownDevice, 404, "not_found_error", "device_not_found"),
    ErrorRule(WrongRole, 501, "not_supported_error", "model_has_other_role"),
    ErrorRule(BadModel, 422, "invalid_request_error", "model_unusable"),
    ErrorRule(CannotFit, 507, "insufficient_memory_error", "model_never_fits", only_if=lambda error: error.never),
    ErrorRule(CannotFit, 503, "insufficient_memory_error", "model_does_not_fit_now", retry_after_s=5),
    ErrorRule(QueueFull, 503, "unavailable_error", "queue_full", retry_after_s=1),
    ErrorRule(ClientLimit, 429, "rate_limit_error", "client_limit", retry_after_s=1),
    ErrorRule(QueueTimeout, 503, "unavailable_error", "queue_timeout", retry_after_s=5),
    ErrorRule(LoadTimeout, 503, "unavailable_error", "load_timeout", retry_after_s=10),
    ErrorRule(LoadFailed, 502, "server_error", "load_failed"),
    ErrorRule(ShuttingDown, 503, "unavailable_error", "shutting_down", retry_after_s=5),
    ErrorRule(PlannerFailed, 503, "unavailable_error", "unavailable", retry_after_s=5),
    ErrorRule(AcquireError, 503, "unavailable_error", "unavailable"),
    ErrorRule(RunnerLost, 502, "server_error", "runner_lost", retry_after_s=1),
)

# aiohttp's own refusals (unknown path, wrong method, body over the limit) by status.
HTTP_CODES: Final[Mapping[int, tuple[str, str]]] = {
    400: ("invalid_request_error", "invalid_request"),
    404: ("not_found_error", "unknown_path"),
    405: ("invalid_request_error", "method_not_allowed"),
    413: ("invalid_request_error", "body_too_large"),
}
UNEXPECTED: Final = ("server_error", "internal_error")


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """What the client is told: a status, headers, and ``error``: the object of OpenAI's envelope, or Ollama's line.

    ``beside`` stands in the envelope beside it. ``event_name`` is the type of the event that tells it in a stream,
    where the API names its events. ``expected`` is False for a defect of ours, whose traceback belongs in the log.
    """

    status: int
    headers: Mapping[str, str]
    error: Mapping[str, Any] | str
    beside: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    event_name: str | None = None
    expected: bool = True

    def response(self) -> web.Response:
        """Return the whole answer, for a request to which nothing was sent yet."""
        return web.Response(status=self.status, headers=self.headers, body=self.body(), content_type="application/json")

    def event(self) -> bytes:
        """Return the server-sent event that ends a stream which cannot be finished."""
        return sse_event(self.body(), self.event_name)

    def body(self) -> bytes:
        """Return the envelope."""
        return json.dumps({**self.beside, "error": self.error}).encode()


ErrorTeller = Callable[[Exception, str], ErrorAnswer]


def answer_to(error: Exception, request_id: str) -> ErrorAnswer:
    """Return how this error is told. Anything unknown becomes a 500 that carries nothing but the request's id."""
    for rule in RULES:
        if isinstance(error, rule.error) and rule.only_if(error):
            return ErrorAnswer(rule.status, _headers(rule, error), _envelope(rule, error))
    if isinstance(error, web.HTTPException):
        return _http_answer(error)
    type_, code = UNEXPECTED
    message = f"internal error; the service's log tells more under request id {request_id}"
    return ErrorAnswer(500, {}, {"message": message, "type": type_, "param": None, "code": code}, expected=False)


def _envelope(rule: ErrorRule, error: Exception) -> dict[str, Any]:
    envelope: dict[str, Any] = {
        "message": str(error),
        "type": rule.type,
        "param": getattr(error, "param", None),
        "code": rule.code,
    }
    if isinstance(error, UnknownModel):
        envelope |= {"param": "model", "closest": list(error.closest)}
    if isinstance(error, CannotFit):
        envelope["causes"] = [
            {
                "device": cause.device,
                "needed_bytes": cause.needed_bytes,
                "available_bytes": cause.available_bytes,
                "shortfall_bytes": cause.shortfall_bytes,
            }
            for cause in error.causes
        ]
    return envelope


def _headers(rule: ErrorRule, error: Exception) -> dict[str, str]:
    """Say when to try again, or that it is of no use: OpenAI's clients repeat every 5xx unless told not to."""
    headers = {"WWW-Authenticate": "Bearer"} if rule.status == HTTPStatus.UNAUTHORIZED else {}
    retry_after_s = getattr(error, "retry_after_s", None)
    if retry_after_s is None:
        retry_after_s = rule.retry_after_s
    if retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
    elif rule.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        headers["x-should-retry"] = "false"
    return headers


def _http_answer(error: web.HTTPException) -> ErrorAnswer:
    type_, code = HTTP_CODES.get(error.status, ("invalid_request_error", "http_error"))
    headers = {name: value for name, value in error.headers.items() if name == "Allow"}
    message = error.reason or HTTPStatus(error.status).phrase
    if isinstance(error, web.HTTPMethodNotAllowed):
        message = f"{error.method} is not allowed here; allowed: {', '.join(sorted(error.allowed_methods))}"
    elif isinstance(error, web.HTTPNotFound):
        message = "no such path"
    elif isinstance(error, web.HTTPRequestEntityTooLarge):
        message = error.text or message
    return ErrorAnswer(error.status, headers, {"message": message, "type": type_, "param": None, "code": code})
