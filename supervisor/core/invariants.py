"""What must hold after every step. Tests check it always; it costs little enough to be checked while debugging."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from typing import Final

from supervisor.core.pool import LoadPhase, Pool
from supervisor.core.runner import HAS_CHILD, IS_LEAVING, IS_LOADING, Runner, RunnerState
from supervisor.core.types import Ticket

MAY_SERVE: Final = frozenset({RunnerState.READY, RunnerState.DRAINING, RunnerState.STOPPING})
HAS_NO_DEADLINE: Final = frozenset({RunnerState.STOPPED, RunnerState.STARTING, RunnerState.STOPPING})
HAS_DEADLINE: Final = frozenset({RunnerState.LOADING, RunnerState.DRAINING, RunnerState.BACKOFF, RunnerState.FAILED})
COMES_BACK: Final = IS_LEAVING | {RunnerState.BACKOFF}


def violations(pool: Pool) -> list[str]:
    """Return one sentence for everything that is wrong with the pool; empty where all is well."""
    return [
        *_of_queue(pool),
        *_of_children(pool),
        *_of_loads(pool),
        *(line for one in pool.runners.values() for line in _of_runner(one)),
    ]


def _of_queue(pool: Pool) -> Iterator[str]:
    if len(pool.waiting) > pool.limits.max_queue:
        yield f"{len(pool.waiting)} tickets wait, more than {pool.limits.max_queue}"
    ids = [ticket.id for ticket in pool.waiting]
    if ids != sorted(set(ids)):
        yield "the tickets do not wait once each, in the order of arrival"
    if pool.draining and pool.waiting:
        yield "tickets wait although the service shuts down"
    most = pool.limits.client_queue
    if most is not None and any(count > most for count in Counter(one.client for one in pool.waiting).values()):
        yield f"more than {most} tickets of one client wait"
    for ticket in pool.waiting:
        runner = pool.runner(ticket.model)
        is_first = ticket == pool.waiting_for(ticket.model)[0]
        held_back = not ticket.owed and any(ticket.model in load.victims for load in pool.loads.values())
        if runner.has_free_slot and runner.can_serve(ticket.options) and is_first and not held_back:
            yield f"ticket {ticket.id} waits although {ticket.model} has a free slot"
        if ticket.model not in pool.loads and not _will_serve(runner, ticket):
            yield f"ticket {ticket.id} waits for {ticket.model}, and nobody loads anything"


def _will_serve(runner: Runner, ticket: Ticket) -> bool:
    """Say whether the runner will serve this ticket, or come to where it is loaded for it."""
    if runner.state is RunnerState.READY:
        return runner.can_serve(ticket.options)
    return runner.state in COMES_BACK


def _of_children(pool: Pool) -> Iterator[str]:
    if len({one.id for one in pool.runners.values()}) != len(pool.runners):
        yield "two runners share an id"
    most = pool.limits.max_loaded_models
    if most is not None and sum(one.state in HAS_CHILD for one in pool.runners.values()) > most:
        yield "more runners have a child than MAX_LOADED_MODELS allows"
    for one, other in combinations(pool.loading, 2):
        if one.plan is not None and other.plan is not None and one.plan.shares_device_with(other.plan):
            yield f"{one.model} and {other.model} load on the same device"
    for one in pool.loading:
        if one.model not in pool.loads and not pool.draining:
            yield f"{one.model} loads without being a load"


def _of_loads(pool: Pool) -> Iterator[str]:
    if sum(load.phase is LoadPhase.PLANNING for load in pool.loads.values()) > 1:
        yield "more than one question to the planner at a time"
    for load in pool.loads.values():
        runner = pool.runner(load.model)
        if (load.phase is LoadPhase.LAUNCHING) != (runner.state in IS_LOADING):
            yield f"the load of {load.model} is {load.phase}, its runner {runner.state}"
        if load.phase is LoadPhase.MAKING_ROOM and load.deadline is None:
            yield f"the load of {load.model} waits for room for ever"
        for victim in load.victims:
            if pool.settings_of(victim).pinned and pool.runner(victim).state not in IS_LEAVING:
                yield f"{victim} is to go for {load.model} although it is pinned"


def _of_runner(one: Runner) -> Iterator[str]:
    if (one.child is not None) != (one.state in HAS_CHILD):
        yield f"{one.model} is {one.state} and has {one.child or 'no child'}"
    if one.state is RunnerState.READY and (one.pid is None or one.url is None):
        yield f"{one.model} is ready without a process or an address"
    if any(count <= 0 for count in one.serving.values()):
        yield f"{one.model} serves {dict(one.serving)}"
    if one.in_flight and one.state not in MAY_SERVE:
        yield f"{one.model} serves requests while {one.state}"
    if one.plan is not None and one.in_flight > one.plan.n_parallel:
        yield f"{one.model} serves {one.in_flight} requests with {one.plan.n_parallel} slots"
    if one.state is RunnerState.READY and one.in_flight and one.deadline is not None:
        yield f"{one.model} would be unloaded while in use"
    if one.state is RunnerState.DRAINING and not one.in_flight:
        yield f"{one.model} drains although nothing is in flight"
    if one.state in HAS_NO_DEADLINE and one.deadline is not None:
        yield f"{one.model} is {one.state} with a deadline"
    if one.state in HAS_DEADLINE and one.deadline is None:
        yield f"{one.model} would be {one.state} for ever"
