"""What can happen. Events about a runner carry the generation of the child they speak of; stale ones change nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from planner.types import LoadOptions
from supervisor.core.loglines import Shortage
from supervisor.core.types import NO_OPTIONS, LoadPlan, ModelId, ModelSettings, PlanOutcome, StopReason, TicketId

ASKED: Final = StopReason("it was asked to stop")


@dataclass(frozen=True, slots=True)
class RequestArrived:
    """A client wants a lease on a runner of this model, which is known to be in the folder. See ``api.need.Need``."""

    ticket: TicketId
    model: ModelId
    client: str = ""
    options: LoadOptions = NO_OPTIONS
    keep_alive_s: float | None = None


@dataclass(frozen=True, slots=True)
class RequestAbandoned:
    """The client of a waiting ticket has gone."""

    ticket: TicketId


@dataclass(frozen=True, slots=True)
class Planned:
    """The answer to ``PlanModel`` of this revision."""

    model: ModelId
    revision: int
    outcome: PlanOutcome


@dataclass(frozen=True, slots=True)
class SettingsChanged:
    """What holds for single models from now on; those that are not named are as all. Asks for the preloads too."""

    by_model: Mapping[ModelId, ModelSettings]


@dataclass(frozen=True, slots=True)
class YieldRequested:
    """``wanted_bytes`` of a device, of which ``free_bytes`` are free now, are another program's until that moment.

    ``free_bytes`` None: nobody knows, so our runners give back as much as is wanted. ``devices`` is that device, or all
    that share its memory.
    """

    devices: frozenset[str]
    wanted_bytes: int
    free_bytes: int | None
    until: float


@dataclass(frozen=True, slots=True)
class YieldEnded:
    """What is another program's of any of these devices, or of memory that they share, is so no more."""

    devices: frozenset[str]


@dataclass(frozen=True, slots=True)
class DevicesRenamed:
    """Devices are called otherwise from now on. ``names`` are the new names, by the old ones.

    What is gone has a name that is no device's, until it is back.
    """

    names: Mapping[str, str]


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
    """The runner is to be launched with this plan, as this new generation. See ``PlanModel``."""

    plan: LoadPlan
    options: LoadOptions = NO_OPTIONS
    launch: object = None


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
class PromptCacheChanged(RunnerEvent):
    """The child has taken so much of the host's memory for its prompt cache by now: the kernel shows that as used."""

    size_bytes: int


@dataclass(frozen=True, slots=True)
class ProcessExited(RunnerEvent):
    """The child is gone and reaped. ``last_error`` is the line of its log that says most about why.

    ``shortage`` says whose memory ran out, where that ended it; ``killed``: a signal did.
    """

    exit: str
    last_error: str | None
    log_tail: tuple[str, ...] = ()
    shortage: Shortage | None = None
    killed: bool = False


@dataclass(frozen=True, slots=True)
class RequestGranted(RunnerEvent):
    """A lease was given out. ``keep_alive_s`` None: as the runner has it."""

    client: str = ""
    keep_alive_s: float | None = None


@dataclass(frozen=True, slots=True)
class RequestFinished(RunnerEvent):
    """A lease came back."""

    client: str = ""


@dataclass(frozen=True, slots=True)
class StopRequested(RunnerEvent):
    """The runner is to stop; what it serves may finish until ``drain_until`` (None: now).

    ``reason`` is what those are told whom it cuts short; ``come_back``: it is wanted again afterwards.
    """

    drain_until: float | None = None
    reason: StopReason = ASKED
    come_back: bool = False


@dataclass(frozen=True, slots=True)
class ChildHung(RunnerEvent):
    """The child lives but does not answer any more; ``reason`` says what it was asked, in one line."""

    reason: str


@dataclass(frozen=True, slots=True)
class ResetRequested(RunnerEvent):
    """Forget the failures of this runner: it may be tried again at once."""


@dataclass(frozen=True, slots=True)
class NoRoomLeft(RunnerEvent):
    """With the margins that it needs since it ran out of memory, the model does not fit any more."""


@dataclass(frozen=True, slots=True)
class KeepAliveChanged(RunnerEvent):
    """The settings say something else of how long it stays once it is idle."""


@dataclass(frozen=True, slots=True)
class DeadlinePassed(RunnerEvent):
    """The runner's own deadline, whatever it means in its state, has passed."""


Event = (
    RequestArrived
    | RequestAbandoned
    | Planned
    | SettingsChanged
    | YieldRequested
    | YieldEnded
    | DevicesRenamed
    | ShutdownRequested
    | TimePassed
    | RunnerEvent
)
