"""What one event does to one runner in one state: a function for each entry of ``runner_table.TRANSITIONS``."""

from __future__ import annotations

import math
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final

from supervisor.core import failing
from supervisor.core.commands import Command, LoseLeases, Spawn, StopProcess
from supervisor.core.events import (
    ASKED,
    BecameReady,
    ChildHung,
    DeadlinePassed,
    KeepAliveChanged,
    LoadProgressed,
    NoRoomLeft,
    ProcessExited,
    ProcessSpawned,
    PromptCacheChanged,
    RequestFinished,
    RequestGranted,
    ResetRequested,
    SpawnFailed,
    StartRequested,
    StopRequested,
    WrongDevices,
)
from supervisor.core.records import changed
from supervisor.core.runner import Child, Runner, RunnerState
from supervisor.core.types import Failure, Limits, StopReason

# ruff: noqa: D103 - the table says when each is called; what a reader would not guess stands with the function

S = RunnerState

Outcome = tuple[Runner, tuple[Command, ...]]

NOT_WANTED: Final = StopReason("no longer wanted")
AT_ONCE: Final = StopReason("it was told to stop at once")
IDLE: Final = StopReason("idle")
STUCK: Final = StopReason("stuck while loading")
ELSEWHERE: Final = StopReason("on other devices than planned")


def _enter(runner: Runner, state: RunnerState, now: float, *, deadline: float | None = None, **changes: Any) -> Runner:
    return replace(runner, state=state, since=now, deadline=deadline, **changes)


def _child(runner: Runner) -> Child:
    """Return its child, in a state that has one."""
    assert runner.child is not None  # noqa: S101 - see ``invariants``
    return runner.child


def _idle_deadline(runner: Runner, now: float, limits: Limits) -> float | None:
    stays_s = runner.stays_s(limits)
    return None if math.isinf(stays_s) else now + stays_s


def start(runner: Runner, event: StartRequested, now: float, _limits: Limits) -> Outcome:
    started = _enter(
        runner,
        S.STARTING,
        now,
        generation=event.generation,
        plan=event.plan,
        options=event.options,
        child=Child(now, event.launch, MappingProxyType({use.device: use.device for use in event.plan.uses})),
        restarts=runner.restarts + runner.failed_last,
        failed_last=False,
        wanted_back=False,
    )
    return started, (Spawn(runner.id, runner.model, event.generation, event.plan),)


def fail_for_room(runner: Runner, _event: NoRoomLeft, now: float, limits: Limits) -> Outcome:
    return _enter(runner, S.FAILED, now, deadline=now + limits.crash_window_s, wanted_back=False), ()


def begin_loading(runner: Runner, event: ProcessSpawned, now: float, limits: Limits) -> Outcome:
    child = replace(_child(runner), pid=event.pid)
    return _enter(runner, S.LOADING, now, deadline=now + limits.load_timeout_s, child=child), ()


def keep_loading(runner: Runner, event: LoadProgressed, now: float, limits: Limits) -> Outcome:
    child = replace(_child(runner), load_fraction=event.fraction)
    return replace(runner, deadline=now + limits.load_timeout_s, child=child), ()


def become_ready(runner: Runner, event: BecameReady, now: float, limits: Limits) -> Outcome:
    child = _child(runner)
    measured = {child.devices.get(device, device): size for device, size in event.measured_bytes.items()}
    ready = _enter(
        runner,
        S.READY,
        now,
        deadline=_idle_deadline(runner, now, limits),
        child=replace(child, url=event.url, measured_bytes=MappingProxyType(measured)),
        reload_s=now - child.started_at,
        last_used=now,
    )
    return ready, ()


def fill_prompt_cache(runner: Runner, event: PromptCacheChanged, _now: float, _limits: Limits) -> Outcome:
    return replace(runner, child=replace(_child(runner), prompt_cache_bytes=event.size_bytes)), ()


def grant(runner: Runner, event: RequestGranted, now: float, _limits: Limits) -> Outcome:
    child = _child(runner)
    keep_alive_s = child.keep_alive_s if event.keep_alive_s is None else event.keep_alive_s
    serving = {**child.serving, event.client: child.serving.get(event.client, 0) + 1}
    child = changed(child, serving=MappingProxyType(serving), keep_alive_s=keep_alive_s)
    return changed(runner, child=child, deadline=None, last_used=now), ()


def _given_back(runner: Runner, client: str, **changes: Any) -> Runner:
    child = _child(runner)
    serving = {**child.serving, client: child.serving.get(client, 0) - 1}
    left = MappingProxyType({one: n for one, n in serving.items() if n})
    return changed(runner, child=changed(child, serving=left), **changes)


def finish(runner: Runner, event: RequestFinished, now: float, limits: Limits) -> Outcome:
    is_last = runner.in_flight == 1
    deadline = _idle_deadline(runner, now, limits) if is_last else None
    return _given_back(runner, event.client, deadline=deadline, last_used=now), ()


def keep_as_long(runner: Runner, _event: KeepAliveChanged, _now: float, limits: Limits) -> Outcome:
    return replace(runner, deadline=_idle_deadline(runner, runner.last_used, limits) if runner.idle else None), ()


def finish_draining(runner: Runner, event: RequestFinished, now: float, _limits: Limits) -> Outcome:
    left = _given_back(runner, event.client)
    reason = _stop_reason(left)
    return (left, ()) if left.serving else _stop(left, now, replace(reason, words=f"{reason}; drained"))


