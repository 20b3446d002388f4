"""The HTTP side without a runner: routes, guards, limits and how every refusal is told."""

from __future__ import annotations

import asyncio
import gzip
import json
from typing import Any

import aiohttp
import pytest
from aiohttp.compression_utils import HAS_ZSTD
from fake_runtime import FakeRuntime, LlamaServer, Serve
from structlog.testing import capture_logs

from planner.types import Shortfall
from supervisor.api.errors import (
    AcquireError,
    BadModel,
    CannotFit,
    LoadFailed,
    LoadTimeout,
    PlannerFailed,
    QueueFull,
    QueueTimeout,
    ShuttingDown,
    UnknownModel,
    WrongRole,
)

pytestmark = pytest.mark.anyio

CAUSES = (Shortfall("CUDA0", 30, 20),)
COMPLETIONS = "/v1/completions"


async def ask(
    http: aiohttp.ClientSession, url: str, body: object = None
) -> tuple[aiohttp.ClientResponse, dict[str, Any]]:
    async with http.post(url + COMPLETIONS, json=body or {"model": "any"}) as answer:
        return answer, (await answer.json())["error"]


@pytest.mark.parametrize(
    "refusal,status,code,retry",
    [
        (UnknownModel("no such model", closest=("one",)), 404, "model_not_found", None),
        (WrongRole("served for embedding"), 501, "model_has_other_role", "never"),
        (BadModel("truncated"), 422, "model_unusable", None),
        (CannotFit("too large", causes=CAUSES, never=True), 507, "model_never_fits", "never"),
        (CannotFit("full", causes=CAUSES, never=False, retry_after_s=2.1), 503, "model_does_not_fit_now", "3"),
        (QueueFull("512 wait"), 503, "queue_full", "1"),
        (QueueTimeout("not free"), 503, "queue_timeout", "5"),
        (LoadTimeout("not ready"), 503, "load_timeout", "10"),
        (LoadFailed("it died: out of memory"), 502, "load_failed", "never"),
        (LoadFailed("it died", retry_after_s=4), 502, "load_failed", "4"),
        (ShuttingDown("draining"), 503, "shutting_down", "5"),
        (PlannerFailed("it ended"), 503, "unavailable", "5"),
        (AcquireError("something else"), 503, "unavailable", "never"),
    ],
)
async def test_each_refusal_has_its_status_its_code_and_says_when_to_try_again(
    serve: Serve,
    http: aiohttp.ClientSession,
    runtime: FakeRuntime,
    refusal: AcquireError,
    status: int,
    code: str,
    retry: str | None,
) -> None:
    """The runtime's own line is what the client reads."""
    runtime.refusal = refusal
    answer, error = await ask(http, await serve())
    assert (answer.status, error["code"], error["message"]) == (status, code, str(refusal))
    assert {"message", "type", "param", "code"} <= set(error)
    told = "never" if answer.headers.get("x-should-retry") == "false" else answer.headers.get("Retry-After")
    assert told == retry
    if isinstance(refusal, CannotFit):
        assert error["causes"] == [
            {"device": "CUDA0", "needed_bytes": 30, "available_bytes": 20, "shortfall_bytes": 10}
        ]


async def test_a_bug_is_told_by_its_request_id_only(
    serve: Serve, http: aiohttp.ClientSession, runtime: FakeRuntime
) -> None:
    """The traceback is in the log, once, and nowhere else."""
    runtime.refusal = RuntimeError("secret inner state")
    with capture_logs() as logs:
        answer, error = await ask(http, await serve())
    assert answer.status == 500
    assert answer.headers["X-Request-Id"] in error["message"]
    assert "secret" not in json.dumps(error)
    assert [entry["exc_info"] for entry in logs if entry["event"] == "request.failed"] == [True]


