"""Models on RPC workers: each serves one client, and keeps its name while it does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from rpc_worker import RpcWorker
from supervising import Models, Supervising, only_runner, took_what_was_planned

from planner.types import Role

pytestmark = [pytest.mark.anyio, pytest.mark.llama]


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
