"""The llama-server children: started with a plan, listened to until they end, stopped when asked.

What a child does becomes an event. Its last word is always ``ProcessExited``, sent once it is reaped.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import anyio
import structlog
from anyio.abc import TaskGroup

from supervisor import strays
from supervisor.core.commands import Spawn
from supervisor.core.events import (
    BecameReady,
    Event,
    LoadProgressed,
    ProcessExited,
    ProcessSpawned,
    SpawnFailed,
    WrongDevices,
)
from supervisor.core.loglines import Fact, Listening, UsingDevice
from supervisor.core.pinning import PinnedDevice, mismatch, missing
from supervisor.core.types import ModelId
from supervisor.health import wait_healthy
from supervisor.logs import ChildLog
from supervisor.process import Child, scrubbed

LAST_WORDS_S: Final = 0.1  # for what a dead child left in its pipe; longer would hold up the news of its death
PROGRESS_EVERY_S: Final = 1.0  # signs of progress count in minutes
KEY_BYTES: Final = 32
RECORDS: Final = "runners"
NO_CONFIG: Final = "no-config"

_log: structlog.typing.FilteringBoundLogger = structlog.get_logger("supervisor.children")


def prepare(state_dir: Path) -> None:
    """Make the folders that children need, and end those that an earlier life left behind. Raises OSError."""
    (state_dir / NO_CONFIG).mkdir(parents=True, exist_ok=True)
    for stray in strays.end_all(state_dir / RECORDS):
        _log.warning("stray.ended", pid=stray.pid, model=stray.model)


@dataclass(frozen=True, slots=True)
class _Running:
    """A live child, what a client has to show it, and what it said."""

    child: Child
    api_key: str
    log: ChildLog
    pinned: tuple[PinnedDevice, ...] = ()
    used: list[UsingDevice] = field(default_factory=list)


class Children:
    """Every live child. ``post`` takes the events; ``environ`` is what children inherit, after scrubbing.

    ``state_dir``, which was prepared, holds the records of who runs, and the empty folder that is a child's whole
    configuration.
    """

    def __init__(
        self, post: Callable[[Event], None], *, state_dir: Path, environ: Mapping[str, str], stop_grace_s: float
    ) -> None:
        self._post = post
        self._records = state_dir / RECORDS
        self._no_config = state_dir / NO_CONFIG
        self._environ = scrubbed(environ)
        self._stop_grace_s = stop_grace_s
        self._running: dict[tuple[ModelId, int], _Running] = {}

    def api_key(self, model: ModelId, generation: int) -> str:
        """Return what a client has to show to this child."""
        return self._running[model, generation].api_key

    def log(self, model: ModelId, generation: int) -> ChildLog | None:
        """Return what this child says, None once it is gone."""
        running = self._running.get((model, generation))
        return None if running is None else running.log

    def spawn(self, command: Spawn, tasks: TaskGroup) -> None:
        """Log the plan that is now final and start a child with it; listen to it as one of these tasks."""
        about = {"model": command.model, "runner": command.runner, "generation": command.generation}
        launch = command.plan.plan.launch
        api_key = secrets.token_urlsafe(KEY_BYTES)
        env = {**self._environ, **launch.env, "LLAMA_API_KEY": api_key, "XDG_CONFIG_HOME": str(self._no_config)}
        # Port 0: the kernel picks a free one while the child binds it, and the child's log names it.
        argv = [*launch.argv, "--host", "127.0.0.1", "--port", "0", "--alias", command.model]
        _log.info("plan.final", **about, plan=command.plan.document)
        try:
            child = Child(argv, env)
        except OSError as error:
            self._post(SpawnFailed(command.model, command.generation, f"cannot start {argv[0]}: {error.strerror}"))
            return
        try:
            strays.record(self._records, child.pid, command.model)
        except OSError as error:  # a full disk is no reason to serve nobody
            _log.warning("stray.not_recorded", **about, pid=child.pid, reason=str(error))
        log = ChildLog(command.plan.buffer_devices, _log.bind(**about, pid=child.pid))
        self._running[command.model, command.generation] = running = _Running(child, api_key, log, command.plan.pinned)
        tasks.start_soon(self._tend, command.model, command.generation, running)
        self._post(ProcessSpawned(command.model, command.generation, child.pid))

    async def stop(self, model: ModelId, generation: int) -> None:
        """End this child, by force in the end; its exit is told as any other."""
        if (running := self._running.get((model, generation))) is not None:
            await running.child.stop(self._stop_grace_s)

    async def _tend(self, model: ModelId, generation: int, running: _Running) -> None:
        """Listen until the child has ended, then reap it and tell. Cancelled, it kills the child."""
        child, log = running.child, running.log
        structlog.contextvars.clear_contextvars()  # the child outlives the request that caused it
        reaped = False
        try:
            async with anyio.create_task_group() as tasks:
                silent = anyio.Event()
                tasks.start_soon(self._listen, model, generation, running, tasks, silent)
                await child.wait_exit()
                exit_ = child.reap()
                reaped = True
                with anyio.move_on_after(LAST_WORDS_S):
                    await silent.wait()
                tasks.cancel_scope.cancel()
            log.close()
        finally:
            if not reaped:
                child.reap()
            child.close()
            strays.forget(self._records, child.pid)
            del self._running[model, generation]
        self._post(ProcessExited(model, generation, exit_, log.last_error, log.tail, log.shortage))

    async def _listen(
        self, model: ModelId, generation: int, running: _Running, tasks: TaskGroup, silent: anyio.Event
    ) -> None:
        """Read what the child says; what it says of its progress and its address becomes events."""
        told_at = time.monotonic()
        while data := await running.child.read():
            for fact in running.log.feed(data):
                if isinstance(fact, UsingDevice):
                    running.used.append(fact)
                if (wrong := _wrong_devices(running, fact)) is not None:
                    self._post(WrongDevices(model, generation, wrong))
                elif isinstance(fact, Listening):
                    tasks.start_soon(self._confirm, model, generation, running, fact.url)
            if time.monotonic() > told_at + PROGRESS_EVERY_S:
                told_at = time.monotonic()
                self._post(LoadProgressed(model, generation))
        silent.set()

    async def _confirm(self, model: ModelId, generation: int, running: _Running, url: str) -> None:
        """Tell that the child is ready once it says so itself."""
        await wait_healthy(url)
        self._post(BecameReady(model, generation, url, running.log.measured_bytes))


def _wrong_devices(running: _Running, fact: Fact) -> str | None:
    """Return what this fact shows to be wrong with the devices of a child, in one line, or None."""
    match fact:
        case UsingDevice():
            return mismatch(running.pinned, running.used)
        case Listening():
            return missing(running.pinned, running.used)
        case _:
            return None
