"""The values that the core decides over. Times are seconds on one monotonic clock that the shell reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any, NewType

from planner.types import HOST, DeviceKind, Plan, Shortfall
from supervisor.core.pinning import PinnedDevice

ModelId = NewType("ModelId", str)
RunnerId = NewType("RunnerId", str)
TicketId = NewType("TicketId", int)


@dataclass(frozen=True, slots=True)
class Limits:
    """What the operator allows the core to do.

    ``max_loaded_models`` None leaves it to the memory.
    ``keep_alive_s`` counts from the end of the last request; None keeps a model for ever, 0 unloads at once.
    ``load_timeout_s`` is how long a load may go without any sign of progress.
    """

    max_loaded_models: int | None
    max_queue: int
    keep_alive_s: float | None
    load_timeout_s: float
    drain_timeout_s: float
    backoff_cap_s: float = 30.0  # longer than a driver's reset takes, shorter than a user's patience
    max_crashes: int = 5  # so many crashes within the window mean that the next one would follow too
    crash_window_s: float = 300.0
    memory_pause_s: float = 30.0  # after a load that ran out of memory: whoever took it keeps it for a while


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """A plan that may be launched.

    ``document`` is what ``planner explain --json`` prints. ``buffer_devices`` maps the names that llama.cpp gives to
    the buffers of an RPC worker (``RPC0[host:port]``, an index within that worker) to the planner's device names.
    ``pinned`` are the devices that the runner has to name when it starts; none: not checked.
    """

    plan: Plan
    document: Mapping[str, Any] = field(repr=False)
    buffer_devices: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    pinned: tuple[PinnedDevice, ...] = ()

    @property
    def n_parallel(self) -> int:
        """Return how many conversations the runner serves at once."""
        return self.plan.request.n_parallel or 1

    @property
    def layers_on_devices(self) -> int:
        """Return how many blocks, the output layer among them, do not stay on the host."""
        placement = self.plan.placement
        return sum(index >= 0 for index in (*placement.layer_devices, placement.output_device))

    @property
    def is_best_possible(self) -> bool:
        """Say whether no other state of the machine could give a better plan: all on devices, or no device at all."""
        if not self.plan.is_known:
            return False
        has_devices = any(usage.kind is not DeviceKind.HOST for usage in self.plan.usages)
        return not has_devices or self.layers_on_devices == len(self.plan.placement.layer_devices) + 1

    def planned_bytes(self) -> dict[str, int]:
        """Return what the plan takes on each device that it uses and on the host, as far as that is known."""
        used = {*self.plan.placement.devices, HOST}
        return {usage.name: usage.known_bytes for usage in self.plan.usages if usage.name in used}


@dataclass(frozen=True, slots=True)
class DoesNotFit:
    """No placement fits on the machine that was asked about. ``headline`` is one sentence that says so."""

    headline: str
    causes: tuple[Shortfall, ...] = ()


@dataclass(frozen=True, slots=True)
class PlanProblem:
    """No plan can be made: the file or llama.cpp rules it out, or (``ours``) the planner itself failed."""

    reason: str
    ours: bool = False


@dataclass(frozen=True, slots=True)
class Failure:
    """How a runner failed. ``reason`` is one line; ``exit`` reads ``exit status 1`` or ``killed by SIGKILL``."""

    at: float
    reason: str
    exit: str | None = None
    log_tail: tuple[str, ...] = ()
    timed_out: bool = False
    out_of_memory: bool = False


class RefusalKind(StrEnum):
    """Why a ticket got no lease."""

    BAD_MODEL = "bad_model"
    CANNOT_FIT = "cannot_fit"
    QUEUE_FULL = "queue_full"
    CLIENT_LIMIT = "client_limit"
    LOAD_TIMEOUT = "load_timeout"
    LOAD_FAILED = "load_failed"
    PLANNER_FAILED = "planner_failed"
    SHUTTING_DOWN = "shutting_down"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A ticket's refusal: one line, and when it is worth trying again (None: it is not)."""

    kind: RefusalKind
    message: str
    retry_after_s: float | None = None
    causes: tuple[Shortfall, ...] = ()


@dataclass(frozen=True, slots=True)
class Ticket:
    """A request that waits for a lease."""

    id: TicketId
    model: ModelId
    arrived_at: float
