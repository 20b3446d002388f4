"""Every API that llama-server speaks, spoken through the gateway by the packages that people use."""

from __future__ import annotations

import asyncio
import json
import math
import re
from typing import Any

import aiohttp
import anthropic
import openai
import pytest
from fake_runtime import FakeRuntime, LlamaServer, Serve
from tiny_models import TOOL_NAME

from supervisor.api.errors import LoadFailed
from supervisor.api.runtime import LoadProgress
from supervisor.gateway.openai import PASSED_THROUGH

# Whether a request takes the short way or the long one, the same comes of it.
pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("at_once", [True, False], ids=["short way", "long way"])]

HELLO: Any = {"role": "user", "content": "hi"}
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}
TOOL: Any = {"type": "function", "function": {"name": TOOL_NAME, "parameters": NO_PARAMETERS}}
CLAUDE_TOOL: Any = {"name": TOOL_NAME, "input_schema": NO_PARAMETERS}


async def test_the_anthropic_package_talks_streams_and_counts(serve: Serve, chat_server: LlamaServer) -> None:
    """With its key as it sends it, in ``x-api-key``."""
    url = await serve([chat_server], api_keys=("secret",))
    async with anthropic.AsyncAnthropic(base_url=url, api_key="secret", max_retries=0) as client:
        whole = await client.messages.create(model=chat_server.model, messages=[HELLO], max_tokens=50)
        async with client.messages.stream(model=chat_server.model, messages=[HELLO], max_tokens=50) as stream:
            text = "".join([piece async for piece in stream.text_stream])
        counted = await client.messages.count_tokens(model=chat_server.model, messages=[HELLO])
    assert whole.content[0].text == text
    assert text.startswith("Hello!")
    assert whole.usage.output_tokens > 10
    assert counted.input_tokens > 0


async def test_the_openai_package_is_handed_tool_calls(serve: Serve, tool_server: LlamaServer) -> None:
    """Whole and streamed."""
    url = await serve([tool_server])
    wanted: Any = {"model": tool_server.model, "messages": [HELLO], "tools": [TOOL]}
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        whole = await client.chat.completions.create(**wanted)
        assert whole.choices[0].message.tool_calls
        (call,) = whole.choices[0].message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == (TOOL_NAME, {})
        chunks = [chunk async for chunk in await client.chat.completions.create(**wanted, stream=True)]
        calls = [call for chunk in chunks if chunk.choices for call in chunk.choices[0].delta.tool_calls or ()]
        assert "".join(call.function.name or "" for call in calls if call.function) == TOOL_NAME


async def test_the_anthropic_package_is_handed_tool_calls(serve: Serve, tool_server: LlamaServer) -> None:
    """Whole and streamed."""
    url = await serve([tool_server])
    asked: Any = {"model": tool_server.model, "messages": [HELLO], "tools": [CLAUDE_TOOL], "max_tokens": 50}
    async with anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as client:
        answer = await client.messages.create(**asked)
        async with client.messages.stream(**asked) as stream:
            streamed = await stream.get_final_message()
    for message in (answer, streamed):
        assert message.stop_reason == "tool_use"
        assert [(block.name, block.input) for block in message.content if block.type == "tool_use"] == [(TOOL_NAME, {})]


async def test_responses_are_made_and_streamed(serve: Serve, chat_server: LlamaServer) -> None:
    url = await serve([chat_server])
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        whole = await client.responses.create(model=chat_server.model, input="hi")
        events = [
            event async for event in await client.responses.create(model=chat_server.model, input="hi", stream=True)
        ]
    assert whole.output_text.startswith("Hello!")
    assert events[-1].type == "response.completed"
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text


async def test_several_models_answer_at_once_through_both_packages(
    serve: Serve, chat_server: LlamaServer, embedding_server: LlamaServer, endless_server: LlamaServer
) -> None:
    """Each request reaches the model that it names."""
    url = await serve([chat_server, embedding_server, endless_server])
    async with (
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as other,
    ):
        answers = await asyncio.gather(
            *(
                client.chat.completions.create(model=server.model, messages=[HELLO], max_tokens=5)
                for server in (chat_server, endless_server)
            ),
            client.embeddings.create(model=embedding_server.model, input="hello"),
            other.messages.create(model=endless_server.model, messages=[HELLO], max_tokens=5),
        )
    names = [chat_server.model, endless_server.model, embedding_server.model, endless_server.model]
    assert [answer.model for answer in answers] == names


