"""The way from the gateway to a runner: whatever a runner may send or not take, within bounds."""

from __future__ import annotations

import asyncio
import io
import re
import socket
from contextlib import ExitStack
from dataclasses import replace
from urllib.parse import urlsplit

import aiohttp
import pytest
from fake_runtime import FakeRuntime, Serve
from raw_runner import raw_runner, read_request

from supervisor.api.lease import Endpoint

# Whether a request takes the short way or the long one, the same comes of it.
pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("at_once", [True, False], ids=["short way", "long way"])]

MIB = 1 << 20
PIECE = b"data: " + b"x" * 16_000 + b"\n\n"
# What the kernel holds for two connections on loopback, and we for one.
MAX_UNDER_WAY = 32 * MIB
# A runner that may write on does so within microseconds.
HELD_BACK_AFTER_S = 1.0


async def test_what_comes_before_the_final_answer_is_skipped(
    serve: Serve, http: aiohttp.ClientSession, runtime: FakeRuntime
) -> None:
    """An interim answer (RFC 9110, 15.2) has a head of its own, which is not the answer's."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n")
        writer.write(b"HTTP/1.1 201 Made\r\nContent-Length: 2\r\nX-Own: 1\r\n\r\n{}")
        writer.close()

    async with raw_runner(answer) as endpoint:
        runtime.endpoints["mock"] = endpoint
        url = await serve()
        async with http.post(f"{url}/v1/completions", json={"model": "mock"}) as response:
            assert (response.status, response.reason, await response.read()) == (201, "Made", b"{}")
            assert "X-Own" in response.headers
            assert "Link" not in response.headers


async def test_a_head_without_end_is_a_bad_gateway(
    serve: Serve, http: aiohttp.ClientSession, runtime: FakeRuntime
) -> None:
    """The runner writes header fields until it is hung up on."""
    hung_up = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n")
        try:
            while True:
                writer.write(b"X-More: " + b"y" * 1000 + b"\r\n")
                await writer.drain()
        except ConnectionError:
            hung_up.set()

    async with raw_runner(answer) as endpoint:
        runtime.endpoints["mock"] = endpoint
        url = await serve()
        async with http.post(f"{url}/v1/completions", json={"model": "mock"}) as response:
            assert response.status == 502
            assert "head has no end" in (await response.json())["error"]["message"]
        await hung_up.wait()


async def test_a_large_body_arrives_whole(serve: Serve, http: aiohttp.ClientSession, runtime: FakeRuntime) -> None:
    """Far more than a socket takes at once."""
    body = b'{"model": "mock", "prompt": "' + b"p" * (8 * MIB) + b'"}'
    seen: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append((await read_request(reader))[1])
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        writer.close()

    async with raw_runner(answer) as endpoint:
        runtime.endpoints["mock"] = endpoint
        url = await serve()
        async with http.post(f"{url}/v1/completions", data=io.BytesIO(body)) as response:
            assert response.status == 200
    assert seen == [body]


async def test_a_runner_waits_for_a_client_that_does_not_read(
    serve: Serve, http: aiohttp.ClientSession, runtime: FakeRuntime
) -> None:
    """What the client does not take does not pile up here; once it reads, nothing is missing."""
    held_back, n_sent = asyncio.Event(), 0
    n_pieces = 2 * MAX_UNDER_WAY // len(PIECE)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal n_sent
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        for _ in range(n_pieces):
            writer.write(PIECE)
            n_sent += len(PIECE)
            drained = asyncio.ensure_future(writer.drain())
            if not (await asyncio.wait({drained}, timeout=HELD_BACK_AFTER_S))[0]:
                held_back.set()
            await drained
        writer.close()

    async with raw_runner(answer) as endpoint:
        runtime.endpoints["mock"] = endpoint
        url = await serve()
        async with http.post(f"{url}/v1/completions", json={"model": "mock", "stream": True}) as response:
            await held_back.wait()
            assert n_sent < MAX_UNDER_WAY
            assert len(await response.read()) == n_pieces * len(PIECE)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
async def test_a_runner_is_found_by_name_and_below_a_path(
    serve: Serve, http: aiohttp.ClientSession, runtime: FakeRuntime, host: str
) -> None:
    """A program that is not ours answers where the operator says that it does."""
    lines: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head, _ = await read_request(reader)
        lines.append(head.split(b"\r\n")[0])
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        writer.close()

    async with raw_runner(answer) as endpoint:
        port = re.sub(r".*:", "", endpoint.base_url)
        runtime.endpoints["mock"] = replace(endpoint, base_url=f"http://{host}:{port}/engine/")
        url = await serve()
        async with http.post(f"{url}/v1/completions", json={"model": "mock"}) as response:
            assert response.status == 200
    assert lines == [b"POST /engine/v1/completions HTTP/1.1"]


async def test_nobody_at_the_runners_address_is_a_bad_gateway(
    serve: Serve, http: aiohttp.ClientSession, runtime: FakeRuntime
) -> None:
    with socket.socket() as taken:  # bound, and not listened on
        taken.bind(("127.0.0.1", 0))
        runtime.endpoints["mock"] = Endpoint(f"http://127.0.0.1:{taken.getsockname()[1]}", "runner-key")
        url = await serve()
        async with http.post(f"{url}/v1/completions", json={"model": "mock"}) as response:
            assert response.status == 502
            assert "Connection refused" in (await response.json())["error"]["message"]


async def test_a_runner_whose_backlog_is_full_is_waited_for(
    serve: Serve, http: aiohttp.ClientSession, runtime: FakeRuntime
) -> None:
    """The kernel lets nobody in until the program accepts; then the request goes through as any other."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        with socket.create_connection(listener.getsockname()) as first:
            runtime.endpoints["mock"] = Endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}", "runner-key")
            url = await serve()
            asked = asyncio.ensure_future(http.post(f"{url}/v1/completions", json={"model": "mock"}))
            await runtime.waiting.wait()
            await asyncio.to_thread(_answer_second, listener)
            assert first.getsockname()
            async with await asked as response:
                assert response.status == 200


