"""Requests that are no HTTP: aiohttp answers them itself, in plain text, before any handler of ours is asked.

It would also log each with a traceback and with the bytes that it stumbled over, among which a key may be.
"""

from __future__ import annotations

import logging
from typing import Final

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

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
