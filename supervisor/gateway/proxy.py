"""Carries one request to a runner and its answer back, bytes untouched both ways.

What is not untouched, and why:

- ``Authorization`` and ``X-Api-Key`` are the client's way to us; the runner asks for its own key.
- Hop-by-hop headers (RFC 9110, 7.6.1), ``Host``, ``Content-Length`` and ``Expect`` belong to one connection; a
  compressed request body has been unpacked to be looked at and goes on unpacked, without ``Content-Encoding``.
- ``X-Conversation-Id`` is dropped: with it llama-server goes on generating after the client has left
  (tools/server/server-http.cpp, the resumable stream).
- ``Origin`` goes no further and ``Access-Control-*`` comes no further: the gateway has judged the page itself.
- What was asked in other words than the client's, for the sake of a Modelfile's template, is answered in the client's
  (``Retelling``).
- A stream whose runner is lost ends, after its last whole event, with an error event instead of ``[DONE]``.

Each request has a connection of its own (``upstream``). An idle kept connection would hold a thread of llama-server
that wakes up a hundred times a second (cpp-httplib, ``keep_alive``), and a request sent into one that the server is
just closing could not be told from one that was begun.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Final, Protocol, Self
from urllib.parse import quote

from aiohttp import hdrs, web
from multidict import CIMultiDict, MultiMapping

from supervisor.api.lease import Lease
from supervisor.gateway.answer import Answer
from supervisor.gateway.errors import RunnerLost
from supervisor.gateway.events import COMMENT, EVENT_END, MAX_HELD_BYTES, WholeEvents, sse_event
from supervisor.gateway.exchange import EXCHANGE
from supervisor.gateway.quiet import learn_head
from supervisor.gateway.upstream import Upstream, send

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


class RunnerLine:
    """The conversation with the runner of one lease, which may die at any moment.

    A dead process's sockets break by themselves; the lease covers what does not break, and tells why. Use within
    ``with``, which gives the connection up: llama-server then stops what it still does for this request.
    """

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._upstream: Upstream | None = None
        self._story: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def __enter__(self) -> Self:
        self._lease.when_lost(self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. Whoever reads from it learns that it was closed."""
        if self._upstream is not None:
            self._upstream.close()

    async def post(self, path: str, body: bytes, headers: CIMultiDict[str]) -> Answer:
        """Send this body to a path of the runner, and return its answer's head; ``read`` has the rest.

        The runner's own key is added; the answer before, if any, is given up. Raises ``RunnerLost`` as soon as it is
        known that nothing will come.
        """
        self.close()
        endpoint = self._lease.endpoint
        headers[hdrs.AUTHORIZATION] = f"Bearer {endpoint.api_key}"
        try:
            self._upstream = await send(endpoint.base_url, path, headers, body)
            if self._story.done():  # heard of before there was a connection to be closed
                self._close_soon()
            await self._upstream.wait_head()
        except OSError as error:
            raise await self._lost(error) from error
        answer = self._upstream.answer
        if answer.status == HTTPStatus.UNAUTHORIZED:
            raise key_refused(self._lease.model)
        return answer

    async def read(self) -> bytes:
        """Return what came of the answer's body, as soon as there is anything; empty at its end.

        Raises ``RunnerLost`` as soon as it is known that nothing more will come.
        """
        assert self._upstream is not None  # noqa: S101 - there is a head
        try:
            return await self._upstream.read()
        except OSError as error:
            raise await self._lost(error) from error

    async def rest(self) -> bytes:
        """Return the answer's body to its end. Raises ``RunnerLost``."""
        pieces = []
        while chunk := await self.read():
            pieces.append(chunk)
        return b"".join(pieces)

    def _hear(self, story: str) -> None:
        """Give the last bytes their time, then cut the wait for more short."""
        self._story.set_result(story)
        self._close_soon()

    def _close_soon(self) -> None:
        asyncio.get_running_loop().call_later(LAST_BYTES_S, self.close)

    async def _lost(self, error: OSError) -> RunnerLost:
        await asyncio.wait({self._story}, timeout=STORY_TIMEOUT_S)
        return lost(self._lease.model, self._story.result() if self._story.done() else None, error)


def key_refused(model: str) -> RunnerLost:
    """Return what is told where a runner does not know its own key."""
    return RunnerLost(f"the runner of {model} refused its own key: another program answers on its port")


def lost(model: str, story: str | None, error: OSError) -> RunnerLost:
    """Return what is told of a runner that was lost: its story, for want of one how its connection broke."""
    broken = f"its connection broke ({str(error) or type(error).__name__})"
    return RunnerLost(f"the runner of {model} was lost: {story or broken}")


