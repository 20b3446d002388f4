"""Real llama-servers that go: idle, unloaded, making room for another program, or with the service."""

from __future__ import annotations

import math
import time
from pathlib import Path

import anyio
import psutil
import pytest
from event_log import EventLog
from supervising import Models, Supervising, ask, hold, load, only_runner, pid_of, story_of_loss, took_what_was_planned

from planner.types import Role
from supervisor.api.errors import (
    CannotFit,
    ShuttingDown,
    UnknownDevice,
)
from supervisor.api.need import Need
from supervisor.children.spare import is_at_gate

pytestmark = [pytest.mark.anyio, pytest.mark.llama]


async def test_an_idle_model_is_unloaded(
    supervising: Supervising, models: Models, chat_model: Path, log: EventLog
) -> None:
    async with supervising(models(chat_model), keep_alive_s=0.0) as supervisor:
        async with supervisor.acquire("tiny-chat", Role.CHAT):
            pid = pid_of(supervisor)
        await log.wait("runner.stopped")
        assert supervisor.snapshot().runners == ()
        assert not psutil.pid_exists(pid), "it is reaped"
        assert list((supervisor._options.state_dir / "runners").iterdir()) == []


async def test_a_runner_that_is_stopped_is_told_of_before_it_is(
    supervising: Supervising, models: Models, chat_model: Path
) -> None:
    """Whoever keeps a connection to it open can end that first, and does not keep it from going."""
    told: list[tuple[str, bool]] = []
    async with supervising(models(chat_model)) as supervisor:
        async with supervisor.acquire("tiny-chat", Role.CHAT) as lease:
            url, pid = lease.endpoint.base_url, pid_of(supervisor)
        supervisor.when_stopped(lambda stopped: told.append((stopped, psutil.pid_exists(pid))))
        assert await supervisor.unload("tiny-chat")
        assert told == [(url, True)]


async def test_a_model_that_was_unloaded_is_loaded_again_in_the_llama_server_that_waits_for_it(
    supervising: Supervising, models: Models, chat_model: Path
) -> None:
    """It waits unseen, and takes nothing that was not planned; with the service it goes."""
    async with supervising(models(chat_model)) as supervisor:
        await load(supervisor, "tiny-chat", Role.CHAT)
        assert await supervisor.unload("tiny-chat")
        waits = await one_at_its_gate()
        line = psutil.Process(waits).cmdline()
        assert supervisor.snapshot().runners == ()
        async with supervisor.acquire("tiny-chat", Role.CHAT) as lease:
            assert (await ask(lease)).startswith("Hello!")
            assert (pid := pid_of(supervisor)) == waits, (line, psutil.Process(pid).cmdline())
            assert took_what_was_planned(only_runner(supervisor))
        assert await supervisor.unload("tiny-chat")
        waits = await one_at_its_gate()
    assert not psutil.pid_exists(waits)


async def one_at_its_gate() -> int:
    """Return the process id of a child that waits for a model to be asked for, once there is one."""
    with anyio.fail_after(30):
        while True:
            if found := [one.pid for one in psutil.Process().children() if is_at_gate(one.pid)]:
                return found[0]
            await anyio.sleep(0.01)


async def test_a_request_says_how_long_its_model_stays(
    supervising: Supervising, models: Models, chat_model: Path, log: EventLog
) -> None:
    async with supervising(models(chat_model)) as supervisor:
        async with supervisor.acquire("tiny-chat", Role.CHAT, Need(keep_alive_s=math.inf)):
            pass
        assert (only_runner(supervisor).expires_at, only_runner(supervisor).keep_alive_s) == (None, math.inf)
        async with supervisor.acquire("tiny-chat", Role.CHAT, Need(keep_alive_s=0.0)):
            assert (only_runner(supervisor).expires_at, only_runner(supervisor).keep_alive_s) == (None, 0.0)
        await log.wait("runner.stopped")


