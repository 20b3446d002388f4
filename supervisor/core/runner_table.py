"""One runner: the life of the llama-server children of one model, as a table.

Theory of operation
-------------------
A runner is started with a plan, becomes one child process, loads, serves, and ends; then it may be started again, as
the next *generation*. Every event names the generation it speaks of, and one that speaks of another than the present
changes nothing: the exit of a former child can never be taken for the exit of this one.

    STOPPED -> STARTING -> LOADING -> READY -> DRAINING -> STOPPING -> STOPPED
                  |           |         |
                  +-----------+---------+--> BACKOFF -> STOPPED       after a failure, for a while
                                             FAILED  -> STOPPED       after too many failures, for longer

Each state has at most one ``deadline``, and one event for its passing:

    LOADING    no sign of progress for LOAD_TIMEOUT: give the load up
    READY      nothing in flight for KEEP_ALIVE: unload (no deadline while something is in flight)
    DRAINING   what is in flight has had its time: stop now
    BACKOFF    may be tried again
    FAILED     the failures have aged: may be tried again, with a clean record

The child's memory counts as held until ``ProcessExited``, whatever was requested before. A failure that leads to a stop
(a load that is stuck) waits in ``pending_failure`` until the child is really gone.

Rules for the maintainer: whatever depends on (state, event) stands in ``TRANSITIONS`` or ``IGNORED``; a pair in neither
is a defect of the shell and raises ``IllegalTransition``. Nothing here knows of other runners: ``scheduler.py`` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final

from supervisor.core.commands import Command, LoseLeases, ReportFailure, Spawn, StopProcess
from supervisor.core.events import (
    BecameReady,
    ChildHung,
    DeadlinePassed,
    LoadProgressed,
    ProcessExited,
    ProcessSpawned,
    RequestFinished,
    RequestGranted,
    ResetRequested,
    RunnerEvent,
    SpawnFailed,
    StartRequested,
    StopRequested,
    WrongDevices,
)
from supervisor.core.runner import Runner, RunnerState
from supervisor.core.types import Failure, Limits

S = RunnerState


class IllegalTransition(Exception):
    """The shell sent an event that cannot happen in this state; the text tells the runner's story."""

    def __init__(self, runner: Runner, event: RunnerEvent) -> None:
        super().__init__(
            f"{type(event).__name__} cannot happen to runner {runner.id} ({runner.model}, generation "
            f"{runner.generation}), which is {runner.state}"
        )


Outcome = tuple[Runner, tuple[Command, ...]]


def _enter(runner: Runner, state: RunnerState, now: float, *, deadline: float | None = None, **changes: Any) -> Runner:
    return replace(runner, state=state, since=now, deadline=deadline, **changes)


def _idle_deadline(now: float, limits: Limits) -> float | None:
    return None if limits.keep_alive_s is None else now + limits.keep_alive_s


def _start(runner: Runner, event: StartRequested, now: float, _limits: Limits) -> Outcome:
    started = _enter(
        replace(runner, generation=event.generation),
        S.STARTING,
        now,
        plan=event.plan,
        pid=None,
        url=None,
        measured_bytes=MappingProxyType({}),
        in_flight=0,
        load_started_at=now,
        load_seconds=None,
        load_fraction=None,
        restarts=runner.restarts + runner.failed_last,
        failed_last=False,
        pending_failure=None,
        wanted_back=False,
    )
    return started, (Spawn(runner.id, runner.model, event.generation, event.plan),)


def _begin_loading(runner: Runner, event: ProcessSpawned, now: float, limits: Limits) -> Outcome:
    return _enter(runner, S.LOADING, now, deadline=now + limits.load_timeout_s, pid=event.pid), ()


def _keep_loading(runner: Runner, event: LoadProgressed, now: float, limits: Limits) -> Outcome:
    return replace(runner, deadline=now + limits.load_timeout_s, load_fraction=event.fraction), ()


