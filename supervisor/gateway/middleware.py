"""What happens around every request: an id, the guards, one log line, the metrics, and each API's errors."""

from __future__ import annotations

from http import HTTPStatus
from typing import Final

import structlog
from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from supervisor.gateway.access import Clients, check_may_manage, check_may_use_all
from supervisor.gateway.exchange import CLIENT_CLOSED_REQUEST, EXCHANGE, Exchange
from supervisor.gateway.options import GatewayOptions
from supervisor.gateway.security import OPEN_PATHS, check_host, check_origin, is_managing, is_undivided
from supervisor.gateway.stalling import StallWatch
from supervisor.gateway.tellers import teller_for
from supervisor.status.metrics import NO_MODEL, HttpMetrics

_log = structlog.get_logger("loadmaster.gateway")

UNMATCHED: Final = "(unmatched)"
# Probes come every few seconds for ever; they are logged only where they fail.
QUIET_ENDPOINTS: Final = frozenset({"/healthz", "/readyz", "/metrics", "/status"})
# Looking costs nothing and is not counted among the requests that a client has in work.
READING: Final = frozenset({hdrs.METH_GET, hdrs.METH_HEAD})
# How long a browser may remember that a page of this origin is welcome.
PREFLIGHT_AGE_S: Final = 600


def observe(metrics: HttpMetrics, stalls: StallWatch) -> Middleware:
    """Return the outermost middleware: it numbers, times and logs each request and tells every error."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        exchange = request[EXCHANGE] = Exchange(endpoint=_endpoint(request), tell=teller_for(request.path))
        status = CLIENT_CLOSED_REQUEST
        with (
            structlog.contextvars.bound_contextvars(request_id=exchange.request_id),
            metrics.in_flight.labels(exchange.endpoint).track_inprogress(),
            stalls.serving(request),
        ):
            try:
                response = await _answer(request, handler)
                if exchange.broken is not None or not _client_gone(request):
                    status = response.status
            finally:
                _record(metrics, exchange, status)
                _log_access(request, exchange, status)
            return response

    return middleware


def guard(options: GatewayOptions, clients: Clients) -> Middleware:
    """Return the middleware that lets through who may ask, and answers a browser's preflight."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if options.loopback_only:
            check_host(request.headers, options.origins)
        request[EXCHANGE].origin = check_origin(request.headers, options.origins)
        if request.method == hdrs.METH_OPTIONS and hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers:
            return _preflight(request)
        if request.path in OPEN_PATHS:
            return await handler(request)
        caller = clients.identify(request.headers, request.remote)
        request[EXCHANGE].client = caller.name
        with clients.admitted(caller, counts=request.method not in READING):
            if is_managing(request.path):
                check_may_manage()
            if is_undivided(request.path):
                check_may_use_all()
            return await handler(request)

    return middleware


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Give every answer its request id, and tell a browser that its page may read it."""
    exchange = request.get(EXCHANGE)
    if exchange is None:
        return
    response.headers["X-Request-Id"] = exchange.request_id
    if exchange.origin is not None:
        response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = exchange.origin
        response.headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = "X-Request-Id, X-Loadmaster-Model"
        response.headers.add(hdrs.VARY, "Origin")


async def _answer(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Return the handler's answer, or the error that it ended in, as an answer."""
    exchange = request[EXCHANGE]
    try:
        return await handler(request)
    except ConnectionError:
        if not _client_gone(request):
            raise
        return web.Response(status=CLIENT_CLOSED_REQUEST)  # it left while it was written to: nobody is told, or logged
    except Exception as error:  # noqa: BLE001 - the boundary: whatever happens, the client gets one envelope
        answer = exchange.tell(error, exchange.request_id)
        if answer.expected:
            exchange.broken = str(error)
        else:
            _log.exception("request.failed", path=request.path)
        if exchange.begun is None:
            return answer.response()
        await exchange.begun.write(answer.event())
        await exchange.begun.write_eof()
        return exchange.begun


def _record(metrics: HttpMetrics, exchange: Exchange, status: int) -> None:
    model = exchange.model or NO_MODEL
    metrics.requests.labels(exchange.endpoint, model, str(status)).inc()
    metrics.duration.labels(exchange.endpoint, model).observe(exchange.elapsed_s())
    if exchange.first_byte_s is not None:
        metrics.first_byte.labels(exchange.endpoint, model).observe(exchange.first_byte_s)
        if exchange.broken is not None:
            metrics.broken_streams.labels(model).inc()
    if exchange.stream and exchange.first_event_s is not None:
        metrics.first_token.labels(model).observe(exchange.first_event_s)


def _log_access(request: web.Request, exchange: Exchange, status: int) -> None:
    if exchange.endpoint in QUIET_ENDPOINTS and status < HTTPStatus.BAD_REQUEST:
        return
    _log.info(
        "request",
        method=request.method,
        path=request.path,
        status=status,
        model=exchange.model,
        stream=exchange.stream,
        seconds=round(exchange.elapsed_s(), 4),
        first_byte_seconds=None if exchange.first_byte_s is None else round(exchange.first_byte_s, 4),
        remote=request.remote,
        client=exchange.client,
        problem=exchange.broken,
    )


def _client_gone(request: web.Request) -> bool:
    return request.transport is None or request.transport.is_closing()


def _endpoint(request: web.Request) -> str:
    """Return the route's pattern, which is one of a few, rather than the path, which is anything."""
    resource = request.match_info.route.resource
    return UNMATCHED if resource is None else resource.canonical


def _preflight(request: web.Request) -> web.Response:
    return web.Response(
        status=HTTPStatus.NO_CONTENT,
        headers={
            hdrs.ACCESS_CONTROL_ALLOW_METHODS: "GET, HEAD, POST, DELETE, OPTIONS",
            hdrs.ACCESS_CONTROL_ALLOW_HEADERS: request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS, "*"),
            hdrs.ACCESS_CONTROL_MAX_AGE: str(PREFLIGHT_AGE_S),
        },
    )
