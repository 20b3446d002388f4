"""What the shell is to do. Whatever takes time ends in an event."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from planner.types import LoadOptions
from supervisor.core.types import (
    NO_OPTIONS,
    Cap,
    Failure,
    LoadPlan,
    ModelId,
    Neighbour,
    Refusal,
    RunnerId,
    StopReason,
    TicketId,
)


@dataclass(frozen=True, slots=True)
class PlanModel:
    """Plan this model on a fresh snapshot of the machine, beside these neighbours; ends in ``Planned``.

    ``options`` is what the request asks of the load, ``launch`` what the settings of the model say. At least
    ``surplus`` neighbours have to go. ``gone`` is what runners held that have just gone: a driver may still show it as
    used. ``caps`` is what all our runners together are held to, ``margins`` what this model has to leave free.
    """

    model: ModelId
    revision: int
    options: LoadOptions = NO_OPTIONS
    launch: object = None
    neighbours: tuple[Neighbour, ...] = ()
    surplus: int = 0
    gone: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    caps: tuple[Cap, ...] = ()
    margins: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))

    def held_bytes(self, *, loading: bool = False) -> dict[str, int]:
        """Return what all neighbours hold on each device, or only those that still load."""
        total: Counter[str] = Counter()
        for one in self.neighbours:
            if one.loading or not loading:
                total.update(one.held_bytes)
        return dict(total)


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
    reason: StopReason
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
    gone: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Learn:
    """Remember, beyond the service's own life, that a runner takes so much on a device beside llama.cpp's buffers."""

    model: ModelId
    device: str
    size_bytes: int


Command = PlanModel | ReadMachine | Spawn | StopProcess | Grant | Reject | LoseLeases | ReportFailure | Learn
