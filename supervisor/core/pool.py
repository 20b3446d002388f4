"""The state of the whole pool, and the questions that the scheduler asks of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from planner.types import LoadOptions
from supervisor.core.records import changed
from supervisor.core.runner import HAS_CHILD, IS_LEAVING, IS_LOADING, Runner, RunnerState
from supervisor.core.settling import SETTLE_WITHIN_S
from supervisor.core.types import (
    AS_FOR_ALL,
    NO_OPTIONS,
    Cap,
    Limits,
    ModelId,
    ModelSettings,
    RunnerId,
    Ticket,
    TicketId,
)


class LoadPhase(StrEnum):
    """Where a load stands."""

    QUEUED = "queued"  # to be planned, once the planner is free
    PLANNING = "planning"  # the one question that is asked at a time
    WAITING = "waiting"  # for other loads where it is to go, or for who leaves
    MAKING_ROOM = "making_room"  # runners have to go first
    LAUNCHING = "launching"  # its child loads


@dataclass(frozen=True, slots=True)
class Load:
    """A load in progress, for ``options``.

    ``victims`` are the runners that go for it, ``alternatives`` those whose memory might do as well, ``tried`` those
    that were idle when it was planned. ``behind`` are the models that it waits for.
    """

    model: ModelId
    started_at: float
    phase: LoadPhase = LoadPhase.QUEUED
    options: LoadOptions = NO_OPTIONS
    victims: frozenset[ModelId] = frozenset()
    alternatives: frozenset[ModelId] = frozenset()
    tried: frozenset[ModelId] = frozenset()
    behind: frozenset[ModelId] = frozenset()
    deadline: float | None = None  # of making room


@dataclass(frozen=True, slots=True)
class Gone:
    """A child that is gone, and what it held."""

    at: float
    held_bytes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Yielded:
    """Memory that is another program's for a while: our runners are held to this cap."""

    cap: Cap
    since: float
    until: float


@dataclass(frozen=True)  # without slots: see ``records``
class Pool:
    """Every runner, the queue in the order of arrival, and the loads in progress in the order in which they began.

    ``turns`` tells in which order the clients that wait were last served, those that were not left out. ``revision``
    grows with every question to the planner: the answer to an earlier one is not listened to.
    """

    limits: Limits
    settings: Mapping[ModelId, ModelSettings] = field(default_factory=lambda: MappingProxyType({}))
    runners: Mapping[ModelId, Runner] = field(default_factory=lambda: MappingProxyType({}))
    waiting: tuple[Ticket, ...] = ()
    turns: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    loads: Mapping[ModelId, Load] = field(default_factory=lambda: MappingProxyType({}))
    gone: tuple[Gone, ...] = ()  # of late
    yields: tuple[Yielded, ...] = ()
    revision: int = 0
    draining: bool = False

    def runner(self, model: ModelId) -> Runner:
        """Return the model's runner, a new one in state STOPPED where it never had one."""
        return self.runners.get(model) or Runner(id=RunnerId(f"r{len(self.runners) + 1}"), model=model)

    def settings_of(self, model: ModelId) -> ModelSettings:
        """Return what the operator says of this model."""
        return self.settings.get(model, AS_FOR_ALL)

    def limits_of(self, model: ModelId) -> Limits:
        """Return the limits with this model's own keep-alive; a pinned model stays for ever unless it says else."""
        settings = self.settings_of(model)
        if settings.keep_alive_s is not None:
            return replace(self.limits, keep_alive_s=settings.keep_alive_s)
        return replace(self.limits, keep_alive_s=float("inf")) if settings.pinned else self.limits

    def with_runner(self, runner: Runner) -> Pool:
        """Return the pool with this runner in its place."""
        if self.runners.get(runner.model) is runner:
            return self
        return changed(self, runners=MappingProxyType({**self.runners, runner.model: runner}))

    def with_load(self, load: Load, **changes: Any) -> Pool:
        """Return the pool with this load in its place, or behind all others where it is new, with these changes."""
        load = replace(load, **changes)
        return replace(self, loads=MappingProxyType({**self.loads, load.model: load}))

    def without_load(self, model: ModelId) -> Pool:
        """Return the pool with no load of this model."""
        return replace(self, loads=MappingProxyType({one: load for one, load in self.loads.items() if one != model}))

    def without_tickets(self, tickets: frozenset[TicketId]) -> Pool:
        """Return the pool with these tickets no longer waiting."""
        return replace(self, waiting=tuple(one for one in self.waiting if one.id not in tickets))

    def with_served(self, served: Ticket) -> Pool:
        """Return the pool in which this ticket waits no longer, and its client is the one that was served last."""
        waiting = tuple(one for one in self.waiting if one.id != served.id)
        clients = {ticket.client for ticket in waiting}
        turns = {one: turn for one, turn in self.turns.items() if one in clients}
        turns[served.client] = max(turns.values(), default=0) + 1
        if turns == self.turns and len(waiting) == len(self.waiting):  # it did not wait, and nobody does
            return self
        return replace(self, waiting=waiting, turns=MappingProxyType(turns))

    def with_gone(self, runner: Runner, now: float) -> Pool:
        """Return the pool that remembers what this runner held, whose child has just gone."""
        recent = tuple(one for one in self.gone if one.at > now - SETTLE_WITHIN_S)
        return replace(self, gone=(*recent, Gone(now, runner.held_bytes())))

    def waiting_for(self, model: ModelId) -> tuple[Ticket, ...]:
        """Return the tickets that wait for this model, oldest first."""
        return tuple(ticket for ticket in self.waiting if ticket.model == model)

    def stranded(self, model: ModelId) -> tuple[Ticket, ...]:
        """Return the tickets that wait for this model and that its present child, if any, cannot serve."""
        runner = self.runner(model)
        is_ready = runner.state is RunnerState.READY
        return tuple(one for one in self.waiting_for(model) if not (is_ready and runner.can_serve(one.options)))

    def others(self, model: ModelId) -> tuple[Runner, ...]:
        """Return the runners of other models that have a child."""
        return tuple(one for one in self.runners.values() if one.model != model and one.state in HAS_CHILD)

    def in_flight_of(self) -> Mapping[str, int]:
        """Return how many requests are being served, by client."""
        total: Counter[str] = Counter()
        for one in self.runners.values():
            total.update(one.serving)
        return total

    def deadlines(self) -> Iterator[float]:
        """Yield the moments at which something has to be decided without anybody asking."""
        yield from (one.deadline for one in self.runners.values() if one.deadline is not None)
        yield from (load.deadline for load in self.loads.values() if load.deadline is not None)
        yield from (one.until for one in self.yields)
        if self.waiting:
            yield self.waiting[0].arrived_at + self.limits.queue_timeout_s

    @property
    def is_under_way(self) -> bool:
        """Say whether anything may follow from the state alone; most requests find nothing of the kind."""
        has_business = bool(self.waiting or self.loads or self.yields)
        return has_business or any(one.wanted_back for one in self.runners.values())

    @property
    def loading(self) -> tuple[Runner, ...]:
        """Return the runners whose child loads."""
        return tuple(one for one in self.runners.values() if one.state in IS_LOADING)

    @property
    def leaving(self) -> tuple[Runner, ...]:
        """Return the runners whose child drains or stops."""
        return tuple(one for one in self.runners.values() if one.state in IS_LEAVING)

    @property
    def has_children(self) -> bool:
        """Say whether any child may be alive."""
        return any(one.state in HAS_CHILD for one in self.runners.values())
