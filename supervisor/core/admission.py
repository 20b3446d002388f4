"""Who may wait, who is served next, and who has waited too long.

A ticket's way, as numbered cases:

1. The service drains, or its runner has failed: refused.
2. It would have to wait, and as many wait as MAX_QUEUE allows, or of this client as CLIENT_QUEUE does: refused.
3. Its runner is ready and has a free slot: granted, to the client with the fewest requests in flight on this runner,
   then anywhere, then to the one that was served longest ago, then to the oldest ticket. But for
   a. tickets behind one that needs the runner loaded anew (a longer context): they wait, or it would never come;
   b. tickets younger than those of a load that waits for this runner to fall idle. Whoever waited when the runner
      became ready is served all the same, or loads would take turns and serve nobody;
   c. all tickets, once the runner's turn is over: it has served for several times as long as it took to load, and a
      client that waits for nothing here waits for it to go. Else one client's queue would keep all others out.
4. Else it waits, for QUEUE_TIMEOUT at most, while ``loading`` sees to it that its model is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from planner.types import LoadOptions
from supervisor.core.commands import Command, Grant, Reject
from supervisor.core.events import RequestArrived, RequestGranted
from supervisor.core.pool import Pool
from supervisor.core.runner import Runner, RunnerState
from supervisor.core.stepping import Outcome, load_failed_refusal, refuse, retry_after_s, step_runner
from supervisor.core.types import ModelId, Refusal, RefusalKind, Ticket

# So many times as long as its load took, a runner may serve while another client waits for it to go: however many
# requests of however many clients come, no more than a quarter of the time goes into loading.
TURN_LOADS: Final = 3.0


def arrive(pool: Pool, event: RequestArrived, now: float) -> Outcome:
    """Let a request wait, or refuse it, or grant it where there is nobody else to be thought of.

    Whoever else need not wait is granted right after.
    """
    ticket = Ticket(event.ticket, event.model, now, event.client, event.options, event.keep_alive_s)
    if free_runner(pool, event.model, event.options) is not None:
        return _grant(pool, ticket, now)
    runner = pool.runner(event.model)
    pool = pool.with_runner(runner)
    refusal = _refusal(pool, runner, ticket, now)
    if refusal is None:
        return replace(pool, waiting=(*pool.waiting, ticket)), ()
    return pool, (Reject(ticket.id, ticket.model, refusal),)


def free_runner(pool: Pool, model: ModelId, options: LoadOptions) -> Runner | None:
    """Return the runner that serves a request for this model at once, with nobody else to be thought of, if any."""
    runner = pool.runner(model)
    is_free = runner.has_free_slot and runner.can_serve(options) and not (pool.is_under_way or pool.draining)
    return runner if is_free else None


def grant_waiting(pool: Pool, now: float) -> Outcome:
    """Grant whatever can be granted (case 3)."""
    commands: tuple[Command, ...] = ()
    pool = _end_turns(pool, now)
    while (ticket := _next_served(pool, now)) is not None:
        pool, more = _grant(pool, ticket, now)
        commands += more
    return pool, commands


def _grant(pool: Pool, ticket: Ticket, now: float) -> Outcome:
    runner = pool.runner(ticket.model)
    granted = RequestGranted(runner.model, runner.generation, ticket.client, ticket.keep_alive_s)
    pool, commands = step_runner(pool, granted, now)
    return pool.with_served(ticket), (*commands, Grant(ticket.id, runner.model, runner.generation, runner.url or ""))


def refuse_late(pool: Pool, now: float) -> Outcome:
    """Refuse who has waited for as long as QUEUE_TIMEOUT allows."""
    commands: tuple[Command, ...] = ()
    for ticket in pool.waiting:
        if ticket.arrived_at + pool.limits.queue_timeout_s <= now:
            message = f"{ticket.model} was not free within {pool.limits.queue_timeout_s:g} s (QUEUE_TIMEOUT)"
            late = Refusal(RefusalKind.QUEUE_TIMEOUT, message, retry_after_s(pool, ticket.model))
            pool, more = refuse(pool, (ticket,), late)
            commands += more
    return pool, commands


def _refusal(pool: Pool, runner: Runner, ticket: Ticket, now: float) -> Refusal | None:
    if pool.draining:
        return Refusal(RefusalKind.SHUTTING_DOWN, "the service is shutting down and takes no new requests")
    if runner.state is RunnerState.FAILED:
        return load_failed_refusal(runner, now)
    most, of_all = pool.limits.max_queue, len(pool.waiting)
    most_of_client, of_client = pool.limits.client_queue, sum(one.client == ticket.client for one in pool.waiting)
    client_is_full = most_of_client is not None and of_client >= most_of_client
    if not client_is_full and of_all < most:
        return None
    if ticket in _eligible(replace(pool, waiting=(*pool.waiting, ticket)), runner, now):
        return None
    again_s = retry_after_s(pool, ticket.model)
    if client_is_full:
        message = f"{of_client} requests of this client wait already, as many as CLIENT_QUEUE allows; try again later"
        return Refusal(RefusalKind.CLIENT_LIMIT, message, again_s)
    message = f"{of_all} requests wait already, as many as MAX_QUEUE allows; try again later"
    return Refusal(RefusalKind.QUEUE_FULL, message, again_s)


def _next_served(pool: Pool, now: float) -> Ticket | None:
    models = dict.fromkeys(ticket.model for ticket in pool.waiting)
    for model in models:
        runner = pool.runner(model)
        tickets = _eligible(pool, runner, now)
        if len(tickets) == 1:
            return tickets[0]
        if tickets:
            everywhere = pool.in_flight_of()
            return min(
                tickets,
                key=lambda one: (
                    runner.serving.get(one.client, 0),
                    everywhere.get(one.client, 0),
                    pool.turns.get(one.client, 0),
                    one.id,
                ),
            )
    return None


def _eligible(pool: Pool, runner: Runner, now: float) -> list[Ticket]:
    """Return who may have the free slot of this runner, nobody where it has none (cases 3a to 3c)."""
    if not runner.has_free_slot or _turn_is_over(pool, runner, now):
        return []
    held_back_from = min(_held_back_from(pool, runner), default=math.inf)
    eligible, is_barred = [], False
    for ticket in pool.waiting:
        if ticket.model == runner.model:
            is_barred = is_barred or not runner.can_serve(ticket.options)
            if ticket.owed or (not is_barred and ticket.id < held_back_from):
                eligible.append(ticket)
    return eligible


def _held_back_from(pool: Pool, runner: Runner) -> Iterator[int]:
    """Yield the oldest ticket of each load that waits for this runner to go."""
    for load in pool.loads.values():
        if runner.model in load.victims:
            yield from (ticket.id for ticket in pool.stranded(load.model)[:1])


def _turn_is_over(pool: Pool, runner: Runner, now: float) -> bool:
    """Say whether case 3c holds."""
    loads = [load for load in pool.loads.values() if runner.model in load.victims]
    if not loads or runner.reload_s is None or now <= runner.since + TURN_LOADS * runner.reload_s:
        return False
    here = {ticket.client for ticket in pool.waiting_for(runner.model)}
    return any({ticket.client for ticket in pool.stranded(load.model)} - here for load in loads)


def _end_turns(pool: Pool, now: float) -> Pool:
    """Return the pool in which runners whose turn is over owe nobody anything."""
    owing = {ticket.model for ticket in pool.waiting if ticket.owed}
    over = {model for model in owing if _turn_is_over(pool, pool.runner(model), now)}
    if not over:
        return pool
    return replace(pool, waiting=tuple(replace(one, owed=False) if one.model in over else one for one in pool.waiting))
