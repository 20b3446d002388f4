"""How the service writes its log: one event per line on stderr, as JSON or for a terminal, libraries included."""

from __future__ import annotations

import logging
import sys
from typing import Literal

import structlog

from supervisor.daemon.log_writer import LogWriter

# Where it failed, and not what was in its hands there: prompts and keys.
TRACEBACK_OF_PLACES = structlog.processors.ExceptionRenderer(
    structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
)
LEVEL_OF_OTHERS = logging.WARNING  # libraries say little that an operator needs below that


def configure(style: Literal["auto", "json", "text"], *, debug: bool) -> None:
    """Set structlog and the standard library's logging up. ``auto`` writes JSON unless stderr is a terminal."""
    as_json = style == "json" or (style == "auto" and not sys.stderr.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    rendering: list[structlog.typing.Processor] = (
        [TRACEBACK_OF_PLACES, structlog.processors.JSONRenderer()]
        if as_json
        else [structlog.dev.ConsoleRenderer(sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)]
    )
    writer = LogWriter(sys.stderr.fileno(), _tell_dropped)
    structlog.configure(
        processors=[*shared, *rendering],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG if debug else logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(writer),  # type: ignore[arg-type]  # it has all that is asked of it,
    )
    handler = logging.StreamHandler(writer)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    logging.basicConfig(handlers=[handler], level=LEVEL_OF_OTHERS, force=True)


def _tell_dropped(lines: int) -> None:
    structlog.get_logger("supervisor.log").warning("log.dropped", lines=lines, reason="nobody read them")
