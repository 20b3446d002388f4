"""Ollama's API over real llama-servers, where the runtime itself refuses, loses a runner, or is asked for more."""

from __future__ import annotations

import json
import math
from typing import Any

import aiohttp
import pytest
from fake_runtime import FakeRuntime, LlamaServer, Serve

from planner.types import LoadOptions
from supervisor.api.errors import CannotFit, LoadFailed, QueueFull, ShuttingDown

pytestmark = [pytest.mark.llama, pytest.mark.anyio]

HELLO = {"role": "user", "content": "hello"}


async def test_a_request_says_how_to_load_and_how_long_to_keep(
    serve: Serve, runtime: FakeRuntime, http: aiohttp.ClientSession, chat_server: LlamaServer
) -> None:
    url = await serve([chat_server])
    options = {"num_ctx": 1024, "num_gpu": 3, "main_gpu": 1, "num_batch": 64, "use_mmap": False, "num_predict": 1}
    asked = {"model": chat_server.model, "messages": [HELLO], "options": options, "keep_alive": "1m"}
    async with http.post(f"{url}/api/chat", json=asked) as answer:
        assert answer.status == 200
    async with http.post(f"{url}/api/generate", json={"model": chat_server.model, "keep_alive": -1}) as answer:
        assert (await answer.json())["done_reason"] == "load"
    loaded, kept = runtime.needs
    assert loaded.load == LoadOptions(1024, 3, 1, 64, use_mmap=False)
    assert loaded.keep_alive_s == 60.0
    assert (kept.load, kept.keep_alive_s) == (LoadOptions(), math.inf)


async def test_the_first_token_of_a_stream_is_timed(
    serve: Serve, http: aiohttp.ClientSession, chat_server: LlamaServer
) -> None:
    """Not that of an answer that comes whole."""
    url = await serve([chat_server])
    asked = {"model": chat_server.model, "messages": [HELLO], "options": {"num_predict": 2}}
    for stream in (True, False):
        async with http.post(f"{url}/api/chat", json={**asked, "stream": stream}) as answer:
            await answer.read()
    async with http.get(f"{url}/metrics") as metrics:
        assert f'loadmaster_first_token_seconds_count{{model="{chat_server.model}"}} 1.0' in await metrics.text()


async def test_an_unload_is_the_runtimes_and_needs_no_lease(
    serve: Serve, runtime: FakeRuntime, http: aiohttp.ClientSession, embedding_server: LlamaServer
) -> None:
    """Of a model of any kind: this is how ``ollama stop`` asks."""
    url = await serve([embedding_server])
    async with http.post(f"{url}/api/generate", json={"model": embedding_server.model, "keep_alive": 0}) as answer:
        assert (await answer.json())["done_reason"] == "unload"
    assert runtime.unloaded == [embedding_server.model]
    assert runtime.granted == 0


@pytest.mark.parametrize(
    "refusal,status,told",
    [
        (QueueFull("512 wait"), 503, "server busy, please try again.  maximum pending requests exceeded"),
        (ShuttingDown("the service is stopping"), 503, "the service is stopping"),
        (CannotFit("chat needs 9 GiB", causes=(), never=True), 500, "chat needs 9 GiB"),
        (LoadFailed("no memory"), 500, "llama runner process has terminated: no memory"),
    ],
)
async def test_a_refused_load_has_ollamas_status_and_text(
    serve: Serve,
    runtime: FakeRuntime,
    http: aiohttp.ClientSession,
    chat_server: LlamaServer,
    refusal: Exception,
    status: int,
    told: str,
) -> None:
    url = await serve([chat_server])
    runtime.refusal = refusal
    asked: dict[str, Any] = {"model": chat_server.model, "messages": [HELLO]}
    for stream in (True, False):
        async with http.post(f"{url}/api/chat", json={**asked, "stream": stream}) as answer:
            assert (answer.status, await answer.json()) == (status, {"error": told})


async def test_a_page_of_another_origin_and_a_missing_key_are_refused_in_one_line(
    serve: Serve, http: aiohttp.ClientSession
) -> None:
    url = await serve([], api_keys=("secret",))
    async with http.get(f"{url}/api/tags", headers={"Origin": "https://elsewhere.example"}) as answer:
        assert answer.status == 403
        assert isinstance((await answer.json())["error"], str)
    async with http.get(f"{url}/api/tags") as answer:
        assert answer.status == 401
        assert isinstance((await answer.json())["error"], str)


async def test_a_runner_that_dies_before_it_answers_is_told_with_a_status(
    serve: Serve, runtime: FakeRuntime, http: aiohttp.ClientSession, endless_server: LlamaServer
) -> None:
    url = await serve([endless_server])
    endless_server.process.kill()
    async with http.post(f"{url}/api/generate", json={"model": endless_server.model, "prompt": "hi"}) as answer:
        assert answer.status == 500
        assert (await answer.json())["error"].startswith("model runner has unexpectedly stopped: ")


async def test_without_a_store_nothing_is_fetched_or_removed(
    serve: Serve, http: aiohttp.ClientSession, chat_server: LlamaServer
) -> None:
    url = await serve([chat_server])
    for method, path, body in (
        ("POST", "/api/pull", {"model": "x"}),
        ("POST", "/api/create", {"model": "x"}),
        ("DELETE", "/api/delete", {"model": chat_server.model}),
        ("POST", f"/api/blobs/sha256:{'0' * 64}", {}),
    ):
        async with http.request(method, url + path, data=json.dumps(body)) as answer:
            assert answer.status == 501
            assert "store" in (await answer.json())["error"]