def finish_stopping(runner: Runner, event: RequestFinished, _now: float, _limits: Limits) -> Outcome:
    return _given_back(runner, event.client), ()


def _stop_reason(runner: Runner) -> StopReason:
    """Return why it drains, of one that does."""
    return _child(runner).stop_reason or ASKED


def _stop(runner: Runner, now: float, reason: StopReason, failure: Failure | None = None) -> Outcome:
    stopping = _enter(runner, S.STOPPING, now, child=replace(_child(runner), pending_failure=failure))
    return stopping, (StopProcess(runner.model, runner.generation, reason),)


def stop_before_spawned(runner: Runner, event: StopRequested, now: float, _limits: Limits) -> Outcome:
    return _enter(runner, S.STOPPING, now, wanted_back=event.come_back), ()


def stop_just_spawned(runner: Runner, event: ProcessSpawned, now: float, _limits: Limits) -> Outcome:
    return _stop(replace(runner, child=replace(_child(runner), pid=event.pid)), now, NOT_WANTED)


def stop_loading(runner: Runner, event: StopRequested, now: float, _limits: Limits) -> Outcome:
    return _stop(replace(runner, wanted_back=event.come_back), now, event.reason)


def stop_ready(runner: Runner, event: StopRequested, now: float, _limits: Limits) -> Outcome:
    child = replace(_child(runner), stop_reason=event.reason)
    runner = replace(runner, wanted_back=event.come_back, child=child)
    if runner.idle:
        return _stop(runner, now, event.reason)
    if event.drain_until is None:
        return _cut_short(runner, now, event.reason)
    return _enter(runner, S.DRAINING, now, deadline=event.drain_until), ()


def stop_draining(runner: Runner, event: StopRequested, now: float, _limits: Limits) -> Outcome:
    if event.drain_until is None:
        return _cut_short(runner, now, AT_ONCE)
    if runner.deadline is not None and runner.deadline <= event.drain_until:
        return runner, ()
    child = replace(_child(runner), stop_reason=event.reason)
    return replace(runner, deadline=event.drain_until, child=child), ()


def drained_long_enough(runner: Runner, _event: DeadlinePassed, now: float, limits: Limits) -> Outcome:
    reason, given = _stop_reason(runner), f"{limits.drain_timeout_s:g} s"
    story = f"{reason}, and this did not finish in the {given} of DRAIN_TIMEOUT"
    return _cut_short(runner, now, replace(reason, words=story))


def _cut_short(runner: Runner, now: float, reason: StopReason) -> Outcome:
    """Stop it, and tell the holders of leases at once: the child may take its time to go."""
    story = f"{runner.in_flight} requests in flight: {reason}"
    stopping, commands = _stop(runner, now, replace(reason, words=story))
    return stopping, (*commands, LoseLeases(runner.model, runner.generation, str(reason)))


def hang(runner: Runner, event: ChildHung, now: float, _limits: Limits) -> Outcome:
    """End it by force: it does not even hear that it is told to stop."""
    failure = Failure(at=now, reason=f"it hung: {event.reason}")
    stopping = _enter(runner, S.STOPPING, now, child=replace(_child(runner), pending_failure=failure))
    stop = StopProcess(runner.model, runner.generation, StopReason(failure.reason), at_once=True)
    lost = (LoseLeases(runner.model, runner.generation, failure.reason),) if runner.serving else ()
    return stopping, (stop, *lost)


def unload(runner: Runner, _event: DeadlinePassed, now: float, _limits: Limits) -> Outcome:
    return _stop(runner, now, IDLE)


def give_up_loading(runner: Runner, _event: DeadlinePassed, now: float, limits: Limits) -> Outcome:
    reason = f"showed no progress in loading for {limits.load_timeout_s:g} s (LOAD_TIMEOUT)"
    return _stop(runner, now, STUCK, Failure(at=now, reason=reason, timed_out=True))


def stop_on_wrong_devices(runner: Runner, event: WrongDevices, now: float, _limits: Limits) -> Outcome:
    reason = f"not on the planned devices: {event.reason}; planner doctor says more"
    return _stop(runner, now, ELSEWHERE, Failure(at=now, reason=reason))


def spawn_failed(runner: Runner, event: SpawnFailed, now: float, limits: Limits) -> Outcome:
    return failing.fail(runner, Failure(at=now, reason=event.reason), now, limits)


def stopped(runner: Runner, event: ProcessExited, now: float, limits: Limits) -> Outcome:
    """Whoever held a lease was told when it was told to stop."""
    if (failure := _child(runner).pending_failure) is not None:
        return failing.fail(runner, replace(failure, exit=event.exit, log_tail=event.log_tail), now, limits)
    return _enter(runner, S.STOPPED, now, child=None), ()


def never_spawned(runner: Runner, _event: SpawnFailed, now: float, _limits: Limits) -> Outcome:
    return _enter(runner, S.STOPPED, now, child=None), ()


def retry_allowed(runner: Runner, _event: DeadlinePassed, now: float, _limits: Limits) -> Outcome:
    return _enter(runner, S.STOPPED, now), ()


def forgive(runner: Runner, _event: DeadlinePassed | ResetRequested, now: float, _limits: Limits) -> Outcome:
    return _enter(runner, S.STOPPED, now, crashes=(), margins=MappingProxyType({}), remedies=()), ()


def forget_retry(runner: Runner, _event: StopRequested, now: float, _limits: Limits) -> Outcome:
    return _enter(runner, S.STOPPED, now, wanted_back=False), ()
