"""The state of the whole pool, and the questions that the scheduler asks of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType

from supervisor.core.runner import HAS_CHILD, IS_LOADING, Runner
from supervisor.core.settling import SETTLE_WITHIN_S
from supervisor.core.types import Limits, LoadPlan, ModelId, RunnerId, Ticket, TicketId


class LoadPhase(StrEnum):
    """Where the one load in progress stands."""

    PLANNING = "planning"  # asked whether it fits beside what is loaded
    PLANNING_ALONE = "planning_alone"  # it does not, or worse: asked whether it would with nothing else loaded
    MAKING_ROOM = "making_room"  # it would: runners have to go first
    LAUNCHING = "launching"  # its child loads


@dataclass(frozen=True, slots=True)
class Load:
    """The one load in progress.

    ``beside`` is the plan that fits beside the others, where a better one was sought; ``best_layers`` how many layers
    would lie on devices if the others were gone, once that was asked.
    """

    model: ModelId
    phase: LoadPhase
    revision: int
    started_at: float
    beside: LoadPlan | None = None
    best_layers: int | None = None
    deadline: float | None = None  # of making room


@dataclass(frozen=True, slots=True)
class Gone:
    """A child that is gone, and what it held."""

    at: float
    held_bytes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Pool:
    """Every runner, the queue, and the one load in progress.

    ``revision`` grows with every question to the planner; a child that comes or goes meanwhile makes it be asked anew.
    """

    limits: Limits
    runners: Mapping[ModelId, Runner] = field(default_factory=lambda: MappingProxyType({}))
    waiting: tuple[Ticket, ...] = ()
    load: Load | None = None
    gone: tuple[Gone, ...] = ()  # of late
    revision: int = 0
    draining: bool = False

    def runner(self, model: ModelId) -> Runner:
        """Return the model's runner, a new one in state STOPPED where it never had one."""
        return self.runners.get(model) or Runner(id=RunnerId(f"r{len(self.runners) + 1}"), model=model)

    def with_runner(self, runner: Runner) -> Pool:
        """Return the pool with this runner in its place."""
        return replace(self, runners=MappingProxyType({**self.runners, runner.model: runner}))

    def without_ticket(self, ticket: TicketId) -> Pool:
        """Return the pool with this ticket no longer waiting."""
        return replace(self, waiting=tuple(one for one in self.waiting if one.id != ticket))

    def waiting_for(self, model: ModelId) -> tuple[Ticket, ...]:
        """Return the tickets that wait for this model, oldest first."""
        return tuple(ticket for ticket in self.waiting if ticket.model == model)

    def others(self, model: ModelId) -> tuple[Runner, ...]:
        """Return the runners of other models that have a child."""
        return tuple(one for one in self.runners.values() if one.model != model and one.state in HAS_CHILD)

    def held_bytes(self) -> dict[str, int]:
        """Return what our runners hold on each device."""
        return _sum_by_device(one.held_bytes() for one in self.runners.values())

    def promised_bytes(self) -> dict[str, int]:
        """Return the part of it that belongs to runners which have not finished loading."""
        return _sum_by_device(one.held_bytes() for one in self.runners.values() if one.state in IS_LOADING)

    def with_gone(self, runner: Runner, now: float) -> Pool:
        """Return the pool that remembers what this runner held, whose child has just gone."""
        recent = tuple(one for one in self.gone if one.at > now - SETTLE_WITHIN_S)
        return replace(self, gone=(*recent, Gone(now, runner.held_bytes())))

    def gone_bytes(self, now: float) -> dict[str, int]:
        """Return what was held on each device by children that have just gone."""
        return _sum_by_device(one.held_bytes for one in self.gone if one.at > now - SETTLE_WITHIN_S)

    def deadlines(self) -> Iterator[float]:
        """Yield the moments at which something has to be decided without anybody asking."""
        yield from (one.deadline for one in self.runners.values() if one.deadline is not None)
        if self.load is not None and self.load.deadline is not None:
            yield self.load.deadline

    @property
    def holds_back(self) -> Load | None:
        """Return the load that waits for room: tickets younger than its own wait behind it."""
        return self.load if self.load is not None and self.load.phase is LoadPhase.MAKING_ROOM else None

    @property
    def has_children(self) -> bool:
        """Say whether any child may be alive."""
        return any(one.state in HAS_CHILD for one in self.runners.values())


def _sum_by_device(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return dict(total)
