"""The llama-server children: started with a plan, listened to until they end, stopped when asked.

What a child does becomes an event. Its last word is always ``ProcessExited``, sent once it is reaped.
"""

from __future__ import annotations

import math
import os
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import anyio
import structlog
from anyio import TASK_STATUS_IGNORED
from anyio.abc import TaskGroup, TaskStatus

from supervisor.api.snapshot import TokenCounts
from supervisor.children import counting, strays
from supervisor.children.counting import TokenWatch
from supervisor.children.hanging import HangWatch, Patience
from supervisor.children.health import wait_healthy, wait_serving
from supervisor.children.logs import ChildLog
from supervisor.children.proc_stat import is_stopped
from supervisor.children.process import READ_BYTES, Child, describe_exit, find_setpriv, scrubbed, started, tied
from supervisor.children.spare import Line, Spare, begun, gated
from supervisor.children.weights_read import WeightsRead
from supervisor.core.commands import Spawn
from supervisor.core.events import (
    BecameReady,
    ChildHung,
    Event,
    LoadProgressed,
    ProcessExited,
    ProcessSpawned,
    PromptCacheChanged,
    SpawnFailed,
    WrongDevices,
)
from supervisor.core.loglines import Fact, Listening, PromptCache, UsingDevice
from supervisor.core.pinning import PinnedDevice, mismatch, missing
from supervisor.core.types import ModelId, Program

LAST_WORDS_S: Final = 0.1  # for what a dead child left in its pipe; longer would hold up the news of its death
# A child that serves says two hundred lines for each request: they are taken together. Shorter than LAST_WORDS_S.
LISTEN_EVERY_S: Final = 0.05
# One that loads writes each line in three pieces; to be woken for each would take the processor from it, and so delay
# the line that counts, that it listens, by more than this. Once it has warmed up and sets up its slots, few lines come
# before that one: from then on each is taken at once.
LISTEN_LOADING_S: Final = 0.002
SETS_UP_SLOTS: Final = b"load_model: initializing, n_slots"  # tools/server/server-context.cpp
PROGRESS_EVERY_S: Final = 0.5  # as often as somebody who waits wants to see it; its deadline counts in minutes
# Between the signals to a child whose loop does not answer: one may have been lost on it.
UNREADY_GRACE_S: Final = 0.5
# Before a spare is started for a model that was stopped: whoever it had to go for is being loaded just then.
REST_S: Final = 0.2
# A loading child that somebody stopped: longer than it takes to look at it, far shorter than LOAD_TIMEOUT.
STOPPED_S: Final = 20.0
KEY_BYTES: Final = 32
PORT: Final = "{port}"  # in the command line of a program that is not ours
RECORDS: Final = "runners"
NO_CONFIG: Final = "no-config"

_log: structlog.typing.FilteringBoundLogger = structlog.get_logger("supervisor.children")


def prepare(state_dir: Path) -> None:
    """Make the folders that children need, and end those that an earlier life left behind. Raises OSError."""
    (state_dir / NO_CONFIG).mkdir(parents=True, exist_ok=True)
    for stray in strays.end_all(state_dir / RECORDS):
        _log.warning("stray.ended", pid=stray.pid, model=stray.model)


