"""The short way of plain requests: it asks and answers what the long way does, whatever comes in whatever pieces."""

from __future__ import annotations

import asyncio
import os
import re
import resource
import socket
import struct
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest
from fake_runtime import FakeRuntime, LlamaServer, Serve
from httptools import HttpParserError, HttpResponseParser
from hypothesis import given
from hypothesis import strategies as st
from raw_runner import Answer, raw_runner, read_request
from structlog.testing import capture_logs

from supervisor.api.lease import Endpoint
from supervisor.gateway.app import build_app, make_runner
from supervisor.gateway.express.ahead import ConnectionsAhead
from supervisor.gateway.express.readiness import Readiness
from supervisor.gateway.options import GatewayOptions

COMPLETIONS = "/v1/completions"
LAST = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
# What differs between any two answers, or is added by aiohttp alone.
OF_THE_MOMENT = frozenset({"date", "server", "x-request-id", "transfer-encoding", "content-length"})
BODIES = (
    b'{"model": "mock"}',
    b'{"model": "mock", "stream": true}',
    b'{"model": "MOCK", "prompt": "\xc3\xa9", "keep_alive": "1m"}',
    b'{"model": "mock", "keep_alive": "never"}',
    b'{"model": "mock", "num_ctx": -1}',
    b'{"model": "nobody"}',
    b'{"model": 1}',
    b"[]",
    b"{",
    b"",
)
FIELDS = (
    "Connection: X-Own",
    "X-Own: 1",
    "Expect: 100-continue",
    "Content-Encoding: gzip",
    "Origin: http://localhost",
    "Origin: https://evil.example",
    "Authorization: Bearer nobody",
    "X-Keep-Alive: 5m",
    "X-Keep-Alive: never",
    "X-Num-Ctx: 7",
    "X-Num-Ctx: seven",
    "X-Conversation-Id: 1",
    "X-Load-Progress: 1",
    "Accept: \u00e9",
)
# What makes a request no HTTP, or the last one of its connection.
LAST_FIELDS = (
    "Host: other.example",
    "Content-Type: multipart/form-data; boundary=x",
    "Connection: close",
    "Transfer-Encoding: chunked",
    "Content-Length: 3",
    "X-Long: " + "y" * 20_000,
    "no field",
)
PATHS = (
    COMPLETIONS,
    COMPLETIONS + "?x=1&y",
    "/v1/chat/completions",
    "/v1%2Fcompletions",
    "/v1/models",
    "/nowhere",
    "*",
)


def request(body: bytes = BODIES[0], *fields: str, start: str = f"POST {COMPLETIONS} HTTP/1.1", more: int = 0) -> bytes:
    """Return a request, whose told length may be another than its body's."""
    head = [start, "Host: localhost", "Content-Type: application/json", *fields, f"Content-Length: {len(body) + more}"]
    return "\r\n".join([*head, "", ""]).encode() + body


@st.composite
def conversations(draw: st.DrawFn) -> list[bytes]:
    """Draw what a client sends, cut anywhere: a few requests, mostly plain; or one that may be anything.

    Where anything follows a request that is the last, or is followed by what is no HTTP, aiohttp answers neither.
    """
    is_one = draw(st.booleans())
    known = FIELDS + LAST_FIELDS if is_one else FIELDS
    sent, is_last = b"", False
    for _ in range(1 if is_one else draw(st.integers(2, 3))):
        method = draw(st.sampled_from(["POST"] * 4 + ["GET", "PUT"]))
        version = draw(st.sampled_from(["1.1"] * 4 + ["1.0"])) if is_one else "1.1"
        fields = draw(st.lists(st.sampled_from(known), max_size=2, unique=True))
        body = draw(st.sampled_from(BODIES[:3] * 2 + BODIES))
        more = draw(st.sampled_from([0, 0, 0, -1])) if is_one and body else 0
        is_last = "Connection: close" in fields
        paths = PATHS[:1] * 4 + (PATHS if is_one else PATHS[:-1])
        start = f"{method} {draw(st.sampled_from(paths))} HTTP/{version}"
        sent += request(body, *fields, start=start, more=0 if is_last else more)
    sent += b"" if is_last else LAST
    cuts = sorted(draw(st.lists(st.integers(0, len(sent)), max_size=3)))
    return [sent[a:b] for a, b in zip([0, *cuts], [*cuts, len(sent)], strict=True) if a < b]


