"""What happens around every request: it is numbered and recorded, guarded, and its errors are told as its API does."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Final

import structlog
from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware
from multidict import CIMultiDict

from supervisor.gateway.access import Clients, check_may_manage, check_may_use_all
from supervisor.gateway.connection import Connection
from supervisor.gateway.exchange import CLIENT_CLOSED_REQUEST, EXCHANGE, Exchange
from supervisor.gateway.observing import Observer
from supervisor.gateway.options import GatewayOptions
from supervisor.gateway.security import OPEN_PATHS, check_host, check_origin, is_managing, is_undivided
from supervisor.gateway.stalling import StallWatch
from supervisor.gateway.tellers import teller_for

_log = structlog.get_logger("loadmaster.gateway")

UNMATCHED: Final = "(unmatched)"
# Looking costs nothing and is not counted among the requests that a client has in work.
READING: Final = frozenset({hdrs.METH_GET, hdrs.METH_HEAD})
# How long a browser may remember that a page of this origin is welcome.
PREFLIGHT_AGE_S: Final = 600


def observe(observer: Observer, stalls: StallWatch) -> Middleware:
    """Return the outermost middleware: it numbers, times and logs each request and tells every error."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        exchange = request[EXCHANGE] = Exchange(
            _endpoint(request), request.method, request.path, request.remote, teller_for(request.path)
        )
        with observer.numbered(exchange), _connection(request).serving(request, stalls):
            try:
                response = await _answer(request, handler)
                if exchange.broken is not None or not _client_gone(request):
                    exchange.status = response.status
            finally:
                observer.record(exchange)
            return response

    return middleware


def guard(options: GatewayOptions, clients: Clients) -> Middleware:
    """Return the middleware that lets through who may ask, and answers a browser's preflight."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        request[EXCHANGE].origin = checked_origin(request.headers, options)
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


def checked_origin(headers: Mapping[str, str], options: GatewayOptions) -> str | None:
    """Return the page that asks, None where none does. Raises ``Forbidden`` for a page or a host that may not."""
    if options.loopback_only:
        check_host(headers, options.origins)
    return check_origin(headers, options.origins)


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Give every answer what ``head_up`` gives it."""
    exchange = request.get(EXCHANGE)
    if exchange is not None:
        head_up(exchange, response.headers)


def head_up(exchange: Exchange, headers: CIMultiDict[str]) -> None:
    """Give an answer's head its request id, and tell a browser that its page may read the answer."""
    headers["X-Request-Id"] = exchange.request_id
    if exchange.origin is not None:
        headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = exchange.origin
        headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = "X-Request-Id, X-Loadmaster-Model"
        headers.add(hdrs.VARY, "Origin")


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


def _connection(request: web.Request) -> Connection:
    connection = request.protocol
    assert isinstance(connection, Connection)  # noqa: S101 - what our server makes
    return connection


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
