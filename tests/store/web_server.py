"""A web server on loopback that answers as a test says, and remembers what it was asked."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class WebServer:
    """A running server, its address, and the requests so far."""

    url: str
    requests: list[web.Request] = field(default_factory=list)

    @property
    def host(self) -> str:
        return self.url.removeprefix("http://")


@asynccontextmanager
async def web_server(answer: Answer) -> AsyncIterator[WebServer]:
    """Run it for as long as the block lasts."""
    app = web.Application()
    server = WebServer("")

    async def remember(request: web.Request) -> web.StreamResponse:
        server.requests.append(request)
        return await answer(request)

    app.router.add_get("/{path:.*}", remember)
    runner = web.AppRunner(app, shutdown_timeout=1.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        await runner.cleanup()


def ranged(data: bytes, request: web.Request, **headers: str) -> web.Response:
    """Answer with the bytes that were asked for."""
    span = request.http_range
    if span.start is None:
        return web.Response(body=data, headers=headers)
    end = min(span.stop if span.stop is not None else len(data), len(data))
    headers["Content-Range"] = f"bytes {span.start}-{end - 1}/{len(data)}"
    return web.Response(status=206, body=data[span.start : end], headers=headers)
