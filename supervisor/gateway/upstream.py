"""One request to a runner and its answer, over a connection of its own.

The parsing is llhttp's, by httptools. What an HTTP client for the world does beside it (redirects, cookies, proxies,
name resolution, a pool) is of no use on the way to a child on this machine and costs more than all the rest of a
request's way (docs/decisions/0010).
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from typing import Final
from urllib.parse import urlsplit

from httptools import HttpParserError, HttpResponseParser
from multidict import CIMultiDict

# Loopback answers within a millisecond; a listener whose backlog is full is as good as gone.
CONNECT_TIMEOUT_S: Final = 5.0
# The first begins, the second says whether it has come about: on loopback it has, unless the backlog is full.
CONNECT_CALLS: Final = 2
# Beyond this the runner has to wait until the client has read: a megabyte for every sixteen clients that stall.
MAX_UNREAD_BYTES: Final = 64 << 10
# llama-server sends some three hundred bytes; whoever sends no end of header fields is no HTTP server.
MAX_HEAD_BYTES: Final = 64 << 10
LOOPBACK: Final = "127.0.0.1"  # where our children listen
HTTP_PORT: Final = 80
HTTPS_PORT: Final = 443
FIRST_FINAL_STATUS: Final = 200  # below: an interim answer, after which the real one comes


class Broken(OSError):
    """The connection, or what came over it, is of no further use; the text says how it ended."""


class Upstream(asyncio.Protocol):
    """The connection, which sends what is unsent as soon as it is made. ``close`` has to be called in the end.

    ``status``, ``reason`` and ``headers`` are the answer's, once ``wait_head`` has returned.
    """

    def __init__(self, unsent: bytes) -> None:
        self.status = 0
        self.reason = ""
        self.headers: CIMultiDict[str] = CIMultiDict()
        self._unsent = unsent
        self._transport: asyncio.Transport | None = None
        self._parser = HttpResponseParser(self)
        self._unread: list[bytes] = []
        self._n_unread = 0
        self._n_head = 0
        self._has_head = False
        self._is_whole = False
        self._error: Broken | None = None
        self._paused = False
        self._waiter: asyncio.Future[None] | None = None

    async def wait_head(self) -> None:
        """Return once the answer's head is there. Raises ``Broken``."""
        while not self._has_head:
            await self._wait()

    async def read(self) -> bytes:
        """Return what has come of the body, as soon as there is anything; empty at its end. Raises ``Broken``."""
        while not self._unread:
            if self._is_whole:
                return b""
            await self._wait()
        data = self._unread[0] if len(self._unread) == 1 else b"".join(self._unread)
        self._unread.clear()
        self._n_unread = 0
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return data

    def close(self) -> None:
        """Give the connection up. Whoever reads from it learns that it was closed."""
        self._end("the connection was closed")
        if self._transport is not None:
            self._transport.abort()

    async def _wait(self) -> None:
        if self._error is not None:
            raise self._error
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _end(self, why: str) -> None:
        """Note that no more will come, which is an error unless the answer is whole."""
        if self._error is None and not self._is_whole:
            self._error = Broken(why)
        self._wake()

    # -----------------------------------------------------------------------------------------------------------------
    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send what is left of the request."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - a stream's
        self._transport = transport
        transport.write(self._unsent)
        self._unsent = b""

    def data_received(self, data: bytes) -> None:
        """Take what has come."""
        if not self._has_head:
            self._n_head += len(data)
        try:
            self._parser.feed_data(data)
        except HttpParserError as error:
            self._end(f"it answered what is no HTTP ({error})")
            self.close()
        if not self._has_head and self._n_head > MAX_HEAD_BYTES:
            self._end("its answer's head has no end")
            self.close()
        elif self._n_unread > MAX_UNREAD_BYTES and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """Note how it ended: an answer of no told length ends so."""
        self._transport = None
        if exc is None and self._error is None and self._has_head and not self._tells_its_length:
            self._is_whole = True
        self._end("the connection was closed" if exc is None else str(exc) or type(exc).__name__)

    @property
    def _tells_its_length(self) -> bool:
        return "Content-Length" in self.headers or "Transfer-Encoding" in self.headers

    # -----------------------------------------------------------------------------------------------------------------
    # httptools' side

    def on_status(self, status: bytes) -> None:
        """Take the reason, or a part of it."""
        self.reason += status.decode("latin-1")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header field; a chunked body's trailer is not passed on."""
        if not self._has_head:
            self.headers.add(name.decode("latin-1"), value.decode("utf-8", "surrogateescape"))

    def on_headers_complete(self) -> None:
        """Note that the head is whole, unless a better one follows."""
        self.status = self._parser.get_status_code()
        if self.status < FIRST_FINAL_STATUS:
            self.headers.clear()
            self.reason = ""
        else:
            self._has_head = True

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        self._unread.append(body)
        self._n_unread += len(body)

    def on_message_complete(self) -> None:
        """Note that the body is whole."""
        self._is_whole = self._has_head


async def send(base_url: str, path: str, headers: CIMultiDict[str], body: bytes) -> Upstream:
    """Connect and send a POST with this body; ``Upstream.wait_head`` waits for the answer. Raises OSError.

    Headers may be none of ``Host``, ``Connection`` and those that frame the body.
    """
    address = urlsplit(base_url)
    told = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head = (
        f"POST {address.path.rstrip('/')}{path} HTTP/1.1\r\nHost: {address.netloc}\r\n{told}"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    ).encode("utf-8", "surrogateescape")
    message = head + body
    loop, host = asyncio.get_running_loop(), address.hostname or ""
    if address.scheme == "http" and host == LOOPBACK:
        connected = await _connect(loop, (host, address.port or HTTP_PORT))
        # Sent at once, not when the loop comes round: of many requests that come together the runner begins the first
        # while the others are still looked at.
        upstream = Upstream(message[_sent(connected, message) :])
        await loop.create_connection(lambda: upstream, sock=connected)
    else:  # a program that is not ours, wherever the operator says that it answers
        is_secure = address.scheme == "https"
        port = address.port or (HTTPS_PORT if is_secure else HTTP_PORT)
        upstream = Upstream(message)
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await loop.create_connection(lambda: upstream, host, port, ssl=is_secure or None)
    return upstream


async def _connect(loop: asyncio.AbstractEventLoop, address: tuple[str, int]) -> socket.socket:
    """Return a socket that is connected, on loopback without a wait. Raises OSError."""
    connected = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        for _ in range(CONNECT_CALLS):
            with suppress(BlockingIOError):
                connected.connect(address)
                return connected
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await loop.sock_connect(connected, address)
    except BaseException:
        connected.close()
        raise
    return connected


def _sent(connected: socket.socket, message: bytes) -> int:
    """Return how many bytes went out at once. What keeps the others from it is told to whoever sends them."""
    with suppress(OSError):
        return connected.send(message)
    return 0
