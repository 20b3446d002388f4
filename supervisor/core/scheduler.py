"""Admission, loading and making room: one pure function over the pool.

A ticket's way, as numbered cases:

1. The service drains ............................ refused.
2. Its runner is ready and has a free slot ........ granted, oldest ticket first.
3. As many tickets wait as MAX_QUEUE allows ....... refused.
4. Its runner is starting, full, or backing off ... waits; a load is joined, never begun twice.
5. Nothing else is being loaded ................... its model is planned beside what is loaded; then
   a. llama.cpp or the file rules it out .......... every ticket of that model is refused;
   b. it fits as well as it ever can .............. launched, once MAX_LOADED_MODELS allows;
   c. it does not, and others are loaded .......... planned once more as if they were not: worse or no better means
                                                    launched or refused at once, better means that room is made;
   d. it does not, and nothing else is loaded ..... refused for good.
6. Room is made by stopping idle runners, least recently used first, one at a time, and planning again after each exit.
   Where all are busy it waits for the first to fall idle; younger tickets wait behind it, or it would never come.

One load at a time: two loads that each see the same free bytes would both take them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final, assert_never

from supervisor.core import runner_table
from supervisor.core.commands import Command, Grant, PlanModel, ReadMachine, Reject
from supervisor.core.events import (
    DeadlinePassed,
    Event,
    Planned,
    RequestAbandoned,
    RequestArrived,
    RequestGranted,
    RunnerEvent,
    ShutdownRequested,
    StartRequested,
    StopRequested,
    TimePassed,
)
from supervisor.core.pool import Load, LoadPhase, Pool
from supervisor.core.runner import HAS_CHILD, IS_LOADING, Runner, RunnerState
from supervisor.core.types import DoesNotFit, LoadPlan, ModelId, PlanProblem, Refusal, RefusalKind, Ticket

RETRY_AFTER_BUSY_S: Final = 5.0  # a queue that is full empties at the pace of answers, which take seconds
MAX_ROUNDS: Final = 10_000  # of settling; far above what a full queue needs, so that ping-pong is an error and no hang
NOWHERE: Final = -1  # fewer than no layer on a device: not runnable at all

Outcome = tuple[Pool, tuple[Command, ...]]


def step(pool: Pool, event: Event, now: float) -> Outcome:
    """Return the pool after this event, and what is to be done. Raises runner_table.IllegalTransition."""
    match event:
        case RequestArrived():
            pool, commands = _arrive(pool, event, now)
        case RequestAbandoned():
            pool, commands = pool.without_ticket(event.ticket), ()
        case Planned():
            pool, commands = _planned(pool, event, now)
        case ShutdownRequested():
            pool, commands = _shut_down(pool, now)
        case TimePassed():
            pool, commands = _pass_deadlines(pool, now)
        case RunnerEvent():
            pool, commands = _runner_step(pool, event, now)
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


# ---------------------------------------------------------------------------------------------------------------------
# Events


def _arrive(pool: Pool, event: RequestArrived, now: float) -> Outcome:
    ticket = Ticket(event.ticket, event.model, now)
    runner = pool.runner(event.model)
    pool = pool.with_runner(runner)
    if pool.draining:
        refusal = Refusal(RefusalKind.SHUTTING_DOWN, "the service is shutting down and takes no new requests")
    elif runner.state is RunnerState.FAILED:
        refusal = _load_failed(runner, now)
    elif len(pool.waiting) >= pool.limits.max_queue and (pool.holds_back or not runner.has_free_slot):
        message = f"{len(pool.waiting)} requests wait already, as many as MAX_QUEUE allows; try again later"
        refusal = Refusal(RefusalKind.QUEUE_FULL, message, retry_after_s=RETRY_AFTER_BUSY_S)
    else:
        return replace(pool, waiting=(*pool.waiting, ticket)), ()
    return pool, (Reject(ticket.id, ticket.model, refusal),)


def _shut_down(pool: Pool, now: float) -> Outcome:
    drain_until = None if pool.draining else now + pool.limits.drain_timeout_s
    refusal = Refusal(RefusalKind.SHUTTING_DOWN, "the service is shutting down")
    commands: tuple[Command, ...] = tuple(Reject(one.id, one.model, refusal) for one in pool.waiting)
    pool = replace(pool, draining=True, load=None, waiting=())
    for one in tuple(pool.runners.values()):
        pool, more = _runner_step(pool, StopRequested(one.model, one.generation, drain_until), now)
        commands += more
    return pool, commands


def _pass_deadlines(pool: Pool, now: float) -> Outcome:
    commands: tuple[Command, ...] = ()
    for one in tuple(pool.runners.values()):
        if one.deadline is not None and one.deadline <= now:
            pool, more = _runner_step(pool, DeadlinePassed(one.model, one.generation), now)
            commands += more
    load = pool.load
    if load is not None and load.deadline is not None and load.deadline <= now:
        message = f"no room for {load.model} within {pool.limits.load_timeout_s:g} s: every loaded model is in use"
        refusal = Refusal(RefusalKind.LOAD_TIMEOUT, message, retry_after_s=RETRY_AFTER_BUSY_S)
        pool, more = _refuse_all(pool, load.model, refusal)
        commands += more
    return pool, commands


def _runner_step(pool: Pool, event: RunnerEvent, now: float) -> Outcome:
    """Move one runner, and the load with it: one that ended makes way, one that plans or waits asks again."""
    before = pool.runner(event.model)
    after, commands = runner_table.step(before, event, now, pool.limits)
    pool = pool.with_runner(after)
    child_gone = before.state in HAS_CHILD and after.state not in HAS_CHILD
    if child_gone:
        pool = pool.with_gone(before, now)
    if child_gone or (after.state is RunnerState.READY and before.state is not RunnerState.READY):
        gone = pool.gone_bytes(now) if child_gone else {}
        commands += (ReadMachine(after.model, pool.held_bytes(), gone),)
    load = pool.load
    if load is not None and load.phase is LoadPhase.LAUNCHING:
        if load.model == after.model and after.state not in IS_LOADING:
            pool = replace(pool, load=None)
    elif load is not None and child_gone:
        pool, more = _ask_plan(pool, load, now)
        commands += more
    load_failed = before.state in IS_LOADING and after.state not in {*IS_LOADING, RunnerState.READY}
    if load_failed or after.state is RunnerState.FAILED:
        pool, more = _refuse_all(pool, after.model, _load_failed(after, now))
        commands += more
    return pool, commands


def _load_failed(runner: Runner, now: float) -> Refusal:
    failure = runner.pending_failure or runner.last_failure
    reason = "it was stopped" if failure is None else failure.reason
    kind = RefusalKind.LOAD_TIMEOUT if failure is not None and failure.timed_out else RefusalKind.LOAD_FAILED
    retry_after_s = RETRY_AFTER_BUSY_S if runner.deadline is None else max(1.0, runner.deadline - now)
    return Refusal(kind, f"the runner of {runner.model} failed: {reason}", retry_after_s=retry_after_s)


# ---------------------------------------------------------------------------------------------------------------------
# The one load


def _begin_load(pool: Pool, now: float) -> Outcome:
    """Plan the model of the oldest ticket that can be helped; else one that crashed while it was in use."""
    asked_for = [ticket.model for ticket in pool.waiting]
    missed = [runner.model for runner in pool.runners.values() if runner.wanted_back]
    for model in (*asked_for, *missed):
        if pool.runner(model).state is RunnerState.STOPPED:
            return _ask_plan(pool, Load(model, LoadPhase.PLANNING, 0, now), now)
    return pool, ()


def _ask_plan(pool: Pool, load: Load, now: float, *, alone: bool = False) -> Outcome:
    revision = pool.revision + 1
    phase = LoadPhase.PLANNING_ALONE if alone else LoadPhase.PLANNING
    load = replace(load, phase=phase, revision=revision, deadline=None)
    question = PlanModel(
        load.model,
        revision,
        held=pool.held_bytes(),
        promised=pool.promised_bytes(),
        gone=pool.gone_bytes(now),
        assume_empty=alone,
    )
    return replace(pool, revision=revision, load=load), (question,)


def _planned(pool: Pool, event: Planned, now: float) -> Outcome:
    load = pool.load
    if load is None or load.revision != event.revision:
        return pool, ()  # the answer to a question that no longer stands
    match event.outcome:
        case PlanProblem(reason=reason, ours=ours):
            kind = RefusalKind.PLANNER_FAILED if ours else RefusalKind.BAD_MODEL
            return _refuse_all(pool, load.model, Refusal(kind, f"{load.model}: {reason}"))
        case DoesNotFit() as no_fit:
            return _weigh(pool, load, None, no_fit, now)
        case LoadPlan() as plan:
            return _weigh(pool, load, plan, None, now)
        case _:
            assert_never(event.outcome)


def _weigh(pool: Pool, load: Load, plan: LoadPlan | None, no_fit: DoesNotFit | None, now: float) -> Outcome:
    """Case 5: launch, ask what an empty machine would give, make room, or refuse."""
    others = pool.others(load.model)
    if load.phase is LoadPhase.PLANNING_ALONE:
        load = replace(load, best_layers=NOWHERE if plan is None else plan.layers_on_devices)
        plan = load.beside
    elif others and (plan is None or not plan.is_best_possible) and load.best_layers is None:
        return _ask_plan(pool, replace(load, beside=_usable_beside(plan)), now, alone=True)
    elif others:
        plan = _usable_beside(plan)
    here = NOWHERE if plan is None else plan.layers_on_devices
    if others and load.best_layers is not None and load.best_layers > here:
        return _make_room(pool, load, now)
    if plan is None:
        return _refuse_all(pool, load.model, _cannot_fit(load.model, no_fit))
    if pool.limits.max_loaded_models is not None and len(others) >= pool.limits.max_loaded_models:
        return _make_room(pool, load, now)
    return _launch(pool, load, plan, now)


def _usable_beside(plan: LoadPlan | None) -> LoadPlan | None:
    """Return the plan, unless some of its bytes are unknown: then it has to be alone."""
    return plan if plan is not None and plan.plan.is_known else None


def _cannot_fit(model: ModelId, no_fit: DoesNotFit | None) -> Refusal:
    headline, causes = (None, ()) if no_fit is None else (no_fit.headline, no_fit.causes)
    return Refusal(RefusalKind.CANNOT_FIT, f"{model}: {headline or 'does not fit on this machine'}", causes=causes)


def _launch(pool: Pool, load: Load, plan: LoadPlan, now: float) -> Outcome:
    pool = replace(pool, load=replace(load, phase=LoadPhase.LAUNCHING, deadline=None))
    runner = pool.runner(load.model)
    return _runner_step(pool, StartRequested(load.model, runner.generation + 1, plan), now)


def _make_room(pool: Pool, load: Load, now: float) -> Outcome:
    if not pool.waiting_for(load.model):  # nobody waits, so nobody has to go
        return _give_up(pool, load.model), ()
    deadline = max(now, load.started_at + pool.limits.load_timeout_s)
    return replace(pool, load=replace(load, phase=LoadPhase.MAKING_ROOM, deadline=deadline)), ()


def _evict(pool: Pool, load: Load, now: float) -> Outcome:
    """Case 6: stop the least recently used idle runner, unless one is on its way out already."""
    if not pool.waiting_for(load.model):
        return _give_up(pool, load.model), ()
    others = pool.others(load.model)
    idle = [one for one in others if one.idle]
    if not idle or any(one.state in {RunnerState.DRAINING, RunnerState.STOPPING} for one in others):
        return pool, ()
    victim = min(idle, key=lambda one: (one.last_used, one.id))
    return _runner_step(pool, StopRequested(victim.model, victim.generation), now)


def _give_up(pool: Pool, model: ModelId) -> Pool:
    load = pool.load if pool.load is not None and pool.load.model != model else None
    return replace(pool.with_runner(replace(pool.runner(model), wanted_back=False)), load=load)


def _refuse_all(pool: Pool, model: ModelId, refusal: Refusal) -> Outcome:
    """Refuse every ticket of this model, and give its load up."""
    commands = tuple(Reject(ticket.id, model, refusal) for ticket in pool.waiting_for(model))
    waiting = tuple(ticket for ticket in pool.waiting if ticket.model != model)
    return _give_up(replace(pool, waiting=waiting), model), commands


# ---------------------------------------------------------------------------------------------------------------------
# Settling: what follows from the state alone


def _settle(pool: Pool, now: float) -> Outcome:
    commands: tuple[Command, ...] = ()
    for _ in range(MAX_ROUNDS):
        before = pool
        pool, granted = _grant_waiting(pool, now)
        pool, advanced = _advance_load(pool, now)
        if pool is before:
            return pool, commands
        commands += granted + advanced
    raise RuntimeError(f"the scheduler did not settle within {MAX_ROUNDS} rounds; load: {pool.load}")


def _grant_waiting(pool: Pool, now: float) -> Outcome:
    """Cases 2 and 6: grant what has a free slot, oldest first, as far as no older ticket waits for room."""
    commands: tuple[Command, ...] = ()
    held_back_by = pool.holds_back
    for ticket in pool.waiting:
        if held_back_by is not None and ticket.model == held_back_by.model:
            break
        runner = pool.runner(ticket.model)
        if not runner.has_free_slot or runner.url is None:
            continue
        pool, more = _runner_step(pool, RequestGranted(runner.model, runner.generation), now)
        pool = pool.without_ticket(ticket.id)
        commands += (*more, Grant(ticket.id, runner.model, runner.generation, runner.url))
    return pool, commands


def _advance_load(pool: Pool, now: float) -> Outcome:
    if pool.draining:
        return pool, ()
    if pool.load is None:
        return _begin_load(pool, now)
    return _evict(pool, pool.load, now) if pool.load.phase is LoadPhase.MAKING_ROOM else (pool, ())
