"""What the fixtures of this folder are functions of, and what tests do with the supervisor that they get."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import anyio

from planner.types import Role
from supervisor.api.lease import Lease
from supervisor.api.snapshot import RunnerView
from supervisor.runtime import Supervisor

PRINTED_TO = 3 * 0.01 * 1024 * 1024  # llama-server prints each of the three sums in MiB with two decimals

Models = Callable[..., Path]
Supervising = Callable[..., AbstractAsyncContextManager[Supervisor]]


@dataclass(slots=True)
class Holding:
    """Runners that hold so much, as far as an inventory asks (``supervisor.inventory.Runners``)."""

    held: dict[str, int] = field(default_factory=dict)
    promised: dict[str, int] = field(default_factory=dict)

    def held_bytes(self) -> dict[str, int]:
        return self.held

    def promised_bytes(self) -> dict[str, int]:
        return self.promised

    def follow_models(self) -> None:
        """There are none that could."""

    def follow_devices(self, names: Mapping[str, str]) -> None:
        """Nothing is remembered of any."""


async def story_of_loss(lease: Lease) -> str:
    """Return what is told once the runner behind this lease has died."""
    told: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    lease.when_lost(told.set_result)
    return await told


async def ask(lease: Lease, **body: object) -> str:
    """Return what the model says to hello; ``body`` is more of the request."""
    headers = {"Authorization": f"Bearer {lease.endpoint.api_key}"}
    body = {"messages": [{"role": "user", "content": "hello"}], **body}
    async with (
        aiohttp.ClientSession(lease.endpoint.base_url, headers=headers) as session,
        session.post("/v1/chat/completions", json=body) as response,
    ):
        assert response.status == 200, await response.text()
        answer = await response.json()
    return str(answer["choices"][0]["message"]["content"])


def only_runner(supervisor: Supervisor) -> RunnerView:
    """Return the runner that is there; there has to be exactly one."""
    (runner,) = supervisor.snapshot().runners
    return runner


def took_what_was_planned(runner: RunnerView) -> bool:
    """Say whether every device gave what was planned of it, as far as llama-server tells."""
    return all(
        use.planned_bytes is not None
        and use.measured_bytes is not None
        and abs(use.measured_bytes - use.planned_bytes) <= PRINTED_TO
        for use in runner.uses
    )


def pid_of(supervisor: Supervisor) -> int:
    """Return the process of the only runner."""
    pid = only_runner(supervisor).pid
    assert pid is not None
    return pid


async def load(supervisor: Supervisor, model: str, role: Role) -> None:
    """Wait for a lease on a model, and give it back."""
    async with supervisor.acquire(model, role):
        pass


async def hold(supervisor: Supervisor) -> None:
    """Wait for a lease on the chat model, and keep it."""
    async with supervisor.acquire("tiny-chat", Role.CHAT):
        await anyio.sleep_forever()