def _answer_second(listener: socket.socket) -> None:
    listener.accept()[0].close()
    connection, _ = listener.accept()
    with connection:
        received = b""
        while b"\r\n\r\n" not in received:
            received += connection.recv(MIB)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")


async def test_a_loss_heard_of_while_connecting_ends_the_wait(
    serve: Serve, http: aiohttp.ClientSession, runtime: FakeRuntime
) -> None:
    """The connection comes about later than its runner's end is told, and whoever holds the socket says nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        with socket.create_connection(listener.getsockname()):
            runtime.endpoints["mock"] = Endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}", "runner-key")
            runtime.loss.set_result("it was swept away")
            url = await serve()
            asked = asyncio.ensure_future(http.post(f"{url}/v1/completions", json={"model": "mock"}))
            await runtime.waiting.wait()
            holding = asyncio.ensure_future(_hold_two(listener))
            async with await asked as response:
                assert response.status == 502
                assert "it was swept away" in (await response.json())["error"]["message"]
            holding.cancel()
            await asyncio.wait({holding})


async def _hold_two(listener: socket.socket) -> None:
    """Accept what filled the backlog, then what was turned away, where the kernel tries it again; say nothing."""
    listener.setblocking(False)
    loop = asyncio.get_running_loop()
    with ExitStack() as held:
        for _ in range(2):
            held.enter_context((await loop.sock_accept(listener))[0])
        await asyncio.Future()


async def test_a_client_that_reads_nothing_is_cut_off_though_the_kernel_takes_all_there_is_for_it(
    serve: Serve, runtime: FakeRuntime
) -> None:
    """The runner goes on with its answer, but slowly: the slot would be taken for as long as the kernel has room."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + b"data: x\n\n" * (256 << 10))
        await reader.read()
        writer.close()

    async with raw_runner(answer) as endpoint:
        runtime.endpoints["tiny"] = endpoint
        parts = urlsplit(await serve(stall_timeout_s=0.2))
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect((parts.hostname, parts.port))
            body = b'{"model": "tiny", "stream": true}'
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n")
            client.sendall(b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
            await asyncio.wait_for(runtime.returned.wait(), timeout=30)
