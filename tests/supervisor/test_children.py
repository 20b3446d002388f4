"""Children as events: told to end once they can hear it, and taken from the spare that waits for them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import anyio
import psutil
import pytest
from anyio.abc import TaskGroup

from planner.types import LaunchSpec
from supervisor.children.hanging import PATIENCE
from supervisor.children.tending import Children, prepare
from supervisor.core.commands import Spawn
from supervisor.core.events import BecameReady, Event, ProcessExited, ProcessSpawned
from supervisor.core.types import LoadPlan, ModelId, RunnerId

pytestmark = pytest.mark.anyio

E = TypeVar("E", bound=Event)
A = ModelId("a")
WITHIN_S = 30.0
HERE = "print('here')"
LONG_S = 600.0  # a grace that no test waits for

# Says that it listens, and loses every signal to end it until its loop answers, as llama-server does.
LATE = """
import http.server, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        {answer}
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_): pass
server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
print(f"llama_server: listening on http://127.0.0.1:{{server.server_port}}", flush=True)
server.serve_forever()
"""


class Events:
    """What was posted, and a way to wait for it."""

    def __init__(self) -> None:
        self._posted: list[Event] = []
        self._more = anyio.Event()

    def post(self, event: Event) -> None:
        self._posted.append(event)
        self._more.set()

    def forget(self) -> None:
        """Forget what was posted."""
        self._posted.clear()

    async def first(self, kind: type[E]) -> E:
        """Return the first event of this kind, once it has come."""
        with anyio.fail_after(WITHIN_S):
            while True:
                if found := [event for event in self._posted if isinstance(event, kind)]:
                    return found[0]
                self._more = anyio.Event()
                await self._more.wait()


@asynccontextmanager
async def watched(state: Path) -> AsyncIterator[tuple[Children, Events, TaskGroup]]:
    """Yield who starts children, what these do, and the tasks that look after them; what is left is killed."""
    events = Events()
    prepare(state)
    children = Children(
        events.post,
        lambda _model, _generation: False,
        lambda _model, _tokens: None,
        state_dir=state,
        environ=os.environ,
        stop_grace_s=LONG_S,
        patience=PATIENCE,
    )
    async with anyio.create_task_group() as tasks:
        yield children, events, tasks
        tasks.cancel_scope.cancel()


@pytest.fixture
def running() -> Callable[..., Spawn]:
    """Return what gives the command that runs this as the child of A, for llama-server: it reads its gate first."""

    def spawn(text: str, *flags: str, generation: int = 1) -> Spawn:
        begun = (sys.executable, "-c", "import os, sys; open('/dev/stdin').read(); exec(os.environ['PROGRAM'])")
        plan = LoadPlan(LaunchSpec((*begun, *flags), {"PROGRAM": text}), uses=())
        return Spawn(RunnerId("r1"), A, generation, plan)

    return spawn


def own_children() -> set[int]:
    return {one.pid for one in psutil.Process().children()}


async def test_a_child_is_told_to_end_once_its_loop_answers(tmp_path: Path, running: Callable[..., Spawn]) -> None:
    """It is ready as soon as it listens; a signal that came before its loop has begun would be lost."""
    async with watched(tmp_path) as (children, events, tasks):
        children.spawn(running(LATE.format(answer="")), tasks)
        await events.first(BecameReady)
        with anyio.fail_after(WITHIN_S):
            await children.stop(A, 1)
        exited = await events.first(ProcessExited)
        assert (exited.exit, exited.killed) == ("exit status 3", False)


async def test_a_child_whose_loop_never_answers_is_ended_by_force(
    tmp_path: Path, running: Callable[..., Spawn]
) -> None:
    """Soon: nobody waits through the grace of one that obeys."""
    async with watched(tmp_path) as (children, events, tasks):
        children.spawn(running(LATE.format(answer="import threading; threading.Event().wait()")), tasks)
        await events.first(BecameReady)
        with anyio.fail_after(WITHIN_S):
            await children.stop(A, 1)
        exited = await events.first(ProcessExited)
        assert (exited.exit, exited.killed) == ("killed by SIGKILL", True)


async def run_once(children: Children, events: Events, tasks: TaskGroup, command: Spawn) -> ProcessExited:
    """Run a child to its end, and return that."""
    children.spawn(command, tasks)
    exited = await events.first(ProcessExited)
    events.forget()
    return exited


async def test_a_child_that_was_expected_is_the_spare_that_waited_for_it(
    tmp_path: Path, running: Callable[..., Spawn]
) -> None:
    async with watched(tmp_path) as (children, events, tasks):
        await run_once(children, events, tasks, running(HERE))
        await tasks.start(children.expect, A)
        waiting = own_children()
        children.spawn(running(HERE, generation=2), tasks)
        assert (await events.first(ProcessSpawned)).pid in waiting
        exited = await events.first(ProcessExited)
    assert (exited.exit, exited.log_tail) == ("exit status 0", ("here",))


async def test_a_model_that_never_ran_is_not_expected(tmp_path: Path) -> None:
    """Nobody knows its command line yet."""
    before = own_children()
    async with watched(tmp_path) as (children, _, _):
        await children.expect(A)
        assert own_children() == before


async def test_a_spare_of_another_line_is_not_taken(tmp_path: Path, running: Callable[..., Spawn]) -> None:
    async with watched(tmp_path) as (children, events, tasks):
        await run_once(children, events, tasks, running(HERE))
        await tasks.start(children.expect, A)
        waiting = own_children()
        children.spawn(running(HERE, "-c", "1024", generation=2), tasks)
        assert (await events.first(ProcessSpawned)).pid not in waiting
        assert (await events.first(ProcessExited)).exit == "exit status 0"


async def test_there_is_one_spare_at_a_time(tmp_path: Path, running: Callable[..., Spawn]) -> None:
    async with watched(tmp_path) as (children, events, tasks):
        before = own_children()
        await run_once(children, events, tasks, running(HERE))
        await tasks.start(children.expect, A)
        (first,) = own_children() - before
        await children.expect(A)
        assert own_children() - before == {first}
        await run_once(children, events, tasks, running(HERE, "-c", "1024", generation=2))
        await tasks.start(children.expect, A)
        with anyio.fail_after(WITHIN_S):
            while first in own_children():  # noqa: ASYNC110 - it is reaped by a task of its own
                await anyio.sleep(0.01)
        assert len(own_children() - before) == 1


async def test_a_script_in_llama_servers_place_is_not_made_to_wait(tmp_path: Path) -> None:
    """Who knows what it passes on, and whether what it starts would wait before it takes memory."""
    program = tmp_path / "llama-server"
    program.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('--api-key-file' in sys.argv)\n")
    program.chmod(0o755)
    spawn = Spawn(RunnerId("r1"), A, 1, LoadPlan(LaunchSpec((str(program), "-m", "m.gguf"), {}), uses=()))
    async with watched(tmp_path) as (children, events, tasks):
        before = own_children()
        assert (await run_once(children, events, tasks, spawn)).exit == "exit status 0"
        await children.expect(A)
        assert own_children() == before


async def test_a_spare_that_somebody_ended_is_done_without(tmp_path: Path, running: Callable[..., Spawn]) -> None:
    async with watched(tmp_path) as (children, events, tasks):
        before = own_children()
        await run_once(children, events, tasks, running(HERE))
        await tasks.start(children.expect, A)
        (spare,) = own_children() - before
        pidfd = os.pidfd_open(spare)
        os.kill(spare, signal.SIGKILL)
        await anyio.wait_readable(pidfd)
        os.close(pidfd)
        children.spawn(running(HERE, generation=2), tasks)
        assert (await events.first(ProcessSpawned)).pid != spare
        assert (await events.first(ProcessExited)).exit == "exit status 0"


async def test_a_model_that_was_stopped_is_expected_again(tmp_path: Path, running: Callable[..., Spawn]) -> None:
    async with watched(tmp_path) as (children, events, tasks):
        before = own_children()
        children.spawn(running(LATE.format(answer="")), tasks)
        await events.first(BecameReady)
        await children.stop(A, 1)
        await events.first(ProcessExited)
        with anyio.fail_after(WITHIN_S):
            while not own_children() - before:  # noqa: ASYNC110 - it is started by a task of its own
                await anyio.sleep(0.01)


async def test_a_spare_that_nobody_needed_goes_with_whoever_started_it(
    tmp_path: Path, running: Callable[..., Spawn]
) -> None:
    before = own_children()
    async with watched(tmp_path) as (children, events, tasks):
        await run_once(children, events, tasks, running(HERE))
        await tasks.start(children.expect, A)
        assert own_children() - before
    assert own_children() == before
    assert not list((tmp_path / "runners").iterdir()), "it is not taken for one that an earlier life left"
