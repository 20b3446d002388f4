"""The pool as others may see it: an immutable snapshot in calendar time, and counters taken from the commands."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from types import MappingProxyType
from typing import Final, assert_never

from planner.types import Machine
from supervisor.api.models import ModelView
from supervisor.api.runtime import LoadProgress
from supervisor.api.snapshot import DeviceLedger, DeviceUse, FailureView, ModelCounters, RunnerView, TokenCounts
from supervisor.core import ledger
from supervisor.core.commands import (
    Command,
    Grant,
    Learn,
    LoseLeases,
    PlanModel,
    ReadMachine,
    Reject,
    ReportFailure,
    Spawn,
    StopProcess,
)
from supervisor.core.pool import Pool
from supervisor.core.runner import IS_LOADING, Runner, RunnerState
from supervisor.core.types import LoadPlan, ModelId
from supervisor.models.catalogue import ModelEntry

# The two clocks are read a moment apart, and the system's is slewed: less than this is not somebody setting it.
CLOCK_STEP_S: Final = 0.1


class Clock:
    """Turns the core's monotonic times into seconds since the epoch.

    A moment has the same time in every snapshot, as long as nobody sets the system's clock.
    """

    def __init__(self) -> None:
        self._offset = 0.0

    def follow(self, now: float) -> None:
        """Take over the system's clock where it has gone another way."""
        offset = time.time() - now
        if abs(offset - self._offset) > CLOCK_STEP_S:
            self._offset = offset

    def at(self, moment: float) -> float:
        """Return a moment since the epoch."""
        return moment + self._offset


def count(counters: Mapping[str, ModelCounters], command: Command) -> Mapping[str, ModelCounters]:
    """Return the counters after this command."""
    before = counters.get(command.model, ModelCounters())
    match command:
        case Spawn():
            after = replace(before, launches=before.launches + 1)
        case Grant():
            after = replace(before, requests_granted=before.requests_granted + 1)
        case Reject():
            after = replace(before, requests_refused=before.requests_refused + 1)
        case ReportFailure(failure=failure, while_loading=while_loading):
            after = replace(
                before,
                load_failures=before.load_failures + while_loading,
                crashes=before.crashes + (not while_loading),
                out_of_memory=before.out_of_memory + (failure.shortage is not None),
            )
        case StopProcess(reason=reason):
            after = replace(before, unloads=before.unloads + 1, evictions=before.evictions + reason.evicts)
        case PlanModel() | ReadMachine() | LoseLeases() | Learn():
            return counters
        case _:
            assert_never(command)
    return MappingProxyType({**counters, command.model: after})


def count_tokens(
    counters: Mapping[str, ModelCounters], model: ModelId, added: TokenCounts
) -> Mapping[str, ModelCounters]:
    """Return the counters after a runner of this model has worked through so many tokens more."""
    before = counters.get(model, ModelCounters())
    after = replace(before, tokens=added if before.tokens is None else before.tokens + added)
    return MappingProxyType({**counters, model: after})


def runner_views(pool: Pool, clock: Clock) -> tuple[RunnerView, ...]:
    """Return every runner that has a child, or had one that failed."""
    return tuple(
        _runner_view(one, one.plan, pool, clock)
        for one in pool.runners.values()
        if one.plan is not None and (one.state is not RunnerState.STOPPED or one.last_failure is not None)
    )


def _runner_view(one: Runner, plan: LoadPlan, pool: Pool, clock: Clock) -> RunnerView:
    return RunnerView(
        id=one.id,
        model=one.model,
        role=plan.role,
        state=str(one.state),
        pid=one.pid,
        url=one.url,
        since=clock.at(one.since),
        in_flight=one.in_flight,
        waiting=len(pool.waiting_for(one.model)),
        restarts=one.restarts,
        n_ctx_per_slot=plan.n_ctx_per_slot,
        n_parallel=plan.n_parallel,
        expires_at=_deadline(one, clock, RunnerState.READY),
        keep_alive_s=one.stays_s(pool.limits_of(one.model)),
        retry_at=_deadline(one, clock, RunnerState.BACKOFF, RunnerState.FAILED),
        load_seconds=one.reload_s,
        plan=plan.document,
        uses=_uses(one, plan),
        last_failure=_failure(one, clock),
        remedies=one.remedies,
    )


