"""What the shell is to do. Whatever takes time ends in an event."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from supervisor.core.types import Failure, LoadPlan, ModelId, Refusal, RunnerId, TicketId


@dataclass(frozen=True, slots=True)
class PlanModel:
    """Plan this model on a fresh snapshot of the machine; ends in ``Planned``.

    ``held`` is what our runners hold on each device, ``promised`` the part of it that the driver need not show yet.
    ``gone`` is what runners held that have just gone: a driver may still show it as used.
    ``assume_empty`` asks for the plan as if none of our runners were there.
    """

    model: ModelId
    revision: int
    held: Mapping[str, int]
    promised: Mapping[str, int]
    gone: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    assume_empty: bool = False


@dataclass(frozen=True, slots=True)
class Spawn:
    """Log the final plan and start the child; ends in ``ProcessSpawned`` or ``SpawnFailed``."""

    runner: RunnerId
    model: ModelId
    generation: int
    plan: LoadPlan


@dataclass(frozen=True, slots=True)
class StopProcess:
    """Stop the child, by force in the end; ends in ``ProcessExited``. ``at_once``: it hangs, so by force."""

    model: ModelId
    generation: int
    reason: str
    at_once: bool = False


@dataclass(frozen=True, slots=True)
class Grant:
    """Give this ticket a lease on the child of this generation, which answers at ``url``."""

    ticket: TicketId
    model: ModelId
    generation: int
    url: str


@dataclass(frozen=True, slots=True)
class Reject:
    """Tell this ticket that it gets no lease."""

    ticket: TicketId
    model: ModelId
    refusal: Refusal


@dataclass(frozen=True, slots=True)
class LoseLeases:
    """Tell the holders of leases on this child that it is gone."""

    model: ModelId
    generation: int
    story: str


@dataclass(frozen=True, slots=True)
class ReportFailure:
    """Log and count a failure: of a load, or of a runner that had been ready."""

    model: ModelId
    generation: int
    failure: Failure
    while_loading: bool


@dataclass(frozen=True, slots=True)
class ReadMachine:
    """Read the machine again: a child of this model has taken its memory or given it back. See ``PlanModel``."""

    model: ModelId
    held: Mapping[str, int]
    gone: Mapping[str, int]


Command = PlanModel | ReadMachine | Spawn | StopProcess | Grant | Reject | LoseLeases | ReportFailure