@pytest.mark.parametrize(
    "method,path,status,code",
    [
        ("GET", "/nowhere", 404, "unknown_path"),
        ("POST", "/nowhere", 404, "unknown_path"),
        ("GET", COMPLETIONS, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/a/b", 404, "model_not_found"),
    ],
)
async def test_what_is_not_there_is_told_in_the_same_envelope(
    serve: Serve, http: aiohttp.ClientSession, method: str, path: str, status: int, code: str
) -> None:
    """Unknown paths, wrong methods and unknown models."""
    url = await serve()
    async with http.request(method, url + path) as answer:
        assert answer.status == status
        assert (await answer.json())["error"]["code"] == code
        assert ("Allow" in answer.headers) == (status == 405)


async def test_models_are_listed_with_role_state_and_context(
    serve: Serve, http: aiohttp.ClientSession, runtime: FakeRuntime, chat_server: LlamaServer
) -> None:
    """An id may hold slashes and odd characters."""
    runtime.servers["folder/odd name"] = chat_server
    url = await serve()
    async with http.get(f"{url}/v1/models/folder/odd%20name") as answer:
        assert await answer.json() == {
            "id": "folder/odd name",
            "object": "model",
            "created": 1_700_000_000,
            "owned_by": "loadmaster",
            "role": "chat",
            "state": "unloaded",
            "context_length": 2048,
            "meta": {"n_ctx_train": 4096, "size": 1000, "architecture": "llama"},
        }


async def test_the_root_is_ollamas_to_programs_and_a_page_to_browsers(
    serve: Serve, http: aiohttp.ClientSession
) -> None:
    """The page may load nothing from anywhere, and only its own script runs."""
    url = await serve()
    async with http.get(url, headers={"Accept": "*/*"}) as answer:
        assert await answer.text() == "Ollama is running"
    async with http.head(url) as answer:
        assert answer.status == 200
    async with http.get(url, headers={"Accept": "text/html,*/*;q=0.8"}) as answer:
        page = await answer.text()
        policy = answer.headers["Content-Security-Policy"]
    assert page.startswith("<!doctype html>")
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy


async def test_probes_tell_life_and_readiness_apart(
    serve: Serve, http: aiohttp.ClientSession, runtime: FakeRuntime
) -> None:
    """A draining service is alive and not ready; the reasons are in the body."""
    url = await serve(api_keys=("secret",))
    runtime.not_ready = ("no llama-server was found", "the service is shutting down")
    runtime.draining = True
    async with http.get(f"{url}/healthz") as answer:
        assert (answer.status, await answer.text()) == (200, "ok")
    async with http.get(f"{url}/readyz") as answer:
        assert answer.status == 503
        assert await answer.json() == {"ready": False, "reasons": list(runtime.not_ready)}
    runtime.not_ready, runtime.draining = (), False
    async with http.get(f"{url}/readyz") as answer:
        assert (answer.status, await answer.json()) == (200, {"ready": True, "reasons": []})


@pytest.mark.parametrize("path", ["/v1/models", "/status", "/metrics", "/nowhere"])
@pytest.mark.parametrize(
    "headers,status",
    [
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "Basic secret"}, 401),
        ({"Authorization": "Bearer s\u00e9cret"}, 401),
        ({"Authorization": "bearer secret"}, 200),
        ({"X-Api-Key": "other"}, 200),
    ],
)
async def test_a_key_is_needed_for_everything_that_tells_something(
    serve: Serve, http: aiohttp.ClientSession, path: str, headers: dict[str, str], status: int
) -> None:
    """Where keys are set, even an unknown path tells nothing without one."""
    url = await serve(api_keys=("secret", "other"))
    async with http.get(url + path, headers=headers) as answer:
        assert answer.status == (404 if status == 200 and path == "/nowhere" else status)
        if status == 401:
            assert answer.headers["WWW-Authenticate"] == "Bearer"
            assert (await answer.json())["error"]["type"] == "authentication_error"


async def test_where_keys_are_needed_and_there_are_none_nobody_is_let_in(
    serve: Serve, http: aiohttp.ClientSession
) -> None:
    url = await serve(keys_needed=True)
    async with http.get(f"{url}/status", headers={"X-Api-Key": "anything"}) as answer:
        assert answer.status == 401


@pytest.mark.parametrize(
    "origin,allowed",
    [
        ("http://localhost:3000", True),
        ("http://127.0.0.1", True),
        ("http://[::1]:8080", True),
        ("https://0.0.0.0:1", True),
        ("app://obsidian.md", True),
        ("file://anything", True),
        ("tauri://localhost", True),
        ("vscode-webview://0a1b", True),
        ("vscode-file://vscode-app", True),
        ("https://chat.example.org", True),
        ("https://a.wild.example", True),
        ("https://evil.example", False),
        ("http://localhost.evil.example", False),
        ("null", False),
    ],
)
async def test_a_foreign_page_is_refused(
    serve: Serve, http: aiohttp.ClientSession, origin: str, *, allowed: bool
) -> None:
    """A page that is welcome is told so, in the preflight too; another one gets no answer to read."""
    url = await serve(origins=("https://chat.example.org", "https://*.wild.example"))
    async with http.get(f"{url}/v1/models", headers={"Origin": origin}) as answer:
        assert answer.status == (200 if allowed else 403)
        assert answer.headers.get("Access-Control-Allow-Origin") == (origin if allowed else None)
    preflight = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x"}
    async with http.options(url + COMPLETIONS, headers=preflight) as answer:
        assert answer.status == (204 if allowed else 403)


@pytest.mark.parametrize(
    "host,loopback_only,status",
    [
        ("localhost:1", True, 200),
        ("box.local", True, 200),
        ("[::1]:1", True, 200),
        ("chat.example.org", True, 200),
        ("rebound.example", True, 403),
        ("[broken", True, 403),
        ("rebound.example", False, 200),
    ],
)
async def test_a_name_that_was_bent_to_loopback_is_refused(
    serve: Serve, http: aiohttp.ClientSession, host: str, *, loopback_only: bool, status: int
) -> None:
    """A page under its own name is its own origin, so that only the Host header gives it away."""
    url = await serve(origins=("https://chat.example.org",), loopback_only=loopback_only)
    async with http.get(f"{url}/status", headers={"Host": host}) as answer:
        assert answer.status == status