async def test_unloading_lets_streams_finish_and_returns_once_the_child_is_gone(
    supervising: Supervising, models: Models, chat_model: Path
) -> None:
    # On cores that others keep busy each of llama-server's two threads waits for the other, and a stream takes seconds.
    async with supervising(models(chat_model), drain_timeout_s=60.0) as supervisor:
        assert not await supervisor.unload("tiny-chat"), "nothing was loaded"
        async with anyio.create_task_group() as tasks, supervisor.acquire("tiny-chat", Role.CHAT) as lease:
            pid = pid_of(supervisor)
            tasks.start_soon(supervisor.unload, "tiny-chat")
            await anyio.wait_all_tasks_blocked()
            assert only_runner(supervisor).state == "draining"
            assert (await ask(lease)).startswith("Hello!")
        assert not psutil.pid_exists(pid)
        assert supervisor.snapshot().runners == ()


async def test_memory_is_yielded_by_runners_that_are_idle_or_fall_idle_and_left_alone_for_a_while(
    supervising: Supervising, models: Models, chat_model: Path, embedding_model: Path, log: EventLog
) -> None:
    """All that is free and more is asked for: the idle one goes, the busy one once it is idle, and none is loaded."""
    async with supervising(models(chat_model, embedding_model)) as supervisor:
        await load(supervisor, "tiny-embedding", Role.EMBEDDING)
        async with supervisor.acquire("tiny-chat", Role.CHAT):
            result = await supervisor.yield_memory("Host", 1 << 60, 60.0)
            assert only_runner(supervisor).state == "draining"
            assert supervisor.snapshot().counters["tiny-embedding"].evictions == 1
            assert set(result.awaited_bytes) == {"tiny-chat"}
            assert result.until > time.time()
            with pytest.raises(CannotFit, match="planner yield") as refused:
                await load(supervisor, "tiny-embedding", Role.EMBEDDING)
        await log.wait("runner.stopped", count=2)
        assert supervisor.snapshot().counters["tiny-chat"].evictions == 1
        assert result.freed_bytes > 0
        assert result.short_bytes
        assert not refused.value.never
        assert 0 < (refused.value.retry_after_s or 0) <= 60
        with pytest.raises(UnknownDevice, match=r"there are: .*Host"):
            await supervisor.yield_memory("CUDA7", 1, 1.0)
        with pytest.raises(UnknownDevice, match=r"there are: .*Host"):
            await supervisor.end_yield("CUDA7")
        assert await supervisor.end_yield("Host")
        await load(supervisor, "tiny-embedding", Role.EMBEDDING)
        assert not await supervisor.end_yield("Host")


async def test_shutting_down_lets_requests_finish_and_takes_no_new_ones(
    supervising: Supervising, models: Models, chat_model: Path
) -> None:
    async with supervising(models(chat_model), drain_timeout_s=60.0) as supervisor:
        async with supervisor.acquire("tiny-chat", Role.CHAT) as lease:
            supervisor.shut_down()
            assert supervisor.snapshot().draining
            assert supervisor.snapshot().not_ready
            with pytest.raises(ShuttingDown):
                await load(supervisor, "tiny-chat", Role.CHAT)
            assert (await ask(lease)).startswith("Hello!")
        with anyio.fail_after(30):
            await supervisor.wait_stopped()


async def test_shutting_down_ends_a_load_and_refuses_who_waits_for_it(
    supervising: Supervising, models: Models, chat_model: Path, log: EventLog
) -> None:
    async with supervising(models(chat_model)) as supervisor:

        async def wait_in_vain() -> None:
            with pytest.raises(ShuttingDown):
                await hold(supervisor)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait_in_vain)
            child = psutil.Process((await log.wait("runner.loading"))["pid"])
            supervisor.shut_down()
        with anyio.fail_after(30):
            await supervisor.wait_stopped()
        assert not child.is_running()


async def test_a_stream_that_does_not_finish_in_time_is_told_before_its_child_has_gone(
    supervising: Supervising, models: Models, chat_model: Path
) -> None:
    """The child is stopped from running at all, so nothing can come from its exit."""
    async with (
        supervising(models(chat_model), drain_timeout_s=0.0) as supervisor,
        supervisor.acquire("tiny-chat", Role.CHAT) as lease,
    ):
        child = psutil.Process(pid_of(supervisor))
        child.suspend()
        try:
            supervisor.shut_down()
            with anyio.fail_after(30):
                assert "0 s of DRAIN_TIMEOUT" in await story_of_loss(lease)
            assert child.is_running()
            assert only_runner(supervisor).state == "stopping"
        finally:
            child.resume()