def _become_ready(runner: Runner, event: BecameReady, now: float, limits: Limits) -> Outcome:
    ready = _enter(
        runner,
        S.READY,
        now,
        deadline=_idle_deadline(now, limits),
        url=event.url,
        measured_bytes=event.measured_bytes,
        load_seconds=now - runner.load_started_at,
        last_used=now,
    )
    return ready, ()


def _grant(runner: Runner, _event: RequestGranted, now: float, _limits: Limits) -> Outcome:
    return replace(runner, in_flight=runner.in_flight + 1, deadline=None, last_used=now), ()


def _finish(runner: Runner, _event: RequestFinished, now: float, limits: Limits) -> Outcome:
    left = runner.in_flight - 1
    deadline = _idle_deadline(now, limits) if left == 0 else None
    return replace(runner, in_flight=left, deadline=deadline, last_used=now), ()


def _finish_draining(runner: Runner, _event: RequestFinished, now: float, _limits: Limits) -> Outcome:
    left = replace(runner, in_flight=runner.in_flight - 1)
    return _stop(left, now, "drained") if left.in_flight == 0 else (left, ())


def _finish_stopping(runner: Runner, _event: RequestFinished, _now: float, _limits: Limits) -> Outcome:
    return replace(runner, in_flight=runner.in_flight - 1), ()


def _stop(runner: Runner, now: float, reason: str, failure: Failure | None = None) -> Outcome:
    stopping = _enter(runner, S.STOPPING, now, pending_failure=failure)
    return stopping, (StopProcess(runner.model, runner.generation, reason),)


def _stop_before_spawned(runner: Runner, _event: StopRequested, now: float, _limits: Limits) -> Outcome:
    return _enter(runner, S.STOPPING, now), ()


def _stop_just_spawned(runner: Runner, event: ProcessSpawned, now: float, _limits: Limits) -> Outcome:
    return _stop(replace(runner, pid=event.pid), now, "no longer wanted")


def _stop_loading(runner: Runner, _event: StopRequested, now: float, _limits: Limits) -> Outcome:
    return _stop(runner, now, "no longer wanted")


def _stop_ready(runner: Runner, event: StopRequested, now: float, _limits: Limits) -> Outcome:
    if not runner.in_flight:
        return _stop(runner, now, "asked to stop")
    if event.drain_until is None:
        return _cut_short(runner, now, "the runner was told to stop at once")
    return _enter(runner, S.DRAINING, now, deadline=event.drain_until), ()


def _stop_draining(runner: Runner, event: StopRequested, now: float, _limits: Limits) -> Outcome:
    if event.drain_until is not None:
        return runner, ()
    return _cut_short(runner, now, "the runner was told to stop at once")


def _drained_long_enough(runner: Runner, _event: DeadlinePassed, now: float, limits: Limits) -> Outcome:
    given = f"{limits.drain_timeout_s:g} s"
    return _cut_short(runner, now, f"the service stops, and this did not finish in the {given} of DRAIN_TIMEOUT")


def _cut_short(runner: Runner, now: float, story: str) -> Outcome:
    """Stop it, and tell the holders of leases at once: the child may take its time to go."""
    stopping, commands = _stop(runner, now, f"{runner.in_flight} requests in flight: {story}")
    return stopping, (*commands, LoseLeases(runner.model, runner.generation, story))


def _hang(runner: Runner, event: ChildHung, now: float, _limits: Limits) -> Outcome:
    failure = Failure(at=now, reason=f"it hung: {event.reason}")
    stopping = _enter(runner, S.STOPPING, now, pending_failure=failure)
    stop = StopProcess(runner.model, runner.generation, failure.reason, at_once=True)
    return stopping, (stop, LoseLeases(runner.model, runner.generation, failure.reason))


def _unload(runner: Runner, _event: DeadlinePassed, now: float, _limits: Limits) -> Outcome:
    return _stop(runner, now, "idle")


