"""Whether a child answers: asked over loopback, each time on a connection of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final
from urllib.parse import urlsplit

import anyio
from anyio.abc import SocketStream

POLL_S: Final = 0.05  # asked only after the child has said that it listens, so once is nearly always enough
POLL_PROGRAM_S: Final = 0.25  # of a program whose start takes seconds
ANSWER_WITHIN_S: Final = 5.0  # an idle thread answers within a millisecond; a machine that swaps takes its time
STATUS_LINE_BYTES: Final = 512
# Far more than the 4 KB that it tells of itself: another program may have taken its port, and talk without an end.
MAX_ANSWER_BYTES: Final = 1 << 16
NO_ANSWER: Final = (OSError, TimeoutError, anyio.EndOfStream, anyio.BrokenResourceError)

# Answered by an HTTP thread alone: a process that is stopped or whose threads all hang does not answer it.
ALIVE: Final = "/health"
# Answered by the loop that serves requests: a task of its queue (tools/server/server-context.cpp, ``get_slots``). While
# it computes a batch, llama.cpp answers it from beside (server-queue.cpp, ``yield_to_queue``); older ones do not.
WORKING: Final = "/slots"
LOADING: Final = 503
OK: Final = 200


async def wait_serving(url: str, api_key: str) -> None:
    """Return when the server at this address serves; ask for ever (whoever asks has a deadline).

    That it listens is not enough: its loop may not have begun, and a signal to end that comes before is lost
    (server-queue.cpp, ``start_loop`` sets ``running`` again). So the loop itself is asked.
    """
    while await ask(url, WORKING, api_key) in {None, LOADING}:  # noqa: ASYNC110 - another program can only be asked
        await anyio.sleep(POLL_S)


async def wait_healthy(url: str, path: str, when_it_answers: Callable[[], object]) -> None:
    """Return when this path answers 200; ask for ever. For a program that says nothing of itself.

    ``when_it_answers`` is called for each answer that says something else.
    """
    while (status := await ask(url, path)) != OK:
        if status is not None:
            when_it_answers()
        await anyio.sleep(POLL_PROGRAM_S)


async def ask(url: str, path: str, api_key: str = "", *, within_s: float = ANSWER_WITHIN_S) -> int | None:
    """Return the status that it answers with, None where it does not within this time."""
    try:
        with anyio.fail_after(within_s):
            async with _asked(url, path, api_key) as stream:
                return _status(await stream.receive(STATUS_LINE_BYTES))
    except NO_ANSWER:
        return None


async def fetch(url: str, path: str, api_key: str, *, within_s: float) -> bytes | None:
    """Return the body of its good answer, None where it gives none within this time."""
    answer = b""
    try:
        with anyio.fail_after(within_s):
            async with _asked(url, path, api_key) as stream:
                async for piece in stream:
                    answer += piece
                    if len(answer) > MAX_ANSWER_BYTES:
                        return None
    except NO_ANSWER:
        return None
    return answer.partition(b"\r\n\r\n")[2] if _status(answer) == OK else None


@asynccontextmanager
async def _asked(url: str, path: str, api_key: str) -> AsyncIterator[SocketStream]:
    """Ask on a connection of its own, and yield what the answer comes on."""
    address = urlsplit(url)
    host, port = address.hostname or "", address.port or 80
    head = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {api_key}\r\nConnection: close\r\n\r\n"
    async with await anyio.connect_tcp(host, port) as stream:
        await stream.send(head.encode())
        yield stream


def _status(answer: bytes) -> int | None:
    version, _, rest = answer.partition(b" ")
    return int(rest[:3]) if version.startswith(b"HTTP/1.") and rest[:3].isdigit() else None
