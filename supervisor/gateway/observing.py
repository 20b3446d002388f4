"""What is told of every request when it has ended: one log line, and the metrics."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from http import HTTPStatus
from typing import Final

import structlog

from supervisor.gateway.exchange import Exchange
from supervisor.status.metrics import NO_MODEL, HttpMetrics

# Probes come every few seconds for ever; they are logged only where they fail.
QUIET_ENDPOINTS: Final = frozenset({"/healthz", "/readyz", "/metrics", "/status"})

# Requests that come together end together, and whoever asks on waits for what is done at the end of the last one. So
# they are logged in one go, this much later: nobody who reads a log sees that.
LOGGED_WITHIN_S: Final = 0.02

_log = structlog.get_logger("loadmaster.gateway")


class Observer:
    """Counts and logs requests."""

    def __init__(self, metrics: HttpMetrics) -> None:
        self._metrics = metrics
        self._unlogged: list[Exchange] = []

    @contextmanager
    def numbered(self, exchange: Exchange) -> Iterator[None]:
        """Count the request among those in flight, and give its id to whatever is logged meanwhile."""
        with structlog.contextvars.bound_contextvars(request_id=exchange.request_id), self.counted(exchange):
            yield

    def counted(self, exchange: Exchange) -> AbstractContextManager[None]:
        """Count the request among those in flight."""
        return self._metrics.in_flight.labels(exchange.endpoint).track_inprogress()

    def record(self, exchange: Exchange) -> None:
        """Tell of a request that has ended: it is counted at once, and logged soon."""
        exchange.ended_s = time.monotonic()
        self._measure(exchange)
        if exchange.endpoint in QUIET_ENDPOINTS and exchange.status < HTTPStatus.BAD_REQUEST:
            return
        self._unlogged.append(exchange)
        if len(self._unlogged) == 1:
            nobodys = contextvars.Context()  # what is bound to one request's is not said of the others
            asyncio.get_running_loop().call_later(LOGGED_WITHIN_S, self.log, context=nobodys)

    def log(self) -> None:
        """Log now whatever has ended."""
        ended, self._unlogged = self._unlogged, []
        for exchange in ended:
            _log_access(exchange)

    def _measure(self, exchange: Exchange) -> None:
        metrics, endpoint, model = self._metrics, exchange.endpoint, exchange.model or NO_MODEL
        metrics.requests.labels(endpoint, model, str(exchange.status)).inc()
        metrics.duration.labels(endpoint, model).observe(exchange.elapsed_s())
        if exchange.first_byte_s is not None:
            metrics.first_byte.labels(endpoint, model).observe(exchange.first_byte_s)
            if exchange.broken is not None:
                metrics.broken_streams.labels(model).inc()
        if exchange.stream and exchange.first_event_s is not None:
            metrics.first_token.labels(model).observe(exchange.first_event_s)


def _log_access(exchange: Exchange) -> None:
    _log.info(
        "request",
        request_id=exchange.request_id,
        method=exchange.method,
        path=exchange.path,
        status=exchange.status,
        model=exchange.model,
        stream=exchange.stream,
        seconds=round(exchange.elapsed_s(), 4),
        first_byte_seconds=None if exchange.first_byte_s is None else round(exchange.first_byte_s, 4),
        remote=exchange.remote,
        client=exchange.client,
        problem=exchange.broken,
    )
