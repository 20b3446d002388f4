"""RPC workers that a runner of ours holds: they cannot be asked, and what they have left is known all the same."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any

import anyio
import psutil
import pytest
from rpc_worker import RpcWorker, start_worker
from running_service import Serve, Service
from supervising import Holding

from planner.types import HOST, HOST_POOL, Device, DeviceKind, DeviceName, Machine, PoolId
from planner.units import MIB
from supervisor.inventory import Inventory
from supervisor.planning.messages import LookAround, ScanModels, Situation, Surroundings
from supervisor.planning.process import PlanningProcess
from supervisor.planning.worker import Worker

Workers = Callable[[int], tuple[RpcWorker, ...]]

pytestmark = pytest.mark.llama

DECLARED = 40 * MIB


def account(service: Service, name: str) -> dict[str, Any]:
    """Return what ``/status`` says of a device."""
    return next(one for one in service.get("/status")["devices"] if one["name"] == name)


def yielded(service: Service, device: str, size_bytes: int) -> dict[str, Any]:
    """Return the answer to somebody who wants so much of a device."""
    asked = {"device": device, "bytes": size_bytes, "for_seconds": 60}
    return dict(json.loads(service.request("POST", "/manage/yield", asked).read()))


def test_what_a_held_worker_has_left_is_its_declared_size_without_what_our_runner_holds_wherever_it_is_told(
    serve: Serve, chat_model: Path, rpc_workers: Workers
) -> None:
    (worker,) = rpc_workers(1)
    service = serve(PLANNER_RPC_SERVERS=f"{worker.endpoint}={DECLARED}")
    assert account(service, "RPC0")["free_bytes"] == DECLARED
    service.chat("tiny-chat", max_tokens=1).read()
    there = account(service, "RPC0")
    left = DECLARED - there["held_bytes"]
    assert (there["held_bytes"] > 0, there["free_bytes"]) == (True, left)
    metrics = service.request("GET", "/metrics").read().decode()
    told = re.search(r'^loadmaster_device_free_bytes{device="RPC0",kind="rpc"} (.*)$', metrics, re.MULTILINE)
    assert told is not None
    assert float(told.group(1)) == left

    given = yielded(service, "RPC0", left)
    assert (given["freed_bytes"], given["free_bytes"], given["short_bytes"]) == (0, left, 0)
    assert service.runner()["state"] == "ready"

    given = yielded(service, "RPC0", left + 1)
    assert (given["freed_bytes"], given["free_bytes"], given["short_bytes"]) == (there["held_bytes"], DECLARED, 0)
    assert account(service, "RPC0")["free_bytes"] == DECLARED


def test_a_runner_on_a_worker_of_this_machine_goes_for_the_host_s_memory_that_it_has_there(
    serve: Serve, chat_model: Path, embedding_model: Path, rpc_workers: Workers
) -> None:
    """And one on another worker stays where only what the one has of its own size is wanted."""
    first, second = rpc_workers(2)
    servers = f"{first.endpoint}={DECLARED},{second.endpoint}={DECLARED}"
    service = serve(PLANNER_RPC_SERVERS=servers, PLANNER_CACHE_RAM="0")
    service.chat("tiny-chat", max_tokens=1).read()
    service.request("POST", "/v1/embeddings", {"model": "tiny-embedding", "input": "hello"}).read()
    held = {one["model"]: {use["device"] for use in one["devices"]} for one in service.get("/status")["runners"]}
    assert sorted(map(len, held.values())) == [2, 2], held
    given = yielded(service, "RPC0", DECLARED)
    assert (given["free_bytes"], given["short_bytes"]) == (DECLARED, 0)
    (left,) = service.get("/status")["runners"]
    assert {use["device"] for use in left["devices"]} == {"RPC1", "Host"}
    held_there = sum(account(service, name)["held_bytes"] for name in ("RPC1", "Host"))
    assert held_there > account(service, "Host")["held_bytes"]
    assert yielded(service, "Host", 1 << 60)["freed_bytes"] == held_there
    assert service.get("/status")["runners"] == []
    refused = service.chat("tiny-chat", max_tokens=1)
    assert refused.status == 503
    assert int(refused.headers["Retry-After"]) <= 60


def planning_process() -> psutil.Process:
    """Return the planning process of this test."""
    (found,) = (one for one in psutil.Process().children() if "supervisor.planning.worker" in one.cmdline())
    return found


def taken(worker: RpcWorker) -> socket.socket:
    """Take a worker, as a runner does."""
    name, _, port = worker.endpoint.rpartition(":")
    return socket.create_connection((name, int(port)))


def left(inventory: Inventory) -> int | None:
    """Return what the worker has left."""
    assert inventory.machine is not None
    return inventory.machine.device("RPC0").free_bytes


@pytest.mark.anyio
async def test_a_look_that_waited_for_its_turn_leaves_a_worker_alone_that_was_taken_meanwhile(
    tmp_path: Path, llama_tools: Path, free_environment: dict[str, str], rpc_workers: Workers
) -> None:
    (worker,) = rpc_workers(1)
    runners = Holding()
    async with PlanningProcess(
        {**free_environment, "PLANNER_RPC_SERVERS": f"{worker.endpoint}={DECLARED}"}
    ) as planning:
        inventory = Inventory(tmp_path, planning, runners)
        await inventory.look_around()
        planning_process().suspend()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(planning.ask, ScanModels(tmp_path))
            tasks.start_soon(inventory.refresh, {})
            await anyio.wait_all_tasks_blocked()
            runners.held["RPC0"] = MIB
            client = taken(worker)
            planning_process().resume()
        with client:
            assert left(inventory) == DECLARED - MIB


@pytest.mark.anyio
async def test_a_planning_process_that_had_to_be_replaced_knows_the_workers_that_are_held_though_it_only_shows_them(
    tmp_path: Path, llama_tools: Path, free_environment: dict[str, str], rpc_workers: Workers
) -> None:
    (worker,) = rpc_workers(1)
    async with PlanningProcess(
        {**free_environment, "PLANNER_RPC_SERVERS": f"{worker.endpoint}={DECLARED}"}
    ) as planning:
        runners = Holding()
        inventory = Inventory(tmp_path, planning, runners, shown_for_s=0.0)
        await inventory.look_around()
        runners.held["RPC0"] = MIB
        with taken(worker):
            planning_process().kill()
            await inventory.refresh({})  # finds it dead
            inventory.was_shown()
            await inventory.follow_what_is_shown()
            assert left(inventory) == DECLARED - MIB
            await inventory.refresh({})
            assert left(inventory) == DECLARED - MIB


@contextmanager
def busy_at_first(worker: RpcWorker) -> Iterator[str]:
    """Stand in front of a worker that lets the first who asks wait until he gives up, and return its address."""

    def serve(listener: socket.socket) -> None:
        with suppress(OSError):  # nobody asks a second time
            answer(listener)

    def answer(listener: socket.socket) -> None:
        asked, _ = listener.accept()
        with asked, suppress(ConnectionResetError):
            while asked.recv(64):
                pass
        asked, _ = listener.accept()
        with asked, taken(worker) as answering:
            back = Thread(target=pass_on, args=(answering, asked))
            back.start()
            pass_on(asked, answering)
            back.join()

    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        thread = Thread(target=serve, args=(listener,))
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def pass_on(source: socket.socket, sink: socket.socket) -> None:
    """Pass on what comes until it ends."""
    with suppress(OSError):
        while data := source.recv(4096):
            sink.sendall(data)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)


def test_a_worker_that_still_finishes_with_a_runner_that_has_gone_is_waited_for(
    llama_tools: Path, free_environment: dict[str, str], rpc_workers: Workers
) -> None:
    """It computes to the end what it was asked before it sees that nobody wants it any more."""
    (worker,) = rpc_workers(1)
    with busy_at_first(worker) as endpoint:
        device = Device(DeviceName("RPC0"), DeviceKind.RPC, DECLARED, DECLARED, PoolId("far"), endpoint=endpoint)
        known = Machine((device,), Device(HOST, DeviceKind.HOST, None, None, HOST_POOL))
        looking = Worker({**free_environment, "PLANNER_RPC_SERVERS": f"{endpoint}={DECLARED}"})
        found = looking.answer(LookAround(Situation(known, {}, {}, {"RPC0": MIB})))
    assert isinstance(found, Surroundings)
    assert found.machine.device("RPC0").usable


def test_a_model_is_not_loaded_on_the_other_device_of_a_worker_that_a_runner_has(
    serve: Serve, chat_model: Path, embedding_model: Path, llama_tools: Path
) -> None:
    """It would wait there for as long as that runner lives."""
    with ExitStack() as stack:
        worker = start_worker(llama_tools, n_devices=2)
        stack.callback(worker.stop)
        service = serve(PLANNER_RPC_SERVERS=f"{worker.endpoint}={DECLARED}")
        service.chat("tiny-chat", max_tokens=1).read()
        assert [account(service, name)["usable"] for name in ("RPC0", "RPC1")] == [True, True]
        asked = {"model": "tiny-embedding", "input": "hello"}
        assert service.request("POST", "/v1/embeddings", asked).status == 200
        (runner,) = service.get("/status")["runners"]
        assert (runner["model"], runner["state"]) == ("tiny-embedding", "ready")
