"""One plain request on its way to a runner, and the answer on its way back: what ``proxy`` does, without a task.

The rules are the proxy's, and so are its words; what differs is that nothing here waits. A piece of the answer goes on
in the same call in which it was read.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from typing import Final, Protocol

import structlog
from aiohttp import hdrs
from multidict import CIMultiDict

from supervisor.api.lease import Lease
from supervisor.gateway.answer import Answer, Broken
from supervisor.gateway.errors import RunnerLost
from supervisor.gateway.events import COMMENT, EVENT_END, MAX_HELD_BYTES, WholeEvents
from supervisor.gateway.exchange import CLIENT_CLOSED_REQUEST, Exchange
from supervisor.gateway.express.wire import Wire
from supervisor.gateway.middleware import head_up
from supervisor.gateway.proxy import (
    HOP_BY_HOP,
    LAST_BYTES_S,
    STORY_TIMEOUT_S,
    forwarded,
    is_stream,
    key_refused,
    lost,
    name_model,
)
from supervisor.gateway.quiet import learn_head
from supervisor.gateway.upstream import CLOSED, CONNECT_TIMEOUT_S, MAX_UNREAD_BYTES, fields_of

# Answers that have no body, whatever their heads say (RFC 9112, 6.3).
BODILESS: Final = frozenset({HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED})
CHUNKED: Final = "Transfer-Encoding: chunked\r\n"
OWN: Final = frozenset({"date", "x-request-id"})  # which every answer of ours has anyway
# Streams begin alike, so that many heads are known again.
MAX_KNOWN: Final = 64
LAST_CHUNK: Final = b"0\r\n\r\n"

_log = structlog.get_logger("loadmaster.gateway")


@lru_cache(1)
def _date(now: int) -> str:
    return formatdate(now, usegmt=True)


@lru_cache(MAX_KNOWN)
def _passed_on(told: tuple[tuple[str, str], ...], model: str) -> str:
    """Return the lines that go on of an answer's head, and the one that names the model."""
    headers = forwarded(CIMultiDict(told), without=HOP_BY_HOP | OWN)
    name_model(headers, model)
    return fields_of(headers)


class Client(Protocol):
    """Who has asked."""

    @property
    def wire(self) -> Wire:
        """The connection to it."""
        ...

    def answered(self, *, keeps: bool) -> None:
        """Hear that all of the answer was sent; the connection ends unless both sides keep it."""
        ...

    def cut(self) -> None:
        """Be cut off."""
        ...


