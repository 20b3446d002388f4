"""What goes through the gateway arrives untouched; what breaks on the way is told."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from typing import Any

import aiohttp
import openai
import pytest
from fake_runtime import FakeRuntime, LlamaServer, Serve
from raw_runner import raw_runner, read_request
from yarl import URL

from supervisor.api.lease import Endpoint

# Whether a request takes the short way or the long one, the same comes of it.
pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("at_once", [True, False], ids=["short way", "long way"])]

HELLO = {"role": "user", "content": "hi"}
# What differs from one answer of llama-server to its next.
VARYING = re.compile(rb'"created":\d+|"id":"chatcmpl-[^"]*"|"timings":\{[^}]*\}|"cached_tokens":\d+')


def chat(model: str, **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [HELLO], "temperature": 0, "cache_prompt": False, **fields}


async def send(http: aiohttp.ClientSession, url: str, body: object, key: str = "none") -> tuple[int, str, bytes]:
    async with http.post(url, json=body, headers={"Authorization": f"Bearer {key}"}) as answer:
        return answer.status, answer.headers["Content-Type"], VARYING.sub(b"", await answer.read())


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"stream": True},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"max_tokens": -7, "messages": 3},
    ],
)
async def test_an_answer_is_byte_for_byte_the_runners(
    serve: Serve, http: aiohttp.ClientSession, chat_server: LlamaServer, fields: dict[str, Any]
) -> None:
    """Whole, streamed, with usage, and refused by the runner: the same bytes with the same status."""
    url = await serve([chat_server])
    body = chat(chat_server.model, **fields)
    endpoint = chat_server.endpoint
    direct = await send(http, f"{endpoint.base_url}/v1/chat/completions", body, endpoint.api_key)
    through = await send(http, f"{url}/v1/chat/completions", body)
    assert through == direct


async def test_embeddings_and_ranks_are_passed_through_too(
    serve: Serve, http: aiohttp.ClientSession, embedding_server: LlamaServer, rerank_server: LlamaServer
) -> None:
    """Every role has its endpoints, under llama-server's own paths."""
    url = await serve([embedding_server, rerank_server])
    wanted = [
        (embedding_server, "/v1/embeddings", {"input": ["hello", "tiny model"]}),
        *(
            (rerank_server, path, {"query": "hello", "documents": ["tiny", "model"]})
            for path in ("/v1/rerank", "/rerank")
        ),
    ]
    for server, path, fields in wanted:
        body = {"model": server.model, **fields}
        direct = await send(http, server.endpoint.base_url + path, body, server.endpoint.api_key)
        assert await send(http, url + path, body) == direct
        assert direct[0] == 200


