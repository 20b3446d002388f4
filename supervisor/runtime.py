"""The single writer: every event goes through ``scheduler.step``, every command is carried out here.

Events are handled to the end in the order in which they come, without a wait in between: whoever reads the state reads
a settled one. What takes time (a child, a plan) runs as a task of the one task group and comes back as an event.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, assert_never

import anyio
import structlog
from anyio import TASK_STATUS_IGNORED
from anyio.abc import TaskGroup, TaskStatus

from config.model_settings import ModelsFile
from planner.types import Role
from supervisor import configured, views
from supervisor.api import (
    NO_NEED,
    Endpoint,
    LoadOptions,
    LoadProgress,
    ModelCounters,
    Need,
    Snapshot,
    UnknownDevice,
    UnknownModel,
    YieldResult,
)
from supervisor.catalogue import ModelEntry
from supervisor.children import Children
from supervisor.core import ledger, scheduler
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
from supervisor.core.events import (
    Event,
    RequestAbandoned,
    RequestArrived,
    RequestFinished,
    ResetRequested,
    SettingsChanged,
    ShutdownRequested,
    StopRequested,
    TimePassed,
    YieldRequested,
)
from supervisor.core.pool import Pool
from supervisor.core.runner import HAS_CHILD, Runner
from supervisor.core.types import Limits, ModelId, TicketId
from supervisor.errors import error_of
from supervisor.inventory import Inventory
from supervisor.leases import ChildLease, Waiter
from supervisor.timers import Alarm

_log: structlog.typing.FilteringBoundLogger = structlog.get_logger("supervisor.runtime")


@dataclass(frozen=True, slots=True)
class RuntimeOptions:
    """What the composition root tells the runtime.

    ``environ`` is what children inherit, after scrubbing. ``n_ctx_per_slot`` is what every conversation was promised,
    None where the planner decides by model.
    """

    version: str
    limits: Limits
    state_dir: Path
    stop_grace_s: float
    n_ctx_per_slot: int | None
    environ: Mapping[str, str]
    warnings: tuple[str, ...] = ()


class Supervisor:
    """The runtime behind ``supervisor.api.Runtime``. ``run`` has to run for anything to happen."""

    def __init__(self, options: RuntimeOptions, inventory: Inventory) -> None:
        self._options = options
        self._inventory = inventory
        self._children = Children(
            self._post,
            lambda model, generation: (model, generation) in self._leases,
            state_dir=options.state_dir,
            environ=options.environ,
            stop_grace_s=options.stop_grace_s,
        )
        self._pool = Pool(options.limits)
        self._inbox: deque[Event] = deque()
        self._handling = False
        self._alarm = Alarm()
        self._tasks: TaskGroup | None = None
        self._stopped = anyio.Event()
        self._changed = anyio.Event()  # set, and replaced, whenever the pool may have changed
        self._next_ticket = 1
        self._waiters: dict[TicketId, Waiter] = {}
        self._leases: dict[tuple[ModelId, int], set[ChildLease]] = {}
        self._counters: Mapping[str, ModelCounters] = MappingProxyType({})
        inventory.when_models_change = self._follow_models
        self._started_at = time.time()
        self._clock = views.Clock()

    async def run(self, *, task_status: TaskStatus[None] = TASK_STATUS_IGNORED) -> None:
        """Serve until ``shut_down`` was called and every child is gone. Cancelled, it takes its children with it."""
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            tasks.start_soon(self._keep_time)
            task_status.started()
            await self._stopped.wait()
            tasks.cancel_scope.cancel()

    async def wait_stopped(self) -> None:
        """Return once ``shut_down`` was called and every child is gone."""
        await self._stopped.wait()

    def configure(self, file: ModelsFile) -> None:
        """Let this models file hold from now on: runners whose settings it does not change keep serving."""
        self._inventory.configure(file)

    def _follow_models(self) -> None:
        settings = configured.scheduling(self._inventory.entries)
        if settings != self._pool.settings:
            self._post(SettingsChanged(settings))

    def shut_down(self) -> None:
        """Take no new work, let what runs finish in its time, stop every child. Called again: stop them now."""
        self._post(ShutdownRequested())

    # -----------------------------------------------------------------------------------------------------------------
    # supervisor.api.Runtime

    def snapshot(self) -> Snapshot:
        """Return the state of everything, at once."""
        now, pool, inventory, clock = anyio.current_time(), self._pool, self._inventory, self._clock
        clock.follow(now)
        return Snapshot(
            version=self._options.version,
            started_at=self._started_at,
            now=clock.at(now),
            draining=pool.draining,
            not_ready=(*inventory.not_ready, *(("the service is shutting down",) if pool.draining else ())),
            llama_server=None if inventory.llama is None else inventory.llama.path,
            llama_version=None if inventory.llama is None else inventory.llama.version,
            machine=inventory.machine,
            ledger=views.ledger_views(pool, inventory.machine, now),
            runners=views.runner_views(pool, clock),
            models=views.model_views(inventory.entries, pool, self._options.n_ctx_per_slot),
            queue_length=len(pool.waiting),
            queue_limit=pool.limits.max_queue,
            counters=self._counters,
            warnings=self._options.warnings,
        )

    async def resolve(self, name: str) -> str:
        """Return the public id that this name stands for. Raises UnknownModel."""
        return (await self._inventory.resolve(name)).id

    @asynccontextmanager
    async def acquire(self, model: str, role: Role, need: Need = NO_NEED) -> AsyncIterator[ChildLease]:
        """Wait for a lease, hold it, give it back exactly once. Entering raises an AcquireError."""
        entry = await self._inventory.find(model, role)
        ticket = TicketId(self._next_ticket)
        self._next_ticket += 1
        waiter = self._waiters[ticket] = Waiter()
        try:
            options = _possible(need.load, entry, self._options.n_ctx_per_slot)
            self._post(RequestArrived(ticket, entry.id, need.client, options, need.keep_alive_s))
            await waiter.wait_settled()
            if waiter.refusal is not None:
                raise error_of(waiter.refusal)
            assert waiter.lease is not None  # noqa: S101 - settled is one or the other
            yield waiter.lease
        finally:
            del self._waiters[ticket]
            if waiter.lease is not None:
                self._give_back(entry.id, waiter.lease, need.client)
            elif waiter.refusal is None:
                self._post(RequestAbandoned(ticket))

    async def unload(self, model: str) -> bool:
        """Let the model's runner finish what it serves, stop it, and return once its child is gone."""
        entry = await self._inventory.resolve(model)
        runner = self._pool.runner(entry.id)
        if runner.state not in HAS_CHILD:
            return False
        drain_until = anyio.current_time() + self._pool.limits.drain_timeout_s
        self._post(StopRequested(runner.model, runner.generation, drain_until))
        await self._until(lambda pool: _is_gone(pool.runner(runner.model), runner.generation))
        return True

    def reset(self, model: str) -> bool:
        """Let a runner that failed or backs off be tried again at once; False where there was nothing to forgive."""
        runner = self._pool.runner(ModelId(model))
        self._post(ResetRequested(runner.model, runner.generation))
        return self._pool.runner(runner.model) != runner

    def progress(self, model: str) -> LoadProgress | None:
        """Return where the model's load stands, None where none is under way."""
        return views.progress(self._pool, ModelId(model), anyio.current_time())

    async def yield_memory(self, device: str, wanted_bytes: int, for_s: float) -> YieldResult:
        """Stop idle runners until so much is free on a device, and place nothing there for so long.

        Raises UnknownDevice.
        """
        before = ledger.held_bytes(self._pool)
        await self._inventory.refresh(before, {})
        free_bytes = self._free_bytes(device)
        until = anyio.current_time() + for_s
        self._post(YieldRequested(device, wanted_bytes, free_bytes or 0, until))
        await self._until(lambda pool: not any(one.held_bytes().get(device) for one in pool.leaving))
        after = ledger.held_bytes(self._pool)
        await self._inventory.refresh(after, ledger.gone_bytes(self._pool, anyio.current_time()))
        freed_bytes = max(0, before.get(device, 0) - after.get(device, 0))
        return YieldResult(device, freed_bytes, self._free_bytes(device), self._clock.at(until))

    def _free_bytes(self, device: str) -> int | None:
        machine = self._inventory.machine
        names = [] if machine is None else [str(one.name) for one in (*machine.devices, machine.host)]
        if machine is None or device not in names:
            raise UnknownDevice(
                f"there is no device {device!r} here; there are: {', '.join(names) or 'none known yet'}"
            )
        return machine.device(device).free_bytes

    async def rescan(self) -> None:
        """Read the models again, now."""
        await self._inventory.scan(forced=True)

    async def details(self, model: str) -> Mapping[str, Any]:
        """Return what the model's header says. Raises UnknownModel, BadModel, PlannerFailed."""
        found = await self._inventory.details(model)
        tensors = [{"name": name, "type": type_, "shape": list(shape)} for name, type_, shape in found.tensors]
        return {"metadata": found.metadata, "tensors": tensors}

    async def log_lines(self, model: str, *, follow: bool) -> AsyncGenerator[str, None]:
        """Yield the last lines that the model's runner logged; with ``follow`` what it says from then on, to its end.

        Raises UnknownModel where no runner of it has said anything.
        """
        runner = self._pool.runner((await self._inventory.resolve(model)).id)
        if (log := self._children.log(runner.model, runner.generation)) is not None:
            async for line in log.lines(follow=follow):
                yield line
        elif runner.last_failure is not None:
            for line in runner.last_failure.log_tail:
                yield line
        else:
            raise UnknownModel(f"no runner of {runner.model} has said anything yet")

    async def _until(self, holds: Callable[[Pool], bool]) -> None:
        """Return once this holds for the pool."""
        while not holds(self._pool):
            await self._changed.wait()

    def _give_back(self, model: ModelId, lease: ChildLease, client: str) -> None:
        holders = self._leases.get((model, lease.generation), set())
        holders.discard(lease)
        if not holders:
            self._leases.pop((model, lease.generation), None)
        self._post(RequestFinished(model, lease.generation, client))

    # -----------------------------------------------------------------------------------------------------------------
    # Events in, commands out

    def _post(self, event: Event) -> None:
        self._inbox.append(event)
        if self._handling:  # a command of an earlier event caused this one: it is handled when that is done
            return
        self._handling = True
        try:
            while self._inbox:
                self._handle(self._inbox.popleft())
        finally:
            self._handling = False
        self._alarm.set(scheduler.next_deadline(self._pool))
        changed, self._changed = self._changed, anyio.Event()
        changed.set()
        if self._pool.draining and not self._pool.has_children:
            self._stopped.set()

    def _handle(self, event: Event) -> None:
        before = self._pool
        self._pool, commands = scheduler.step(before, event, anyio.current_time())
        for runner in self._pool.runners.values():
            was = before.runner(runner.model).state
            if was is not runner.state:
                about = {"model": runner.model, "runner": runner.id, "generation": runner.generation}
                _log.info(f"runner.{runner.state}", was=str(was), pid=runner.pid, **about)
        for command in commands:
            self._counters = views.count(self._counters, command)
            self._carry_out(command)

    def _carry_out(self, command: Command) -> None:
        assert self._tasks is not None  # noqa: S101 - nobody asks for anything before ``run`` has started
        match command:
            case PlanModel():
                self._tasks.start_soon(self._plan, command)
            case ReadMachine(_, held, gone):
                self._tasks.start_soon(self._inventory.refresh, held, gone)
            case Spawn():
                self._children.spawn(command, self._tasks)
            case Learn(model, device, size_bytes):
                self._inventory.learn(device, size_bytes, model)
            case StopProcess(model, generation, reason, at_once):
                _log.info("runner.stop", model=model, generation=generation, reason=reason)
                self._tasks.start_soon(self._children.stop, model, generation, at_once)
            case Grant() | Reject() | LoseLeases():
                self._tell(command)
            case ReportFailure():
                _report(command)
            case _:
                assert_never(command)

    def _tell(self, command: Grant | Reject | LoseLeases) -> None:
        """Tell those who wait for a lease, or hold one."""
        match command:
            case Grant(ticket, model, generation, url):
                endpoint = Endpoint(url, self._children.api_key(model, generation))
                lease = ChildLease(model, generation, endpoint, self._inventory.amendments(model))
                self._leases.setdefault((model, generation), set()).add(lease)
                self._waiters[ticket].settle(lease)
            case Reject(ticket, _, refusal):
                self._waiters[ticket].settle(refusal)
            case LoseLeases(model, generation, story):
                for lease in self._leases.pop((model, generation), set()):
                    lease.lose(story)

    async def _plan(self, command: PlanModel) -> None:
        self._post(await self._inventory.plan(command))

    async def _keep_time(self) -> None:
        while True:
            await self._alarm.wait()
            self._post(TimePassed())