def _give_up_loading(runner: Runner, _event: DeadlinePassed, now: float, limits: Limits) -> Outcome:
    reason = f"showed no progress in loading for {limits.load_timeout_s:g} s (LOAD_TIMEOUT)"
    return _stop(runner, now, "stuck while loading", Failure(at=now, reason=reason, timed_out=True))


def _stop_on_wrong_devices(runner: Runner, event: WrongDevices, now: float, _limits: Limits) -> Outcome:
    reason = f"not on the planned devices: {event.reason}; planner doctor says more"
    return _stop(runner, now, "on other devices than planned", Failure(at=now, reason=reason))


def _spawn_failed(runner: Runner, event: SpawnFailed, now: float, limits: Limits) -> Outcome:
    return _fail(runner, Failure(at=now, reason=event.reason), now, limits)


def _died(runner: Runner, event: ProcessExited, now: float, limits: Limits) -> Outcome:
    failure = Failure(
        at=now,
        reason=": ".join(part for part in (event.exit, event.shortage, event.last_error) if part is not None),
        exit=event.exit,
        log_tail=event.log_tail,
        out_of_memory=event.shortage is not None,
    )
    return _fail(runner, failure, now, limits)


def _fail(runner: Runner, failure: Failure, now: float, limits: Limits) -> Outcome:
    """Wait before the next try: not at all after a first failure, then 1, 2, 4 ... seconds, and at last much longer.

    A load that ran out of memory waits from the first time on: planned again at once, it would be the same plan.
    """
    while_loading = runner.load_seconds is None
    crashes = (*(at for at in runner.crashes if at > now - limits.crash_window_s), now)
    if len(crashes) >= limits.max_crashes:
        state, pause = S.FAILED, limits.crash_window_s
    else:
        state, pause = S.BACKOFF, 0.0 if len(crashes) == 1 else min(limits.backoff_cap_s, 2.0 ** (len(crashes) - 2))
        if failure.out_of_memory and while_loading:
            pause = max(pause, limits.memory_pause_s)
    was_serving = runner.state is S.READY and limits.keep_alive_s != 0
    failed = _enter(
        runner,
        state,
        now,
        deadline=now + pause,
        crashes=crashes,
        last_failure=failure,
        failed_last=True,
        wanted_back=was_serving and state is S.BACKOFF,
    )
    report = ReportFailure(runner.model, runner.generation, failure, while_loading=while_loading)
    lost = (LoseLeases(runner.model, runner.generation, failure.reason),) if runner.in_flight else ()
    return _without_child(failed), (report, *lost)


def _without_child(runner: Runner) -> Runner:
    """Forget the child, which is reaped."""
    return replace(runner, pid=None, url=None, in_flight=0, measured_bytes=MappingProxyType({}), pending_failure=None)


def _stopped(runner: Runner, event: ProcessExited, now: float, limits: Limits) -> Outcome:
    """Whoever held a lease was told when it was told to stop."""
    if (failure := runner.pending_failure) is not None:
        return _fail(runner, replace(failure, exit=event.exit, log_tail=event.log_tail), now, limits)
    return _without_child(_enter(runner, S.STOPPED, now)), ()


def _never_spawned(runner: Runner, _event: SpawnFailed, now: float, _limits: Limits) -> Outcome:
    return _without_child(_enter(runner, S.STOPPED, now)), ()


def _retry_allowed(runner: Runner, _event: DeadlinePassed, now: float, _limits: Limits) -> Outcome:
    return _enter(runner, S.STOPPED, now), ()


def _forgive(runner: Runner, _event: DeadlinePassed | ResetRequested, now: float, _limits: Limits) -> Outcome:
    return _enter(runner, S.STOPPED, now, crashes=()), ()


def _forget_retry(runner: Runner, _event: StopRequested, now: float, _limits: Limits) -> Outcome:
    return _enter(runner, S.STOPPED, now, wanted_back=False), ()


Handler = Callable[[Runner, Any, float, Limits], Outcome]

