"""Heads of answers come without waking anybody; whatever else comes is told, however short it is."""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import Iterator

import aiohttp
import pytest
from fake_runtime import FakeRuntime, Serve
from raw_runner import raw_runner, read_request

from supervisor.gateway.quiet import Quiet, learn_head

pytestmark = pytest.mark.anyio

HEAD_BYTES = 300


@pytest.fixture
def connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yield both ends of a connection over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        ours = socket.create_connection(listening.getsockname())
        theirs, _ = listening.accept()
        with ours, theirs:
            yield ours, theirs


@pytest.fixture(autouse=True)
def learned() -> Iterator[None]:
    """Know how long heads are, and forget it again."""
    learn_head(HEAD_BYTES)
    yield
    learn_head(0)


def is_ready(ours: socket.socket, within_s: float) -> bool:
    """Say whether there is something to be read."""
    return bool(select.select([ours], [], [], within_s)[0])


async def test_a_head_alone_is_kept_and_the_first_byte_after_it_is_told(
    connected: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = connected
    quiet = Quiet(ours)
    theirs.sendall(b"h" * HEAD_BYTES)
    assert not is_ready(ours, 0.0)
    theirs.sendall(b"b")
    assert is_ready(ours, 5.0)
    quiet.end()


async def test_the_end_of_a_connection_is_told_though_less_has_come(
    connected: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = connected
    quiet = Quiet(ours)
    theirs.sendall(b"h")
    theirs.shutdown(socket.SHUT_WR)
    assert is_ready(ours, 5.0)
    quiet.end()


async def test_what_has_come_is_told_once_the_quiet_ends(connected: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = connected
    quiet = Quiet(ours)
    theirs.sendall(b"h")
    assert not is_ready(ours, 0.0)
    quiet.end()
    quiet.end()
    assert is_ready(ours, 5.0)


@pytest.mark.parametrize("at_once", [True, False], ids=["short way", "long way"])
async def test_a_stream_that_begins_shorter_than_others_did_is_passed_on_while_it_goes_on(
    serve: Serve, runtime: FakeRuntime, http: aiohttp.ClientSession
) -> None:
    """A program of another kind has shorter heads and events; nothing of it is held back for good."""
    read = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: a\n\n")
        await read.wait()
        writer.close()

    async with raw_runner(answer) as endpoint:
        runtime.endpoints["mock"] = endpoint
        async with http.post(f"{await serve()}/v1/completions", json={"model": "mock", "stream": True}) as response:
            assert await response.content.readline() == b"data: a\n"
            read.set()
