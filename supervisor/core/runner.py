"""One runner as a value: where it stands, and what its child holds. ``runner_table`` says what changes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from supervisor.core.types import Failure, LoadPlan, ModelId, RunnerId


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
HAS_CHILD: Final = frozenset({*IS_LOADING, RunnerState.READY, RunnerState.DRAINING, RunnerState.STOPPING})


@dataclass(frozen=True, slots=True)
class Runner:
    """One model's runner. ``plan`` is the plan of the present child, or of the last one."""

    id: RunnerId
    model: ModelId
    state: RunnerState = RunnerState.STOPPED
    since: float = 0.0
    generation: int = 0
    plan: LoadPlan | None = None
    pid: int | None = None
    url: str | None = None
    measured_bytes: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    in_flight: int = 0
    deadline: float | None = None
    last_used: float = 0.0
    load_started_at: float = 0.0
    load_seconds: float | None = None
    load_fraction: float | None = None
    crashes: tuple[float, ...] = ()  # when, within the crash window
    restarts: int = 0
    last_failure: Failure | None = None
    failed_last: bool = False  # the last child ended by failing
    pending_failure: Failure | None = None
    wanted_back: bool = False  # it crashed while people used it: load it again without being asked

    @property
    def idle(self) -> bool:
        """Say whether it is ready and serves nobody."""
        return self.state is RunnerState.READY and self.in_flight == 0

    @property
    def has_free_slot(self) -> bool:
        """Say whether one more request would be served at once."""
        return self.state is RunnerState.READY and self.plan is not None and self.in_flight < self.plan.n_parallel

    def held_bytes(self) -> dict[str, int]:
        """Return what its child holds on each device: the larger of what was planned and what was measured."""
        if self.state not in HAS_CHILD or self.plan is None:
            return {}
        planned = self.plan.planned_bytes()
        return {
            device: max(planned.get(device, 0), self.measured_bytes.get(device, 0))
            for device in planned.keys() | self.measured_bytes.keys()
        }
