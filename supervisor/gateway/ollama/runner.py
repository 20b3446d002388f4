"""Talks to one runner in llama-server's words: one question with one answer, or a stream of events."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any, Final

from aiohttp import hdrs
from multidict import CIMultiDict

from supervisor.api.lease import Lease
from supervisor.gateway.errors import RunnerLost
from supervisor.gateway.events import EVENT_END, WholeEvents
from supervisor.gateway.ollama.errors import ContextExceeded, RunnerRefused
from supervisor.gateway.proxy import RunnerLine

DATA: Final = b"data: "
DONE: Final = b"[DONE]"
# What llama-server calls in its own words what operators write in OpenAI's.
OWN_WORDS: Final[Mapping[str, str]] = {"max_tokens": "n_predict", "max_completion_tokens": "n_predict"}
# tools/server/server-common.cpp, ``format_error_response``
EXCEEDED: Final = "exceed_context_size_error"


class Runner:
    """The runner of one lease. ``talking`` makes one."""

    def __init__(self, lease: Lease, line: RunnerLine) -> None:
        self._lease = lease
        self._line = line

    async def ask(self, path: str, body: Mapping[str, Any]) -> Any:
        """Return llama-server's JSON answer. Raises ``RunnerRefused``, ``RunnerLost``."""
        await self._ask(path, body)
        return json.loads(await self._line.rest())

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the events of llama-server's answer, as they come. Raises ``RunnerRefused``, ``RunnerLost``.

        Closing the iterator closes the connection, at which llama-server stops generating.
        """
        events = WholeEvents()
        try:
            await self._ask(path, {**body, "stream": True})
            while chunk := await self._line.read():
                for event in events.feed(chunk).split(EVENT_END):
                    if event.startswith(DATA) and event != DATA + DONE:
                        yield _checked(json.loads(event[len(DATA) :]))
        finally:
            self._line.close()

    def lost(self, why: str) -> RunnerLost:
        """Return the error for an answer that ended by itself, and too early."""
        return RunnerLost(f"the runner of {self._lease.model} {why}")

    async def _ask(self, path: str, body: Mapping[str, Any]) -> None:
        headers = CIMultiDict({hdrs.CONTENT_TYPE: "application/json"})
        amendments = self._lease.amendments
        sent = body if amendments is None else amendments.in_words(OWN_WORDS).applied(body)
        answer = await self._line.post(path, json.dumps(sent).encode(), headers)
        if answer.status != HTTPStatus.OK:
            raise _refusal(answer.status, await self._line.rest())


@contextmanager
def talking(lease: Lease) -> Iterator[Runner]:
    """Return the lease's runner to talk to; its loss is heard for as long as the context is open."""
    with RunnerLine(lease) as line:
        yield Runner(lease, line)


def _checked(event: dict[str, Any]) -> dict[str, Any]:
    if "error" in event:
        raise _error(HTTPStatus.INTERNAL_SERVER_ERROR, event["error"])
    return event


def _refusal(status: int, body: bytes) -> RunnerRefused:
    try:
        return _error(status, json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return RunnerRefused(status, body.decode("utf-8", "replace").strip() or f"llama-server answered {status}")


def _error(status: int, error: Mapping[str, Any]) -> RunnerRefused:
    message = str(error.get("message", "llama-server failed without a word"))
    if error.get("type") == EXCEEDED:
        return ContextExceeded(message, int(error.get("n_ctx", 0)))
    return RunnerRefused(int(error.get("code", status)), message)