async def test_a_body_over_the_limit_is_refused_with_413(serve: Serve, http: aiohttp.ClientSession) -> None:
    """Also where it is sent compressed and only becomes large here."""
    url = await serve(max_body_bytes=1000)
    body = json.dumps({"model": "m", "prompt": "x" * 2000}).encode()
    for data, headers in ((body, {}), (gzip.compress(body), {"Content-Encoding": "gzip"})):
        async with http.post(url + COMPLETIONS, data=data, headers=headers) as answer:
            assert answer.status == 413
            assert (await answer.json())["error"]["code"] == "body_too_large"


@pytest.mark.parametrize(
    "fields",
    [
        b"X-Long: " + b"x" * 40_000,
        b"\r\n".join(b"X-%d: 1" % n for n in range(500)),
        b"Authorization: Bearer secret\x00",
        b"Content-Length: secret",
        b"Transfer-Encoding: chunked\r\n\r\nsecret",
    ],
)
async def test_what_is_no_http_is_refused_and_logged_in_one_line_without_its_bytes(
    serve: Serve, caplog: pytest.LogCaptureFixture, fields: bytes
) -> None:
    """Neither one long header nor very many are read into memory; a key that was sent badly is in no log."""
    url = await serve()
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n" + fields + b"\r\n\r\n")
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")  # until the connection is closed
    assert b" 400 " in head.splitlines()[0]
    error = json.loads(body)["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_request")
    assert "secret" not in error["message"]
    writer.close()
    await writer.wait_closed()
    [line] = caplog.records
    assert (line.levelname, line.exc_info) == ("WARNING", None)
    assert line.getMessage().startswith("malformed request refused (")
    assert "secret" not in caplog.text


async def test_a_path_that_is_no_clients_of_ours_is_not_read_to_its_end(serve: Serve) -> None:
    host, port = (await serve()).removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /" + b"x" * 40_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert b" 400 " in await reader.readline()
    writer.close()
    await writer.wait_closed()


async def test_a_body_that_is_not_encoded_as_it_says_is_the_clients_fault(
    serve: Serve, http: aiohttp.ClientSession
) -> None:
    url = await serve()
    async with http.post(url + COMPLETIONS, data=b"no gzip", headers={"Content-Encoding": "gzip"}) as answer:
        assert answer.status == 400
        assert (await answer.json())["error"]["code"] == "invalid_request"


@pytest.mark.skipif(HAS_ZSTD, reason="this Python can unpack it")
async def test_a_body_that_is_compressed_in_a_way_that_nobody_here_knows_says_what_is(
    serve: Serve, http: aiohttp.ClientSession
) -> None:
    url = await serve()
    async with http.post(url + COMPLETIONS, data=b"packed", headers={"Content-Encoding": "zstd"}) as answer:
        assert answer.status == 400
        assert "send it as gzip" in (await answer.json())["error"]["message"]


async def test_only_models_of_the_folder_become_labels(
    serve: Serve, http: aiohttp.ClientSession, chat_server: LlamaServer
) -> None:
    """Whatever names and paths clients make up, the metrics do not grow."""
    url = await serve([chat_server])
    await ask(http, url, {"model": "made-up-1"})
    async with http.get(f"{url}/made-up-2") as answer:
        assert answer.status == 404
    async with http.post(
        url + COMPLETIONS, json={"model": chat_server.model, "prompt": "hi", "max_tokens": 1}
    ) as answer:
        assert answer.status == 200
    async with http.get(f"{url}/metrics") as answer:
        text = await answer.text()
    assert "made-up" not in text
    labels = f'endpoint="{COMPLETIONS}",model="{chat_server.model}"'
    assert f'loadmaster_http_requests_total{{{labels},status="200"}} 1.0' in text
    assert f"loadmaster_http_first_byte_seconds_count{{{labels}}} 1.0" in text
    assert f'loadmaster_http_requests_total{{endpoint="{COMPLETIONS}",model="(none)",status="404"}} 1.0' in text


async def test_the_access_log_has_neither_keys_nor_words_of_the_conversation(
    serve: Serve, http: aiohttp.ClientSession, chat_server: LlamaServer
) -> None:
    """One line per request says who asked which model, and how it went."""
    url = await serve([chat_server], api_keys=("key-in-header",))
    headers = {"X-Api-Key": "key-in-header"}
    body = {"model": chat_server.model, "prompt": "a private thought", "max_tokens": 1}
    with capture_logs() as logs:
        async with http.post(f"{url}{COMPLETIONS}?k=key-in-query", json=body, headers=headers) as answer:
            await answer.read()
        async with http.get(f"{url}/healthz"):
            pass
        while not logs:  # noqa: ASYNC110 - it is logged soon, and nobody is told
            await asyncio.sleep(0.001)
    [line] = logs
    assert (line["path"], line["model"], line["status"]) == (COMPLETIONS, chat_server.model, 200)
    assert not any(secret in str(line) for secret in ("key-in", "private"))
