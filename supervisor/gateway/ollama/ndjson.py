"""Answers as Ollama sends them: one JSON object a line as they come, or all of it in one object."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import quote

import structlog
from aiohttp import web

from supervisor.api.models import JsonText
from supervisor.gateway.exchange import EXCHANGE
from supervisor.gateway.proxy import MODEL_HEADER

Json = Mapping[str, Any]
CONTENT_TYPE: Final = "application/x-ndjson"

_log: structlog.typing.FilteringBoundLogger = structlog.get_logger("loadmaster.ollama")


async def send_lines(request: web.Request, lines: AsyncIterator[Json]) -> web.StreamResponse:
    """Send each line as soon as it is there.

    What goes wrong before the first is raised, so that it is told with its status; later it becomes the last line.
    """
    first = await anext(lines, None)
    response = web.StreamResponse(headers=model_header(request))
    response.content_type = CONTENT_TYPE
    await response.prepare(request)
    exchange = request[EXCHANGE]
    try:
        if first is not None:
            exchange.mark_first_byte()
            exchange.mark_first_event()
            await response.write(_line(first))
        async for line in lines:
            await response.write(_line(line))
    except ConnectionError:
        raise  # the client left while it was written to
    except Exception as error:  # noqa: BLE001 - whatever happens, the stream ends with a line that says so
        exchange.broken = str(error) or type(error).__name__
        answer = exchange.tell(error, exchange.request_id)
        if not answer.expected:
            _log.exception("request.failed", path=request.path)
        await response.write(_line({"error": answer.error}))
    await response.write_eof()
    return response


def send_whole(request: web.Request, answer: Json) -> web.Response:
    """Return one object as the whole answer."""
    return web.Response(
        body=_encoded(answer),
        content_type="application/json",
        charset="utf-8",
        headers=model_header(request),
    )


def model_header(request: web.Request) -> dict[str, str]:
    """Return the header that says which model answered, where one did."""
    model = request[EXCHANGE].model
    return {} if model is None else {MODEL_HEADER: quote(model, safe="/:@+ ")}


def timestamp(seconds: float | None = None) -> str:
    """Return a moment since the epoch (default: now) as Ollama writes it."""
    moment = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def _encoded(answer: Json) -> bytes:
    """Return the answer's JSON, with what is JSON already put in its places."""
    place, written = secrets.token_hex(16), []

    def hold(value: object) -> str:
        if not isinstance(value, JsonText):
            raise TypeError(f"{type(value).__name__} is nothing that JSON has")
        written.append(value.text)
        return place

    first, *others = json.dumps(answer, default=hold).encode().split(f'"{place}"'.encode())
    return b"".join([first, *(part for pair in zip(written, others, strict=True) for part in pair)])


def _line(value: Json) -> bytes:
    return json.dumps(value).encode() + b"\n"
