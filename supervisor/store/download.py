"""Fill a partial blob over HTTP: parts at once, each tried again after a break, with longer and longer pauses."""

from __future__ import annotations

import functools
import re
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from typing import Final

import aiohttp
import anyio

from supervisor.api.store import RegistryFailed
from supervisor.store.fetching import Transient
from supervisor.store.partial import Partial

STREAMS: Final = 8  # of one pull; more gain nothing on a line, and cost its servers
MAX_TRIES: Final = 6  # without a byte in between; with the pauses about half a minute, as Ollama's
FIRST_PAUSE_S: Final = 0.5
WRITTEN_AT_ONCE_BYTES: Final = 1 << 20  # of which a killed process loses at most one for each stream
_PARTIAL_CONTENT: Final = 206
_CONTENT_RANGE: Final = re.compile(r"bytes (\d{1,20})-(\d{1,20})/(\d{1,20})", re.ASCII)

# Asks for a span of bytes, as the Range header has it.
Source = Callable[[str], AbstractAsyncContextManager[aiohttp.ClientResponse]]


class _NoRanges(Exception):
    """The server sends everything whatever was asked for."""


async def together(jobs: Iterable[Callable[[], Awaitable[None]]]) -> None:
    """Do all at once. Where one fails the others are cancelled, and its error is raised, by itself."""
    failed: list[Exception] = []

    async def one(job: Callable[[], Awaitable[None]]) -> None:
        try:
            await job()
        except Exception as error:  # noqa: BLE001 - raised below
            failed.append(error)
            tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        for job in jobs:
            tasks.start_soon(one, job)
    if failed:
        raise failed[0]


async def fill(partial: Partial, source: Source, streams: anyio.CapacityLimiter, moved: Callable[[], None]) -> None:
    """Return once every byte is there. ``moved`` is called whenever more are. Raises RegistryFailed, OSError."""

    async def one(part: int) -> None:
        async with streams:
            await _fill_part(partial, part, source, moved)

    def missing() -> list[Callable[[], Awaitable[None]]]:
        return [functools.partial(one, part) for part in range(len(partial.done)) if _left(partial, part)]

    try:
        await together(missing())
    except _NoRanges:
        partial.restart(in_one=True)
        await together(missing())


async def _fill_part(partial: Partial, part: int, source: Source, moved: Callable[[], None]) -> None:
    tries = 0
    while _left(partial, part):
        before = partial.done[part]
        try:
            await _stream(partial, part, source, moved)
        except Transient as error:
            tries = 1 if partial.done[part] != before else tries + 1
            if tries >= MAX_TRIES:
                raise RegistryFailed(f"{error}; given up after {tries} tries: what came is kept, pull again") from error
            await anyio.sleep(FIRST_PAUSE_S * 2 ** (tries - 1))


async def _stream(partial: Partial, part: int, source: Source, moved: Callable[[], None]) -> None:
    """Take what one request brings. Raises Transient, RegistryFailed, OSError, _NoRanges."""
    first, end = partial.span(part)
    async with source(f"bytes={first}-{end - 1}") as response:
        if response.status == _PARTIAL_CONTENT:
            _check_range(response, first, partial.total_bytes)
        elif len(partial.done) > 1:
            raise _NoRanges
        else:
            partial.restart(in_one=True)
        waiting = bytearray()
        try:
            async for data in response.content.iter_any():
                waiting += data
                if len(waiting) > _left(partial, part):
                    waiting.clear()
                    raise RegistryFailed(f"{response.url.host} sends more bytes than were asked for")
                if len(waiting) >= WRITTEN_AT_ONCE_BYTES:
                    written, waiting = waiting, bytearray()
                    await partial.write(part, written)
                    moved()
        finally:
            with anyio.CancelScope(shield=True):
                await partial.write(part, waiting)
        moved()
    if _left(partial, part):
        raise Transient(f"{response.url.host} ended early")


def _left(partial: Partial, part: int) -> int:
    first, end = partial.span(part)
    return end - first


def _check_range(response: aiohttp.ClientResponse, first: int, total_bytes: int) -> None:
    found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if found is None or int(found[1]) != first or int(found[3]) != total_bytes:
        given = response.headers.get("Content-Range", "no range")
        raise RegistryFailed(f"{response.url.host} answers with {given}, of a blob of {total_bytes} bytes")