def progress(pool: Pool, model: ModelId, now: float) -> LoadProgress | None:
    """Return where the load of this model stands, None where none is under way."""
    runner, load = pool.runner(model), pool.loads.get(model)
    if runner.child is not None and runner.state in IS_LOADING:
        return LoadProgress(str(runner.state), runner.child.load_fraction, now - runner.child.started_at)
    if load is not None:
        return LoadProgress(str(load.phase).replace("_", " "), None, now - load.started_at)
    return None


def ledger_views(pool: Pool, machine: Machine | None, now: float) -> tuple[DeviceLedger, ...]:
    """Return the account of every device of the machine."""
    devices = () if machine is None else (*machine.devices, machine.host)
    rows = ledger.rows(pool, {device.name: device.free_bytes for device in devices}, now)
    return tuple(DeviceLedger(**asdict(row)) for row in rows)


class ModelViews:
    """Views of the folder's models, made anew only where a model or its plan has changed.

    ``n_ctx_per_slot`` is what every conversation was promised, None where the planner decides by model.
    """

    def __init__(self, n_ctx_per_slot: int | None) -> None:
        self._n_ctx_per_slot = n_ctx_per_slot
        self._made: dict[ModelId, tuple[ModelEntry, ModelView]] = {}

    def of(self, entry: ModelEntry, pool: Pool) -> ModelView:
        """Return one model of the folder; its context is the plan's, else what every conversation was promised."""
        plan = pool.runner(entry.runner).plan
        n_ctx = _promised(entry, self._n_ctx_per_slot) if plan is None else plan.n_ctx_per_slot
        made_of, view = self._made.get(entry.id, (None, None))
        if view is None or made_of is not entry or view.n_ctx_per_slot != n_ctx:
            view = _model_view(entry, n_ctx)
            self._made[entry.id] = entry, view
        return view


def _model_view(entry: ModelEntry, n_ctx_per_slot: int | None) -> ModelView:
    return ModelView(
        id=entry.id,
        path=entry.path,
        role=entry.role,
        architecture=entry.architecture,
        file_bytes=entry.file_bytes,
        modified_at=entry.modified_at,
        n_ctx_train=entry.n_ctx_train,
        n_ctx_per_slot=n_ctx_per_slot,
        problem=entry.problem,
        digest=entry.digest,
        quantization=entry.quantization,
        n_params=entry.n_params,
        n_embd=entry.n_embd,
        capabilities=entry.capabilities,
        preset=entry.preset,
        aliases=entry.aliases,
        runner=entry.runner,
        has_chat_template=entry.has_chat_template,
        mmproj=entry.mmproj,
        adapters=entry.adapters,
    )


def _promised(entry: ModelEntry, n_ctx_per_slot: int | None) -> int | None:
    """Return what a conversation will get: llama-server uses no more than the model was trained for."""
    known = [length for length in (n_ctx_per_slot, entry.n_ctx_train) if length is not None]
    return min(known) if n_ctx_per_slot is not None else None


def _deadline(one: Runner, clock: Clock, *states: RunnerState) -> float | None:
    return clock.at(one.deadline) if one.state in states and one.deadline is not None else None


def _uses(one: Runner, plan: LoadPlan) -> tuple[DeviceUse, ...]:
    """Return what the runner takes, device by device; nothing where no child of it can hold anything."""
    if one.child is None:
        return ()
    measured = one.child.measured_bytes
    return tuple(DeviceUse(use.device, use.planned_bytes, measured.get(use.device)) for use in plan.uses)


def _failure(one: Runner, clock: Clock) -> FailureView | None:
    failure = one.last_failure
    if failure is None:
        return None
    return FailureView(clock.at(failure.at), failure.reason, failure.exit, failure.log_tail)
