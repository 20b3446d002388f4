"""Builds the application: one factory for production and for tests, so that both cancel, limit and time alike."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Iterable
from functools import partial
from typing import Final, cast

from aiohttp import web

from supervisor.api.runtime import Runtime
from supervisor.api.store import Store
from supervisor.gateway.access import Clients, PermittedRuntime
from supervisor.gateway.connection import Connection, Server, connection_log
from supervisor.gateway.express.front import Front
from supervisor.gateway.express.lane import Lane
from supervisor.gateway.manage import Manage
from supervisor.gateway.middleware import add_headers, guard, observe
from supervisor.gateway.monitoring import Monitoring
from supervisor.gateway.observing import Observer
from supervisor.gateway.ollama.routes import ollama_routes
from supervisor.gateway.openai import OpenAI
from supervisor.gateway.options import MAX_HEADER_FIELDS, GatewayOptions
from supervisor.gateway.stalling import StallWatch, Watched
from supervisor.status.metrics import Exposition

CLIENTS: Final = web.AppKey("clients", Clients)
STALLS: Final = web.AppKey("stalls", StallWatch)
LANE: Final = web.AppKey("lane", Lane)

# A request line or header field longer than this is no client's of ours: the longest is a key or a cookie.
MAX_LINE_BYTES: Final = 16 << 10
# Longer than the 60 s after which reverse proxies usually drop an idle connection: theirs closes first, without a race.
KEEP_ALIVE_S: Final = 75.0
# A refused body (413) is read on for so long, that the client gets to see the answer.
LINGER_S: Final = 5.0


def build_app(runtime: Runtime, options: GatewayOptions, store: Store | None = None) -> web.Application:
    """Return the application that serves this runtime. ``make_runner`` has to run it.

    Without a store no model can be fetched, made or removed.
    """
    exposition = Exposition(runtime)
    clients = Clients(options.api_keys, options.clients, options.keys_needed)
    stalls = StallWatch(KEEP_ALIVE_S, options.head_timeout_s, options.stall_timeout_s)
    permitted, observer = PermittedRuntime(runtime), Observer(exposition.http)
    app = web.Application(
        middlewares=[observe(observer, stalls), guard(options, clients)],
        client_max_size=options.max_body_bytes,
    )
    app[CLIENTS], app[STALLS] = clients, stalls
    app[LANE] = Lane(permitted, clients, observer, options)
    app.on_response_prepare.append(add_headers)
    app.on_cleanup.append(partial(_log_the_last, observer))
    app.add_routes(OpenAI(permitted).routes())
    app.add_routes(ollama_routes(permitted, store, options.version))
    app.add_routes(Monitoring(permitted, exposition).routes())
    app.add_routes(Manage(permitted).routes())
    return app


async def _log_the_last(observer: Observer, _app: web.Application) -> None:
    observer.log()


class GatewayRunner(web.AppRunner):
    """A runner that cuts off stalled clients for as long as it serves, and lets plain requests take the short way."""

    _front: Front | None = None
    _watching: asyncio.Task[None] | None = None

    async def listen(self, bound: socket.socket, tls: ssl.SSLContext | None) -> None:
        """Serve on this socket, once ``setup`` has made ready; over TLS all requests go the long way."""
        server, app = self.server, self.app
        assert isinstance(server, Server)  # noqa: S101 - what setup has made
        if tls is not None:
            await web.SockSite(self, bound, ssl_context=tls).start()
        else:
            self._front = Front(bound, app[LANE], server, app[STALLS])
            self._front.open()
        self._watching = asyncio.create_task(app[STALLS].watch(self._connections))

    async def cleanup(self) -> None:
        """Stop serving."""
        if self._watching is not None:
            self._watching.cancel()
        if self._front is not None:
            await self._front.end(self._shutdown_timeout)
        await super().cleanup()

    def _connections(self) -> Iterable[Watched]:
        assert self.server is not None  # noqa: S101 - what setup has made
        visitors = () if self._front is None else self._front.visitors
        return [*cast("list[Connection]", self.server.connections), *visitors]

    async def _make_server(self) -> web.Server:
        plain = await super()._make_server()
        return Server(plain.request_handler, request_factory=plain.request_factory, **self._kwargs)


def make_runner(app: web.Application, *, shutdown_timeout_s: float) -> GatewayRunner:
    """Return the runner with the settings that the application relies on.

    A handler is cancelled as soon as its client has left. On ``cleanup`` the listener closes first, then answers that
    have begun get ``shutdown_timeout_s`` to end.
    """
    return GatewayRunner(
        app,
        handler_cancellation=True,
        access_log=None,
        logger=connection_log(),
        max_line_size=MAX_LINE_BYTES,
        max_field_size=MAX_LINE_BYTES,
        max_headers=MAX_HEADER_FIELDS,
        keepalive_timeout=KEEP_ALIVE_S,
        lingering_time=LINGER_S,
        shutdown_timeout=shutdown_timeout_s,
    )
