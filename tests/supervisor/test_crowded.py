"""More requests than slots, of several clients, over real HTTP: bounded, fair, and left without a trace."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from pathlib import Path

import pytest
from running_service import WITHIN_S, Serve, Service

pytestmark = pytest.mark.llama

GREEDY, MODEST, THIRD = "127.0.0.1", "127.0.0.2", "127.0.0.3"
ASKED = json.dumps({"model": "tiny-endless", "stream": True, "messages": [{"role": "user", "content": "hello"}]})


@pytest.fixture
def connections() -> Iterator[ExitStack]:
    """Close every connection after the test."""
    with ExitStack() as stack:
        yield stack


def asking(connections: ExitStack, service: Service, client: str) -> HTTPConnection:
    """Ask from this address for an answer without an end."""
    connection = HTTPConnection("127.0.0.1", service.port, timeout=WITHIN_S, source_address=(client, 0))
    connections.enter_context(closing(connection))
    connection.request("POST", "/v1/chat/completions", ASKED)
    return connection


def wait_for(service: Service, *, waiting: int) -> None:
    while service.get("/status")["queue"]["waiting"] != waiting:
        pass  # it is on its way; each question takes its time


def test_one_clients_crowd_is_refused_beyond_its_share_and_another_client_is_served_before_the_rest_of_it(
    serve: Serve, connections: ExitStack, endless_model: Path
) -> None:
    service = serve(PLANNER_CLIENT_QUEUE="2", PLANNER_MAX_QUEUE="3", PLANNER_CONTEXT_LENGTH="32768")
    served = asking(connections, service, GREEDY)
    assert served.getresponse().read(10)
    crowd = [asking(connections, service, GREEDY) for _ in range(2)]
    wait_for(service, waiting=2)
    too_many = asking(connections, service, GREEDY).getresponse()
    assert (too_many.status, json.load(too_many)["error"]["code"]) == (429, "client_limit")
    assert int(too_many.headers["Retry-After"]) > 0
    modest = asking(connections, service, MODEST)
    wait_for(service, waiting=3)
    full = asking(connections, service, THIRD).getresponse()
    assert (full.status, json.load(full)["error"]["code"]) == (503, "queue_full")
    assert int(full.headers["Retry-After"]) > 0
    crowd.pop().close()
    wait_for(service, waiting=2)
    served.close()
    assert modest.getresponse().read(10)
    wait_for(service, waiting=1)
    modest.close()
    assert crowd.pop().getresponse().read(10)


def test_a_runner_serves_as_many_at_a_time_as_there_was_found_to_be_room_for(
    serve: Serve, connections: ExitStack, endless_model: Path
) -> None:
    """Each of them at once, and one more waits; another model beside it has as many."""
    service = serve(PLANNER_NUM_PARALLEL="auto", PLANNER_CONTEXT_LENGTH="16384")
    streams = [asking(connections, service, GREEDY).getresponse() for _ in range(4)]
    assert all(stream.read(10) for stream in streams)
    asking(connections, service, MODEST)
    wait_for(service, waiting=1)
    assert service.chat("tiny-chat", max_tokens=1).status == 200
    runners = {one["model"]: one for one in service.get("/status")["runners"]}
    assert {name: one["slots"] for name, one in runners.items()} == {"tiny-endless": 4, "tiny-chat": 4}
    assert runners["tiny-endless"]["in_flight"] == 4


def test_one_clients_crowd_leaves_room_for_others_where_nothing_is_said_of_it(
    serve: Serve, connections: ExitStack, endless_model: Path
) -> None:
    service = serve(PLANNER_MAX_QUEUE="4", PLANNER_CONTEXT_LENGTH="32768")
    assert asking(connections, service, GREEDY).getresponse().read(10)
    crowd = [asking(connections, service, GREEDY) for _ in range(2)]
    wait_for(service, waiting=len(crowd))
    too_many = asking(connections, service, GREEDY).getresponse()
    assert (too_many.status, json.load(too_many)["error"]["code"]) == (429, "client_limit")
    asking(connections, service, MODEST)
    wait_for(service, waiting=len(crowd) + 1)
