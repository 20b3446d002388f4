"""The values that the core decides over. Times are seconds on one monotonic clock that the shell reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final, NewType

from planner.types import HOST, Decision, LaunchSpec, LoadOptions, Role, Shortfall
from supervisor.core.loglines import Shortage
from supervisor.core.pinning import PinnedDevice

ModelId = NewType("ModelId", str)
RunnerId = NewType("RunnerId", str)
TicketId = NewType("TicketId", int)  # grows with each arrival

NO_OPTIONS: Final = LoadOptions()


@dataclass(frozen=True, slots=True)
class Limits:
    """What the operator allows the core to do. A time of ``math.inf`` is for ever.

    ``max_loaded_models`` None leaves it to the memory. ``client_queue`` is how many requests of one client may wait,
    None: as many as anybody's. ``keep_alive_s`` counts from the end of the last request, 0 unloads at once.
    ``load_timeout_s`` is how long a load may go without any sign of progress, or wait for room, ``queue_timeout_s`` how
    long a request may wait in all.
    """

    max_loaded_models: int | None
    max_queue: int
    keep_alive_s: float
    load_timeout_s: float
    drain_timeout_s: float
    client_queue: int | None = None
    queue_timeout_s: float = math.inf
    backoff_cap_s: float = 30.0  # longer than a driver's reset takes, shorter than a user's patience
    max_crashes: int = 5  # so many crashes within the window mean that the next one would follow too
    crash_window_s: float = 300.0


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """What the operator says of one model, as far as it concerns the core.

    ``keep_alive_s`` None: as for all. ``pinned``: never evicted, and never idle for too long. ``priority``: the higher,
    the later it is evicted. ``preload``: loaded without being asked for. ``launch`` is whatever else a change of which
    needs another child; it is compared, and handed to whoever plans.
    """

    keep_alive_s: float | None = None
    pinned: bool = False
    priority: int = 0
    preload: bool = False
    launch: object = None


AS_FOR_ALL: Final = ModelSettings()


@dataclass(frozen=True, slots=True)
class PlannedUse:
    """What a plan takes on one device: in all as llama.cpp counts it (None: not known), and beside its buffers.

    ``taken_bytes`` is what nobody else can have meanwhile, as far as it is known. On the host that leaves out what is
    mapped, which is page cache. ``later_bytes`` of it are taken in use only: the prompt cache, and what a
    large image takes.
    """

    device: str
    planned_bytes: int | None
    taken_bytes: int
    overhead_bytes: int = 0
    headroom_bytes: int | None = None
    later_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Program:
    """A program that is no llama-server: where it answers, and the path that answers 200 once it is ready.

    ``{port}`` in ``url``, and in the launch line, stands for a port that is free when it is started.
    """

    url: str
    health: str
    folder: str | None = None


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """A plan that may be launched, of llama-server or of a ``program`` that is not ours.

    ``uses`` are the devices that it uses, the host among them. ``quality`` grows with how well it is placed (blocks on
    devices, and the projector), ``is_long_enough`` says that nobody need go for a longer context, ``is_best_possible``
    that no other state of the machine could give a better plan, ``is_known`` that other models can be planned beside
    it, ``is_elastic`` that it would be as good with less: its context is as long, or its slots are as many, as there is
    room for.

    ``serves`` are the values that the child will really have, by name. ``document`` is what ``planner explain --json``
    prints. ``buffer_devices`` maps the names that llama.cpp gives to the buffers of an RPC worker (``RPC0[host:port]``,
    an index within that worker) to the planner's device names. ``pinned`` are the devices that the runner has to name
    when it starts; none: not checked.
    """

    launch: LaunchSpec
    uses: tuple[PlannedUse, ...]
    role: Role = Role.CHAT
    n_parallel: int = 1
    serves: LoadOptions = NO_OPTIONS
    quality: int = 0
    is_best_possible: bool = True
    is_known: bool = True
    is_long_enough: bool = True
    is_elastic: bool = False
    document: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}), repr=False)
    buffer_devices: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    pinned: tuple[PinnedDevice, ...] = ()
    program: Program | None = None

    @property
    def n_ctx_per_slot(self) -> int | None:
        """Return how many tokens one conversation may have, None where that is not known."""
        return self.serves.n_ctx

    def taken_bytes(self) -> dict[str, int]:
        """Return what the plan takes on each device that it uses and on the host, as far as that is known."""
        return {use.device: use.taken_bytes for use in self.uses}

    @property
    def contended(self) -> frozenset[str]:
        """Return the devices over which it may quarrel with another load: the host where it uses no other."""
        return frozenset(use.device for use in self.uses if use.device != HOST) or frozenset({HOST})

    def shares_device_with(self, other: LoadPlan) -> bool:
        """Say whether both use the same device, the host left aside."""
        return bool(self.contended & other.contended - {HOST})


@dataclass(frozen=True, slots=True)
class MakeRoom:
    """The model fits as well as it can once these have gone: the cheapest such set.

    ``alternatives`` are the runners whose memory might do as well. ``contended`` as in ``LoadPlan``.
    """

    victims: frozenset[ModelId]
    alternatives: frozenset[ModelId] = frozenset()
    contended: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class DoesNotFit:
    """No placement fits. ``headline`` is one sentence that says so; ``never``: not on an empty machine either.

    ``yielded``: it would, were it not for memory that is another program's for now.
    """

    headline: str
    causes: tuple[Shortfall, ...] = ()
    never: bool = True
    yielded: bool = False


@dataclass(frozen=True, slots=True)
class PlanProblem:
    """No plan can be made: the file or llama.cpp rules it out, or (``ours``) the planner itself failed."""

    reason: str
    ours: bool = False


PlanOutcome = LoadPlan | MakeRoom | DoesNotFit | PlanProblem


@dataclass(frozen=True, slots=True)
class Cap:
    """The most that all our runners together may hold of a device, or of all the devices that share one memory."""

    devices: frozenset[str]
    most_bytes: int


@dataclass(frozen=True, slots=True)
class StopReason:
    """Why a runner goes, in words. ``evicts``: not for its own sake, but for somebody else's."""

    words: str
    evicts: bool = False

    def __str__(self) -> str:
        """Return the words."""
        return self.words


