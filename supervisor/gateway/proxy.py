"""Carries one request to a runner and its answer back, bytes untouched both ways.

What is not untouched, and why:

- ``Authorization`` and ``X-Api-Key`` are the client's way to us; the runner asks for its own key.
- Hop-by-hop headers (RFC 9110, 7.6.1), ``Host``, ``Content-Length`` and ``Expect`` belong to one connection; a
  compressed request body has been unpacked to be looked at and goes on unpacked, without ``Content-Encoding``.
- ``X-Conversation-Id`` is dropped: with it llama-server goes on generating after the client has left
  (tools/server/server-http.cpp, the resumable stream).
- ``Origin`` goes no further and ``Access-Control-*`` comes no further: the gateway has judged the page itself.
- A stream whose runner is lost ends, after its last whole event, with an error event instead of ``[DONE]``.

Each request has a connection of its own. An idle kept connection would occupy one of llama-server's few HTTP threads,
and a request sent into one that the server is just closing could not be told from one that was begun.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from http import HTTPStatus
from typing import Final, Self, TypeVar
from urllib.parse import quote

import aiohttp
from aiohttp import hdrs, web
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from supervisor.api import Lease
from supervisor.gateway.errors import RunnerLost, answer_to
from supervisor.gateway.events import EVENT_END, MAX_HELD_BYTES, WholeEvents
from supervisor.gateway.exchange import EXCHANGE

T = TypeVar("T")

# Loopback answers within a millisecond; a listener whose backlog is full is as good as gone.
CONNECT_TIMEOUT_S: Final = 5.0
# A dead runner's last bytes may still lie in the socket: they are read before its loss is told.
LAST_BYTES_S: Final = 0.25
# The connection breaks a moment before the exit is noticed; so long the gateway waits for the reason.
STORY_TIMEOUT_S: Final = 1.0
SSE_CONTENT_TYPE: Final = "text/event-stream"
# Which model answered, percent-encoded where its id has other than ASCII.
MODEL_HEADER: Final = "X-Loadmaster-Model"

HOP_BY_HOP: Final = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
NOT_TO_RUNNER: Final = HOP_BY_HOP | {
    "host",
    "content-length",
    "content-encoding",
    "expect",
    "authorization",
    "x-api-key",
    "x-conversation-id",
    "origin",
}


def open_session() -> aiohttp.ClientSession:
    """Return the one session for all runners. The caller closes it."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=(hdrs.USER_AGENT, hdrs.ACCEPT, hdrs.ACCEPT_ENCODING, hdrs.CONTENT_TYPE),
    )


class RunnerLine:
    """The conversation with the runner of one lease, which may die at any moment.

    A dead process's sockets break by themselves; ``wait_lost`` covers what does not break, and tells why.
    """

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._deadline: float | None = None
        self._scope: asyncio.Timeout | None = None

    async def __aenter__(self) -> Self:
        self._story = asyncio.create_task(self._lease.wait_lost())
        self._story.add_done_callback(self._hear)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._story.cancel()

    async def result(self, pending: Awaitable[T]) -> T:
        """Return what the runner sends. Raises ``RunnerLost`` as soon as it is known that nothing will come."""
        try:
            async with asyncio.timeout_at(self._deadline) as scope:
                self._scope = scope
                try:
                    return await pending
                finally:
                    self._scope = None  # from here on there is nothing left to cut short
        except (aiohttp.ClientError, OSError) as error:  # TimeoutError, once the loss was heard, is an OSError
            raise RunnerLost(f"the runner of {self._lease.model} was lost: {await self._why(error)}") from error

    def _hear(self, story: asyncio.Task[str]) -> None:
        if not story.cancelled():
            self._deadline = asyncio.get_running_loop().time() + LAST_BYTES_S
            if self._scope is not None:
                self._scope.reschedule(self._deadline)

    async def _why(self, error: Exception) -> str:
        await asyncio.wait({self._story}, timeout=STORY_TIMEOUT_S)
        return (
            self._story.result()
            if self._story.done()
            else f"its connection broke ({str(error) or type(error).__name__})"
        )


async def forward(
    session: aiohttp.ClientSession, lease: Lease, request: web.Request, path: str, body: bytes
) -> web.StreamResponse:
    """Send ``body`` to ``path`` of the lease's runner and carry its answer to the client as it comes.

    Raises ``RunnerLost`` where the runner fails before the first byte; afterwards the answer is ended as well as it can
    be. Nothing is ever sent twice. A cancelled call (the client has left) closes the runner's connection, at which
    llama-server stops generating.
    """
    query = f"?{request.rel_url.raw_query_string}" if request.query_string else ""
    url = URL(lease.endpoint.base_url.rstrip("/") + path + query, encoded=True)
    headers = forwarded(request.headers, without=NOT_TO_RUNNER)
    headers[hdrs.AUTHORIZATION] = f"Bearer {lease.endpoint.api_key}"
    async with RunnerLine(lease) as line:
        upstream = await line.result(session.post(url, data=body, headers=headers, allow_redirects=False))
        try:
            return await _relay(line, upstream, lease, request)
        finally:
            upstream.close()


async def _relay(
    line: RunnerLine, upstream: aiohttp.ClientResponse, lease: Lease, request: web.Request
) -> web.StreamResponse:
    if upstream.status == HTTPStatus.UNAUTHORIZED:
        raise RunnerLost(f"the runner of {lease.model} refused its own key: another program answers on its port")
    chunk = await line.result(upstream.content.readany())
    response = web.StreamResponse(
        status=upstream.status, reason=upstream.reason, headers=forwarded(upstream.headers, without=HOP_BY_HOP)
    )
    response.headers[MODEL_HEADER] = quote(lease.model, safe="/:@+ ")
    await response.prepare(request)
    events = WholeEvents(MAX_HELD_BYTES if response.content_type == SSE_CONTENT_TYPE else 0)
    try:
        while chunk:
            await _send(response, request, events.feed(chunk))
            chunk = await line.result(upstream.content.readany())
    except RunnerLost as error:
        await _end_broken(response, request, error, clean=events.clean)
    else:
        await _send(response, request, events.rest())
        await response.write_eof()
    return response


async def _send(response: web.StreamResponse, request: web.Request, piece: bytes) -> None:
    if piece:
        request[EXCHANGE].mark_first_byte()
        await response.write(piece)


async def _end_broken(response: web.StreamResponse, request: web.Request, error: RunnerLost, *, clean: bool) -> None:
    """End an answer that has begun and cannot be finished, so that no client takes it for a whole one."""
    exchange = request[EXCHANGE]
    exchange.broken = str(error)
    if response.content_type == SSE_CONTENT_TYPE:
        event = answer_to(error, exchange.request_id).event()
        await response.write(event if clean else EVENT_END + event)
        await response.write_eof()
    elif request.transport is not None:
        request.transport.abort()  # the promised length cannot be kept: a cut connection is the only honest sign


def forwarded(headers: CIMultiDictProxy[str], *, without: frozenset[str]) -> CIMultiDict[str]:
    """Return the headers that go on to the other side; what ``Connection`` names stays behind too."""
    named = {name.strip().lower() for value in headers.getall(hdrs.CONNECTION, ()) for name in value.split(",")}
    return CIMultiDict(
        (name, value)
        for name, value in headers.items()
        if name.lower() not in without | named and not name.lower().startswith("access-control-")
    )
