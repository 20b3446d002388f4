"""What there is at one moment, frozen: the runners, their models, the devices' accounts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from planner.types import Decision, Machine, Role
from supervisor.api.models import ModelView


@dataclass(frozen=True, slots=True)
class FailureView:
    """How a runner last failed. ``at`` is seconds since the epoch, ``exit`` e.g. ``killed by SIGKILL``."""

    at: float
    reason: str
    exit: str | None
    log_tail: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """Planned and measured bytes of one runner on one device; None where not known (yet)."""

    device: str
    planned_bytes: int | None
    measured_bytes: int | None


@dataclass(frozen=True, slots=True)
class DeviceLedger:
    """One device's account: what its driver calls free, and what of it is or was our runners'.

    ``held_bytes`` is what our runners hold, ``promised_bytes`` the part of it that loads are about to take,
    ``settling_bytes`` what was given back so lately that the driver may still show it as used, ``cap_bytes`` the most
    that they may hold while memory is another program's (None: no limit), ``difference_bytes`` what they turned out to
    hold beyond their plans (None: not measured).
    """

    device: str
    free_bytes: int | None
    held_bytes: int
    promised_bytes: int
    settling_bytes: int
    cap_bytes: int | None
    difference_bytes: int | None


@dataclass(frozen=True, slots=True)
class RunnerView:
    """One runner as it is at this moment. ``state`` is a value of ``supervisor.core.runner.RunnerState``.

    ``expires_at`` is when it is unloaded if nobody asks, None where it stays for ever or is not idle. ``keep_alive_s``
    is how long it stays once it is idle, ``math.inf`` for ever.
    ``plan`` is what ``planner explain --json`` prints, ``remedies`` what was changed since it ran out of memory. Times
    are seconds since the epoch.
    """

    id: str
    model: str
    role: Role
    state: str
    pid: int | None
    url: str | None
    since: float
    in_flight: int
    waiting: int
    restarts: int
    n_ctx_per_slot: int | None
    n_parallel: int | None
    expires_at: float | None
    keep_alive_s: float
    retry_at: float | None
    load_seconds: float | None
    plan: Mapping[str, Any] | None
    uses: tuple[DeviceUse, ...]
    last_failure: FailureView | None
    remedies: tuple[Decision, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """The tokens that runners have worked through, by their own counters, and the seconds that each kind took.

    ``prompt`` has none that were found in the cache. The seconds of requests that ran side by side are added up.
    """

    prompt: int = 0
    generated: int = 0
    prompt_s: float = 0.0
    generated_s: float = 0.0

    def __add__(self, more: TokenCounts) -> TokenCounts:
        """Return both together."""
        return TokenCounts(
            self.prompt + more.prompt,
            self.generated + more.generated,
            self.prompt_s + more.prompt_s,
            self.generated_s + more.generated_s,
        )


@dataclass(frozen=True, slots=True)
class ModelCounters:
    """What happened to one model since the service started. ``unloads`` counts ``evictions`` too.

    ``tokens`` is None where no runner of it has told any.
    """

    launches: int = 0
    crashes: int = 0
    load_failures: int = 0
    requests_granted: int = 0
    requests_refused: int = 0
    unloads: int = 0
    evictions: int = 0
    out_of_memory: int = 0
    tokens: TokenCounts | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that the status endpoints tell, at one moment. Building it never wakes or loads anything."""

    version: str
    started_at: float
    now: float
    draining: bool
    not_ready: tuple[str, ...]  # reasons why /readyz is 503; empty: ready
    llama_server: str | None
    llama_version: str | None
    machine: Machine | None
    runners: tuple[RunnerView, ...]
    models: tuple[ModelView, ...]
    queue_length: int
    queue_limit: int
    counters: Mapping[str, ModelCounters] = field(default_factory=lambda: MappingProxyType({}))
    warnings: tuple[str, ...] = ()
    ledger: tuple[DeviceLedger, ...] = ()
