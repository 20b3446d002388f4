"""Tells a client that waits for a model how far its load is, in the stream that it asked for.

Only clients that ask are told, by the header ``X-Load-Progress: 1``: the first word sent makes the status 200, so
whatever goes wrong afterwards can only be told in the stream. Told is in comments, which event stream readers skip.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from typing import Final

from aiohttp import hdrs, web

from supervisor.api.lease import Lease
from supervisor.api.runtime import LoadProgress, Runtime
from supervisor.gateway.events import sse_comment
from supervisor.gateway.exchange import EXCHANGE
from supervisor.gateway.proxy import SSE_CONTENT_TYPE, name_model

PROGRESS_HEADER: Final = "X-Load-Progress"
WANTED: Final = frozenset({"1", "true", "yes"})
# A model that is loaded answers sooner; nobody wants to be told of that as of a load.
FIRST_AFTER_S: Final = 0.5
EVERY_S: Final = 1.0
QUEUED: Final = "queued"


def wants_progress(request: web.Request) -> bool:
    """Say whether this request, for a stream, asked to be told how far the load is."""
    return bool(request[EXCHANGE].stream) and request.headers.get(PROGRESS_HEADER, "").lower() in WANTED


@asynccontextmanager
async def progress_told(
    request: web.Request, runtime: Runtime, model: str, acquiring: AbstractAsyncContextManager[Lease]
) -> AsyncIterator[Lease]:
    """Acquire the lease, and tell the load's progress until it is there."""
    async with AsyncExitStack() as stack:
        async with _telling(request, runtime, model):
            lease = await stack.enter_async_context(acquiring)
        yield lease


@asynccontextmanager
async def _telling(request: web.Request, runtime: Runtime, model: str) -> AsyncIterator[None]:
    granted = asyncio.Event()
    telling = asyncio.create_task(_tell(request, runtime, model, granted))
    try:
        yield
    except asyncio.CancelledError:  # the client has left: nothing more can be told
        telling.cancel()
        raise
    finally:
        granted.set()
        with suppress(asyncio.CancelledError):
            await telling


async def _tell(request: web.Request, runtime: Runtime, model: str, granted: asyncio.Event) -> None:
    exchange, began_s = request[EXCHANGE], time.monotonic()
    pause_s = FIRST_AFTER_S
    while not await _set_within(granted, pause_s):
        if exchange.begun is None:
            head = {hdrs.CONTENT_TYPE: SSE_CONTENT_TYPE, hdrs.CACHE_CONTROL: "no-cache"}
            response = web.StreamResponse(headers=head)
            name_model(response.headers, model)
            with suppress(ConnectionError):
                await response.prepare(request)
            exchange.begun = response
        told = runtime.progress(model) or LoadProgress(QUEUED, None, time.monotonic() - began_s)
        with suppress(ConnectionError):  # whoever waits for the lease is cancelled for it
            await exchange.begun.write(sse_comment(b"load-progress " + _as_json(told)))
        pause_s = EVERY_S


async def _set_within(event: asyncio.Event, seconds: float) -> bool:
    with suppress(TimeoutError):
        return await asyncio.wait_for(event.wait(), seconds)
    return False


def _as_json(told: LoadProgress) -> bytes:
    fraction = None if told.fraction is None else round(told.fraction, 3)
    return json.dumps({"stage": told.stage, "fraction": fraction, "waited_s": round(told.waited_s, 1)}).encode()
