"""What must hold after every step. Tests check it always; it costs little enough to be checked while debugging."""

from __future__ import annotations

from collections.abc import Iterator

from supervisor.core.pool import LoadPhase, Pool
from supervisor.core.runner import HAS_CHILD, IS_LOADING, Runner, RunnerState


def violations(pool: Pool) -> list[str]:
    """Return one sentence for everything that is wrong with the pool; empty where all is well."""
    return [*_of_queue(pool), *_of_load(pool), *(line for one in pool.runners.values() for line in _of_runner(one))]


def _of_queue(pool: Pool) -> Iterator[str]:
    if len(pool.waiting) > pool.limits.max_queue:
        yield f"{len(pool.waiting)} tickets wait, more than {pool.limits.max_queue}"
    if len({ticket.id for ticket in pool.waiting}) != len(pool.waiting):
        yield "a ticket waits twice"
    if pool.draining and pool.waiting:
        yield "tickets wait although the service shuts down"
    for ticket in pool.waiting:
        if pool.runner(ticket.model).has_free_slot and not pool.holds_back:
            yield f"ticket {ticket.id} waits although {ticket.model} has a free slot"
        if pool.load is None and pool.runner(ticket.model).state is RunnerState.STOPPED:
            yield f"ticket {ticket.id} waits for {ticket.model}, and nobody loads anything"


def _of_load(pool: Pool) -> Iterator[str]:
    loading = [one.model for one in pool.runners.values() if one.state in IS_LOADING]
    if len(loading) > 1:
        yield f"more than one load at a time: {loading}"
    if len({one.id for one in pool.runners.values()}) != len(pool.runners):
        yield "two runners share an id"
    most = pool.limits.max_loaded_models
    if most is not None and sum(one.state in HAS_CHILD for one in pool.runners.values()) > most:
        yield "more runners have a child than MAX_LOADED_MODELS allows"
    load = pool.load
    if load is None:
        if loading and not pool.draining:
            yield f"{loading[0]} loads without being the load"
    elif (load.phase is LoadPhase.LAUNCHING) != (pool.runner(load.model).state in IS_LOADING):
        yield f"the load of {load.model} is {load.phase}, its runner {pool.runner(load.model).state}"


def _of_runner(one: Runner) -> Iterator[str]:
    if one.state is RunnerState.READY and (one.pid is None or one.url is None):
        yield f"{one.model} is ready without a process or an address"
    if one.in_flight < 0:
        yield f"{one.model} serves {one.in_flight} requests"
    if one.in_flight and one.state not in {RunnerState.READY, RunnerState.DRAINING, RunnerState.STOPPING}:
        yield f"{one.model} serves requests while {one.state}"
    if one.plan is not None and one.in_flight > one.plan.n_parallel:
        yield f"{one.model} serves {one.in_flight} requests with {one.plan.n_parallel} slots"
    if one.state is RunnerState.READY and one.in_flight and one.deadline is not None:
        yield f"{one.model} would be unloaded while in use"
    if one.state is RunnerState.DRAINING and not one.in_flight:
        yield f"{one.model} drains although nothing is in flight"
    if one.state in {RunnerState.STOPPED, RunnerState.STARTING, RunnerState.STOPPING} and one.deadline is not None:
        yield f"{one.model} is {one.state} with a deadline"
    if one.state in {RunnerState.LOADING, RunnerState.DRAINING, RunnerState.BACKOFF, RunnerState.FAILED} and (
        one.deadline is None
    ):
        yield f"{one.model} would be {one.state} for ever"
    if one.state not in HAS_CHILD and (one.pid is not None or one.held_bytes()):
        yield f"{one.model} is {one.state} and still holds a process or memory"