@dataclass
class Told:
    """What came back, answer by answer: status, reason, header fields, body."""

    answers: list[tuple[int, bytes, list[tuple[str, bytes]], bytes]] = field(default_factory=list)
    reason: bytes = b""
    fields: list[tuple[str, bytes]] = field(default_factory=list)
    body: bytes = b""

    def on_message_begin(self) -> None:
        self.reason, self.fields, self.body = b"", [], b""

    def on_status(self, status: bytes) -> None:
        self.reason += status

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.decode().lower() not in OF_THE_MOMENT:
            self.fields.append((name.decode().lower(), value))

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        body = re.sub(rb"req_[0-9a-f]+", b"req", self.body)
        self.answers.append((self.parser.get_status_code(), self.reason, sorted(self.fields), body))

    def read(self, data: bytes) -> Told:
        """Take all that came."""
        self.parser = HttpResponseParser(self)
        try:
            self.parser.feed_data(data)
        except HttpParserError as error:
            pytest.fail(f"{error}: {data[:500]!r}")
        return self


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer with what was asked: as events where a stream is wanted, else whole."""
    head, body = await read_request(reader)
    asked = b"\r\n".join(sorted(head.split(b"\r\n"))) + body
    if b'"stream": true' in body:
        events = b"".join(b"data: %b\n\n" % part for part in asked.split(b"\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for at in range(0, len(events), 50):
            writer.write(b"%x\r\n%b\r\n" % (len(events[at : at + 50]), events[at : at + 50]))
        writer.write(b"0\r\n\r\n")
    else:
        writer.write(b"HTTP/1.1 201 Fine\r\nContent-Type: text/plain\r\nX-Own: 1\r\nConnection: X-Own\r\n")
        writer.write(b"Access-Control-Allow-Origin: *\r\nContent-Length: %d\r\n\r\n%b" % (len(asked), asked))
    await writer.drain()
    writer.close()


async def talk(url: str, pieces: list[bytes]) -> bytes:
    """Send these pieces and return all that comes until the service closes."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0)
        return await asyncio.wait_for(reader.read(), timeout=20)
    except ConnectionError:  # it has refused what came, and has not read the rest
        return b""
    finally:
        writer.close()


async def ask_both_ways(pieces: list[bytes], answer: Answer = echo) -> tuple[Told, Told]:
    """Return what the short way and the long way make of this conversation, with a runner that answers so."""
    async with AsyncExitStack() as stack:
        endpoint: Endpoint = await stack.enter_async_context(raw_runner(answer))
        told = []
        for at_once in (True, False):
            runtime = FakeRuntime(endpoints={"mock": endpoint}, at_once=at_once)
            runner = make_runner(build_app(runtime, GatewayOptions(version="0.1.0")), shutdown_timeout_s=1)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            bound = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            await runner.listen(bound, tls=None)
            told.append(Told().read(await talk(f"http://127.0.0.1:{bound.getsockname()[1]}", pieces)))
            assert runtime.granted == runtime.released
        return told[0], told[1]


@given(conversations())
def test_the_short_way_and_the_long_way_ask_and_answer_alike(pieces: list[bytes]) -> None:
    """Whatever a client sends: the runner is asked for the same, and the client told the same, in the same order."""
    short, long = asyncio.run(ask_both_ways(pieces))
    assert short.answers == long.answers


EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
JSON = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    "answered",
    [
        [],
        [b"HTTP/1.1 200 O"],
        [b"SSH-2.0-x\r\n\r\n"],
        [EVENTS],
        [EVENTS, b"9\r\ndata: a\n\n\r\n"],
        [EVENTS, b"10\r\ndata: a\n\ndata: b\r\n"],
        [EVENTS, b"9\r\ndata: a\n\n\r\n", b"zz\r\n"],
        [EVENTS, b"0\r\n\r\n"],
        [JSON + b"Transfer-Encoding: chunked\r\n\r\n"],
        [JSON + b"\r\n", b"{}"],
        [JSON + b"Content-Length: 0\r\n\r\n"],
        [JSON + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"],
        [b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\nx"],
        [b"HTTP/1.1 204 No Content\r\n\r\n"],
        [b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 2\r\n\r\n{}"],
        [b"HTTP/1.0 500 \r\nContent-Type: application/json\r\n\r\n{}"],
    ],
    ids=repr,
)
def test_whatever_a_runner_answers_is_told_alike_and_leaves_the_connection_in_order(answered: list[bytes]) -> None:
    """It breaks off, or talks nonsense: what the client gets of it ends where it says, and the next answer follows."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        for piece in answered:
            writer.write(piece)
            await writer.drain()
        writer.close()

    short, long = asyncio.run(ask_both_ways([request(), LAST], answer))
    assert short.answers == long.answers
    assert [status for status, *_ in short.answers][-1] == 200


@pytest.mark.anyio
async def test_half_an_event_is_held_back_though_it_comes_in_whole_chunks(serve: Serve, runtime: FakeRuntime) -> None:
    """The end of its line looks like an event's end, behind the size of a chunk; then the runner is gone."""
    has_come = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(EVENTS + b"9\r\ndata: a\n\n\r\n")
        await has_come.wait()
        writer.write(b"7\r\ndata: b\r\n1\r\n\n\r\n")
        writer.close()

    async with raw_runner(answer) as endpoint:
        runtime.endpoints["mock"] = endpoint
        parts = urlsplit(await serve())
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        writer.write(request(BODIES[1]))
        await reader.readuntil(b"data: a\n\n")
        has_come.set()
        rest = await reader.readuntil(b"0\r\n\r\n")
        writer.close()
    assert (rest.count(b"data: "), rest.count(b'data: {"error"')) == (1, 1)


@pytest.mark.anyio
@pytest.mark.parametrize("last", [LAST, b""], ids=["handed over", "half closed"])
async def test_an_answer_is_sent_to_its_end_whatever_comes_meanwhile(
    serve: Serve, runtime: FakeRuntime, last: bytes
) -> None:
    """A client that reads slowly, and asks ahead for what is not plain, or says that it asks no more."""
    whole = b"x" * (4 << 20)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(JSON + b"Content-Length: %d\r\n\r\n" % len(whole) + whole)
        await writer.drain()
        writer.close()

    async with raw_runner(answer) as endpoint:
        runtime.endpoints["mock"] = endpoint
        parts = urlsplit(await serve())
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect((parts.hostname, parts.port))
            client.sendall(request())
            received = b""
            while not runtime.returned.is_set():  # until the runner has said all, of which not all is sent
                received += await asyncio.to_thread(client.recv, 1 << 14)
            client.sendall(last)
            if not last:
                client.shutdown(socket.SHUT_WR)
            while piece := await asyncio.to_thread(client.recv, 1 << 16):
                received += piece
    answers = Told().read(received).answers
    assert [(status, len(body)) for status, _, _, body in answers] == [(200, len(whole)), (200, 2)][: 2 if last else 1]


@pytest.mark.anyio
async def test_a_client_that_asked_ahead_and_was_reset_leaves_nothing_behind(
    serve: Serve, runtime: FakeRuntime
) -> None:
    """Nobody reads from it while it is answered: that it has gone is seen by writing to it."""
    gone = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(EVENTS)
        try:
            while not gone.is_set() or await reader.read(0) is not None:
                writer.write(b"9\r\ndata: a\n\n\r\n")
                await writer.drain()
                await asyncio.sleep(0)
        except ConnectionError:
            writer.close()

    async with raw_runner(answer) as endpoint:
        runtime.endpoints["mock"] = endpoint
        parts = urlsplit(await serve())
        n_files = _n_files()
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.connect((parts.hostname, parts.port))
        await asyncio.to_thread(client.sendall, request(BODIES[1]) + b"x" * (100 << 10))
        await runtime.waiting.wait()
        client.close()
        gone.set()
        await runtime.returned.wait()
        while _n_files() > n_files:  # noqa: ASYNC110 - the kernel tells nobody
            await asyncio.sleep(0)


@pytest.mark.anyio
async def test_a_client_that_asked_ahead_and_has_left_is_given_up_though_nothing_is_written_to_it(
    serve: Serve, runtime: FakeRuntime
) -> None:
    """The runner thinks, and its answer will come whole: the slot is not kept for it."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        await reader.read()  # until it is hung up on
        writer.close()

    async with raw_runner(answer) as endpoint:
        runtime.endpoints["mock"] = endpoint
        parts = urlsplit(await serve(stall_timeout_s=1))
        with socket.socket() as client:
            client.connect((parts.hostname, parts.port))
            await asyncio.to_thread(client.sendall, request() + b"x" * (100 << 10))
            await runtime.waiting.wait()
        await runtime.returned.wait()


@pytest.mark.anyio
@pytest.mark.parametrize("at_once", [True, False], ids=["short way", "long way"])
async def test_a_client_that_would_rather_speak_another_protocol_is_answered(
    serve: Serve, http: aiohttp.ClientSession, runtime: FakeRuntime
) -> None:
    """Java's own client asks so with every request (RFC 9113, 3.1: to be ignored)."""
    async with raw_runner(echo) as endpoint:
        runtime.endpoints["mock"] = endpoint
        rather = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABkAAQ"}
        async with http.post(await serve() + COMPLETIONS, json={"model": "mock"}, headers=rather) as answer:
            assert answer.status == 201


def _n_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.anyio
async def test_one_connection_serves_request_after_request_of_every_kind(
    serve: Serve, runtime: FakeRuntime, chat_server: LlamaServer
) -> None:
    """Plain ones, one that is not, and plain ones again, streamed and whole."""
    url = await serve([chat_server])
    asked = {"model": chat_server.model, "prompt": "hi", "max_tokens": 3}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) as http:
        for more in ({}, {"stream": True}, {}):
            async with http.post(url + COMPLETIONS, json=asked | more) as answer:
                assert (answer.status, bool(await answer.read())) == (200, True)
        async with http.get(f"{url}/v1/models") as listed:
            assert listed.status == 200
        async with http.post(url + COMPLETIONS, json=asked) as answer:
            assert answer.status == 200
    assert runtime.granted == 4


@pytest.mark.anyio
async def test_every_request_is_counted_and_logged_once(
    serve: Serve, http: aiohttp.ClientSession, runtime: FakeRuntime
) -> None:
    """Whether it took the short way, or was looked at there and sent the long way."""
    async with raw_runner(echo) as endpoint:
        runtime.endpoints["mock"] = endpoint
        url = await serve()
        with capture_logs() as logs:
            for model in ("mock", "nobody"):
                async with http.post(url + COMPLETIONS, json={"model": model}) as answer:
                    await answer.read()
            while not any(one.get("status") == 404 for one in logs):  # noqa: ASYNC110 - soon, and nobody is told
                await asyncio.sleep(0.001)
        async with http.get(f"{url}/metrics") as scraped:
            text = await scraped.text()
    assert [(one["model"], one["status"]) for one in logs if one["event"] == "request"] == [("mock", 201), (None, 404)]
    assert f'loadmaster_http_requests_total{{endpoint="{COMPLETIONS}",model="mock",status="201"}} 1.0' in text
    assert f'loadmaster_http_requests_total{{endpoint="{COMPLETIONS}",model="(none)",status="404"}} 1.0' in text
    assert f'loadmaster_http_requests_in_flight{{endpoint="{COMPLETIONS}"}} 0.0' in text


@pytest.mark.anyio
async def test_where_files_have_run_out_connections_wait_until_there_are_some_again(
    serve: Serve, runtime: FakeRuntime
) -> None:
    """The kernel holds who has connected; nobody is turned away."""
    async with raw_runner(echo) as endpoint:
        runtime.endpoints["mock"] = endpoint
        parts = urlsplit(await serve())
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with ExitStack() as stack:
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            with capture_logs() as logs:
                resource.setrlimit(resource.RLIMIT_NOFILE, (_take_all_files(stack, client.fileno() + 1), hard))
                stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
                await loop.sock_connect(client, (parts.hostname, parts.port))
                await loop.sock_sendall(client, request(BODIES[0], "Connection: close"))
                while not any(one["event"] == "connections.exhausted" for one in logs):  # noqa: ASYNC110 - a list
                    await asyncio.sleep(0)
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert (await loop.sock_recv(client, 100)).startswith(b"HTTP/1.1 201 Fine\r\n")


def _take_all_files(stack: ExitStack, above: int) -> int:
    """Take every number of a file below the highest in use, and return the limit that leaves none."""
    while (taken := os.open("/dev/null", os.O_RDONLY)) <= above:
        stack.callback(os.close, taken)
    stack.callback(os.close, taken)
    return taken + 1


@pytest.mark.anyio
async def test_a_client_that_asks_on_and_on_is_not_read_before_it_was_answered(
    serve: Serve, runtime: FakeRuntime
) -> None:
    """What it has sent ahead waits in the kernel, and is answered in order once the first answer is there."""
    go_on = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, body = await read_request(reader)
        await go_on.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        writer.close()

    n_asked = 40
    async with raw_runner(answer) as endpoint:
        runtime.endpoints["mock"] = endpoint
        parts = urlsplit(await serve())
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        for number in range(n_asked):
            writer.write(request(b'{"model": "mock", "prompt": "%d%b"}' % (number, b"x" * 10_000)))
        await runtime.waiting.wait()
        go_on.set()
        for number in range(n_asked):
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: (\d+)", head)
            assert length
            assert b'"prompt": "%dx' % number in await reader.readexactly(int(length[1]))
        writer.close()


@dataclass
class Counted:
    """Answers each request, and tells which connections came, and which brought requests."""

    ends_unasked: bool = False
    came: list[int] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    news: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        port = writer.get_extra_info("peername")[1]
        async with self.news:
            self.came.append(port)
            self.news.notify_all()
        if self.ends_unasked and len(self.came) == 2:
            writer.close()
            return
        try:
            await read_request(reader)
        except asyncio.IncompleteReadError:
            self.ended.set()
            raise
        self.asked.append(port)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        writer.close()

    async def wait_came(self, n: int) -> None:
        """Return once so many connections have come."""
        async with self.news:
            await self.news.wait_for(lambda: len(self.came) >= n)


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """Send a request and return its answer's body, of two bytes."""
    writer.write(request())
    await reader.readuntil(b"\r\n\r\n")
    return await reader.readexactly(2)


@pytest.mark.anyio
@pytest.mark.parametrize("ends_unasked", [False, True], ids=["it waits", "the runner has ended it"])
async def test_a_request_goes_over_a_connection_that_was_made_after_the_last_one(
    serve: Serve, runtime: FakeRuntime, *, ends_unasked: bool
) -> None:
    """Where the runner has ended it meanwhile, the request gets one of its own, and its client notices nothing."""
    runner = Counted(ends_unasked)
    async with raw_runner(runner.answer) as endpoint:
        runtime.endpoints["mock"] = endpoint
        parts = urlsplit(await serve())
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        assert await ask(reader, writer) == b"{}"
        await runner.wait_came(2)
        assert len(runner.asked) == 1
        assert await ask(reader, writer) == b"{}"
        writer.close()
        assert runner.asked[1] == runner.came[2 if ends_unasked else 1]


@pytest.mark.anyio
@pytest.mark.parametrize("stops", ["the runner", "the service"])
async def test_no_connection_waits_for_a_request_where_none_will_come(runtime: FakeRuntime, stops: str) -> None:
    """A runner would take longer to stop with one, and what the service has opened ends with it."""
    runner = Counted()
    async with raw_runner(runner.answer) as endpoint:
        runtime.endpoints["mock"] = endpoint
        gateway = make_runner(build_app(runtime, GatewayOptions(version="0.1.0")), shutdown_timeout_s=1)
        await gateway.setup()
        with socket.create_server(("127.0.0.1", 0)) as bound:
            port = bound.getsockname()[1]
            await gateway.listen(bound, tls=None)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            assert await ask(reader, writer) == b"{}"
            await runner.wait_came(2)
            if stops == "the runner":
                (tell,) = runtime.told_of_stops
                tell(endpoint.base_url)
                await runner.ended.wait()
            await gateway.cleanup()
            await runner.ended.wait()
            writer.close()


@pytest.mark.anyio
async def test_no_connection_is_made_to_a_runner_that_is_stopped_as_its_request_ends() -> None:
    """It goes with the lease of its last request, just when a connection for the next one was to be made."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        ahead = ConnectionsAhead(ready := Readiness())
        ahead.renew(urlsplit(url))
        ahead.end(url)
        await asyncio.sleep(0)
        with pytest.raises(BlockingIOError):
            listening.accept()
        ahead.renew(urlsplit(url))
        await asyncio.sleep(0)
        listening.accept()[0].close()
        ahead.close()
        ready.close()
