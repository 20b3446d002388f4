"""A model over three unequal workers, of which one is killed in mid-stream and comes back."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
import anyio
import pytest
from event_log import EventLog
from rpc_worker import RpcWorker, start_worker
from running_service import Serve
from supervising import Supervising, only_runner, story_of_loss

from planner.types import Role
from supervisor.api.lease import Lease
from supervisor.runtime import Supervisor

pytestmark = pytest.mark.llama

# 1.5, 0.7 and 0.4 GiB by 1000 / 13: small enough for this model to need all three.
CAPS_KIB = (19968, 9318, 5325)


@pytest.fixture
def start(llama_tools: Path) -> Iterator[Callable[..., RpcWorker]]:
    """Return a function that starts a worker, at an endpoint of before if it is told one."""
    with ExitStack() as stack:

        def run(again_on: str | None = None) -> RpcWorker:
            worker = start_worker(llama_tools, again_on)
            stack.callback(worker.stop)
            return worker

        yield run


@asynccontextmanager
async def answering(lease: Lease, n_events: int) -> AsyncIterator[None]:
    """Ask for an endless answer and go on after so many events of it; it is not cut off before the context is left."""
    body = {"messages": [{"role": "user", "content": "hello"}], "stream": True}
    headers = {"Authorization": f"Bearer {lease.endpoint.api_key}"}
    async with (
        aiohttp.ClientSession(lease.endpoint.base_url, headers=headers) as session,
        session.post("/v1/chat/completions", json=body) as response,
    ):
        async for line in response.content:
            if line.startswith(b"data: ") and json.loads(line[6:])["choices"]:
                n_events -= 1
            if n_events == 0:
                break
        yield


def servers(workers: list[RpcWorker]) -> str:
    """Return the setting that names these workers with their caps."""
    return ",".join(f"{worker.endpoint}={cap}KiB" for worker, cap in zip(workers, CAPS_KIB, strict=True))


def used(supervisor: Supervisor) -> list[str]:
    """Return the devices that the one runner uses."""
    runner = only_runner(supervisor)
    return [use.device for use in runner.uses if use.planned_bytes]


@pytest.mark.anyio
async def test_a_worker_that_dies_under_a_stream_is_told_left_out_and_used_again_when_it_is_back(
    supervising: Supervising,
    models: Callable[..., Path],
    endless_model: Path,
    start: Callable[..., RpcWorker],
    log: EventLog,
) -> None:
    workers = [start() for _ in CAPS_KIB]
    settings = {"PLANNER_RPC_SERVERS": servers(workers)}
    async with supervising(models(endless_model), settings, keep_alive_s=0.0) as supervisor:
        async with supervisor.acquire("tiny-endless", Role.CHAT) as lease:
            assert used(supervisor) == ["RPC0", "RPC1", "RPC2", "Host"]
            async with answering(lease, 3):
                workers[1].process.kill()
                with anyio.fail_after(30):
                    assert await story_of_loss(lease)
        async with supervisor.acquire("tiny-endless", Role.CHAT) as lease:
            machine = supervisor.snapshot().machine
            assert machine is not None
            gone = next(device for device in machine.devices if device.endpoint == workers[1].endpoint)
            assert not gone.usable
            assert "unreachable" in gone.description
            assert "cannot connect" in str(gone.why_not)
            assert gone.name not in used(supervisor)
            async with answering(lease, 3):
                pass
        await log.wait("runner.stopping")  # unused, since nothing is kept
        start(workers[1].endpoint)
        async with supervisor.acquire("tiny-endless", Role.CHAT) as lease:
            assert used(supervisor) == ["RPC0", "RPC1", "RPC2", "Host"]
            async with answering(lease, 3):
                pass


def test_what_users_see_of_a_worker_that_dies_is_in_the_stream_and_in_the_status(
    serve: Serve, endless_model: Path, start: Callable[..., RpcWorker]
) -> None:
    workers = [start() for _ in CAPS_KIB]
    service = serve(PLANNER_RPC_SERVERS=servers(workers), PLANNER_CONTEXT_LENGTH="512")
    gone = workers[1].endpoint

    def on_workers() -> list[str]:
        return [one["device"] for one in service.runner()["devices"] if one["device"] != "Host"]

    stream = service.chat("tiny-endless", stream=True)
    assert stream.read(10)
    assert on_workers() == ["RPC0", "RPC1", "RPC2"]
    workers[1].process.kill()
    rest = stream.read().decode()
    assert '"code": "runner_lost"' in rest
    assert "killed by SIGABRT" in rest
    assert "[DONE]" not in rest
    assert gone in service.read_log("machine.warning")["warning"]
    (shown,) = (one for one in service.get("/status")["devices"] if not one["usable"])
    assert shown["description"] == f"{gone} (unreachable)"
    assert "start ggml-rpc-server there or take it out of RPC_SERVERS" in shown["why_not"]
    assert service.chat("tiny-endless", max_tokens=2).status == 200
    assert 0 < len(on_workers()) < len(workers), "as many as help, of those that are left"
    start(gone)
    assert service.request("POST", "/api/generate", {"model": "tiny-endless", "keep_alive": 0}).status == 200
    assert service.chat("tiny-endless", max_tokens=2).status == 200
    assert on_workers() == ["RPC0", "RPC1", "RPC2"]
    assert all(one["usable"] for one in service.get("/status")["devices"])