@dataclass(slots=True)
class _Running:
    """A live child, what a client has to show it, and what it said. ``url`` once it has said that it listens.

    ``is_nearly_ready`` once it has said that it sets up its slots.
    ``tokens`` reads what it counts, from then on; a program that is not ours counts nothing.
    ``obeys`` once its loop is seen to work: a signal to end it that comes before is lost. ``unasked_lines`` is how many
    it had said when it first answered, being a program: many write a line each time they are asked if they are ready.
    """

    child: Child
    argv: Sequence[str]
    api_key: str
    log: ChildLog
    pinned: tuple[PinnedDevice, ...] = ()
    is_program: bool = False
    used: list[UsingDevice] = field(default_factory=list)
    url: str | None = None
    tokens: TokenWatch | None = None
    is_nearly_ready: bool = False
    obeys: bool = False
    was_stopped: bool = False
    unasked_lines: int | None = None
    until_gone: anyio.CancelScope = field(default_factory=anyio.CancelScope)  # of what asks it whether it is ready

    @property
    def n_lines_unasked(self) -> int:
        """Return how many lines it has said that no question of ours can have brought about."""
        return self.log.n_lines if self.unasked_lines is None else self.unasked_lines

    @property
    def pause_s(self) -> float:
        """Return how long what it says may wait until it is read."""
        if self.url is not None:
            return LISTEN_EVERY_S
        return 0.0 if self.is_nearly_ready else LISTEN_LOADING_S

    def note_answer(self) -> None:
        """Take no line for progress from now on: each may only tell of our questions."""
        if self.unasked_lines is None:
            self.unasked_lines = self.log.n_lines


