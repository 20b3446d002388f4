"""Requests that wait for a real llama-server, each for its turn, and who leaves meanwhile."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest
from event_log import EventLog
from supervising import Models, Supervising, ask, hold, load, only_runner

from planner.types import Role
from supervisor.api.errors import (
    QueueFull,
)
from supervisor.runtime import Supervisor

pytestmark = [pytest.mark.anyio, pytest.mark.llama]


async def test_more_requests_than_slots_wait_their_turn(
    supervising: Supervising, models: Models, chat_model: Path
) -> None:
    order: list[str] = []

    async def request(name: str, supervisor: Supervisor) -> None:
        async with supervisor.acquire("tiny-chat", Role.CHAT) as lease:
            order.append(f"{name} begins")
            await ask(lease, max_tokens=2)
            order.append(f"{name} ends")

    async with supervising(models(chat_model)) as supervisor, anyio.create_task_group() as tasks:
        tasks.start_soon(request, "first", supervisor)
        await anyio.lowlevel.checkpoint()
        tasks.start_soon(request, "second", supervisor)
    assert order == ["first begins", "first ends", "second begins", "second ends"]


async def test_a_full_queue_refuses(supervising: Supervising, models: Models, chat_model: Path) -> None:
    async with supervising(models(chat_model), max_queue=1) as supervisor:
        async with supervisor.acquire("tiny-chat", Role.CHAT), anyio.create_task_group() as tasks:
            tasks.start_soon(hold, supervisor)
            await anyio.wait_all_tasks_blocked()
            assert supervisor.snapshot().queue_length == 1
            with pytest.raises(QueueFull):
                await hold(supervisor)
            tasks.cancel_scope.cancel()
        assert supervisor.snapshot().queue_length == 0, "who was cancelled waits no more"
        assert only_runner(supervisor).in_flight == 0


async def test_a_lease_comes_back_when_its_holder_is_cancelled(
    supervising: Supervising, models: Models, chat_model: Path
) -> None:
    async with supervising(models(chat_model)) as supervisor:
        with anyio.CancelScope() as scope:
            async with supervisor.acquire("tiny-chat", Role.CHAT):
                scope.cancel()
                await anyio.sleep_forever()
        assert only_runner(supervisor).in_flight == 0


async def test_a_client_that_leaves_while_its_model_loads_leaves_the_load_to_the_next_one(
    supervising: Supervising, models: Models, chat_model: Path, log: EventLog
) -> None:
    async with supervising(models(chat_model)) as supervisor:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hold, supervisor)
            await log.wait("runner.loading")
            tasks.cancel_scope.cancel()
        assert supervisor.snapshot().queue_length == 0
        await log.wait("runner.ready")
        assert only_runner(supervisor).in_flight == 0
        await load(supervisor, "tiny-chat", Role.CHAT)
        assert len(log.of("plan.final")) == 1


async def test_models_are_swapped_where_only_one_may_be_loaded(
    supervising: Supervising, models: Models, chat_model: Path, embedding_model: Path
) -> None:
    async with supervising(models(chat_model, embedding_model), max_loaded_models=1) as supervisor:
        await load(supervisor, "tiny-chat", Role.CHAT)
        async with supervisor.acquire("tiny-embedding", Role.EMBEDDING):
            assert [runner.model for runner in supervisor.snapshot().runners] == ["tiny-embedding"]


async def test_two_models_load_side_by_side_on_the_host(
    supervising: Supervising, models: Models, chat_model: Path, embedding_model: Path, log: EventLog
) -> None:
    """Neither waits until the other is ready."""
    async with supervising(models(chat_model, embedding_model)) as supervisor, anyio.create_task_group() as tasks:
        tasks.start_soon(load, supervisor, "tiny-chat", Role.CHAT)
        tasks.start_soon(load, supervisor, "tiny-embedding", Role.EMBEDDING)
        await log.wait("runner.ready", count=2)
        events = [entry["event"] for entry in log.entries]
        assert len([event for event in events[: events.index("runner.ready")] if event == "plan.final"]) == 2
    (host,) = [one for one in supervisor.snapshot().ledger if one.device == "Host"]
    assert host.held_bytes == 0, "all are gone"
