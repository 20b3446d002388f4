"""One runner as a value: where it stands, and what its child holds. ``runner_table`` says what changes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from planner.types import HOST, Decision, LoadOptions
from supervisor.core.types import NO_OPTIONS, Failure, Limits, LoadPlan, ModelId, RunnerId, StopReason


class RunnerState(StrEnum):
    """Where a runner stands; the values are what ``/status`` shows."""

    STOPPED = "stopped"
    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    STOPPING = "stopping"
    BACKOFF = "backoff"
    FAILED = "failed"


IS_LOADING: Final = frozenset({RunnerState.STARTING, RunnerState.LOADING})
IS_LEAVING: Final = frozenset({RunnerState.DRAINING, RunnerState.STOPPING})
STAYS: Final = frozenset({*IS_LOADING, RunnerState.READY})
HAS_CHILD: Final = STAYS | IS_LEAVING
NOBODY: Final[Mapping[str, int]] = MappingProxyType({})


@dataclass(frozen=True)  # without slots: see ``records``
class Child:
    """What is known of one child process, from when it is asked for until it is reaped.

    ``launch`` is what the settings said of it. ``devices`` are those of its plan as they are called now, by the names
    that they had then, which its log goes by. It has a ``pid`` once it was spawned, and a ``url`` from when it was
    ready. ``prompt_cache_bytes`` is what it said last that its prompt cache has taken. ``serving`` counts the requests
    in flight by client. ``keep_alive_s`` is what a request asked of it, None where none did. ``stop_reason`` is why it
    drains, ``pending_failure`` why it is stopped, where that is a failure.
    """

    started_at: float
    launch: object = None
    devices: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    pid: int | None = None
    url: str | None = None
    load_fraction: float | None = None
    measured_bytes: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    prompt_cache_bytes: int = 0
    serving: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    keep_alive_s: float | None = None
    stop_reason: StopReason | None = None
    pending_failure: Failure | None = None


@dataclass(frozen=True)
class Runner:
    """One model's runner, and its child where it has one. ``plan`` and ``options`` are that child's, or the last one's.

    ``reload_s`` is how long the last load took. ``margins`` is what it has to leave free by device, having run out of
    memory there, and ``remedies`` the steps that led to that.
    """

    id: RunnerId
    model: ModelId
    state: RunnerState = RunnerState.STOPPED
    since: float = 0.0
    generation: int = 0
    plan: LoadPlan | None = None
    options: LoadOptions = NO_OPTIONS
    child: Child | None = None
    deadline: float | None = None
    last_used: float = 0.0
    reload_s: float | None = None
    crashes: tuple[float, ...] = ()  # when, within the crash window
    restarts: int = 0
    last_failure: Failure | None = None
    failed_last: bool = False  # the last child ended by failing
    margins: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    remedies: tuple[Decision, ...] = ()
    wanted_back: bool = False  # load it without being asked

    @property
    def serving(self) -> Mapping[str, int]:
        """Return how many requests its child serves, by client."""
        return NOBODY if self.child is None else self.child.serving

    @property
    def pid(self) -> int | None:
        """Return its child's process id, None where there is none."""
        return None if self.child is None else self.child.pid

    @property
    def url(self) -> str | None:
        """Return where its child answers, None where there is none that has been ready."""
        return None if self.child is None else self.child.url

    @property
    def in_flight(self) -> int:
        """Return how many requests it serves."""
        return 0 if self.child is None else sum(self.child.serving.values())

    @property
    def idle(self) -> bool:
        """Say whether it is ready and serves nobody."""
        return self.state is RunnerState.READY and not self.serving

    @property
    def has_free_slot(self) -> bool:
        """Say whether one more request would be served at once."""
        return self.state is RunnerState.READY and self.plan is not None and self.in_flight < self.plan.n_parallel

    def can_serve(self, options: LoadOptions) -> bool:
        """Say whether its child has what a request asks of the load: no option, or as much, or just that.

        What it was loaded for it can serve, whatever came of it: else it would be loaded again and again.
        """
        if self.plan is None or options == NO_OPTIONS:
            return self.plan is not None
        everything = self.plan.is_best_possible and self.plan.serves.n_gpu_layers
        if everything and options.n_gpu_layers is not None and options.n_gpu_layers >= everything:
            options = replace(options, n_gpu_layers=None)  # more layers than there are
        contexts = [one.n_ctx for one in (self.plan.serves, self.options) if one.n_ctx is not None]
        if options.n_ctx is not None and options.n_ctx > max(contexts, default=0):
            return False
        return all(
            asked is None or asked in {getattr(self.plan.serves, name), getattr(self.options, name)}
            for name in ("n_gpu_layers", "main_gpu", "n_batch", "use_mmap")
            for asked in [getattr(options, name)]
        )

    def stays_s(self, limits: Limits) -> float:
        """Return how long it stays once it is idle: as a request asked of this child, else as the limits say."""
        asked_s = None if self.child is None else self.child.keep_alive_s
        return limits.keep_alive_s if asked_s is None else asked_s

    def held_bytes(self) -> dict[str, int]:
        """Return what its child holds on each device: the larger of what was planned and what was measured.

        On the host it is what was planned: what is measured there counts mapped files, which are page cache.
        """
        if self.child is None or self.plan is None:
            return {}
        planned = self.plan.taken_bytes()
        beside = {use.device: use.overhead_bytes for use in self.plan.uses}
        measured = {
            device: size + beside.get(device, 0) for device, size in self.child.measured_bytes.items() if device != HOST
        }
        return {
            device: max(planned.get(device, 0), measured.get(device, 0)) for device in planned.keys() | measured.keys()
        }

    def later_bytes(self) -> dict[str, int]:
        """Return the part of it that its child takes in use only and has not taken yet, where one has loaded.

        How full its prompt cache is, it says; of what a large image takes nobody knows whether there was one.
        """
        if self.child is None or self.state in IS_LOADING or self.plan is None:
            return {}
        later = {use.device: use.later_bytes for use in self.plan.uses}
        later[HOST] = later.get(HOST, 0) - self.child.prompt_cache_bytes
        return {device: size for device, size in later.items() if size > 0}

    def held_on(self, devices: Iterable[str]) -> int:
        """Return what its child holds on these devices together."""
        held = self.held_bytes()
        return sum(held.get(device, 0) for device in devices)