class Children:
    """Every live child. ``post`` takes the events; ``environ`` is what children inherit, after scrubbing.

    ``is_busy`` says whether a child of this generation has requests in flight; ``count`` is given the tokens that a
    model's child has worked through since it was given any.
    ``state_dir``, which was prepared, holds the records of who runs, and the empty folder that is a child's whole
    configuration.
    """

    def __init__(
        self,
        post: Callable[[Event], None],
        is_busy: Callable[[ModelId, int], bool],
        count: Callable[[ModelId, TokenCounts], None],
        *,
        state_dir: Path,
        environ: Mapping[str, str],
        stop_grace_s: float,
        patience: Patience,
    ) -> None:
        self._post = post
        self._is_busy = is_busy
        self._count = count
        self._records = state_dir / RECORDS
        self._no_config = state_dir / NO_CONFIG
        self._environ = scrubbed(environ)
        self._lines: dict[ModelId, Line] = {}  # with which each model was started last
        self._spare: Spare | None = None
        self._spares_wait = True  # until one turns out not to
        self._stop_grace_s = stop_grace_s
        self._patience = patience
        self._running: dict[tuple[ModelId, int], _Running] = {}
        self._ended: dict[ModelId, ChildLog] = {}  # what the last child of each model said

    async def expect(self, model: ModelId, *, task_status: TaskStatus[None] = TASK_STATUS_IGNORED) -> None:
        """Have a spare wait, for a while, that becomes this model's next child if that is started as the last one was.

        For when it is being planned, and for when it may be asked for again. There is one spare at a time.
        """
        line = self._lines.get(model)
        if line is None or not line.has_gate or not self._spares_wait:
            return
        if self._spare is not None and self._spare.is_for(line):
            return
        try:
            spare = Spare(line, self._environ, secrets.token_urlsafe(KEY_BYTES))
        except OSError:  # whoever starts the child tells of it
            return
        if self._spare is not None:
            self._spare.let_go()
        self._spare = spare
        task_status.started()
        self._record(model, spare.pid)
        try:
            self._spares_wait &= await spare.hold()
        finally:
            if self._spare is spare:
                self._spare = None
            if not spare.is_taken:
                strays.forget(self._records, spare.pid)

    def api_key(self, model: ModelId, generation: int) -> str:
        """Return what a client has to show to this child."""
        return self._running[model, generation].api_key

    def log(self, model: ModelId, generation: int) -> ChildLog | None:
        """Return what this child says, else what the last one of the model said; None where there was none."""
        running = self._running.get((model, generation))
        return self._ended.get(model) if running is None else running.log

    def note_use(self, model: ModelId, generation: int) -> None:
        """Have the tokens of this child counted, if it is still there: a request to it has ended."""
        running = self._running.get((model, generation))
        if running is not None and running.tokens is not None:
            running.tokens.note_use()

    def spawn(self, command: Spawn, tasks: TaskGroup) -> None:
        """Log the plan that is now final and start a child with it; listen to it as one of these tasks."""
        about = {"model": command.model, "runner": command.runner, "generation": command.generation}
        line, url = self._line(command)
        _log.info("plan.final", **about, plan=command.plan.document)
        program = command.plan.program
        try:
            child, api_key = self._start(command.model, line, program)
        except OSError as error:
            self._post(SpawnFailed(command.model, command.generation, f"cannot start {line.argv[0]}: {error.strerror}"))
            return
        log = ChildLog(command.plan.buffer_devices, _log.bind(**about, pid=child.pid))
        self._running[command.model, command.generation] = running = _Running(
            child, line.argv, api_key, log, command.plan.pinned, program is not None
        )
        tasks.start_soon(self._tend, command.model, command.generation, running, tasks)
        if program is not None and url is not None:
            tasks.start_soon(self._serve_program, command, running, url, program.health)
        self._post(ProcessSpawned(command.model, command.generation, child.pid))

    def _line(self, command: Spawn) -> tuple[Line, str | None]:
        """Return how to start it and, for a program not ours, where it will answer."""
        launch, program = command.plan.launch, command.plan.program
        if program is not None:
            port = str(free_port())
            argv = tuple(word.replace(PORT, port) for word in launch.argv)
            return Line(argv, launch.env), program.url.replace(PORT, port)
        env = {**launch.env, "XDG_CONFIG_HOME": str(self._no_config), **counting.ENABLED}
        # Port 0: the kernel picks a free one while the child binds it, and the child's log names it.
        argv = (*gated(launch.argv), "--host", "127.0.0.1", "--port", "0", "--alias", command.model)
        return Line(argv, env), None

    def _start(self, model: ModelId, line: Line, program: Program | None) -> tuple[Child, str]:
        """Start this, or open the gate of what waits to be just this; return it and its key. Raises OSError."""
        api_key = secrets.token_urlsafe(KEY_BYTES)
        if program is not None:
            command = tied(line.argv, find_setpriv(), os.getpid())
            child = Child(started(command, {**self._environ, **line.env}, program.folder))
        else:
            self._lines[model] = line
            if self._spare is not None and self._spare.is_for(line) and (waiting := self._spare.take()) is not None:
                return waiting, self._spare.api_key  # on record since it waits
            child = begun(line, self._environ, api_key)
        self._record(model, child.pid)
        return child, api_key

    async def stop(self, model: ModelId, generation: int, at_once: bool = False) -> None:  # noqa: FBT001, FBT002  a task
        """End this child, by force in the end or ``at_once``; its exit is told as any other."""
        running = self._running.get((model, generation))
        if running is None:
            return
        if at_once:
            running.child.kill()
            return
        running.was_stopped = True
        if running.url is not None and not running.obeys:
            with anyio.move_on_after(UNREADY_GRACE_S):
                await wait_serving(running.url, running.api_key)
                running.obeys = True
        if running.tokens is not None:
            await running.tokens.read(counting.LAST_ANSWER_WITHIN_S)
        await running.child.stop(self._stop_grace_s if running.obeys else UNREADY_GRACE_S)

    async def _tend(self, model: ModelId, generation: int, running: _Running, all_tasks: TaskGroup) -> None:
        """Listen until the child has ended, then reap it and tell. Cancelled, it kills the child."""
        child, log = running.child, running.log
        structlog.contextvars.clear_contextvars()  # the child outlives the request that caused it
        reaped = False
        try:
            async with anyio.create_task_group() as tasks:
                silent = anyio.Event()
                tasks.start_soon(self._listen, model, generation, running, tasks, silent)
                tasks.start_soon(self._follow_load, model, generation, running)
                await child.wait_exit()
                returncode = child.reap()
                reaped = True
                with anyio.move_on_after(LAST_WORDS_S):
                    await silent.wait()
                tasks.cancel_scope.cancel()
            running.until_gone.cancel()
            log.close()
        finally:
            if not reaped:
                child.reap()
            child.close()
            strays.forget(self._records, child.pid)
            del self._running[model, generation]
            self._ended[model] = log
        if running.was_stopped and not running.is_program:
            all_tasks.start_soon(self._expect_again, model)
        said = log.tail[-1:] if running.is_program else ()  # nobody knows what its complaints look like
        last_error = log.last_error or "".join(said) or None
        how = describe_exit(returncode)
        self._post(ProcessExited(model, generation, how, last_error, log.tail, log.shortage, killed=returncode < 0))

    async def _expect_again(self, model: ModelId) -> None:
        """Expect a model that was stopped to be asked for again, as those are that somebody changes between."""
        await anyio.sleep(REST_S)
        await self.expect(model)

    def _record(self, model: ModelId, pid: int) -> None:
        try:
            strays.record(self._records, pid, model)
        except OSError as error:  # a full disk is no reason to serve nobody
            _log.warning("stray.not_recorded", model=model, pid=pid, reason=str(error))

    async def _listen(
        self, model: ModelId, generation: int, running: _Running, tasks: TaskGroup, silent: anyio.Event
    ) -> None:
        """Read what the child says; what it says of its devices and its address becomes events."""
        while data := await running.child.read():
            running.is_nearly_ready |= SETS_UP_SLOTS in data
            for fact in running.log.feed(data):
                if isinstance(fact, UsingDevice):
                    running.used.append(fact)
                if (wrong := _wrong_devices(running, fact)) is not None:
                    self._post(WrongDevices(model, generation, wrong))
                elif isinstance(fact, PromptCache):
                    self._post(PromptCacheChanged(model, generation, fact.size_bytes))
                elif isinstance(fact, Listening):
                    running.url = fact.url
                    running.tokens = TokenWatch(fact.url, running.api_key, partial(self._count, model))
                    self._post(BecameReady(model, generation, fact.url, running.log.measured_bytes))
                    tasks.start_soon(self._watch, model, generation, running, fact.url)
                    tasks.start_soon(running.tokens.follow)
            if len(data) < READ_BYTES and (pause_s := running.pause_s):
                await running.child.wait_exited(pause_s)
        silent.set()

    async def _follow_load(self, model: ModelId, generation: int, running: _Running) -> None:
        """Tell of every sign of progress until the child serves: it said something, or read on."""
        weights = WeightsRead(running.child.pid, running.argv)
        seen, stopped_since = None, math.inf
        while running.url is None:
            await anyio.sleep(PROGRESS_EVERY_S)
            stopped_since = min(stopped_since, anyio.current_time()) if is_stopped(running.child.pid) else math.inf
            if anyio.current_time() - stopped_since > STOPPED_S:
                self._post(ChildHung(model, generation, f"it was stopped (SIGSTOP) for more than {STOPPED_S:g} s"))
                return
            fraction = weights.fraction()
            if seen != (seen := (running.n_lines_unasked, fraction)):
                self._post(LoadProgressed(model, generation, fraction))

    async def _watch(
        self, model: ModelId, generation: int, running: _Running, url: str, program_health: str | None = None
    ) -> None:
        """Tell when the child does not answer any more."""
        watch = HangWatch(
            url,
            running.api_key,
            running.child.pid,
            lambda: self._is_busy(model, generation),
            self._patience,
            program_health=program_health,
        )
        self._post(ChildHung(model, generation, await watch.wait_hung()))

    async def _serve_program(self, command: Spawn, running: _Running, url: str, health: str) -> None:
        """Tell when a program that is not ours is ready, by its health, and when it hangs; its end ends the asking."""
        with running.until_gone:
            await wait_healthy(url, health, running.note_answer)
            running.url, running.obeys = url, True
            self._post(BecameReady(command.model, command.generation, url))
            await self._watch(command.model, command.generation, running, url, health)


def free_port() -> int:
    """Return a port that is free now. Another process may take it meanwhile: then the program says so and ends."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def _wrong_devices(running: _Running, fact: Fact) -> str | None:
    """Return what this fact shows to be wrong with the devices of a child, in one line, or None."""
    match fact:
        case UsingDevice():
            return mismatch(running.pinned, running.used)
        case Listening():
            return missing(running.pinned, running.used)
        case _:
            return None
