"""How Anthropic's API tells what went wrong: an envelope of its own, and types of its own.

The types are those of its documentation; which of them a client's package makes of an answer it takes from the status,
so the statuses stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Final

from supervisor.gateway.errors import ErrorAnswer, answer_to

# Where these paths begin, Anthropic's clients ask.
PREFIX: Final = "/v1/messages"
EVENT_NAME: Final = "error"

TYPES: Final[Mapping[int, str]] = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "request_too_large",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
    HTTPStatus.NOT_IMPLEMENTED: "invalid_request_error",
    HTTPStatus.SERVICE_UNAVAILABLE: "overloaded_error",
}
OTHERS_FAULT: Final = "api_error"
CALLERS_FAULT: Final = "invalid_request_error"


def anthropic_answer_to(error: Exception, request_id: str) -> ErrorAnswer:
    """Return how this error is told to a client of Anthropic's: ``{"type": "error", "error": {...}}``."""
    told = answer_to(error, request_id)
    fallback = CALLERS_FAULT if told.status < HTTPStatus.INTERNAL_SERVER_ERROR else OTHERS_FAULT
    about = {"message": told.error} if isinstance(told.error, str) else told.error
    return ErrorAnswer(
        told.status,
        told.headers,
        {**about, "type": TYPES.get(told.status, fallback)},
        beside={"type": "error", "request_id": request_id},
        event_name=EVENT_NAME,
        expected=told.expected,
    )
