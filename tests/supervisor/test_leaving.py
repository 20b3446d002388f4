"""Clients that leave and a service that stops, over real HTTP: nothing is lost, nothing is left."""

from __future__ import annotations

import json
from http.client import HTTPConnection
from pathlib import Path

import openai
import pytest
from running_service import WITHIN_S, Serve, Service

pytestmark = pytest.mark.llama


def ask_and_leave_open(service: Service, model: str) -> HTTPConnection:
    """Send a chat request and do not wait for its answer."""
    connection = HTTPConnection("127.0.0.1", service.port, timeout=WITHIN_S)
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}]}
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    return connection


def test_who_leaves_while_a_model_loads_waits_no_more_and_the_load_goes_on(
    serve: Serve, chat_model: Path, held_back: Path, gate: Path
) -> None:
    service = serve(PLANNER_LLAMA_SERVER=str(held_back))
    connections = [ask_and_leave_open(service, "tiny-chat") for _ in range(2)]
    service.read_log("runner.starting")
    while service.get("/status")["queue"]["waiting"] < len(connections):
        pass  # the second may still be on its way; each question takes its time
    for left in (1, 0):
        connections.pop().close()
        assert service.read_log("request")["status"] == 499
        assert service.get("/status")["queue"]["waiting"] == left
    gate.write_text("go\n")
    service.read_log("runner.ready")
    assert service.runner()["in_flight"] == 0
    assert service.chat("tiny-chat").status == 200
    (model,) = [one for one in service.get("/status")["models"] if one["id"] == "tiny-chat"]
    assert model["counters"]["launches"] == 1


def test_a_stream_that_ends_within_the_bound_is_whole_though_the_service_is_stopping(
    serve: Serve, endless_model: Path
) -> None:
    service = serve(PLANNER_DRAIN_TIMEOUT="1h", PLANNER_STOP_GRACE="200ms")
    stream = service.chat("tiny-endless", stream=True, max_tokens=400)
    assert stream.read(10)
    service.process.terminate()
    service.read_log("serve.stopping")
    ready = service.request("GET", "/readyz")
    assert (ready.status, json.load(ready)["reasons"]) == (503, ["the service is shutting down"])
    assert stream.read().endswith(b"data: [DONE]\n\n")
    assert service.process.wait(WITHIN_S) == 0


def test_a_stream_that_does_not_end_is_ended_with_an_error_that_its_client_shows(
    serve: Serve, endless_model: Path
) -> None:
    service = serve(PLANNER_DRAIN_TIMEOUT="300ms", PLANNER_STOP_GRACE="200ms")
    with openai.OpenAI(base_url=f"http://127.0.0.1:{service.port}/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(
            model="tiny-endless", messages=[{"role": "user", "content": "hello"}], stream=True
        )
        assert next(stream).choices
        service.process.terminate()
        with pytest.raises(openai.APIError, match=r"did not finish in the .* of DRAIN_TIMEOUT"):
            for _ in stream:
                pass
    assert service.process.wait(WITHIN_S) == 0