async def test_every_path_reaches_the_model_it_names(
    serve: Serve, http: aiohttp.ClientSession, chat_server: LlamaServer, embedding_server: LlamaServer
) -> None:
    """No path that is passed through is unknown to llama-server; tokens are any model's."""
    url = await serve([chat_server, embedding_server])
    for path, role in PASSED_THROUGH.items():
        for server in (chat_server, embedding_server):
            if role in {None, server.role}:
                async with http.post(
                    url + path, json={"model": server.model, "content": "hi", "tokens": [1]}
                ) as answer:
                    text = await answer.text()
                    assert answer.headers["X-Loadmaster-Model"] == server.model, path
                    assert "File Not Found" not in text, path


async def test_a_forms_model_is_found_among_its_files(
    serve: Serve, http: aiohttp.ClientSession, chat_server: LlamaServer, runtime: FakeRuntime
) -> None:
    """A recording to be transcribed goes on as it came; this model cannot hear, and says so itself."""
    url = await serve([chat_server])
    form = aiohttp.FormData()
    form.add_field("file", b"RIFF\r\n\r\n--not-a-boundary", filename='model="other".wav', content_type="audio/wav")
    form.add_field("model", chat_server.model)
    async with http.post(f"{url}/v1/audio/transcriptions", data=form) as answer:
        assert answer.headers["X-Loadmaster-Model"] == chat_server.model
        assert "audio" in (await answer.json())["error"]["message"]
    nameless = aiohttp.FormData({"language": "en"}, default_to_multipart=True)
    async with http.post(f"{url}/v1/audio/transcriptions", data=nameless) as answer:
        assert answer.status == 400
    assert runtime.granted == 1


async def test_anthropics_clients_are_told_errors_in_their_envelope(
    serve: Serve, runtime: FakeRuntime, endless_server: LlamaServer
) -> None:
    """Before the stream, and within it."""
    url = await serve([endless_server])
    async with anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as client:
        with pytest.raises(anthropic.NotFoundError) as unknown:
            await client.messages.create(model="nobody", messages=[HELLO], max_tokens=5)
        assert unknown.value.body["type"] == "error"  # type: ignore[index]
        assert unknown.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
        stream = await client.messages.create(
            model=endless_server.model, messages=[HELLO], max_tokens=10_000, stream=True
        )
        await anext(aiter(stream))
        endless_server.process.kill()
        with pytest.raises(anthropic.APIError, match="killed by SIGKILL"):
            [event async for event in stream]
        runtime.refusal = LoadFailed("it died: out of memory")
        with pytest.raises(anthropic.InternalServerError, match="out of memory"):
            await client.messages.create(model="any", messages=[HELLO], max_tokens=5)


@pytest.mark.parametrize(
    "headers,fields,keep_alive_s,n_ctx",
    [
        ({}, {}, None, None),
        ({"X-Keep-Alive": "10m", "X-Num-Ctx": "4096"}, {}, 600.0, 4096),
        ({"X-Keep-Alive": "0"}, {}, 0.0, None),
        ({"X-Keep-Alive": "-1"}, {}, math.inf, None),
        ({}, {"keep_alive": "5m", "num_ctx": 1024}, 300.0, 1024),
        ({}, {"keep_alive": -1, "num_ctx": 0}, math.inf, None),
        ({"X-Keep-Alive": "10m", "X-Num-Ctx": "4096"}, {"keep_alive": 1.5, "num_ctx": 512}, 1.5, 512),
    ],
)
async def test_a_request_says_how_long_its_model_stays_and_how_much_it_holds(
    serve: Serve,
    http: aiohttp.ClientSession,
    runtime: FakeRuntime,
    chat_server: LlamaServer,
    headers: dict[str, str],
    fields: dict[str, object],
    keep_alive_s: float | None,
    n_ctx: int | None,
) -> None:
    """In a header or in the body, which counts where both are there; llama-server does not mind the fields."""
    url = await serve([chat_server])
    body = {"model": chat_server.model, "messages": [HELLO], "max_tokens": 1, **fields}
    async with http.post(f"{url}/v1/chat/completions", json=body, headers=headers) as answer:
        assert answer.status == 200
    (need,) = runtime.needs
    assert (need.keep_alive_s, need.load.n_ctx) == (keep_alive_s, n_ctx)


