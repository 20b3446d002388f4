"""What can happen. Events about a runner carry the generation of the child they speak of; stale ones change nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from supervisor.core.types import DoesNotFit, LoadPlan, ModelId, PlanProblem, TicketId


@dataclass(frozen=True, slots=True)
class RequestArrived:
    """A client wants a lease on a runner of this model, which is known to be in the folder."""

    ticket: TicketId
    model: ModelId


@dataclass(frozen=True, slots=True)
class RequestAbandoned:
    """The client of a waiting ticket has gone."""

    ticket: TicketId


@dataclass(frozen=True, slots=True)
class Planned:
    """The answer to ``PlanModel`` of this revision."""

    model: ModelId
    revision: int
    outcome: LoadPlan | DoesNotFit | PlanProblem


@dataclass(frozen=True, slots=True)
class ShutdownRequested:
    """The service is to stop. A second one hurries: what still drains is stopped at once."""


@dataclass(frozen=True, slots=True)
class TimePassed:
    """The earliest deadline of the pool may have passed."""


@dataclass(frozen=True, slots=True)
class RunnerEvent:
    """Something about one child of one model."""

    model: ModelId
    generation: int


@dataclass(frozen=True, slots=True)
class StartRequested(RunnerEvent):
    """The runner is to be launched with this plan, as this new generation."""

    plan: LoadPlan


@dataclass(frozen=True, slots=True)
class ProcessSpawned(RunnerEvent):
    """The child process exists."""

    pid: int


@dataclass(frozen=True, slots=True)
class SpawnFailed(RunnerEvent):
    """The child process could not be made."""

    reason: str


@dataclass(frozen=True, slots=True)
class LoadProgressed(RunnerEvent):
    """The child said something or read on: it is not stuck. ``fraction`` of its weights is read; None: not known."""

    fraction: float | None = None


@dataclass(frozen=True, slots=True)
class WrongDevices(RunnerEvent):
    """The child uses other devices than its plan counts on; ``reason`` says which, in one line."""

    reason: str


@dataclass(frozen=True, slots=True)
class BecameReady(RunnerEvent):
    """The child answers at ``url``. ``measured_bytes`` are the sums of the buffers that its log reported, by device."""

    url: str
    measured_bytes: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class ProcessExited(RunnerEvent):
    """The child is gone and reaped. ``last_error`` is the line of its log that says most about why.

    ``shortage`` says in words whose memory ran out, where that ended it.
    """

    exit: str
    last_error: str | None
    log_tail: tuple[str, ...] = ()
    shortage: str | None = None


@dataclass(frozen=True, slots=True)
class RequestGranted(RunnerEvent):
    """A lease was given out."""


@dataclass(frozen=True, slots=True)
class RequestFinished(RunnerEvent):
    """A lease came back."""


@dataclass(frozen=True, slots=True)
class StopRequested(RunnerEvent):
    """The runner is to stop; what it serves may finish until ``drain_until`` (None: now)."""

    drain_until: float | None = None


@dataclass(frozen=True, slots=True)
class ChildHung(RunnerEvent):
    """The child lives but does not answer any more; ``reason`` says what it was asked, in one line."""

    reason: str


@dataclass(frozen=True, slots=True)
class ResetRequested(RunnerEvent):
    """Forget the failures of this runner: it may be tried again at once."""


@dataclass(frozen=True, slots=True)
class DeadlinePassed(RunnerEvent):
    """The runner's own deadline, whatever it means in its state, has passed."""


Event = RequestArrived | RequestAbandoned | Planned | ShutdownRequested | TimePassed | RunnerEvent
