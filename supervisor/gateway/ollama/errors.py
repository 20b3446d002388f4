"""How Ollama tells what went wrong: ``{"error": "one line"}``, in its words where programs look for them.

The table stands beside OpenAI's (``supervisor.gateway.errors``); what it does not name is told as there. Ollama knows
few statuses: 400 the request, 401 and 403 the guards, 404 no such model, 503 busy, 500 everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

from supervisor.api.errors import (
    BadModel,
    CannotFit,
    ClientLimit,
    LoadFailed,
    LoadTimeout,
    PlannerFailed,
    QueueFull,
    QueueTimeout,
    ShuttingDown,
)
from supervisor.api.store import BadCreate, BadModelName, NotInStore, StoreError
from supervisor.gateway.errors import ErrorAnswer, RequestError, RunnerLost, answer_to
from supervisor.go_template.nodes import TemplateError

# Where these paths begin, Ollama's clients ask.
PREFIX: Final = "/api/"

SHOWN_NAME: Final = 200  # characters of a name that nobody has

# Texts that programs look for (server/routes.go, server/sched.go, server/images.go).
MISSING_BODY: Final = "missing request body"
MODEL_REQUIRED: Final = "model is required"
BUSY: Final = "server busy, please try again.  maximum pending requests exceeded"
INPUT_TOO_LONG: Final = "the input length exceeds the context length"
NO_IMAGE_INPUT: Final = "this model is missing data required for image input"
RAW_EXCLUDES: Final = "raw mode does not support template, system, or context"
RAW_WITHOUT_IMAGES: Final = "raw mode does not support images: leave raw out, or write the prompt without them"
TOP_LOGPROBS_RANGE: Final = "top_logprobs must be between 0 and 20"
LOAD_DIED: Final = "llama runner process has terminated"
RUN_DIED: Final = "model runner has unexpectedly stopped"


class OllamaError(RequestError):
    """The request is refused with a status and a text that Ollama's clients know."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class RunnerRefused(Exception):
    """llama-server answered with an error of its own; the text is its message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class ContextExceeded(RunnerRefused):
    """The prompt is longer than the runner's context of ``n_ctx`` tokens."""

    def __init__(self, message: str, n_ctx: int) -> None:
        super().__init__(HTTPStatus.BAD_REQUEST, message)
        self.n_ctx = n_ctx


def model_not_found(name: str) -> OllamaError:
    """Return what generate, chat, show and delete say of a name that nobody has."""
    return OllamaError(HTTPStatus.NOT_FOUND, f"model '{name[:SHOWN_NAME]}' not found")


def model_not_pulled(name: str) -> OllamaError:
    """Return what the embedding endpoints say of it."""
    return OllamaError(HTTPStatus.NOT_FOUND, f'model "{name[:SHOWN_NAME]}" not found, try pulling it first')


def lacks(name: str, ability: str) -> OllamaError:
    """Return what is said of a model that cannot chat, generate or think."""
    return OllamaError(HTTPStatus.BAD_REQUEST, f'"{name}" does not support {ability}')


def lacks_capability(name: str, capability: str) -> OllamaError:
    """Return what is said of a model that knows no tools or cannot insert: its name stands without quotes here."""
    return OllamaError(HTTPStatus.BAD_REQUEST, f"{name} does not support {capability}")


@dataclass(frozen=True, slots=True)
class ErrorRule:
    """One row of the table: which error becomes which status and text."""

    error: type[Exception]
    status: int
    text: Callable[[Any], str] = str


# The first row that matches holds.
RULES: Final = (
    ErrorRule(QueueFull, 503, lambda _: BUSY),
    ErrorRule(ClientLimit, 503, lambda error: f"{BUSY} ({error})"),
    ErrorRule(QueueTimeout, 503, lambda error: f"{BUSY} ({error})"),
    ErrorRule(ShuttingDown, 503),
    ErrorRule(BadModel, 500),
    ErrorRule(CannotFit, 500),
    ErrorRule(PlannerFailed, 500),
    ErrorRule(LoadFailed, 500, lambda error: f"{LOAD_DIED}: {error}"),
    ErrorRule(LoadTimeout, 500, lambda error: f"timed out waiting for llama runner to start: {error}"),
    ErrorRule(RunnerLost, 500, lambda error: f"{RUN_DIED}: {error}"),
    ErrorRule(BadModelName, 400),
    ErrorRule(BadCreate, 400),
    ErrorRule(NotInStore, 404),
    ErrorRule(StoreError, 500),
    ErrorRule(TemplateError, 500, lambda error: f"template: {error}"),
)


def ollama_answer_to(error: Exception, request_id: str) -> ErrorAnswer:
    """Return how this error is told to a client of Ollama's."""
    if isinstance(error, OllamaError):
        return ErrorAnswer(error.status, {}, str(error))
    if isinstance(error, RunnerRefused):
        ours = error.status != HTTPStatus.BAD_REQUEST
        return ErrorAnswer(HTTPStatus.INTERNAL_SERVER_ERROR if ours else error.status, {}, str(error))
    told = answer_to(error, request_id)
    for rule in RULES:
        if isinstance(error, rule.error):
            return ErrorAnswer(rule.status, told.headers, rule.text(error))
    message = told.error if isinstance(told.error, str) else told.error["message"]
    return ErrorAnswer(told.status, told.headers, message, expected=told.expected)