@pytest.mark.parametrize(
    "headers,fields,param",
    [
        ({"X-Keep-Alive": "soon"}, {}, "X-Keep-Alive"),
        ({"X-Num-Ctx": "many"}, {}, "X-Num-Ctx"),
        ({}, {"keep_alive": "soon"}, "keep_alive"),
        ({}, {"keep_alive": True}, "keep_alive"),
        ({}, {"keep_alive": math.nan}, "keep_alive"),
        ({}, {"keep_alive": 10**400}, "keep_alive"),
        ({}, {"num_ctx": -1}, "num_ctx"),
        ({}, {"num_ctx": "4096 tokens"}, "num_ctx"),
        ({}, {"num_ctx": 1.5}, "num_ctx"),
    ],
)
async def test_what_is_no_duration_or_no_context_is_refused(
    serve: Serve,
    http: aiohttp.ClientSession,
    chat_server: LlamaServer,
    headers: dict[str, str],
    fields: dict[str, object],
    param: str,
) -> None:
    url = await serve([chat_server])
    async with http.post(
        f"{url}/v1/completions", json={"model": chat_server.model, **fields}, headers=headers
    ) as answer:
        error = (await answer.json())["error"]
    assert (answer.status, error["param"]) == (400, param)
    assert re.search("is not a (duration such as 5m|number of tokens)", error["message"])


async def test_a_client_that_asks_for_it_is_told_how_the_load_goes(
    serve: Serve, http: aiohttp.ClientSession, runtime: FakeRuntime, chat_server: LlamaServer
) -> None:
    """In comments, which the client's package skips; then the answer comes in the same stream."""
    runtime.loading[chat_server.model] = LoadProgress("loading", 0.25, 3.0)
    runtime.gate = asyncio.Event()
    url = await serve([chat_server])
    body = {"model": chat_server.model, "messages": [HELLO], "stream": True}
    asked = {"X-Load-Progress": "1"}
    async with http.post(f"{url}/v1/chat/completions", json=body, headers=asked) as answer:
        told = await answer.content.readuntil(b"\n\n")
        assert told.startswith(b": load-progress ")
        assert json.loads(told.removeprefix(b": load-progress ")) == {
            "stage": "loading",
            "fraction": 0.25,
            "waited_s": 3.0,
        }
        runtime.gate.set()
        rest = await answer.content.read()
    assert rest.endswith(b"data: [DONE]\n\n")
    assert rest.count(b'"content":"Hello!"') == 1


async def test_a_load_that_fails_after_progress_was_told_ends_the_stream_with_an_error(
    serve: Serve, runtime: FakeRuntime, chat_server: LlamaServer
) -> None:
    """The status is spent; what the runner itself refuses is told there too."""
    url = await serve([chat_server])
    asked = {"X-Load-Progress": "1"}
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        for wrong, fields in ((LoadFailed("it died"), {}), (None, {"temperature": "hot"})):
            runtime.gate = asyncio.Event()
            runtime.refusal = wrong
            asking = client.chat.completions.create(
                model=chat_server.model, messages=[HELLO], stream=True, extra_headers=asked, extra_body=fields
            )
            stream = await asking
            runtime.gate.set()
            with pytest.raises(openai.APIError):
                [chunk async for chunk in stream]
    assert runtime.granted == 1


async def test_nobody_is_told_of_a_load_who_did_not_ask(
    serve: Serve, http: aiohttp.ClientSession, runtime: FakeRuntime, chat_server: LlamaServer
) -> None:
    """A refusal keeps its status."""
    runtime.gate = asyncio.Event()
    runtime.refusal = LoadFailed("it died")
    url = await serve([chat_server])
    body = {"model": chat_server.model, "messages": [HELLO], "stream": True}
    asking = asyncio.ensure_future(http.post(f"{url}/v1/chat/completions", json=body))
    await runtime.waiting.wait()
    runtime.gate.set()
    assert (await asking).status == 502