class Passage:
    """One request that was offered a lease, as ``message`` to a runner on loopback.

    ``begin`` sends it over what ``connect`` returns. Whatever else there is to do comes after that, while the runner
    begins: to ``take`` the lease, too. From then on the runner's answer drives it. ``when_over`` is called once, when
    that has ended in whichever way; ``exchange`` tells in which. ``keeps``: the client keeps its connection for more.
    """

    _lease: Lease  # these are there once it has begun
    _answer: Answer
    _events: WholeEvents

    def __init__(
        self,
        client: Client,
        exchange: Exchange,
        message: bytes,
        *,
        connect: Callable[[], Wire],
        take: Callable[[], Lease],
        keeps: bool,
        when_over: Callable[[], None],
    ) -> None:
        self._client = client
        self._exchange = exchange
        self._message = message
        self._connect = connect
        self._take_lease = take
        self._keeps = keeps
        self._when_over = when_over
        self._loop = asyncio.get_running_loop()
        self._runner: Wire | None = None
        self._is_chunked = False
        self._awaits_event = False
        self._unsent_head = b""
        self._is_headed = False
        self._has_begun = False
        self._is_over = False
        self._story: str | None = None
        self._broken: OSError | None = None
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Send the request, and take the lease."""
        broken: OSError | None = None
        try:
            self._runner = runner = self._connect()
            runner.send(self._message)
            runner.when_heard(self._hear)
            if runner.unsent_bytes == len(self._message):
                self._timer = self._loop.call_later(CONNECT_TIMEOUT_S, self._check_connected, runner.unsent_bytes)
        except OSError as error:
            broken = error
        self._message = b""
        self._answer = Answer()
        self._events = WholeEvents(0)
        self._lease = self._take_lease()
        self._lease.when_lost(self._hear_story)
        if broken is not None:
            self._break(broken)

    def leave(self) -> None:
        """Give up: the client has left. llama-server then stops what it still does for this request."""
        self._end(CLIENT_CLOSED_REQUEST)

    def _hear(self) -> None:
        """Take what the runner has sent, and pass it on."""
        try:
            self._take()
        except Exception:  # noqa: BLE001 - the boundary: whatever happens, the lease is given back
            _log.exception("request.failed", path=self._exchange.path)
            self._client.cut()

    def _take(self) -> None:
        assert self._runner is not None  # noqa: S101 - it was heard
        broken: OSError | None = None
        try:
            data = self._runner.read()
            if data is None:
                return
            if data:
                if self._may_go_on_as_it_is(data):
                    self._send(data, is_last=False)
                    self._wait_where_slow()
                    return
                self._answer.feed(data)
            else:
                self._answer.close()
                broken = Broken(CLOSED)
        except OSError as error:
            broken = error
        self._pass_on()
        if broken is not None:
            self._break(broken)

    def _pass_on(self) -> None:
        """Send what has come of the answer, as far as it may go on already.

        Nothing goes before there is something of the body: until then a runner's end can still be told as what it is.
        """
        answer = self._answer
        if not answer.has_head:
            return
        if answer.status == HTTPStatus.UNAUTHORIZED:
            self._fail(key_refused(self._lease.model))
            return
        if not self._is_headed:
            self._unsent_head = self._head()
        if not (answer.n_unread or answer.is_whole):
            return
        head, self._unsent_head, self._has_begun = self._unsent_head, b"", True
        piece = self._events.feed(answer.take())
        if answer.is_whole:
            piece += self._events.rest()
        self._mark(piece)
        self._send(head + self._framed(piece), is_last=answer.is_whole)
        if self._is_over:
            return
        if answer.is_whole:
            self._client.answered(keeps=self._keeps)
            self._end(answer.status)
        else:
            self._wait_where_slow()

    def _may_go_on_as_it_is(self, data: bytes) -> bool:
        """Return whether these are whole events in whole chunks, as most of a stream are: they need no parsing."""
        return (
            self._has_begun
            and self._is_chunked
            and not self._awaits_event
            and self._events.is_between
            and self._answer.is_apart(data, EVENT_END)
        )

    def _wait_where_slow(self) -> None:
        """Read no more of the answer while the client takes none."""
        if self._client.wire.unsent_bytes > MAX_UNREAD_BYTES and self._runner is not None and not self._is_over:
            self._runner.pause()
            self._client.wire.when_sent(self._go_on)

    def _head(self) -> bytes:
        """Return the head with which the client's answer begins."""
        answer = self._answer
        self._is_headed = True
        if is_stream(answer):
            learn_head(answer.n_head_bytes)
            self._events, self._awaits_event = WholeEvents(MAX_HELD_BYTES), True
        self._is_chunked = hdrs.CONTENT_LENGTH not in answer.headers and answer.status not in BODILESS
        fields = _passed_on(tuple(answer.headers.items()), self._lease.model)
        return self._headed(answer.status, answer.reason, f"{fields}{CHUNKED}" if self._is_chunked else fields)

    def _headed(self, status: int, reason: str, fields: str) -> bytes:
        own: CIMultiDict[str] = CIMultiDict()
        head_up(self._exchange, own)
        if not self._keeps:
            own[hdrs.CONNECTION] = "close"
        head = f"HTTP/1.1 {status} {reason}\r\nDate: {_date(int(time.time()))}\r\n{fields}{fields_of(own)}\r\n"
        return head.encode("utf-8", "surrogateescape")

    def _mark(self, piece: bytes) -> None:
        if piece:
            self._exchange.mark_first_byte()
            if self._awaits_event and not piece.startswith(COMMENT):
                self._exchange.mark_first_event()
                self._awaits_event = False

    def _framed(self, piece: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(piece), piece) if self._is_chunked and piece else piece

    def _send(self, data: bytes, *, is_last: bool) -> None:
        try:
            self._client.wire.send(data + LAST_CHUNK if is_last and self._is_chunked else data)
        except OSError:  # nobody is there any more
            self._client.cut()

    def _go_on(self) -> None:
        """Read on: the client has taken what there was."""
        if self._runner is not None and self._broken is None and not self._is_over:
            self._runner.when_heard(self._hear)

    # -----------------------------------------------------------------------------------------------------------------
    # How it ends otherwise

    def _hear_story(self, story: str) -> None:
        self._loop.call_soon(self._take_story, story)  # whoever tells has more to do

    def _take_story(self, story: str) -> None:
        """Give a dead runner's last bytes their time, then cut the wait for more short."""
        if self._is_over:
            return
        self._story = story
        if self._broken is not None:
            self._lose()
        else:
            self._wait(LAST_BYTES_S, lambda: self._break(Broken(CLOSED)))

    def _check_connected(self, unsent_bytes: int) -> None:
        if self._runner is not None and self._runner.unsent_bytes == unsent_bytes:
            self._break(Broken(f"it took no connection within {CONNECT_TIMEOUT_S:g} s"))

    def _break(self, error: OSError) -> None:
        """Note that nothing more will come of the runner, and wait a moment for the reason."""
        if self._is_over or self._broken is not None:
            return
        self._broken = error
        if self._runner is not None:
            self._runner.close()
        if self._story is not None:
            self._lose()
        else:
            self._wait(STORY_TIMEOUT_S, self._lose)

    def _wait(self, seconds: float, then: Callable[[], None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, then)

    def _lose(self) -> None:
        self._fail(lost(self._lease.model, self._story, self._broken or Broken(CLOSED)))

    def _fail(self, error: RunnerLost) -> None:
        """End the answer as well as it can be, so that no client takes it for a whole one."""
        exchange = self._exchange
        exchange.broken = str(error)
        told = exchange.tell(error, exchange.request_id)
        if not self._has_begun:
            self._has_begun, self._is_chunked = True, False
            headers = CIMultiDict(told.headers)
            body = told.body()
            headers[hdrs.CONTENT_TYPE], headers[hdrs.CONTENT_LENGTH] = "application/json", str(len(body))
            fields = fields_of(headers)
            self._send(self._headed(told.status, HTTPStatus(told.status).phrase, fields) + body, is_last=True)
            self._end(told.status)
        elif is_stream(self._answer):
            event = told.event()
            self._send(self._framed(event if self._events.clean else EVENT_END + event), is_last=True)
            self._end(self._answer.status)
        else:
            self._end(self._answer.status)
            self._client.cut()  # the promised length cannot be kept: a cut connection is the only honest sign
            return
        self._client.answered(keeps=self._keeps)

    def _end(self, status: int) -> None:
        if self._is_over:
            return
        self._is_over = True
        if self._timer is not None:
            self._timer.cancel()
        if self._runner is not None:
            self._runner.close()
        self._exchange.status = status
        self._when_over()
