"""A scripted runner: what llama-server does only when it breaks, and what other programs may do."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from supervisor.api.lease import Endpoint

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def raw_runner(answer: Answer) -> AsyncIterator[Endpoint]:
    """Serve one scripted answer per connection; those that were made ahead for a request to come get none."""
    taken: set[asyncio.StreamWriter] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        taken.add(writer)
        try:
            await answer(reader, writer)
        except asyncio.IncompleteReadError as error:
            writer.close()
            if error.partial:
                raise
        finally:
            taken.discard(writer)

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        yield Endpoint(f"http://{host}:{port}", "runner-key")
    for writer in tuple(taken):
        writer.close()


async def read_request(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Return head and body of a request with a Content-Length."""
    head = await reader.readuntil(b"\r\n\r\n")
    found = re.search(rb"(?i)content-length: (\d+)", head)
    assert found
    return head, await reader.readexactly(int(found[1]))
