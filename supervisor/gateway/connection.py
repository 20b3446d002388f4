"""A client's connection, as aiohttp serves it, and what we add: our words for what is no HTTP, and an eye on stalls.

What is no HTTP aiohttp answers itself, before any handler of ours is asked: in plain text, if it were left to, and with
a log entry that has a traceback and the bytes that it stumbled over, among which a key may be.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from aiohttp import web
from aiohttp.http_exceptions import ContentEncodingError, HttpProcessingError

from supervisor.gateway.errors import BadRequest, answer_to
from supervisor.gateway.stalling import IDLE, Stage, StallWatch, Standing, taken

CLIENTS_FAULT: Final = (HttpProcessingError, web.RequestPayloadError)


class _InOneLine(logging.Filter):
    """Rewrites what aiohttp logs of a malformed request: one line, the kind of the fault, none of its bytes."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record pass, those of malformed requests rewritten."""
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, CLIENTS_FAULT):
            record.levelno, record.levelname = logging.WARNING, logging.getLevelName(logging.WARNING)
            record.msg, record.args = f"malformed request refused ({type(error).__name__})", ()
            record.exc_info = None
        return True


_IN_ONE_LINE: Final = _InOneLine()


def connection_log() -> logging.Logger:
    """Return the logger for what goes wrong with a connection itself."""
    log = logging.getLogger("loadmaster.connections")
    log.addFilter(_IN_ONE_LINE)  # adding it again changes nothing
    return log


class Connection(web.RequestHandler):
    """One connection, whose malformed requests are told what is wrong as all others are: in OpenAI's envelope.

    ``seen`` is what was read from it already, by whoever had it before.
    """

    __slots__ = ("_request", "_seen")

    def __init__(self, server: web.Server, seen: bytes, **options: Any) -> None:
        super().__init__(server, loop=asyncio.get_running_loop(), **options)
        self._seen = seen
        self._request: web.Request | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin with what was seen already."""
        super().connection_made(transport)
        if self._seen:
            self.data_received(self._seen)
            self._seen = b""

    @contextmanager
    def serving(self, request: web.Request, stalls: StallWatch) -> Iterator[None]:
        """Mark the connection as in use: from here on the request's body has to come, and its answer to be read."""
        self._request = request
        stalls.restart(self)
        try:
            yield
        finally:
            self._request = None
            stalls.restart(self)

    def standing(self) -> Standing:
        """Return where the connection stands."""
        request, transport = self._request, self.transport
        if request is None:
            return IDLE
        if not request.content.is_eof():
            return Standing(Stage.ASKING, request.content.total_bytes)
        connection = None if transport is None else transport.get_extra_info("socket")
        if transport is None or connection is None or transport.is_closing():
            return Standing(Stage.ANSWERING, waits=False)
        return taken(connection, transport.get_write_buffer_size())

    def cut(self) -> None:
        """End it at once: to close it would wait until the other side has read."""
        if self.transport is not None:
            self.transport.abort()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Return the answer, after which the connection is closed."""
        answer = super().handle_error(request, status, exc, message)
        if isinstance(exc, HttpProcessingError):
            answer = answer_to(BadRequest(_wrong_with(exc)), "").response()
            answer.force_close()
        return answer


def _wrong_with(error: HttpProcessingError) -> str:
    if isinstance(error, ContentEncodingError):
        return "the request body is compressed in a way that is not understood here: send it as gzip, or as it is"
    return f"the request is not well-formed HTTP ({type(error).__name__})"


class Server(web.Server):
    """A server whose connections are ``Connection``s."""

    def __call__(self) -> web.RequestHandler:
        """Return what serves a new connection."""
        return self.continuing(b"")

    def continuing(self, seen: bytes) -> Connection:
        """Return what serves a connection from which this much was read already."""
        return Connection(self, seen, **self._kwargs)
