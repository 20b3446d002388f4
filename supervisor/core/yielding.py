"""Memory that is another program's for a while: what our runners may hold meanwhile, and which of them go for it.

1. From when it is asked for until its time is over, or is ended before, our runners together may hold no more of the
   device than leaves the other program what it wants: a cap on what is loaded there, or in the memory that it shares
   with other devices. Whoever asks again asks for the same memory: the lowest cap holds. Where nobody knows how much is
   free, all of it has to come from our runners.
2. As long as they hold more, the cheapest set of them that is enough goes. Idle ones go at once. One in use takes up no
   new request and goes when it has served those that it serves, however long they take: nobody is cut short.
3. One that has just been loaded serves first who waited for it. Pinned runners stay.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final

from supervisor.core import eviction, ledger
from supervisor.core.commands import Command
from supervisor.core.events import StopRequested, YieldEnded, YieldRequested
from supervisor.core.pool import Pool, Yielded
from supervisor.core.runner import STAYS, Runner, RunnerState
from supervisor.core.stepping import Outcome, step_runner
from supervisor.core.types import Cap, ModelId, StopReason

FOR_OTHERS: Final = StopReason("its memory is another program's for now", evicts=True)


def changed(pool: Pool, event: YieldRequested | YieldEnded, now: float) -> Pool:
    """Return the pool in which this memory is another program's (case 1), or is so no more; who goes already goes."""
    if isinstance(event, YieldEnded):
        return replace(pool, yields=tuple(one for one in pool.yields if not one.cap.devices & event.devices))
    most_bytes = ledger.held_on(pool, event.devices) - event.wanted_bytes
    if event.free_bytes is not None:
        most_bytes += event.free_bytes - ledger.later_on(pool, event.devices)
    return replace(pool, yields=(*pool.yields, Yielded(Cap(event.devices, most_bytes), now, event.until)))


def advance(pool: Pool, now: float) -> Outcome:
    """Let those go that have to, and may by now (cases 2 and 3)."""
    commands: tuple[Command, ...] = ()
    for one in _going(pool, now):
        if one.state is RunnerState.READY and not any(ticket.owed for ticket in pool.waiting_for(one.model)):
            stop = StopRequested(one.model, one.generation, math.inf, FOR_OTHERS)
            pool, more = step_runner(pool, stop, now)
            commands += more
    return pool, commands


def awaited_bytes(pool: Pool, devices: frozenset[str], now: float) -> dict[ModelId, int]:
    """Return what each runner in use will give back on these devices once it has finished, because it goes."""
    draining = (one for one in pool.leaving if one.state is RunnerState.DRAINING)
    awaited = {one.model: one.held_on(devices) for one in (*draining, *_going(pool, now))}
    return {model: size for model, size in awaited.items() if size > 0}


def _going(pool: Pool, now: float) -> tuple[Runner, ...]:
    """Return the runners that have to go and were not told so yet: who goes for one cap need not go for another.

    What was loaded since was planned below the cap. Should it turn out a little larger, it is not loaded over and over.
    """
    if not pool.yields:
        return ()
    staying = [one for one in pool.runners.values() if one.state in STAYS]
    going: frozenset[ModelId] = frozenset()
    for hold in sorted(pool.yields, key=lambda one: (len(one.cap.devices), one.cap.most_bytes)):
        left = [one for one in staying if one.model not in going]
        excess_bytes = sum(one.held_on(hold.cap.devices) for one in left) - hold.cap.most_bytes
        if excess_bytes > 0:
            older = [one for one in left if one.child is not None and one.child.started_at <= hold.since]
            earlier = [ledger.neighbour(pool, one, now) for one in older]
            going |= eviction.cheapest_for(earlier, hold.cap.devices, excess_bytes)
    return tuple(one for one in staying if one.model in going)
