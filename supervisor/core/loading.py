"""How models come to be loaded: planned one at a time, launched side by side where their devices are not the same.

A load's way, as numbered cases:

1. Its model is asked for, or missed (it crashed in use, ran out of memory as it loaded, has drained for other settings,
   or is preloaded), and it has no child, or one that was loaded for less than is asked: queued. The oldest load is
   planned first.
2. llama.cpp or the file rules it out, or it does not fit even with all gone that may go: who waits for it is refused,
   but for those who ask for a shorter context than it was planned for. One that ran out of memory and never fits with
   the margins that it needs since has failed. While a pinned runner loads it waits for that instead, unless it never
   fits: what that one takes is not known before.
3. It fits as well as it would without its neighbours: launched; what it takes is promised from then on. Where it shares
   a device with a load in progress, it waits for that and is planned again: no driver tells how much of what was
   promised to the other it shows already. Where MAX_LOADED_MODELS have a child it waits for those that leave.
4. It would fit better without some: room is made. The cheapest set of runners goes, together, once all of it is idle;
   meanwhile none of the set takes up requests younger than this load's. Nobody goes for a load that nobody waits for.
   Then it is planned again, on what is free by then. Where there is no room within LOAD_TIMEOUT, who waits is refused.
5. A runner that was not chosen falls idle first: planned again, it may do instead.
6. Its own child was loaded for less: the child drains, bounded by DRAIN_TIMEOUT, and goes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, Final, assert_never

from planner.types import LoadOptions
from supervisor.core import ledger
from supervisor.core.commands import Command, PlanModel
from supervisor.core.events import NoRoomLeft, Planned, StartRequested, StopRequested
from supervisor.core.pool import Load, LoadPhase, Pool
from supervisor.core.runner import HAS_CHILD, IS_LEAVING, IS_LOADING, Runner, RunnerState
from supervisor.core.stepping import RETRY_AFTER_BUSY_S, Outcome, refuse, step_runner
from supervisor.core.types import (
    DoesNotFit,
    LoadPlan,
    MakeRoom,
    ModelId,
    PlanProblem,
    Refusal,
    RefusalKind,
    StopReason,
    Ticket,
)

CAN_LOAD: Final = frozenset({RunnerState.STOPPED, RunnerState.READY})  # READY: what it was loaded for is not enough
FOR_ROOM: Final = StopReason("another model needs its place", evicts=True)
FOR_OPTIONS: Final = StopReason("it is loaded again with other options")


def advance(pool: Pool, now: float) -> Outcome:
    """Do for every load what follows from the state alone: begin it, end it, make its room, ask for its plan."""
    commands: tuple[Command, ...] = ()
    pool = _begin(_without_ended(pool), now)
    for load in tuple(pool.loads.values()):
        if load.phase is LoadPhase.WAITING and not any(_is_passing(pool.runner(one)) for one in load.behind):
            pool = pool.with_load(load, phase=LoadPhase.QUEUED)
        elif load.phase is LoadPhase.MAKING_ROOM:
            pool, more = _make_room(pool, load, now)
            commands += more
    if not any(load.phase is LoadPhase.PLANNING for load in pool.loads.values()):
        for load in pool.loads.values():
            if load.phase is LoadPhase.QUEUED and pool.runner(load.model).state in CAN_LOAD:
                pool, question = _ask(pool, load, now)
                return pool, (*commands, question)
    return pool, commands


def planned(pool: Pool, event: Planned, now: float) -> Outcome:
    """Take the planner's answer, unless the question no longer stands."""
    load = pool.loads.get(event.model)
    if load is None or load.phase is not LoadPhase.PLANNING or pool.revision != event.revision:
        return pool, ()
    match event.outcome:
        case LoadPlan() as plan:
            return _launch(pool, load, plan, now)
        case MakeRoom() as room:
            return _want_room(pool, load, room, now), ()
        case DoesNotFit() as no_fit:
            return _has_no_room(pool, load, no_fit, now)
        case PlanProblem(reason=reason, ours=ours):
            kind = RefusalKind.PLANNER_FAILED if ours else RefusalKind.BAD_MODEL
            return give_up(pool, load, Refusal(kind, f"{load.model}: {reason}"))
        case _:
            assert_never(event.outcome)