TRANSITIONS: Final[Mapping[tuple[RunnerState, type[RunnerEvent]], Handler]] = {
    (S.STOPPED, StartRequested): _start,
    (S.STARTING, ProcessSpawned): _begin_loading,
    (S.STARTING, SpawnFailed): _spawn_failed,
    (S.STARTING, StopRequested): _stop_before_spawned,
    (S.LOADING, LoadProgressed): _keep_loading,
    (S.LOADING, BecameReady): _become_ready,
    (S.LOADING, WrongDevices): _stop_on_wrong_devices,
    (S.LOADING, ProcessExited): _died,
    (S.LOADING, StopRequested): _stop_loading,
    (S.LOADING, DeadlinePassed): _give_up_loading,
    (S.READY, RequestGranted): _grant,
    (S.READY, RequestFinished): _finish,
    (S.READY, ChildHung): _hang,
    (S.READY, ProcessExited): _died,
    (S.READY, StopRequested): _stop_ready,
    (S.READY, DeadlinePassed): _unload,
    (S.DRAINING, RequestFinished): _finish_draining,
    (S.DRAINING, ChildHung): _hang,
    (S.DRAINING, ProcessExited): _died,
    (S.DRAINING, StopRequested): _stop_draining,
    (S.DRAINING, DeadlinePassed): _drained_long_enough,
    (S.STOPPING, ProcessSpawned): _stop_just_spawned,
    (S.STOPPING, SpawnFailed): _never_spawned,
    (S.STOPPING, RequestFinished): _finish_stopping,
    (S.STOPPING, ProcessExited): _stopped,
    (S.BACKOFF, StopRequested): _forget_retry,
    (S.BACKOFF, DeadlinePassed): _retry_allowed,
    (S.BACKOFF, ResetRequested): _forgive,
    (S.FAILED, DeadlinePassed): _forgive,
    (S.FAILED, ResetRequested): _forgive,
}

IGNORED: Final = frozenset(
    {
        # the child said its last words while the decision was already taken
        (S.READY, LoadProgressed),
        (S.DRAINING, LoadProgressed),
        (S.STOPPING, LoadProgressed),
        (S.STOPPING, BecameReady),
        (S.STOPPING, WrongDevices),
        (S.STOPPING, ChildHung),
        (S.STOPPED, ChildHung),
        (S.BACKOFF, ChildHung),
        (S.FAILED, ChildHung),
        # it stops already, or has nothing to stop
        (S.STOPPING, StopRequested),
        (S.STOPPED, StopRequested),
        (S.FAILED, StopRequested),
        # nothing to forgive
        (S.STOPPED, ResetRequested),
        (S.STARTING, ResetRequested),
        (S.LOADING, ResetRequested),
        (S.READY, ResetRequested),
        (S.DRAINING, ResetRequested),
        (S.STOPPING, ResetRequested),
        # the readers of a dead child's pipe may speak after its exit was noticed
        (S.STOPPED, LoadProgressed),
        (S.BACKOFF, LoadProgressed),
        (S.FAILED, LoadProgressed),
        (S.STOPPED, BecameReady),
        (S.STOPPED, WrongDevices),
        (S.BACKOFF, WrongDevices),
        (S.FAILED, WrongDevices),
        (S.BACKOFF, BecameReady),
        (S.FAILED, BecameReady),
        # leases on a dead child come back when their holders have noticed
        (S.STOPPED, RequestFinished),
        (S.BACKOFF, RequestFinished),
        (S.FAILED, RequestFinished),
    }
)


def step(runner: Runner, event: RunnerEvent, now: float, limits: Limits) -> Outcome:
    """Return the runner after this event and what is to be done. Raises IllegalTransition."""
    if not isinstance(event, StartRequested) and event.generation != runner.generation:
        return runner, ()
    key = (runner.state, type(event))
    if key in IGNORED:
        return runner, ()
    if (handler := TRANSITIONS.get(key)) is None:
        raise IllegalTransition(runner, event)
    return handler(runner, event, now, limits)