def _is_gone(runner: Runner, generation: int) -> bool:
    """Say whether the child of this generation is gone, whatever came after it."""
    return runner.generation != generation or runner.state not in HAS_CHILD


def _report(command: ReportFailure) -> None:
    model, failure = command.model, command.failure
    event = "load.failed" if command.while_loading else "runner.crashed"
    _log.error(event, model=model, generation=command.generation, reason=failure.reason)
    if (remedy := failure.remedy) is not None:
        _log.warning("load.again", model=model, chosen=remedy.chosen, because=remedy.because)


def _possible(options: LoadOptions, entry: ModelEntry, n_ctx_per_slot: int | None) -> LoadOptions:
    """Return the options that a runner can be loaded with, for this request and for those to come.

    No longer a context than the model was trained for, no shorter one than every conversation was promised. Ollama's
    clients write a negative number of layers for as many as fit.
    """
    n_ctx, n_gpu_layers = options.n_ctx, options.n_gpu_layers
    if n_ctx is not None:
        n_ctx = max(n_ctx, n_ctx_per_slot or 0)
        n_ctx = n_ctx if entry.n_ctx_train is None else min(n_ctx, entry.n_ctx_train)
    return replace(options, n_ctx=n_ctx, n_gpu_layers=None if (n_gpu_layers or 0) < 0 else n_gpu_layers)
