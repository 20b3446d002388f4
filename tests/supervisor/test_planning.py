"""The planning process: asked, killed, hung, replaced."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import anyio
import psutil
import pytest

from planner.types import Role
from supervisor.api import PlannerFailed
from supervisor.planning import PlanningFailed, PlanningProcess
from supervisor.planning_messages import ScanModels
from supervisor.runtime import Supervisor

pytestmark = pytest.mark.anyio

Supervising = Callable[..., AbstractAsyncContextManager[Supervisor]]


def worker() -> psutil.Process:
    """Return the planning process of this test."""
    (found,) = (one for one in psutil.Process().children() if "supervisor.planning_worker" in one.cmdline())
    return found


async def killed_in_the_middle(asking: Callable[[], Awaitable[object]]) -> None:
    """Ask while the worker is held up, and kill it -9 before it can answer."""
    held_up = worker()
    held_up.suspend()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(asking)
        await anyio.wait_all_tasks_blocked()
        held_up.send_signal(signal.SIGKILL)
    assert not held_up.is_running(), "it is reaped"


async def test_a_worker_that_is_killed_gives_one_clear_error_and_is_replaced(tmp_path: Path) -> None:
    async with PlanningProcess({}) as planning:

        async def ask() -> None:
            with pytest.raises(PlanningFailed, match=r"ended \(killed by SIGKILL\).*try again"):
                await planning.ask(ScanModels(tmp_path))

        assert await planning.ask(ScanModels(tmp_path)) == ()
        first = worker().pid
        await killed_in_the_middle(ask)
        assert await planning.ask(ScanModels(tmp_path)) == ()
        assert worker().pid != first
    assert not psutil.Process().children(), "none is left behind"


async def test_a_worker_that_hangs_is_given_up_and_replaced(tmp_path: Path) -> None:
    async with PlanningProcess({}, answer_within_s=5.0) as planning:
        await planning.ask(ScanModels(tmp_path))
        hung = worker()
        hung.suspend()
        with pytest.raises(PlanningFailed, match="did not answer within 5 s"):
            await planning.ask(ScanModels(tmp_path))
        assert not hung.is_running()
        assert await planning.ask(ScanModels(tmp_path)) == ()


async def test_a_question_that_is_given_up_does_not_spoil_the_next_answer(tmp_path: Path) -> None:
    (tmp_path / "noise.gguf").write_bytes(b"noise")
    async with PlanningProcess({}) as planning:
        assert len(await planning.ask(ScanModels(tmp_path))) == 1  # type: ignore[arg-type]
        worker().suspend()
        with anyio.CancelScope() as given_up:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(planning.ask, ScanModels(tmp_path))
                await anyio.wait_all_tasks_blocked()
                given_up.cancel()
        (tmp_path / "noise.gguf").unlink()
        assert await planning.ask(ScanModels(tmp_path)) == ()


@pytest.mark.llama
async def test_a_request_whose_planner_is_killed_fails_and_the_next_one_is_served(
    supervising: Supervising, models: Callable[..., Path], chat_model: Path
) -> None:
    async with supervising(models(chat_model)) as supervisor:

        async def request() -> None:
            with pytest.raises(PlannerFailed, match="tiny-chat: the planning process ended"):
                async with supervisor.acquire("tiny-chat", Role.CHAT):
                    pass

        await killed_in_the_middle(request)
        async with supervisor.acquire("tiny-chat", Role.CHAT) as lease:
            assert lease.model == "tiny-chat"