def _has_no_room(pool: Pool, load: Load, no_fit: DoesNotFit, now: float) -> Outcome:
    """Case 2."""
    runner = pool.runner(load.model)
    if no_fit.never and runner.margins and runner.state is RunnerState.STOPPED:
        return step_runner(pool.without_load(load.model), NoRoomLeft(runner.model, runner.generation), now)
    pinned = frozenset(one.model for one in pool.loading if pool.settings_of(one.model).pinned)
    if pinned and not no_fit.never:
        return pool.with_load(load, phase=LoadPhase.WAITING, victims=frozenset(), behind=pinned), ()
    return give_up(pool, load, _cannot_fit(pool, load.model, no_fit, now))


def refuse_late(pool: Pool, now: float) -> Outcome:
    """Refuse who waits for room that nobody made in time."""
    commands: tuple[Command, ...] = ()
    for load in tuple(pool.loads.values()):
        if load.deadline is not None and load.deadline <= now:
            message = f"no room for {load.model} within {pool.limits.load_timeout_s:g} s: what could go is in use"
            late = Refusal(RefusalKind.LOAD_TIMEOUT, message, retry_after_s=RETRY_AFTER_BUSY_S)
            pool, more = give_up(pool, load, late)
            commands += more
    return pool, commands


def give_up(pool: Pool, load: Load, refusal: Refusal) -> Outcome:
    """End a load, and refuse those who wait for it; not those who ask for less than it was to be loaded for."""
    tickets = pool.stranded(load.model)
    demanding = tuple(one for one in tickets if load.options.n_ctx and one.options.n_ctx == load.options.n_ctx)
    return refuse(_without(pool, load), demanding or tickets, refusal)


def _without(pool: Pool, load: Load) -> Pool:
    """Return the pool without this load, whose model is not missed any more."""
    return pool.with_runner(replace(pool.runner(load.model), wanted_back=False)).without_load(load.model)


# ---------------------------------------------------------------------------------------------------------------------
# Beginning and asking


def _without_ended(pool: Pool) -> Pool:
    """Return the pool without the loads that have ended, one way or the other."""
    for load in tuple(pool.loads.values()):
        runner = pool.runner(load.model)
        launched = load.phase is LoadPhase.LAUNCHING and runner.state not in IS_LOADING
        if launched or runner.state is RunnerState.FAILED:
            pool = pool.without_load(load.model)
    return pool


def _begin(pool: Pool, now: float) -> Pool:
    asked_for = dict.fromkeys(ticket.model for ticket in pool.waiting)
    missed = dict.fromkeys(runner.model for runner in pool.runners.values() if runner.wanted_back)
    for model in asked_for | missed:
        state = pool.runner(model).state
        is_short = state is RunnerState.READY and bool(pool.stranded(model))
        if model not in pool.loads and (state is RunnerState.STOPPED or is_short):
            pool = pool.with_load(Load(model, now))
    return pool


def _ask(pool: Pool, load: Load, now: float) -> tuple[Pool, Command]:
    runner = pool.runner(load.model)
    others = pool.others(load.model)
    most = pool.limits.max_loaded_models
    present = (runner, *others) if runner.state in HAS_CHILD else others
    options = _options(pool.waiting_for(load.model), runner)
    question = PlanModel(
        load.model,
        pool.revision + 1,
        options=options,
        launch=pool.settings_of(load.model).launch,
        neighbours=tuple(ledger.neighbour(pool, one, now) for one in present),
        surplus=0 if most is None else max(0, len(others) + 1 - most),
        gone=ledger.gone_bytes(pool, now),
        caps=ledger.caps(pool, now),
        margins=runner.margins,
    )
    idle = frozenset(one.model for one in others if one.idle)
    pool = pool.with_load(load, phase=LoadPhase.PLANNING, options=options, tried=idle)
    return replace(pool, revision=question.revision), question


def _options(tickets: tuple[Ticket, ...], runner: Runner) -> LoadOptions:
    """Return what all who wait ask for together: the longest context, else the oldest wish; nobody: as it was."""
    if not tickets:
        return runner.options
    first: dict[str, Any] = {
        each.name: next((value for one in tickets if (value := getattr(one.options, each.name)) is not None), None)
        for each in fields(LoadOptions)
    }
    n_ctx = max((one.options.n_ctx for one in tickets if one.options.n_ctx is not None), default=None)
    return LoadOptions(**{**first, "n_ctx": n_ctx})


