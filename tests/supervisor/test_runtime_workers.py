"""Models on RPC workers: each serves one client, and keeps its name while it does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from rpc_worker import RpcWorker
from supervising import Models, Supervising, load, only_runner, took_what_was_planned

from planner.types import HOST, Role
from planner.units import MIB
from supervisor.runtime import Supervisor

pytestmark = [pytest.mark.anyio, pytest.mark.llama]


def used_workers(supervisor: Supervisor) -> dict[str, str | None]:
    """Return the endpoints of the workers that the only runner uses, by the names of their devices."""
    machine = supervisor.snapshot().machine
    assert machine is not None
    used = [use.device for use in only_runner(supervisor).uses if use.device != HOST]
    return {device: machine.device(device).endpoint for device in used}


async def test_workers_serve_one_model_at_a_time_with_the_bytes_that_were_planned(
    supervising: Supervising,
    models: Models,
    chat_model: Path,
    embedding_model: Path,
    rpc_workers: Callable[[int], tuple[RpcWorker, ...]],
) -> None:
    """A worker serves one client, so the second model waits for the first, idle, to be stopped."""
    endpoints = ",".join(worker.endpoint for worker in rpc_workers(2))
    settings = {"PLANNER_RPC_SERVERS": endpoints, "PLANNER_SCHED_SPREAD": "1"}
    async with supervising(models(chat_model, embedding_model), settings) as supervisor:
        for model, role in (("tiny-chat", Role.CHAT), ("tiny-embedding", Role.EMBEDDING)):
            async with supervisor.acquire(model, role):
                runner = only_runner(supervisor)
            assert runner.model == model
            assert [use.device for use in runner.uses] == ["RPC0", "RPC1", "Host"]
            assert took_what_was_planned(runner)


async def test_a_worker_in_use_keeps_its_name_when_another_vanishes(
    supervising: Supervising,
    models: Models,
    chat_model: Path,
    embedding_model: Path,
    rpc_workers: Callable[[int], tuple[RpcWorker, ...]],
) -> None:
    """Else what is held there would be booked under another worker's name; also when the planner is replaced."""
    small, first, second = rpc_workers(3)
    settings = {"PLANNER_RPC_SERVERS": f"{small.endpoint}=1KiB,{first.endpoint}=8GiB,{second.endpoint}=8GiB"}
    async with supervising(models(chat_model, embedding_model), settings) as supervisor:
        async with supervisor.acquire("tiny-chat", Role.CHAT):
            assert [use.device for use in only_runner(supervisor).uses] == ["RPC1", "Host"]
            small.stop()
            planning = next(one for one in psutil.Process().children() if "planning.worker" in one.cmdline()[-1])
            planning.kill()
            planning.wait()
            async with supervisor.acquire("tiny-embedding", Role.EMBEDDING):
                runners = supervisor.snapshot().runners
        machine = supervisor.snapshot().machine
    assert machine is not None
    endpoints = {str(device.name): device.endpoint for device in machine.devices}
    assert endpoints.pop("RPC1") == first.endpoint
    on = {runner.model: runner.uses[0].device for runner in runners}
    assert on["tiny-chat"] == "RPC1"
    assert endpoints[on["tiny-embedding"]] == second.endpoint


async def test_memory_that_was_yielded_of_a_worker_stays_so_under_its_next_name(
    supervising: Supervising,
    models: Models,
    chat_model: Path,
    rpc_workers: Callable[[int], tuple[RpcWorker, ...]],
) -> None:
    """Workers that nobody uses are numbered anew when one has died: then another one has the name that was told."""
    small, first, second = rpc_workers(3)
    settings = {"PLANNER_RPC_SERVERS": f"{small.endpoint}=1KiB,{first.endpoint}=64MiB,{second.endpoint}=64MiB"}
    async with supervising(models(chat_model), settings) as supervisor:
        await load(supervisor, "tiny-chat", Role.CHAT)
        assert used_workers(supervisor) == {"RPC1": first.endpoint}
        small.stop()
        given = await supervisor.yield_memory("RPC1", 64 * MIB, 60.0)
        assert (given.device, given.short_bytes) == ("RPC0", 0)
        assert given.freed_bytes > 0
        assert next(row for row in supervisor.snapshot().ledger if row.device == "RPC0").cap_bytes == 0
        await load(supervisor, "tiny-chat", Role.CHAT)
        assert used_workers(supervisor) == {"RPC1": second.endpoint}
        await supervisor.unload("tiny-chat")
        assert await supervisor.end_yield("RPC0")
        await load(supervisor, "tiny-chat", Role.CHAT)
        assert used_workers(supervisor) == {"RPC0": first.endpoint}
