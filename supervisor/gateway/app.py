"""Builds the application: one factory for production and for tests, so that both cancel, limit and time alike."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

import aiohttp
from aiohttp import web

from supervisor.api import Runtime, Store
from supervisor.gateway.malformed import connection_log
from supervisor.gateway.middleware import add_headers, guard, observe
from supervisor.gateway.monitoring import Monitoring
from supervisor.gateway.ollama.routes import ollama_routes
from supervisor.gateway.openai import OpenAI
from supervisor.gateway.options import GatewayOptions
from supervisor.gateway.proxy import open_session
from supervisor.status.metrics import Exposition

SESSION: Final = web.AppKey("session", aiohttp.ClientSession)

# A request line or header field longer than this is no client's of ours: the longest is a key or a cookie.
MAX_LINE_BYTES: Final = 16 << 10
# Browsers send some 20 header fields.
MAX_HEADER_FIELDS: Final = 100
# Longer than the 60 s after which reverse proxies usually drop an idle connection: theirs closes first, without a race.
KEEP_ALIVE_S: Final = 75.0
# A refused body (413) is read on for so long, that the client gets to see the answer.
LINGER_S: Final = 5.0


def build_app(runtime: Runtime, options: GatewayOptions, store: Store | None = None) -> web.Application:
    """Return the application that serves this runtime. ``make_runner`` has to run it.

    Without a store no model can be fetched, made or removed.
    """
    exposition = Exposition(runtime)
    app = web.Application(
        middlewares=[observe(exposition.http), guard(options)], client_max_size=options.max_body_bytes
    )
    app.on_response_prepare.append(add_headers)
    app.cleanup_ctx.append(_session)
    app.add_routes(OpenAI(runtime, SESSION).routes())
    app.add_routes(ollama_routes(runtime, SESSION, store, options.version))
    app.add_routes(Monitoring(runtime, exposition).routes())
    return app


def make_runner(app: web.Application, *, shutdown_timeout_s: float) -> web.AppRunner:
    """Return the runner with the settings that the application relies on.

    A handler is cancelled as soon as its client has left. On ``cleanup`` the listener closes first, then answers that
    have begun get ``shutdown_timeout_s`` to end.
    """
    return web.AppRunner(
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


async def _session(app: web.Application) -> AsyncIterator[None]:
    async with open_session() as session:
        app[SESSION] = session
        yield
