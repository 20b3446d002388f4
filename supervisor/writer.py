"""The single writer: every event goes through ``scheduler.step``, every command is carried out here.

Events are handled to the end in the order in which they come, without a wait in between: whoever reads the state reads
a settled one. What takes time (a child, a plan) runs as a task of the one task group and comes back as an event.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Final, assert_never

import anyio
import structlog
from anyio import TASK_STATUS_IGNORED
from anyio.abc import TaskGroup, TaskStatus

from supervisor import views
from supervisor.api.lease import Endpoint
from supervisor.api.need import Need
from supervisor.api.snapshot import ModelCounters, TokenCounts
from supervisor.children.hanging import Patience
from supervisor.children.tending import Children
from supervisor.core import admission, ledger, scheduler
from supervisor.core.commands import (
    Command,
    Grant,
    Learn,
    LoseLeases,
    PlanModel,
    ReadMachine,
    Reject,
    ReportFailure,
    Spawn,
    StopProcess,
)
from supervisor.core.events import Event, RequestAbandoned, RequestArrived, RequestFinished, TimePassed
from supervisor.core.pool import Pool
from supervisor.core.runner import Runner, RunnerState
from supervisor.core.types import Limits, ModelId, TicketId
from supervisor.errors import error_of
from supervisor.inventory import Inventory
from supervisor.leases import ChildLease, Waiter
from supervisor.models.catalogue import ModelEntry
from supervisor.timers import Alarm

_log: structlog.typing.FilteringBoundLogger = structlog.get_logger("supervisor.runtime")
# The loop's own clock, by which the core counts. To ask anyio which loop that is takes a fiftieth of a request's time.
_now: Final = time.monotonic


class Writer:
    """Owns the pool. ``run`` has to run for anything to happen; ``pool`` and ``counters`` are for everybody to read."""

    def __init__(
        self,
        limits: Limits,
        inventory: Inventory,
        *,
        state_dir: Path,
        environ: Mapping[str, str],
        stop_grace_s: float,
        patience: Patience,
    ) -> None:
        self.pool = Pool(limits)
        self.counters: Mapping[str, ModelCounters] = MappingProxyType({})
        self.children = Children(
            self.post,
            lambda model, generation: (model, generation) in self._leases,
            self._count_tokens,
            state_dir=state_dir,
            environ=environ,
            stop_grace_s=stop_grace_s,
            patience=patience,
        )
        self.stopped = anyio.Event()  # shut down, and every child is gone
        self._inventory = inventory
        self._inbox: deque[Event] = deque()
        self._handling = False
        self._alarm = Alarm()
        self._tasks: TaskGroup | None = None
        self._changed: anyio.Event | None = None  # of who waits for the pool to change
        self._next_ticket = 1
        self._waiters: dict[TicketId, Waiter] = {}
        self._told_of_stops: list[Callable[[str], None]] = []
        self._leases: dict[tuple[ModelId, int], set[ChildLease]] = {}

    async def run(self, *, task_status: TaskStatus[None] = TASK_STATUS_IGNORED) -> None:
        """Work until the pool was shut down and every child is gone. Cancelled, it takes its children with it."""
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            tasks.start_soon(self._keep_time)
            task_status.started()
            await self.stopped.wait()
            tasks.cancel_scope.cancel()

    async def until(self, holds: Callable[[Pool], bool]) -> None:
        """Return once this holds for the pool."""
        while not holds(self.pool):
            self._changed = self._changed or anyio.Event()
            await self._changed.wait()

    async def lease(self, entry: ModelEntry, need: Need) -> ChildLease:
        """Wait for a lease and return it; ``give_back`` has to follow, exactly once. Raises an AcquireError."""
        arrived, waiter = self._arrival(entry, need)
        try:
            self.post(arrived)
            await waiter.wait_settled()
        except BaseException:
            if waiter.lease is not None:  # granted in the moment in which nobody waits any longer
                self.give_back(waiter.lease, need.client)
            elif waiter.refusal is None:
                self.post(RequestAbandoned(arrived.ticket))
            raise
        finally:
            del self._waiters[arrived.ticket]
        if waiter.refusal is not None:
            raise error_of(waiter.refusal)
        assert waiter.lease is not None  # noqa: S101 - settled is one or the other
        return waiter.lease

    def endpoint_at_once(self, entry: ModelEntry, need: Need) -> Endpoint | None:
        """Return where a lease would lead that ``lease_at_once`` took in this same call, None where none is granted.

        Nothing happens: what the core would do is only looked at.
        """
        runner = admission.free_runner(self.pool, entry.runner, need.load)
        if runner is not None:
            return self._endpoint(runner.model, runner.generation, runner.url or "")
        arrived = self._arrived(entry, need)
        for one in scheduler.step(self.pool, arrived, _now())[1]:
            if isinstance(one, Grant) and one.ticket == arrived.ticket:
                return self._endpoint(one.model, one.generation, one.url)
        return None

    def look_ahead(self, model: ModelId) -> None:
        """Have the machine looked at where this model is not loaded, and most likely is to be in a moment."""
        pool = self.pool
        is_next = pool.runner(model).state is RunnerState.STOPPED and not (pool.loads or pool.leaving or pool.draining)
        if is_next and self._tasks is not None:  # one that leaves would give back between this look and the question
            self._inventory.look_ahead(ledger.gone_bytes(pool, _now()), self._tasks)

    def lease_at_once(self, entry: ModelEntry, need: Need) -> ChildLease:
        """Return the lease that ``endpoint_at_once`` has just told of; ``give_back`` has to follow, exactly once."""
        arrived, waiter = self._arrival(entry, need)
        try:
            self.post(arrived)
        finally:
            del self._waiters[arrived.ticket]
            if waiter.lease is None:  # nothing that can happen; but nobody would wait for it any more
                self.post(RequestAbandoned(arrived.ticket))
        assert waiter.lease is not None  # noqa: S101 - nothing has happened since the core said so
        return waiter.lease

    def _arrived(self, entry: ModelEntry, need: Need) -> RequestArrived:
        ticket, self._next_ticket = TicketId(self._next_ticket), self._next_ticket + 1
        return RequestArrived(ticket, entry.runner, need.client, need.load, need.keep_alive_s)

    def _arrival(self, entry: ModelEntry, need: Need) -> tuple[RequestArrived, Waiter]:
        arrived = self._arrived(entry, need)
        waiter = self._waiters[arrived.ticket] = Waiter(entry.id)
        return arrived, waiter

    def _endpoint(self, model: ModelId, generation: int, url: str) -> Endpoint:
        return Endpoint(url, self.children.api_key(model, generation))

    def give_back(self, lease: ChildLease, client: str) -> None:
        """Take a lease back from the client that held it."""
        lease.forget()
        model, generation = lease.runner, lease.generation
        holders = self._leases.get((model, generation), set())
        holders.discard(lease)
        if not holders:
            self._leases.pop((model, generation), None)
        self.children.note_use(model, generation)
        self.post(RequestFinished(model, generation, client))

    def post(self, event: Event) -> None:
        """Let this happen: it is handled before this returns, but for what a command of an earlier event caused."""
        self._inbox.append(event)
        if not self._handling:
            self._work_off(self._handle_next)

    def _work_off(self, first: Callable[[], None]) -> None:
        """Do this and handle whatever waits then."""
        self._handling = True
        try:
            first()
            while self._inbox:
                self._handle_next()
        finally:
            self._handling = False
        self._alarm.set(scheduler.next_deadline(self.pool))
        if self._changed is not None:
            self._changed.set()
            self._changed = None
        if self.pool.draining and not self.pool.has_children:
            self.stopped.set()

    def _handle_next(self) -> None:
        self._follow(*scheduler.step(self.pool, self._inbox.popleft(), _now()))

    def _follow(self, pool: Pool, commands: Iterable[Command]) -> None:
        """Go on with this pool, and carry out what it takes."""
        before, self.pool = self.pool, pool
        for runner in pool.runners.values():
            was = before.runner(runner.model).state
            if was is runner.state:
                continue
            if runner.state is RunnerState.READY:  # logged once those who wait for just that have gone on
                asyncio.get_running_loop().call_soon(_log_state, runner, was)
            else:
                _log_state(runner, was)
        for command in commands:
            self.counters = views.count(self.counters, command)
            self._carry_out(command)

    def _carry_out(self, command: Command) -> None:
        assert self._tasks is not None  # noqa: S101 - nobody asks for anything before ``run`` has started
        match command:
            case PlanModel():
                self._tasks.start_soon(self._plan, command, self._tasks)
            case ReadMachine(_, gone):
                self._tasks.start_soon(self._inventory.refresh_at_rest, gone)
            case Spawn():
                self.children.spawn(command, self._tasks)
            case Learn(model, device, size_bytes):
                self._inventory.learn(device, size_bytes, model)
            case StopProcess(model, generation, reason, at_once):
                _log.info("runner.stop", model=model, generation=generation, reason=str(reason))
                self._tell_stopped(self.pool.runner(model).url)
                self._tasks.start_soon(self.children.stop, model, generation, at_once)
            case Grant() | Reject() | LoseLeases():
                self._tell(command)
            case ReportFailure():
                _report(command)
            case _:
                assert_never(command)

    def when_stopped(self, tell: Callable[[str], None]) -> None:
        """Have this told the base URL of each runner that is stopped, just before it is."""
        self._told_of_stops.append(tell)

    def _tell_stopped(self, url: str | None) -> None:
        if url is not None:  # else nobody knew it
            for tell in self._told_of_stops:
                tell(url)

    def _count_tokens(self, model: ModelId, added: TokenCounts) -> None:
        self.counters = views.count_tokens(self.counters, model, added)

    def _tell(self, command: Grant | Reject | LoseLeases) -> None:
        """Tell those who wait for a lease, or hold one."""
        match command:
            case Grant(ticket, model, generation, url):
                waiter = self._waiters[ticket]
                amendments = self._inventory.amendments(waiter.model)
                lease = ChildLease(waiter.model, model, generation, self._endpoint(model, generation, url), amendments)
                self._leases.setdefault((model, generation), set()).add(lease)
                waiter.settle(lease)
            case Reject(ticket, _, refusal):
                self._waiters[ticket].settle(refusal)
            case LoseLeases(model, generation, story):
                for lease in self._leases.pop((model, generation), set()):
                    lease.lose(story)

    async def _plan(self, command: PlanModel, tasks: TaskGroup) -> None:
        meanwhile = partial(tasks.start_soon, self.children.expect, command.model)
        self.post(await self._inventory.plan(command, meanwhile=meanwhile))

    async def _keep_time(self) -> None:
        while True:
            await self._alarm.wait()
            self.post(TimePassed())


def _log_state(runner: Runner, was: RunnerState) -> None:
    about = {"model": runner.model, "runner": runner.id, "generation": runner.generation}
    _log.info(f"runner.{runner.state}", was=str(was), pid=runner.pid, **about)


def _report(command: ReportFailure) -> None:
    model, failure = command.model, command.failure
    event = "load.failed" if command.while_loading else "runner.crashed"
    _log.error(event, model=model, generation=command.generation, reason=failure.reason)
    if (remedy := failure.remedy) is not None:
        _log.warning("load.again", model=model, chosen=remedy.chosen, because=remedy.because)