class Retelling(Protocol):
    """Tells a runner's good answer in other words; refusals go through as they are."""

    def feed(self, piece: bytes) -> bytes:
        """Return what may go on now: of an event stream, whose whole events come in, at once; of a body nothing."""
        ...

    def rest(self) -> bytes:
        """Return what goes on at the answer's end."""
        ...


async def forward(
    lease: Lease, request: web.Request, path: str, body: bytes, retelling: Retelling | None = None
) -> web.StreamResponse:
    """Send ``body`` to ``path`` of the lease's runner and carry its answer to the client as it comes.

    Raises ``RunnerLost`` where the runner fails before the first byte; afterwards the answer is ended as well as it can
    be. Nothing is ever sent twice. A cancelled call (the client has left) closes the runner's connection, at which
    llama-server stops generating. Where the client's stream was begun already, the answer goes on in it.
    """
    query = f"?{request.rel_url.raw_query_string}" if request.query_string else ""
    with RunnerLine(lease) as line:
        answer = await line.post(path + query, body, forwarded(request.headers, without=NOT_TO_RUNNER))
        begun = request[EXCHANGE].begun
        if begun is not None and not is_stream(answer):
            return await _tell_in_stream(line, begun)
        return await _relay(line, answer, lease, request, retelling if answer.status == HTTPStatus.OK else None)


async def _relay(
    line: RunnerLine, answer: Answer, lease: Lease, request: web.Request, retelling: Retelling | None
) -> web.StreamResponse:
    exchange = request[EXCHANGE]
    dropped = HOP_BY_HOP if retelling is None else HOP_BY_HOP | {"content-length"}
    response = exchange.begun or web.StreamResponse(
        status=answer.status, reason=answer.reason, headers=forwarded(answer.headers, without=dropped)
    )
    chunk = await line.read()  # until there is something a runner's end can still be told as what it is
    if exchange.begun is None:
        name_model(response.headers, lease.model)
        await response.prepare(request)
    awaits_event = response.content_type == SSE_CONTENT_TYPE
    if awaits_event:
        learn_head(answer.n_head_bytes)
    events = WholeEvents(MAX_HELD_BYTES if awaits_event else 0)
    try:
        while chunk:
            piece = events.feed(chunk)
            if retelling is not None:
                piece = retelling.feed(piece)
            if piece:
                exchange.mark_first_byte()
                if awaits_event and not piece.startswith(COMMENT):  # with which llama-server bridges a long wait
                    exchange.mark_first_event()
                    awaits_event = False
                await response.write(piece)
            chunk = await line.read()
    except RunnerLost as error:
        await _end_broken(response, request, error, clean=events.clean)
    else:
        rest = events.rest()
        await response.write_eof(rest if retelling is None else retelling.feed(rest) + retelling.rest())
    return response


async def _tell_in_stream(line: RunnerLine, begun: web.StreamResponse) -> web.StreamResponse:
    """Put an answer that is no stream, which only a refusal is, into the stream that the client was given already."""
    await begun.write(sse_event((await line.rest()).replace(b"\n", b" ")))
    await begun.write_eof()
    return begun


async def _end_broken(response: web.StreamResponse, request: web.Request, error: RunnerLost, *, clean: bool) -> None:
    """End an answer that has begun and cannot be finished, so that no client takes it for a whole one."""
    exchange = request[EXCHANGE]
    exchange.broken = str(error)
    if response.content_type == SSE_CONTENT_TYPE:
        event = exchange.tell(error, exchange.request_id).event()
        await response.write(event if clean else EVENT_END + event)
        await response.write_eof()
    elif request.transport is not None:
        request.transport.abort()  # the promised length cannot be kept: a cut connection is the only honest sign


def is_stream(answer: Answer) -> bool:
    """Say whether an answer is an event stream."""
    return answer.headers.get(hdrs.CONTENT_TYPE, "").partition(";")[0].strip().lower() == SSE_CONTENT_TYPE


def name_model(headers: CIMultiDict[str], model: str) -> None:
    """Say in an answer's head which model answers."""
    headers[MODEL_HEADER] = quote(model, safe="/:@+ ")


def forwarded(headers: MultiMapping[str], *, without: frozenset[str]) -> CIMultiDict[str]:
    """Return the headers that go on to the other side; what ``Connection`` names stays behind too."""
    for value in headers.getall(hdrs.CONNECTION, ()):
        without |= {name.strip().lower() for name in value.split(",")}
    kept = [(name, value) for name, value in headers.items() if name.lower() not in without]
    return CIMultiDict((name, value) for name, value in kept if not name.lower().startswith("access-control-"))
