"""One runner's event and what it means for the others: memory that came back, tickets that are owed or refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from supervisor.core import ledger, runner_table
from supervisor.core.commands import Command, ReadMachine, Reject
from supervisor.core.events import RunnerEvent
from supervisor.core.pool import LoadPhase, Pool
from supervisor.core.runner import HAS_CHILD, IS_LOADING, Runner, RunnerState
from supervisor.core.types import ModelId, Refusal, RefusalKind, Ticket, TicketId

RETRY_AFTER_BUSY_S: Final = 5.0  # a queue that is full empties at the pace of answers, which take seconds
LONGEST_RETRY_AFTER_S: Final = 300.0  # whoever comes back later than that asks anew anyway

Outcome = tuple[Pool, tuple[Command, ...]]


def step_runner(pool: Pool, event: RunnerEvent, now: float) -> Outcome:
    """Return the pool after one runner's event. Raises runner_table.IllegalTransition."""
    before = pool.runner(event.model)
    after, commands = runner_table.step(before, event, now, pool.limits_of(event.model))
    pool = pool.with_runner(after)
    is_gone = before.state in HAS_CHILD and after.state not in HAS_CHILD
    is_ready = after.state is RunnerState.READY and before.state is not RunnerState.READY
    if is_gone:
        pool = asked_anew(pool.with_gone(before, now))
    if is_ready:
        pool = _owe(pool, after.model)
    if is_gone or is_ready:
        gone = ledger.gone_bytes(pool, now) if is_gone else {}
        commands += (ReadMachine(after.model, gone),)
    load_failed = before.state in IS_LOADING and after.state not in {*IS_LOADING, RunnerState.READY}
    given_up = after.state is RunnerState.FAILED and before.state is not RunnerState.FAILED
    if given_up or (load_failed and not after.wanted_back):
        pool, again = (pool, frozenset()) if given_up else _tried_again(pool, after)
        told = tuple(one for one in pool.waiting_for(after.model) if one.id not in again)
        pool, more = refuse(pool, told, load_failed_refusal(after, now))
        commands += more
    return pool, commands


def _tried_again(pool: Pool, runner: Runner) -> tuple[Pool, frozenset[TicketId]]:
    """Return who goes on waiting though the load has failed: once each, where it was killed."""
    if runner.state is not RunnerState.BACKOFF or runner.last_failure is None or not runner.last_failure.killed:
        return pool, frozenset()
    again = frozenset(one.id for one in pool.waiting_for(runner.model) if not one.tried_again)
    waiting = tuple(replace(one, tried_again=True) if one.id in again else one for one in pool.waiting)
    return replace(pool, waiting=waiting), again


def asked_anew(pool: Pool) -> Pool:
    """Return the pool in which the planner's present question, if any, is to be asked again: the machine is another."""
    for load in pool.loads.values():
        if load.phase is LoadPhase.PLANNING:
            pool = pool.with_load(load, phase=LoadPhase.QUEUED)
    return pool


def _owe(pool: Pool, model: ModelId) -> Pool:
    """Note who waits for this model, which has just become ready: it is not evicted before they were served."""
    runner = pool.runner(model)
    waiting = tuple(
        replace(one, owed=True) if one.model == model and runner.can_serve(one.options) else one for one in pool.waiting
    )
    return replace(pool, waiting=waiting)


def refuse(pool: Pool, tickets: tuple[Ticket, ...], refusal: Refusal) -> Outcome:
    """Refuse these tickets."""
    commands = tuple(Reject(one.id, one.model, refusal) for one in tickets)
    return pool.without_tickets(frozenset(one.id for one in tickets)), commands


def retry_after_s(pool: Pool, model: ModelId) -> float:
    """Return when it is worth asking for a model again: as long as its last load took, where one was measured."""
    measured = pool.runner(model).reload_s
    return RETRY_AFTER_BUSY_S if measured is None else min(LONGEST_RETRY_AFTER_S, max(1.0, measured))


def load_failed_refusal(runner: Runner, now: float) -> Refusal:
    """Return what those are told who wait for a runner that failed."""
    failure = runner.last_failure if runner.child is None else runner.child.pending_failure
    reason = "it was stopped" if failure is None else failure.reason
    kind = RefusalKind.LOAD_TIMEOUT if failure is not None and failure.timed_out else RefusalKind.LOAD_FAILED
    retry_after = RETRY_AFTER_BUSY_S if runner.deadline is None else max(1.0, runner.deadline - now)
    message = f"the runner of {runner.model} failed: {reason}"
    if runner.state is RunnerState.FAILED:
        message += f"; it is left alone for a while now (planner reset {runner.model}: try it again at once)"
    return Refusal(kind, message, retry_after_s=retry_after)
