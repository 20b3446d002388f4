"""Whether a child answers: ``GET /health`` on loopback, until it says 200."""

from __future__ import annotations

from typing import Final
from urllib.parse import urlsplit

import anyio

POLL_S: Final = 0.05  # asked only after the child has said that it listens, so once is nearly always enough
ANSWER_WITHIN_S: Final = 5.0
STATUS_LINE_BYTES: Final = 512


async def wait_healthy(url: str) -> None:
    """Return when the server at this address answers 200; ask for ever (whoever asks has a deadline)."""
    while not await is_healthy(url):  # noqa: ASYNC110 - the one thing that another program can only be asked
        await anyio.sleep(POLL_S)


async def is_healthy(url: str) -> bool:
    """Say whether the server answers 200 within a few seconds."""
    address = urlsplit(url)
    host, port = address.hostname or "", address.port or 80
    try:
        with anyio.fail_after(ANSWER_WITHIN_S):
            async with await anyio.connect_tcp(host, port) as stream:
                await stream.send(f"GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
                answer = await stream.receive(STATUS_LINE_BYTES)
    except (OSError, TimeoutError, anyio.EndOfStream, anyio.BrokenResourceError):
        return False
    return answer.startswith((b"HTTP/1.1 200 ", b"HTTP/1.0 200 "))