async def test_the_openai_package_works_against_it(serve: Serve, chat_server: LlamaServer) -> None:
    """Listing, answering and streaming, with the client that most programs use."""
    url = await serve([chat_server], api_keys=("secret",))
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="secret") as client:
        assert [model.id async for model in client.models.list()] == [chat_server.model]
        assert (await client.models.retrieve(chat_server.model)).owned_by == "loadmaster"
        whole = await client.chat.completions.create(model=chat_server.model, messages=[HELLO])
        stream = await client.chat.completions.create(model=chat_server.model, messages=[HELLO], stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
        assert text == whole.choices[0].message.content
        assert text.startswith("Hello!")
        with pytest.raises(openai.NotFoundError) as unknown:
            await client.chat.completions.create(model="nobody", messages=[HELLO])
    assert unknown.value.body["closest"] == [chat_server.model]  # type: ignore[index]


async def test_an_answer_says_which_model_and_which_request_it_was(
    serve: Serve, http: aiohttp.ClientSession, chat_server: LlamaServer
) -> None:
    url = await serve([chat_server])
    async with http.post(f"{url}/v1/chat/completions", json=chat(chat_server.model)) as answer:
        assert answer.status == 200
        assert answer.headers["X-Loadmaster-Model"] == chat_server.model
        assert answer.headers["X-Request-Id"].startswith("req_")


async def test_a_killed_runner_ends_the_stream_with_an_error_event(
    serve: Serve, http: aiohttp.ClientSession, endless_server: LlamaServer
) -> None:
    """The body is terminated properly, its last event tells the story, and nothing claims that it was done."""
    url = await serve([endless_server])
    received = b""
    async with http.post(f"{url}/v1/chat/completions", json=chat(endless_server.model, stream=True)) as answer:
        async for chunk in answer.content.iter_any():
            if not received:
                endless_server.process.kill()
            received += chunk
    events = [event for event in received.split(b"\n\n") if event]
    error = json.loads(events[-1].removeprefix(b"data: "))["error"]
    assert "killed by SIGKILL" in error["message"]
    assert error["code"] == "runner_lost"
    assert b"[DONE]" not in received
    assert received.endswith(b"\n\n")
    async with http.get(f"{url}/metrics") as metrics:
        assert f'broken_streams_total{{model="{endless_server.model}"}} 1.0' in await metrics.text()


async def test_the_openai_package_raises_on_a_broken_stream(serve: Serve, endless_server: LlamaServer) -> None:
    """A client that knows nothing of us sees an error, not a short answer."""
    url = await serve([endless_server])
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        stream = await client.chat.completions.create(model=endless_server.model, messages=[HELLO], stream=True)
        await anext(stream)
        endless_server.process.kill()
        with pytest.raises(openai.APIError, match="killed by SIGKILL"):
            [chunk async for chunk in stream]


async def recorded(http: aiohttp.ClientSession, server: LlamaServer) -> bytes:
    """Return the bytes of a whole streamed answer, from the server itself."""
    headers = {"Authorization": f"Bearer {server.endpoint.api_key}"}
    body = chat(server.model, stream=True)
    async with http.post(f"{server.endpoint.base_url}/v1/chat/completions", json=body, headers=headers) as answer:
        return await answer.read()


@pytest.mark.parametrize("into", [0, 1, 5, 6, 7, 40, -1])
async def test_a_stream_cut_within_an_event_shows_the_openai_package_our_error(
    serve: Serve, http: aiohttp.ClientSession, chat_server: LlamaServer, runtime: FakeRuntime, into: int
) -> None:
    """Real events, the last of them cut so many bytes after its beginning: the client never sees the half."""
    events = (await recorded(http, chat_server)).split(b"\n\n")
    sent = b"\n\n".join([*events[:3], (events[3] + b"\n\n")[:into]])

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        writer.write(head + b"%x\r\n%s\r\n" % (len(sent), sent))
        runtime.loss.set_result("it was killed by SIGKILL")
        writer.close()

    async with raw_runner(answer) as endpoint:
        runtime.endpoints["mock"] = endpoint
        async with openai.AsyncOpenAI(base_url=f"{await serve()}/v1", api_key="none", max_retries=0) as client:
            stream = await client.chat.completions.create(model="mock", messages=[HELLO], stream=True)
            seen = [await anext(stream) for _ in range(3)]
            with pytest.raises(openai.APIError, match="killed by SIGKILL"):
                await anext(stream)
    assert seen[2].choices


async def test_a_runner_killed_before_its_first_byte_is_a_bad_gateway(
    serve: Serve, http: aiohttp.ClientSession, endless_server: LlamaServer
) -> None:
    """Nothing was sent yet, so the client gets a status that it can act upon."""
    url = await serve([endless_server])
    request = asyncio.ensure_future(http.post(f"{url}/v1/chat/completions", json=chat(endless_server.model)))
    await until_busy(endless_server)
    endless_server.process.kill()
    answer = await request
    assert answer.status == 502
    assert answer.headers["Retry-After"] == "1"
    assert "killed by SIGKILL" in (await answer.json())["error"]["message"]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_stops_its_generation(
    serve: Serve, http: aiohttp.ClientSession, endless_server: LlamaServer, runtime: FakeRuntime, *, stream: bool
) -> None:
    """llama-server itself says that it has stopped, and the lease came back exactly once."""
    url = await serve([endless_server])
    headers = {"X-Conversation-Id": "keeps-running-if-forwarded"}
    body = chat(endless_server.model, stream=stream)
    request = asyncio.ensure_future(http.post(f"{url}/v1/chat/completions", json=body, headers=headers))
    await until_busy(endless_server)
    if stream:
        answer = await request
        await answer.content.readany()
        answer.close()
    else:
        request.cancel()
    await runtime.returned.wait()
    await endless_server.wait_log(b"cancel task")
    await endless_server.wait_log(b"all slots are idle")
    assert (runtime.granted, runtime.released) == (1, 1)


async def test_a_client_that_leaves_while_it_is_written_to_is_no_error_in_the_log(
    serve: Serve, runtime: FakeRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    """The runner's next event and the client's end come in one turn of the loop, in this order."""
    got_it = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\ndata: 0\n\n")
        await got_it.wait()
        writer.write(b"data: 1\n\n")
        client.close()
        await runtime.returned.wait()
        writer.close()

    async with raw_runner(answer) as endpoint:
        runtime.endpoints["mock"] = endpoint
        url = URL(await serve())
        client = socket.create_connection((url.host or "", url.port or 0))
        client.setblocking(False)
        body = b'{"model": "mock", "stream": true}'
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(client, head + body)
        while b"data: 0" not in await loop.sock_recv(client, 4096):
            pass
        got_it.set()
        await runtime.returned.wait()
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


async def test_the_first_token_is_timed_where_it_is_streamed_and_not_what_bridges_the_wait_for_it(
    serve: Serve, http: aiohttp.ClientSession, runtime: FakeRuntime
) -> None:
    """llama-server sends a comment every thirty seconds of a long prompt; each number here is one answer more."""
    sent_on = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, body = await read_request(reader)
        kind = "text/event-stream" if b"true" in body else "application/json"
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nConnection: close\r\n\r\n" % kind.encode())
        writer.write(b":\n\n" if b"true" in body else b"{}")
        if b"event" in body and b"true" in body:
            await sent_on.wait()
            writer.write(b"data: 1\n\n")
        writer.close()

    async def counted() -> str:
        async with http.get(f"{url}/metrics") as metrics:
            found = re.search(r'first_token_seconds_count{model="mock"} (\S+)', await metrics.text())
            return found[1] if found else "none"

    async with raw_runner(answer) as endpoint:
        runtime.endpoints["mock"] = endpoint
        url = await serve()
        for asked in ({"prompt": "event"}, {"stream": True, "prompt": "only comments"}):
            async with http.post(f"{url}/v1/completions", json={"model": "mock", **asked}) as whole:
                await whole.read()
            assert await counted() == "none"
        body = {"model": "mock", "stream": True, "prompt": "event"}
        async with http.post(f"{url}/v1/completions", json=body) as streamed:
            assert await streamed.content.readany() == b":\n\n"
            sent_on.set()
            assert await streamed.content.read() == b"data: 1\n\n"
        assert await counted() == "1.0"


async def until_busy(server: LlamaServer) -> None:
    """Return once the server has begun to generate; each question is a request that takes its time."""
    while not await server.busy_slots():
        pass


async def test_the_body_goes_on_as_it_came_and_the_headers_are_ours_where_they_must_be(
    serve: Serve, http: aiohttp.ClientSession, runtime: FakeRuntime
) -> None:
    """Odd spacing, escapes and duplicates survive; keys, hop-by-hop headers and the conversation id do not."""
    seen: list[tuple[bytes, bytes]] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await read_request(reader))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-Odd: kept\r\nKeep-Alive: timeout=5\r\n\r\nok")
        writer.close()

    raw = b'{ "model":\t"nobody", "model" : "m\\u006fck",\n"content":"\\ud83d\\ude00\xc3\xa9", "n": 1.0e0 }'
    headers = {
        "Authorization": "Bearer client-key",
        "X-Api-Key": "client-key",
        "X-Conversation-Id": "7",
        "Connection": "X-Hop",
        "X-Hop": "one hop",
        "X-Kept": "yes",
    }
    async with raw_runner(answer) as endpoint:
        runtime.endpoints["mock"] = endpoint
        url = await serve(api_keys=("client-key",))
        async with http.post(
            URL(f"{url}/v1/completions?a=%2F&b=+", encoded=True), data=raw, headers=headers
        ) as response:
            assert await response.read() == b"ok"
            assert response.headers["X-Odd"] == "kept"
            assert "Keep-Alive" not in response.headers
    [(head, body)] = seen
    assert body == raw
    assert head.startswith(b"POST /v1/completions?a=%2F&b=+ HTTP/1.1\r\n")
    names = {line.partition(b":")[0].lower() for line in head.split(b"\r\n")[1:]}
    assert b"Authorization: Bearer runner-key\r\n" in head
    assert b"client-key" not in head
    assert names.isdisjoint({b"x-api-key", b"x-conversation-id", b"x-hop"})
    assert b"x-kept" in names


async def test_each_chunk_comes_as_soon_as_the_runner_sends_it(
    serve: Serve, http: aiohttp.ClientSession, runtime: FakeRuntime
) -> None:
    """The runner sends its next event only after the client has the one before: buffering would hang this test."""
    got_it = asyncio.Semaphore(0)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        for number in range(3):
            writer.write(b"data: %d\n\n" % number)
            await got_it.acquire()
        writer.close()

    async with raw_runner(answer) as endpoint:
        runtime.endpoints["mock"] = endpoint
        url = await serve()
        async with http.post(f"{url}/v1/completions", json={"model": "mock", "stream": True}) as response:
            for number in range(3):
                assert await response.content.readexactly(9) == b"data: %d\n\n" % number
                got_it.release()
            assert await response.content.read() == b""


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n", b"nonsense\r\n\r\n"])
async def test_a_runner_that_sends_nothing_usable_is_a_bad_gateway(
    serve: Serve, http: aiohttp.ClientSession, runtime: FakeRuntime, sent: bytes
) -> None:
    """No answer, headers alone, or no HTTP at all."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(sent)
        writer.close()

    async with raw_runner(answer) as endpoint:
        runtime.endpoints["mock"] = endpoint
        url = await serve()
        async with http.post(f"{url}/v1/completions", json={"model": "mock"}) as response:
            assert response.status == 502
            assert "the runner of mock was lost" in (await response.json())["error"]["message"]


async def test_a_whole_answer_that_breaks_off_is_cut_off_for_the_client_too(
    serve: Serve, http: aiohttp.ClientSession, runtime: FakeRuntime
) -> None:
    """Half a JSON object must not look like an answer."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"half":')
        writer.close()

    async with raw_runner(answer) as endpoint:
        runtime.endpoints["mock"] = endpoint
        url = await serve()
        with pytest.raises(aiohttp.ClientError):
            async with http.post(f"{url}/v1/completions", json={"model": "mock"}) as response:
                await response.read()


async def test_another_program_on_the_runners_port_is_no_authentication_error(
    serve: Serve, http: aiohttp.ClientSession, chat_server: LlamaServer, runtime: FakeRuntime
) -> None:
    """The client's key was right; that the runner refuses ours is not the client's fault."""
    runtime.endpoints["mock"] = Endpoint(chat_server.endpoint.base_url, "wrong")
    url = await serve()
    async with http.post(f"{url}/v1/chat/completions", json=chat("mock")) as response:
        assert response.status == 502
        assert "refused its own key" in (await response.json())["error"]["message"]


@pytest.mark.parametrize("begun", [False, True])
async def test_a_loss_is_told_even_where_the_connection_stays_open(
    serve: Serve, http: aiohttp.ClientSession, runtime: FakeRuntime, *, begun: bool
) -> None:
    """A process can be gone while another one still holds its socket: the supervisor's word counts."""
    ended = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        if begun:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\ndata: half an ev")
        else:
            runtime.loss.set_result("it was swept away")
        await reader.read()  # until the gateway hangs up
        writer.close()
        ended.set()

    async with raw_runner(answer) as endpoint:
        runtime.endpoints["mock"] = endpoint
        url = await serve()
        async with http.post(f"{url}/v1/completions", json={"model": "mock"}) as response:
            assert response.status == (200 if begun else 502)
            received = await response.content.readany()
            if begun:
                runtime.loss.set_result("it was swept away")
                received += await response.read()
            *before, error = received.removesuffix(b"\n\n").split(b"\n\n")
            assert before == ([b"data: 1"] if begun else [])
            assert "it was swept away" in json.loads(error.removeprefix(b"data: "))["error"]["message"]
        await ended.wait()