class Standing(StrEnum):
    """Whether a runner's memory can be had."""

    LEAVING = "leaving"  # it stops already
    IDLE = "idle"  # at once
    BUSY = "busy"  # once it has served whom it serves
    FIXED = "fixed"  # never: it is pinned


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A runner beside which a model is to be planned. ``loading``: drivers need not show yet what it holds.

    ``cost_s`` is about how many seconds its going would cost, ``priority`` as in ``ModelSettings``; ``later_bytes`` is
    what it takes in use only, if ever.
    """

    model: ModelId
    standing: Standing
    held_bytes: Mapping[str, int]
    cost_s: float
    priority: int = 0
    loading: bool = False
    later_bytes: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def promised_bytes(self) -> Mapping[str, int]:
        """Return what drivers need not show yet of what it holds."""
        return self.held_bytes if self.loading else self.later_bytes


@dataclass(frozen=True, slots=True)
class Failure:
    """How a runner failed. ``reason`` is one line; ``exit`` reads ``exit status 1`` or ``killed by SIGKILL``.

    ``killed``: a signal ended it that was not ours, which says little about whether the next child will last.
    """

    at: float
    reason: str
    exit: str | None = None
    log_tail: tuple[str, ...] = ()
    timed_out: bool = False
    killed: bool = False
    shortage: Shortage | None = None
    remedy: Decision | None = None  # what the next load does about it


class RefusalKind(StrEnum):
    """Why a ticket got no lease."""

    BAD_MODEL = "bad_model"
    CANNOT_FIT = "cannot_fit"
    QUEUE_FULL = "queue_full"
    CLIENT_LIMIT = "client_limit"
    QUEUE_TIMEOUT = "queue_timeout"
    LOAD_TIMEOUT = "load_timeout"
    LOAD_FAILED = "load_failed"
    PLANNER_FAILED = "planner_failed"
    SHUTTING_DOWN = "shutting_down"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A ticket's refusal: one line, and when it is worth trying again (None: it is not).

    ``never``: what was asked for does not fit on an empty machine either.
    """

    kind: RefusalKind
    message: str
    retry_after_s: float | None = None
    causes: tuple[Shortfall, ...] = ()
    never: bool = False


@dataclass(frozen=True, slots=True)
class Ticket:
    """A request that waits for a lease. ``keep_alive_s`` None: as the runner has it.

    ``owed``: its runner became ready while it waited, and is not evicted before it was served. ``tried_again``: a load
    that it waited for was killed; the next one that is ends its waiting.
    """

    id: TicketId
    model: ModelId
    arrived_at: float
    client: str = ""
    options: LoadOptions = NO_OPTIONS
    keep_alive_s: float | None = None
    owed: bool = False
    tried_again: bool = False
