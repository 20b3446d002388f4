"""The one function over the pool: an event comes in, the next state and the commands go out.

``admission`` says who waits and who is served, ``loading`` how models come to be loaded, ``yielding`` what becomes of
memory that another program wants, ``runner_table`` what becomes of one runner, ``ledger`` what each holds, ``eviction``
(asked by whoever plans) which runners go.

What follows from the state alone is not done by the event that brought it about, but here, by settling: rules are
applied until none changes anything. So it does not matter which event made a slot free or a device empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final, assert_never

from supervisor.core import admission, loading, renaming, yielding
from supervisor.core.commands import Command, PlanModel, ReadMachine, Reject
from supervisor.core.events import (
    DeadlinePassed,
    DevicesRenamed,
    Event,
    KeepAliveChanged,
    Planned,
    RequestAbandoned,
    RequestArrived,
    RunnerEvent,
    SettingsChanged,
    ShutdownRequested,
    StopRequested,
    TimePassed,
    YieldEnded,
    YieldRequested,
)
from supervisor.core.pool import LoadPhase, Pool
from supervisor.core.runner import STAYS, RunnerState
from supervisor.core.stepping import Outcome, asked_anew, step_runner
from supervisor.core.types import ModelId, ModelSettings, Refusal, RefusalKind, StopReason

SERVICE_STOPS: Final = StopReason("the service stops")
SETTINGS_CHANGED: Final = StopReason("its settings have changed")
MAX_ROUNDS: Final = 10_000  # of settling; far above what a full queue needs, so that ping-pong is an error and no hang


def step(pool: Pool, event: Event, now: float) -> Outcome:
    """Return the pool after this event, and what is to be done. Raises runner_table.IllegalTransition."""
    match event:
        case RequestArrived():
            pool, commands = admission.arrive(pool, event, now)
        case RequestAbandoned(ticket):
            pool, commands = pool.without_tickets(frozenset({ticket})), ()
        case Planned():
            pool, commands = loading.planned(pool, event, now)
        case SettingsChanged(by_model):
            pool, commands = _change_settings(pool, by_model, now)
        case YieldRequested() | YieldEnded() | DevicesRenamed():
            pool, commands = _ask_all_anew(_change_devices(pool, event, now)), ()
        case ShutdownRequested():
            pool, commands = _shut_down(pool, now)
        case TimePassed():
            pool, commands = _pass_deadlines(pool, now)
        case RunnerEvent():
            pool, commands = step_runner(pool, event, now)
        case _:
            assert_never(event)
    pool, more = _settle(pool, now)
    commands += more
    if pool.draining or any(isinstance(command, PlanModel) for command in commands):  # which reads it as well
        commands = tuple(command for command in commands if not isinstance(command, ReadMachine))
    return pool, commands


def next_deadline(pool: Pool) -> float | None:
    """Return when ``TimePassed`` is due, None where nothing waits for time to pass."""
    return min(pool.deadlines(), default=None)


def _settle(pool: Pool, now: float) -> Outcome:
    commands: tuple[Command, ...] = ()
    for _ in range(MAX_ROUNDS):
        if not pool.is_under_way:
            return pool, commands
        before = pool
        pool, granted = admission.grant_waiting(pool, now)
        commands += granted
        if not pool.draining:
            pool, gone = yielding.advance(pool, now)
            pool, advanced = loading.advance(pool, now)
            commands += gone + advanced
        if pool is before:
            return pool, commands
    raise RuntimeError(f"the scheduler did not settle within {MAX_ROUNDS} rounds; loads: {pool.loads}")


def _shut_down(pool: Pool, now: float) -> Outcome:
    drain_until = None if pool.draining else now + pool.limits.drain_timeout_s
    refusal = Refusal(RefusalKind.SHUTTING_DOWN, "the service is shutting down")
    commands: tuple[Command, ...] = tuple(Reject(one.id, one.model, refusal) for one in pool.waiting)
    pool = replace(pool, draining=True, loads=MappingProxyType({}), waiting=())
    for one in tuple(pool.runners.values()):
        stop = StopRequested(one.model, one.generation, drain_until, SERVICE_STOPS)
        pool, more = step_runner(pool, stop, now)
        commands += more
    return pool, commands


def _pass_deadlines(pool: Pool, now: float) -> Outcome:
    commands: tuple[Command, ...] = ()
    for one in tuple(pool.runners.values()):
        if one.deadline is not None and one.deadline <= now:
            pool, more = step_runner(pool, DeadlinePassed(one.model, one.generation), now)
            commands += more
    kept = tuple(one for one in pool.yields if one.until > now)
    if kept != pool.yields:
        pool = _ask_all_anew(replace(pool, yields=kept))
    pool, late = admission.refuse_late(pool, now)
    pool, too_late = loading.refuse_late(pool, now)
    return pool, commands + late + too_late


def _change_settings(pool: Pool, by_model: Mapping[ModelId, ModelSettings], now: float) -> Outcome:
    """Change what differs, and nothing else: a runner that needs another child drains and comes back."""
    commands: tuple[Command, ...] = ()
    before, pool = pool, replace(pool, settings=by_model)
    for one in tuple(pool.runners.values()):
        if one.child is not None and one.state in STAYS and one.child.launch != pool.settings_of(one.model).launch:
            until = now + pool.limits.drain_timeout_s
            stop = StopRequested(one.model, one.generation, until, SETTINGS_CHANGED, come_back=True)
            pool, more = step_runner(pool, stop, now)
            commands += more
        elif before.limits_of(one.model) != pool.limits_of(one.model):
            pool, more = step_runner(pool, KeepAliveChanged(one.model, one.generation), now)
            commands += more
    for model, settings in by_model.items():
        if settings.preload and pool.runner(model).state is RunnerState.STOPPED:
            pool = pool.with_runner(replace(pool.runner(model), wanted_back=True))
    return _ask_all_anew(pool), commands


def _change_devices(pool: Pool, event: YieldRequested | YieldEnded | DevicesRenamed, now: float) -> Pool:
    """Follow what may be had of devices, and how they are called."""
    if isinstance(event, DevicesRenamed):
        return renaming.renamed(pool, event.names)
    return yielding.changed(pool, event, now)


def _ask_all_anew(pool: Pool) -> Pool:
    """Return the pool in which every load that is not launched yet is planned again: what it was planned on is not."""
    for load in pool.loads.values():
        if load.phase in {LoadPhase.WAITING, LoadPhase.MAKING_ROOM}:
            pool = pool.with_load(load, phase=LoadPhase.QUEUED, victims=frozenset())
    return asked_anew(pool)
