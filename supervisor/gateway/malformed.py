"""Requests that are no HTTP: aiohttp answers them itself, before any handler of ours is asked.

Left to itself it would do so in plain text, and log each with a traceback and with the bytes that it stumbled over,
among which a key may be.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from aiohttp import web
from aiohttp.http_exceptions import ContentEncodingError, HttpProcessingError

from supervisor.gateway.errors import BadRequest, answer_to

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


class EnvelopeHandler(web.RequestHandler):
    """One connection, whose malformed requests are told what is wrong as all others are: in OpenAI's envelope."""

    __slots__ = ()

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


class EnvelopeServer(web.Server):
    """A server whose connections are ``EnvelopeHandler``s."""

    def __call__(self) -> web.RequestHandler:
        """Return what serves a new connection."""
        return EnvelopeHandler(self, loop=asyncio.get_running_loop(), **self._kwargs)
