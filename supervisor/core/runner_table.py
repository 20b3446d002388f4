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
from typing import Any, Final

from supervisor.core import failing, runner_moves
from supervisor.core.events import (
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
    RunnerEvent,
    SpawnFailed,
    StartRequested,
    StopRequested,
    WrongDevices,
)
from supervisor.core.runner import Runner, RunnerState
from supervisor.core.runner_moves import Outcome
from supervisor.core.types import Limits

S = RunnerState


class IllegalTransition(Exception):
    """The shell sent an event that cannot happen in this state; the text tells the runner's story."""

    def __init__(self, runner: Runner, event: RunnerEvent) -> None:
        super().__init__(
            f"{type(event).__name__} cannot happen to runner {runner.id} ({runner.model}, generation "
            f"{runner.generation}), which is {runner.state}"
        )


Handler = Callable[[Runner, Any, float, Limits], Outcome]

TRANSITIONS: Final[Mapping[tuple[RunnerState, type[RunnerEvent]], Handler]] = {
    (S.STOPPED, StartRequested): runner_moves.start,
    (S.STOPPED, NoRoomLeft): runner_moves.fail_for_room,
    (S.STARTING, ProcessSpawned): runner_moves.begin_loading,
    (S.STARTING, SpawnFailed): runner_moves.spawn_failed,
    (S.STARTING, StopRequested): runner_moves.stop_before_spawned,
    (S.LOADING, LoadProgressed): runner_moves.keep_loading,
    (S.LOADING, BecameReady): runner_moves.become_ready,
    (S.LOADING, WrongDevices): runner_moves.stop_on_wrong_devices,
    (S.LOADING, ProcessExited): failing.died,
    (S.LOADING, StopRequested): runner_moves.stop_loading,
    (S.LOADING, DeadlinePassed): runner_moves.give_up_loading,
    (S.READY, RequestGranted): runner_moves.grant,
    (S.READY, RequestFinished): runner_moves.finish,
    (S.READY, PromptCacheChanged): runner_moves.fill_prompt_cache,
    (S.READY, ProcessExited): failing.died,
    (S.READY, StopRequested): runner_moves.stop_ready,
    (S.LOADING, ChildHung): runner_moves.hang,
    (S.READY, ChildHung): runner_moves.hang,
    (S.READY, KeepAliveChanged): runner_moves.keep_as_long,
    (S.READY, DeadlinePassed): runner_moves.unload,
    (S.DRAINING, RequestFinished): runner_moves.finish_draining,
    (S.DRAINING, PromptCacheChanged): runner_moves.fill_prompt_cache,
    (S.DRAINING, ProcessExited): failing.died,
    (S.DRAINING, StopRequested): runner_moves.stop_draining,
    (S.DRAINING, ChildHung): runner_moves.hang,
    (S.DRAINING, DeadlinePassed): runner_moves.drained_long_enough,
    (S.STOPPING, ProcessSpawned): runner_moves.stop_just_spawned,
    (S.STOPPING, SpawnFailed): runner_moves.never_spawned,
    (S.STOPPING, RequestFinished): runner_moves.finish_stopping,
    (S.STOPPING, ProcessExited): runner_moves.stopped,
    (S.BACKOFF, StopRequested): runner_moves.forget_retry,
    (S.BACKOFF, DeadlinePassed): runner_moves.retry_allowed,
    (S.BACKOFF, ResetRequested): runner_moves.forgive,
    (S.FAILED, DeadlinePassed): runner_moves.forgive,
    (S.FAILED, ResetRequested): runner_moves.forgive,
}

IGNORED: Final = frozenset(
    {
        # the child said its last words while the decision was already taken
        (S.READY, LoadProgressed),
        (S.DRAINING, LoadProgressed),
        (S.STOPPING, LoadProgressed),
        (S.STOPPING, PromptCacheChanged),
        (S.STOPPING, BecameReady),
        (S.STOPPING, WrongDevices),
        (S.STOPPING, ChildHung),
        # a program that is not ours may talk as llama-server does, and before we know that it serves
        (S.LOADING, PromptCacheChanged),
        # it stops already, or has nothing to stop
        (S.STOPPING, StopRequested),
        (S.STOPPED, StopRequested),
        (S.FAILED, StopRequested),
        # it will hold once the runner is ready
        (S.STOPPED, KeepAliveChanged),
        (S.STARTING, KeepAliveChanged),
        (S.LOADING, KeepAliveChanged),
        (S.DRAINING, KeepAliveChanged),
        (S.STOPPING, KeepAliveChanged),
        (S.BACKOFF, KeepAliveChanged),
        (S.FAILED, KeepAliveChanged),
        # nothing to forgive
        (S.STOPPED, ResetRequested),
        (S.STARTING, ResetRequested),
        (S.LOADING, ResetRequested),
        (S.READY, ResetRequested),
        (S.DRAINING, ResetRequested),
        (S.STOPPING, ResetRequested),
        # the readers of a dead child's pipe may speak after its exit was noticed
        (S.STOPPED, LoadProgressed),
        (S.STOPPED, PromptCacheChanged),
        (S.BACKOFF, PromptCacheChanged),
        (S.FAILED, PromptCacheChanged),
        (S.STOPPED, ChildHung),
        (S.BACKOFF, ChildHung),
        (S.FAILED, ChildHung),
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
