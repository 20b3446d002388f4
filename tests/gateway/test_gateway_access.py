"""Who may do what: clients by their keys, the models on their lists, how much at a time, and who is too slow."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from fake_runtime import FakeRuntime, LlamaServer, Serve

from config.keys_file import Client, hash_of
from supervisor.api.errors import ClientLimit
from supervisor.api.lease import Endpoint
from supervisor.gateway.access import Clients

pytestmark = pytest.mark.anyio

COMPLETIONS = "/v1/chat/completions"
KEY = "lm-phone"
AS_PHONE = {"Authorization": f"Bearer {KEY}"}
NOWHERE = Endpoint("http://127.0.0.1:1", "none")


def phone(**may: Any) -> dict[str, Client]:
    return {"phone": Client(hash_of(KEY), **may)}


def chat(model: str) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


async def test_a_client_sees_and_uses_the_models_on_its_list_and_no_others(
    serve: Serve, http: aiohttp.ClientSession, runtime: FakeRuntime, chat_server: LlamaServer
) -> None:
    runtime.endpoints["private"] = NOWHERE
    url = await serve([chat_server], clients=phone(models=(chat_server.model,)))
    async with http.get(f"{url}/v1/models", headers=AS_PHONE) as answer:
        assert [each["id"] for each in (await answer.json())["data"]] == [chat_server.model]
    async with http.post(url + COMPLETIONS, json=chat(chat_server.model), headers=AS_PHONE) as answer:
        assert answer.status == 200
    for path in (COMPLETIONS, "/api/chat", "/api/show", "/tokenize"):
        async with http.post(url + path, json=chat("private"), headers=AS_PHONE) as answer:
            assert answer.status == 404
            assert chat_server.model not in await answer.text()
    assert [need.client for need in runtime.needs] == ["phone"]


async def test_a_limited_client_is_told_no_name_but_the_one_that_it_asked_for(
    serve: Serve, http: aiohttp.ClientSession, runtime: FakeRuntime
) -> None:
    """Neither one that resembles it, nor the one that it is another way of writing."""
    runtime.endpoints["private"] = NOWHERE
    url = await serve(clients=phone(models=("none*",)))
    for name in ("privat", "PRIVATE"):
        async with http.post(url + COMPLETIONS, json=chat(name), headers=AS_PHONE) as answer:
            assert (answer.status, "private" in await answer.text()) == (404, False)


@pytest.mark.parametrize(
    "method,path",
    [
        ("POST", "/manage/unload"),
        ("POST", "/manage/load"),
        ("POST", "/manage/yield"),
        ("POST", "/manage/yield/end"),
        ("GET", "/manage/logs"),
        ("POST", "/api/pull"),
        ("POST", "/api/create"),
        ("POST", "/api/copy"),
        ("DELETE", "/api/delete"),
        ("POST", "/api/blobs/sha256:" + "0" * 64),
    ],
)
async def test_a_client_that_may_not_manage_changes_nothing(
    serve: Serve, http: aiohttp.ClientSession, method: str, path: str
) -> None:
    url = await serve(clients=phone(manage=False))
    async with http.request(method, url + path, json={}, headers=AS_PHONE) as answer:
        assert answer.status == 403


@pytest.mark.parametrize(
    "method,path",
    [
        ("GET", "/metrics"),
        ("POST", "/manage/yield"),
        ("POST", "/manage/yield/end"),
        ("POST", "/api/pull"),
        ("POST", "/api/create"),
        ("POST", "/api/%63opy"),
        ("DELETE", "/api/delete"),
        ("HEAD", "/api/blobs/sha256:" + "0" * 64),
        ("POST", "/api/blobs/sha256:" + "0" * 64),
    ],
)
async def test_what_reaches_all_models_at_once_is_not_for_a_client_of_some(
    serve: Serve, http: aiohttp.ClientSession, method: str, path: str
) -> None:
    """A copy of a model has a name that may be on the list; labels of metrics name all models."""
    url = await serve(clients=phone(models=("mine*",)))
    async with http.request(method, url + path, json={}, headers=AS_PHONE) as answer:
        assert answer.status == 403


async def test_no_list_tells_a_client_of_a_model_that_is_not_on_its_list(
    serve: Serve, http: aiohttp.ClientSession, runtime: FakeRuntime, chat_server: LlamaServer
) -> None:
    runtime.endpoints["private"] = NOWHERE
    url = await serve([chat_server], clients=phone(models=(chat_server.model,)))
    for path in ("/v1/models", "/api/tags", "/api/ps", "/status"):
        async with http.get(url + path, headers=AS_PHONE) as answer:
            assert "private" not in await answer.text(), path
    for path in ("/v1/models/private", "/manage/logs?model=private"):
        async with http.get(url + path, headers=AS_PHONE) as answer:
            told = (await answer.json())["error"]["message"]
            assert (answer.status, "GET /v1/models lists those that it may use" in told) == (404, True), path


async def test_unloading_by_an_empty_prompt_is_managing_too(
    serve: Serve, http: aiohttp.ClientSession, runtime: FakeRuntime, chat_server: LlamaServer
) -> None:
    url = await serve([chat_server], clients=phone(manage=False))
    body = {"model": chat_server.model, "keep_alive": 0}
    async with http.post(f"{url}/api/generate", json=body, headers=AS_PHONE) as answer:
        assert answer.status == 403
    assert not runtime.unloaded


async def test_a_client_has_no_more_requests_in_work_than_its_key_allows(
    serve: Serve, http: aiohttp.ClientSession, runtime: FakeRuntime, chat_server: LlamaServer
) -> None:
    """The second is refused while the first is in work, and taken once that is done; looking is free."""
    runtime.gate = asyncio.Event()
    url = await serve([chat_server], clients=phone(concurrency=1))
    first = asyncio.create_task(http.post(url + COMPLETIONS, json=chat(chat_server.model), headers=AS_PHONE))
    await runtime.waiting.wait()
    async with http.post(url + COMPLETIONS, json=chat(chat_server.model), headers=AS_PHONE) as answer:
        assert answer.status == 429
        assert int(answer.headers["Retry-After"]) >= 1
        assert (await answer.json())["error"]["code"] == "client_limit"
    async with http.get(f"{url}/status", headers=AS_PHONE) as answer:
        assert answer.status == 200
    runtime.gate.set()
    async with await first as answer:
        assert answer.status == 200
    async with http.post(url + COMPLETIONS, json=chat(chat_server.model), headers=AS_PHONE) as answer:
        assert answer.status == 200


async def test_without_keys_clients_are_told_apart_by_their_address(
    serve: Serve, http: aiohttp.ClientSession, runtime: FakeRuntime, chat_server: LlamaServer
) -> None:
    url = await serve([chat_server])
    async with http.post(url + COMPLETIONS, json=chat(chat_server.model)) as answer:
        assert answer.status == 200
    assert [need.client for need in runtime.needs] == ["127.0.0.1"]


async def test_clients_with_keys_that_have_no_name_are_told_apart_by_key_and_address(
    serve: Serve, http: aiohttp.ClientSession, runtime: FakeRuntime, chat_server: LlamaServer
) -> None:
    url = await serve([chat_server], api_keys=("sk-office", "sk-home"), clients=phone())
    for key in ("sk-office", "sk-home", KEY):
        headers = {"Authorization": f"Bearer {key}"}
        async with http.post(url + COMPLETIONS, json=chat(chat_server.model), headers=headers) as answer:
            assert answer.status == 200
    office, home, named = (need.client for need in runtime.needs)
    assert (office, home, named) == ("shared key 1 from 127.0.0.1", "shared key 2 from 127.0.0.1", "phone")


async def test_runners_are_unloaded_reset_and_looked_into(
    serve: Serve, http: aiohttp.ClientSession, runtime: FakeRuntime
) -> None:
    runtime.endpoints["tiny"] = NOWHERE
    runtime.logs["tiny"] = ["first line", "second line"]
    url = await serve()
    async with http.post(f"{url}/manage/unload", json={"model": "tiny"}) as answer:
        assert await answer.json() == {"model": "tiny", "unloaded": True}
    async with http.post(f"{url}/manage/reset", json={"model": "tiny"}) as answer:
        assert await answer.json() == {"model": "tiny", "reset": False}
    async with http.get(f"{url}/manage/logs", params={"model": "tiny"}) as answer:
        assert await answer.text() == "first line\nsecond line\n"
    async with http.post(f"{url}/manage/yield", json={"device": "CUDA0", "bytes": 1, "for_seconds": 60}) as answer:
        assert (await answer.json())["device"] == "CUDA0"
    async with http.post(f"{url}/manage/yield/end", json={"device": "CUDA0"}) as answer:
        assert await answer.json() == {"device": "CUDA0", "ended": False}
    async with http.post(f"{url}/manage/rescan") as answer:
        assert await answer.json() == {"models": 1}


@pytest.mark.parametrize(
    "body,field",
    [
        ({"bytes": 1, "for_seconds": 1}, "device"),
        ({"device": "CUDA0", "bytes": -1, "for_seconds": 1}, "bytes"),
        ({"device": "CUDA0", "bytes": True, "for_seconds": 1}, "bytes"),
        ({"device": "CUDA0", "bytes": 1, "for_seconds": 1e9}, "for_seconds"),
    ],
)
async def test_memory_is_yielded_within_reason_only(
    serve: Serve, http: aiohttp.ClientSession, body: dict[str, Any], field: str
) -> None:
    url = await serve()
    async with http.post(f"{url}/manage/yield", json=body) as answer:
        assert (answer.status, (await answer.json())["error"]["param"]) == (400, field)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nX-Slow: ",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{",
    ],
    ids=["nothing", "half a head", "half a body"],
)
async def test_a_client_that_stops_sending_is_cut_off(serve: Serve, sent: bytes) -> None:
    parts = urlsplit(await serve(head_timeout_s=0.2, stall_timeout_s=0.2))
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(sent)
    assert await asyncio.wait_for(reader.read(), timeout=30) == b""
    writer.close()


async def test_a_client_that_stops_reading_is_cut_off(serve: Serve, runtime: FakeRuntime) -> None:
    """Its answer is larger than what the kernel holds for it, so that nothing can be sent until it reads."""
    runtime.endpoints["tiny"] = NOWHERE
    runtime.logs["tiny"] = ["x" * (32 << 20)]
    parts = urlsplit(await serve(stall_timeout_s=0.2))
    _, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=1024)
    writer.write(b"GET /manage/logs?model=tiny HTTP/1.1\r\nHost: localhost\r\n\r\n")
    await asyncio.wait_for(runtime.returned.wait(), timeout=30)
    writer.transport.abort()


def test_a_client_whose_limit_was_lowered_is_let_in_again_once_it_has_less_in_work() -> None:
    """What it has in work goes on."""
    clients = Clients(named={"phone": Client(hash_of("k"), concurrency=2)})
    headers = {"Authorization": "Bearer k"}
    with ExitStack() as in_work:
        for _ in range(2):
            in_work.enter_context(clients.admitted(clients.identify(headers, None), counts=True))
        clients.replace({"phone": Client(hash_of("k"), concurrency=1)})
        with pytest.raises(ClientLimit), clients.admitted(clients.identify(headers, None), counts=True):
            pass
    with clients.admitted(clients.identify(headers, None), counts=True):
        pass
