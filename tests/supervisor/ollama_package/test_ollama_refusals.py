"""What cannot be done and what ends too early, as the ``ollama`` package is told; and the shape of what it reads."""

from __future__ import annotations

import base64
import json
import os
import signal
from typing import Any

import ollama
import pytest
from ollama_questions import HELLO, TOOL, picture
from running_service import Service

pytestmark = [pytest.mark.llama, pytest.mark.anyio]


def test_what_the_store_refuses_is_told_with_a_status_or_at_the_end_of_the_stream(
    service: Service, client: ollama.Client
) -> None:
    with pytest.raises(ollama.ResponseError, match='model "nobody" not found') as refused:
        client.copy("nobody", "somebody")
    assert refused.value.status_code == 404
    with pytest.raises(ollama.ResponseError) as unreachable:
        client.pull("127.0.0.1:1/library/nothing", insecure=True)
    assert unreachable.value.status_code == 500
    with pytest.raises(ollama.ResponseError):
        list(client.pull("127.0.0.1:1/library/nothing", insecure=True, stream=True))
    wrong = service.request("POST", f"/api/blobs/sha256:{'0' * 64}", "other bytes")
    assert wrong.status == 400
    assert "digest" in json.loads(wrong.read())["error"]
    assert service.request("HEAD", f"/api/blobs/sha256:{'0' * 64}").status == 404
    assert service.request("POST", "/api/create", {"model": "../up", "from": "chat"}).status == 400


@pytest.mark.parametrize(
    "ask,status,told",
    [
        (lambda client: client.chat("nobody", [HELLO]), 404, "model 'nobody' not found"),
        (lambda client: client.generate("nobody", "hi"), 404, "model 'nobody' not found"),
        (lambda client: client.show("nobody"), 404, "model 'nobody' not found"),
        (lambda client: client.embed("nobody", "hi"), 404, 'model "nobody" not found, try pulling it first'),
        (lambda client: client.delete("nobody"), 404, "model 'nobody' not found"),
        (lambda client: client.chat("embed", [HELLO]), 400, '"embed" does not support chat'),
        (lambda client: client.generate("embed", "hi"), 400, '"embed" does not support generate'),
        (lambda client: client.chat("chat", [HELLO], tools=[TOOL]), 400, "chat does not support tools"),
        (lambda client: client.chat("chat", [HELLO], think=True), 400, '"chat" does not support thinking'),
        (lambda client: client.generate("chat", "a", suffix="b"), 400, "chat does not support insert"),
        (lambda client: client.embed("chat", "hi"), 501, "this model does not support embeddings"),
        (lambda client: client.chat("chat", [HELLO], keep_alive="5"), 400, 'time: missing unit in duration "5"'),
        (lambda client: client.chat("chat", [HELLO], options={"seed": "x"}), 400, 'option "seed" must be of type i'),
        (lambda client: client.push("chat"), 501, "push is not supported"),
    ],
)
def test_what_cannot_be_done_is_told_as_ollama_tells_it(
    client: ollama.Client, ask: Any, status: int, told: str
) -> None:
    with pytest.raises(ollama.ResponseError) as refused:
        ask(client)
    assert refused.value.status_code == status
    assert refused.value.error.startswith(told)


def test_a_runner_that_dies_ends_the_stream_with_a_line_that_says_so(service: Service, client: ollama.Client) -> None:
    lines = client.chat("endless", [HELLO], stream=True)
    assert next(lines).message.content
    (pid,) = (one["pid"] for one in service.get("/status")["runners"] if one["model"] == "endless")
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ollama.ResponseError, match=r"model runner has unexpectedly stopped.*SIGKILL"):
        list(lines)


def test_a_client_that_leaves_ends_its_generation(service: Service, client: ollama.Client) -> None:
    lines = client.generate("endless", "hello", stream=True)
    assert next(lines).response
    lines.close()  # type: ignore[attr-defined]  # it is a generator
    client.generate("endless", "hello", options={"num_predict": 1})  # the only slot is free again


def test_the_doors_that_programs_knock_at_answer(service: Service) -> None:
    version = service.get("/api/version")["version"]
    assert all(part.isdigit() for part in version.split("."))
    assert service.request("GET", "/").read() == b"Ollama is running"
    for path in ("/", "/api/version", "/api/tags"):
        answer = service.request("HEAD", path)
        assert (answer.status, answer.read()) == (200, b"")
    wrong = service.request("GET", "/api/chat")
    assert (wrong.status, json.loads(wrong.read())["error"]) == (405, "GET is not allowed here; allowed: POST")


def test_lines_are_json_objects_of_their_type(service: Service) -> None:
    streamed = service.request("POST", "/api/generate", {"model": "chat", "prompt": "hi"})
    assert streamed.headers["Content-Type"] == "application/x-ndjson"
    assert streamed.headers["X-Loadmaster-Model"] == "chat"
    lines = [json.loads(line) for line in streamed.read().splitlines()]
    assert all(line["created_at"].endswith("Z") for line in lines)
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    image = base64.b64encode(picture()).decode()
    whole = service.request("POST", "/api/generate", {"model": "chat", "prompt": "hi", "stream": False})
    assert whole.headers["Content-Type"] == "application/json; charset=utf-8"
    refused = service.request("POST", "/api/generate", {"model": "chat", "prompt": "hi", "images": [image + "!"]})
    assert (refused.status, json.loads(refused.read())["error"]) == (400, "illegal base64 data in images")