# ---------------------------------------------------------------------------------------------------------------------
# Launching, and making room


def _launch(pool: Pool, load: Load, plan: LoadPlan, now: float) -> Outcome:
    """Case 3. Host memory was promised in full, so that two loads on the host do not quarrel."""
    quarrel = _contending(pool, plan.shares_device_with)
    leaving = [one.model for one in pool.others(load.model) if one.state in IS_LEAVING]
    most = pool.limits.max_loaded_models
    crowded = most is not None and len(pool.others(load.model)) >= most
    behind = quarrel | frozenset(leaving if crowded else ())
    runner = pool.runner(load.model)
    if behind:
        return pool.with_load(load, phase=LoadPhase.WAITING, victims=frozenset(), behind=behind), ()
    if runner.state is not RunnerState.STOPPED:  # case 6
        return _want_room(pool, load, MakeRoom(frozenset()), now), ()
    pool = pool.with_load(load, phase=LoadPhase.LAUNCHING, victims=frozenset(), deadline=None)
    settings = pool.settings_of(load.model)
    start = StartRequested(load.model, runner.generation + 1, plan, load.options, settings.launch)
    return step_runner(pool, start, now)


def _want_room(pool: Pool, load: Load, room: MakeRoom, now: float) -> Pool:
    """Cases 4 and 6; what a load in progress gives or takes on the same devices has to be known first."""
    quarrel = _contending(pool, lambda other: bool(other.contended & room.contended))
    if quarrel:
        return pool.with_load(load, phase=LoadPhase.WAITING, victims=frozenset(), behind=quarrel)
    deadline = max(now, load.started_at + pool.limits.load_timeout_s) if load.deadline is None else load.deadline
    wanted = {"victims": room.victims, "alternatives": room.alternatives, "deadline": deadline}
    return pool.with_load(load, phase=LoadPhase.MAKING_ROOM, **wanted)


def _make_room(pool: Pool, load: Load, now: float) -> Outcome:
    own = pool.runner(load.model)
    victims = [one for one in pool.others(load.model) if one.model in load.victims]
    if not victims and own.state is RunnerState.STOPPED:
        return pool.with_load(load, phase=LoadPhase.QUEUED, victims=frozenset()), ()
    if not pool.stranded(load.model):
        return _without(pool, load), ()
    if any(one.state not in IS_LEAVING and not one.idle for one in victims):
        fresh = [one for one in load.alternatives - load.tried if pool.runner(one).idle]
        return (pool.with_load(load, phase=LoadPhase.QUEUED) if fresh else pool), ()
    commands: tuple[Command, ...] = ()
    for one in victims:
        if one.state not in IS_LEAVING:
            pool, more = step_runner(pool, StopRequested(one.model, one.generation, reason=FOR_ROOM), now)
            commands += more
    if own.state is RunnerState.READY:
        until = now + pool.limits.drain_timeout_s
        pool, more = step_runner(pool, StopRequested(own.model, own.generation, until, FOR_OPTIONS), now)
        commands += more
    return pool, commands


def _contending(pool: Pool, quarrels: Callable[[LoadPlan], bool]) -> frozenset[ModelId]:
    return frozenset(one.model for one in pool.loading if one.plan is not None and quarrels(one.plan))


def _is_passing(runner: Runner) -> bool:
    """Say whether it loads or leaves: what it holds is about to change."""
    return runner.state in IS_LOADING or runner.state in IS_LEAVING


def _cannot_fit(pool: Pool, model: ModelId, no_fit: DoesNotFit, now: float) -> Refusal:
    message, retry_after_s = f"{model}: {no_fit.headline}", None
    if no_fit.yielded and pool.yields:
        message += "; memory is another program's for now (planner yield)"
        retry_after_s = max(1.0, min(one.until for one in pool.yields) - now)
    elif not no_fit.never:
        retry_after_s = RETRY_AFTER_BUSY_S
    return Refusal(RefusalKind.CANNOT_FIT, message, retry_after_s, no_fit.causes, no_fit.never)
