"""RPC workers: real ones, alive, busy and dead, and what is none."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from config.values import RpcServer
from gpu import host
from gpu.rpc import PINNED_PROTOCOL, WorkerState, probe, probe_all
from gpu.rpc_devices import RpcDevices, ask_workers, rpc_devices
from planner.types import HOST, HOST_POOL, Device, DeviceKind, Machine

GIB = 1024**3
SHORT_S = 0.3  # what a busy worker is given to answer: it never does, so more would only be waiting

Workers = Callable[[int], tuple[Any, ...]]


def _server(endpoint: str, cap_bytes: int | None = None) -> RpcServer:
    name, _, port = endpoint.rpartition(":")
    return RpcServer(name, int(port), cap_bytes)


def look(
    servers: list[RpcServer],
    memory: host.HostMemory,
    leased: frozenset[str] = frozenset(),
    known: Machine | None = None,
) -> RpcDevices:
    asked = ask_workers(servers, protocol=PINNED_PROTOCOL, leased=leased)
    return rpc_devices(servers, asked, protocol=PINNED_PROTOCOL, memory=memory, known=known)


@pytest.fixture
def closed_endpoint() -> str:
    """Return an address where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture
def web_server() -> Iterator[str]:
    """Return an address where somebody answers everything in another protocol."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(64)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


def test_a_ready_worker_tells_its_protocol_and_its_devices(rpc_workers: Workers) -> None:
    (worker,) = rpc_workers(1)
    found = probe(worker.endpoint, protocol=PINNED_PROTOCOL)
    assert found.state is WorkerState.READY
    assert found.protocol == PINNED_PROTOCOL
    (device,) = found.devices
    assert device.is_cpu
    assert device.alignment_bytes == 32
    assert device.total_bytes > 0


def test_a_worker_may_be_asked_again_and_again(rpc_workers: Workers) -> None:
    (worker,) = rpc_workers(1)
    states = {probe(worker.endpoint, protocol=PINNED_PROTOCOL).state for _ in range(1500)}  # more than a pipe holds
    assert states == {WorkerState.READY}
    assert worker.process.poll() is None


def test_a_busy_worker_is_told_apart_and_survives_being_asked(rpc_workers: Workers) -> None:
    (worker,) = rpc_workers(1)
    host_name, _, port = worker.endpoint.rpartition(":")
    with socket.create_connection((host_name, int(port))):  # a client that holds the worker
        found = probe(worker.endpoint, protocol=PINNED_PROTOCOL, timeout_s=SHORT_S)
    assert found.state is WorkerState.BUSY
    assert found.why_not is not None
    assert "another client" in str(found.why_not)
    assert probe(worker.endpoint, protocol=PINNED_PROTOCOL).state is WorkerState.READY
    assert worker.process.poll() is None


def test_a_dead_worker_is_unreachable_with_the_reason(closed_endpoint: str) -> None:
    found = probe(closed_endpoint, protocol=PINNED_PROTOCOL)
    assert found.state is WorkerState.UNREACHABLE
    assert found.why_not is not None
    assert "refused" in str(found.why_not)
    assert closed_endpoint in str(found.why_not)


def test_a_name_that_resolves_nowhere_is_unreachable() -> None:
    assert probe("no-such-host.invalid:50052", protocol=None).state is WorkerState.UNREACHABLE


def test_another_protocol_is_incompatible(web_server: str) -> None:
    assert probe(web_server, protocol=PINNED_PROTOCOL).state is WorkerState.INCOMPATIBLE


@pytest.mark.parametrize("ours", ["6.0.0", "8.0.0"])
def test_a_worker_of_another_major_version_is_incompatible(rpc_workers: Workers, ours: str) -> None:
    (worker,) = rpc_workers(1)
    found = probe(worker.endpoint, protocol=ours)
    assert found.state is WorkerState.INCOMPATIBLE
    assert found.why_not is not None
    assert PINNED_PROTOCOL in str(found.why_not)
    assert ours in str(found.why_not)


def test_a_newer_minor_version_on_our_side_is_compatible(rpc_workers: Workers) -> None:
    (worker,) = rpc_workers(1)
    assert probe(worker.endpoint, protocol="7.1.0").state is WorkerState.READY


def test_several_workers_are_asked_at_the_same_time_and_answered_in_order(
    rpc_workers: Workers, closed_endpoint: str
) -> None:
    first, second = rpc_workers(2)
    endpoints = [second.endpoint, closed_endpoint, first.endpoint]
    found = probe_all(endpoints, protocol=PINNED_PROTOCOL)
    assert [worker.endpoint for worker in found] == endpoints
    assert [worker.state for worker in found] == [WorkerState.READY, WorkerState.UNREACHABLE, WorkerState.READY]


def test_devices_are_numbered_over_the_workers_that_answer_and_the_others_stay_visible(
    rpc_workers: Workers, closed_endpoint: str
) -> None:
    first, second = rpc_workers(2)
    servers = [_server(first.endpoint, 4 * GIB), _server(closed_endpoint), _server(second.endpoint, 2 * GIB)]
    found = look(servers, host.HostMemory(64 * GIB, 32 * GIB))
    assert [(d.name, d.endpoint, d.total_bytes, d.free_bytes) for d in found.devices] == [
        ("RPC0", first.endpoint, 4 * GIB, 4 * GIB),
        ("RPC1", second.endpoint, 2 * GIB, 2 * GIB),
    ]
    (absent,) = found.absent
    assert absent.name == f"RPC[{closed_endpoint}]"
    assert not absent.usable
    assert closed_endpoint in found.warnings[0]


def test_a_cpu_worker_on_this_machine_shares_the_hosts_memory(rpc_workers: Workers) -> None:
    (worker,) = rpc_workers(1)
    memory = host.HostMemory(total_bytes=3 * GIB, available_bytes=GIB)
    (device,) = look([_server(worker.endpoint)], memory).devices
    assert device.pool == HOST_POOL
    assert (device.total_bytes, device.free_bytes) == (3 * GIB, GIB)
    assert device.overhead_bytes == 0


def test_a_worker_that_a_runner_of_ours_holds_is_not_asked_but_kept(rpc_workers: Workers) -> None:
    first, second = rpc_workers(2)
    servers = [_server(first.endpoint, 4 * GIB), _server(second.endpoint, 2 * GIB)]
    memory = host.HostMemory(64 * GIB, 32 * GIB)
    before = look(servers, memory).devices
    first.stop()  # were it asked, it would now be unreachable
    known = Machine(before, Device(HOST, DeviceKind.HOST, 64 * GIB, 32 * GIB, HOST_POOL))
    after = look(servers, memory, frozenset({first.endpoint}), known)
    assert after.devices == before
    assert after.warnings == ()
