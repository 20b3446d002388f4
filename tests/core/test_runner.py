"""The table of one runner: what each event does in each state."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
from making_plans import LIMITS, make_plan

from supervisor.core import events
from supervisor.core.commands import Learn, LoseLeases, ReportFailure, Spawn, StopProcess
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
    RunnerEvent,
    SpawnFailed,
    StartRequested,
    StopRequested,
    WrongDevices,
)
from supervisor.core.loglines import Shortage
from supervisor.core.runner import HAS_CHILD, Child, Runner, RunnerState
from supervisor.core.runner_table import IGNORED, TRANSITIONS, IllegalTransition, step
from supervisor.core.types import ModelId, PlannedUse, RunnerId

MODEL = ModelId("m")
MIB = 1024 * 1024
OUT_OF_MEMORY = ProcessExited(MODEL, 1, "exit status 1", "cudaMalloc failed", shortage=Shortage("CUDA0"))
EVENT_TYPES = tuple(
    kind for kind in vars(events).values() if isinstance(kind, type) and RunnerEvent in kind.__mro__[1:]
)
EXAMPLES: dict[type[RunnerEvent], RunnerEvent] = {
    StartRequested: StartRequested(MODEL, 1, make_plan()),
    ProcessSpawned: ProcessSpawned(MODEL, 1, 4711),
    SpawnFailed: SpawnFailed(MODEL, 1, "no such file"),
    LoadProgressed: LoadProgressed(MODEL, 1),
    WrongDevices: WrongDevices(MODEL, 1, "it uses CUDA1 where CUDA0 was planned"),
    BecameReady: BecameReady(MODEL, 1, "http://127.0.0.1:1"),
    PromptCacheChanged: PromptCacheChanged(MODEL, 1, 5),
    ProcessExited: ProcessExited(MODEL, 1, "exit status 1", "out of memory", ("a", "b")),
    RequestGranted: RequestGranted(MODEL, 1),
    RequestFinished: RequestFinished(MODEL, 1),
    StopRequested: StopRequested(MODEL, 1),
    KeepAliveChanged: KeepAliveChanged(MODEL, 1),
    NoRoomLeft: NoRoomLeft(MODEL, 1),
    ChildHung: ChildHung(MODEL, 1, "it did not answer"),
    ResetRequested: ResetRequested(MODEL, 1),
    DeadlinePassed: DeadlinePassed(MODEL, 1),
}

# What the shell can only send by mistake, and why it cannot happen.
ILLEGAL = {
    *itertools.product(
        set(RunnerState) - {RunnerState.STOPPED}, [StartRequested, NoRoomLeft]
    ),  # only STOPPED is ever started
    *itertools.product(set(RunnerState) - {RunnerState.READY}, [RequestGranted]),  # only READY has free slots
    *itertools.product(  # a child is spawned once, right after it was asked for
        set(RunnerState) - {RunnerState.STARTING, RunnerState.STOPPING}, [ProcessSpawned, SpawnFailed]
    ),
    # before there is a process nothing can be said of it, and after its exit there is none
    *itertools.product(
        [RunnerState.STARTING],
        [LoadProgressed, WrongDevices, BecameReady, PromptCacheChanged, ChildHung, ProcessExited],
    ),
    *itertools.product([RunnerState.STOPPED, RunnerState.BACKOFF, RunnerState.FAILED], [ProcessExited]),
    *itertools.product([RunnerState.READY, RunnerState.DRAINING], [BecameReady, WrongDevices]),  # said once, before
    *itertools.product([RunnerState.STARTING, RunnerState.LOADING], [RequestFinished]),  # nothing was granted yet
    # these states have no deadline
    *itertools.product([RunnerState.STOPPED, RunnerState.STARTING, RunnerState.STOPPING], [DeadlinePassed]),
}


def runner_in(state: RunnerState, child: Child | None = None, **changes: object) -> Runner:
    """Return a runner in this state, with a child that was asked for just now where such a runner has one."""
    child = (child or Child(0.0)) if state in HAS_CHILD else None
    runner = Runner(RunnerId("r1"), MODEL, state=state, generation=1, plan=make_plan(n_parallel=2), child=child)
    return replace(runner, **changes)  # type: ignore[arg-type]


def loading_again(runner: Runner) -> Runner:
    return replace(runner, state=RunnerState.LOADING, child=Child(0.0))


def test_every_pair_of_state_and_event_is_written_down() -> None:
    """Each pair is a transition, ignored on purpose, or listed here as impossible; never two of these."""
    pairs = set(itertools.product(RunnerState, EVENT_TYPES))
    assert set(TRANSITIONS) | IGNORED | ILLEGAL == pairs
    assert len(TRANSITIONS) + len(IGNORED) + len(ILLEGAL) == len(pairs)


@pytest.mark.parametrize("state, kind", sorted(ILLEGAL, key=str))
def test_impossible_events_raise_with_the_story(state: RunnerState, kind: type[RunnerEvent]) -> None:
    with pytest.raises(IllegalTransition, match=f"r1.*{state}"):
        step(runner_in(state), EXAMPLES[kind], 0.0, LIMITS)


@pytest.mark.parametrize("state", RunnerState)
@pytest.mark.parametrize("kind", [kind for kind in EVENT_TYPES if kind is not StartRequested])
def test_events_of_another_generation_change_nothing(state: RunnerState, kind: type[RunnerEvent]) -> None:
    """The exit of a former child is never taken for the exit of this one."""
    runner = runner_in(state, generation=2)
    assert step(runner, EXAMPLES[kind], 0.0, LIMITS) == (runner, ())


def test_a_start_spawns_the_plan_as_the_generation_it_names() -> None:
    plan = make_plan()
    runner, commands = step(runner_in(RunnerState.STOPPED), StartRequested(MODEL, 2, plan), 5.0, LIMITS)
    assert runner.state is RunnerState.STARTING
    assert commands == (Spawn(runner.id, MODEL, 2, plan),)


def test_loading_may_take_as_long_as_it_makes_progress() -> None:
    runner, _ = step(runner_in(RunnerState.STARTING), ProcessSpawned(MODEL, 1, 7), 0.0, LIMITS)
    assert runner.deadline == 30.0
    runner, _ = step(runner, LoadProgressed(MODEL, 1), 29.0, LIMITS)
    assert runner.deadline == 59.0


def test_a_load_without_progress_is_stopped_and_fails_once_the_child_is_gone() -> None:
    runner, commands = step(runner_in(RunnerState.LOADING), DeadlinePassed(MODEL, 1), 30.0, LIMITS)
    assert runner.state is RunnerState.STOPPING
    assert [type(command) for command in commands] == [StopProcess]
    assert runner.held_bytes()["CUDA0"] == 10, "its memory is not free before it is gone"
    runner, commands = step(runner, ProcessExited(MODEL, 1, "killed by SIGTERM", None, killed=True), 31.0, LIMITS)
    assert runner.state is RunnerState.BACKOFF
    assert runner.last_failure is not None
    assert "LOAD_TIMEOUT" in runner.last_failure.reason
    assert runner.last_failure.exit == "killed by SIGTERM"
    assert runner.held_bytes() == {}


def test_keep_alive_counts_from_the_end_of_the_last_request() -> None:
    runner, _ = step(runner_in(RunnerState.LOADING), BecameReady(MODEL, 1, "http://x"), 0.0, LIMITS)
    assert runner.deadline == 60.0
    runner, _ = step(runner, RequestGranted(MODEL, 1), 10.0, LIMITS)
    assert runner.deadline is None
    runner, _ = step(runner, RequestFinished(MODEL, 1), 500.0, LIMITS)
    assert runner.deadline == 560.0


def test_keep_alive_may_be_for_ever_or_nothing() -> None:
    for keep_alive_s, deadline in ((math.inf, None), (0.0, 7.0)):
        limits = replace(LIMITS, keep_alive_s=keep_alive_s)
        busy = runner_in(RunnerState.READY, Child(0.0, serving={"": 1}))
        runner, _ = step(busy, RequestFinished(MODEL, 1), 7.0, limits)
        assert runner.deadline == deadline


def test_a_request_s_keep_alive_holds_until_another_request_says_else_and_not_for_the_next_child() -> None:
    runner = runner_in(RunnerState.READY)
    for said_s, deadline in ((5.0, 6.0), (None, 6.0), (math.inf, None), (None, None), (0.0, 1.0)):
        runner, _ = step(runner, RequestGranted(MODEL, 1, keep_alive_s=said_s), 0.0, LIMITS)
        runner, _ = step(runner, RequestFinished(MODEL, 1), 1.0, LIMITS)
        assert runner.deadline == deadline
    started, _ = step(replace(runner, state=RunnerState.STOPPED), StartRequested(MODEL, 2, make_plan()), 2.0, LIMITS)
    assert started.stays_s(LIMITS) == LIMITS.keep_alive_s


def test_another_keep_alive_in_the_settings_holds_for_an_idle_runner_from_its_last_use() -> None:
    idle = runner_in(RunnerState.READY, last_used=10.0, deadline=70.0)
    changed, _ = step(idle, KeepAliveChanged(MODEL, 1), 20.0, replace(LIMITS, keep_alive_s=5.0))
    assert changed.deadline == 15.0
    busy, _ = step(runner_in(RunnerState.READY, Child(0.0, serving={"": 1})), KeepAliveChanged(MODEL, 1), 20.0, LIMITS)
    assert busy.deadline is None


def test_a_crash_while_serving_tells_the_holders_and_backs_off() -> None:
    ready = runner_in(RunnerState.READY, Child(0.0, pid=7, url="http://x", serving={"": 2}))
    runner, commands = step(ready, EXAMPLES[ProcessExited], 5.0, LIMITS)
    assert runner.state is RunnerState.BACKOFF
    assert (runner.in_flight, runner.pid, runner.url) == (0, None, None)
    report, lost = commands
    assert isinstance(report, ReportFailure)
    assert not report.while_loading
    assert report.failure.reason == "exit status 1: out of memory"
    assert report.failure.log_tail == ("a", "b")
    assert lost == LoseLeases(MODEL, 1, "exit status 1: out of memory")


def test_pauses_after_crashes_grow_are_capped_and_end_in_failed() -> None:
    """The first retry is immediate: one crash is an accident. Old crashes do not count."""
    limits = replace(LIMITS, max_crashes=7, backoff_cap_s=5.0, crash_window_s=100.0)
    runner, pauses = runner_in(RunnerState.LOADING), []
    for second in range(6):
        runner, _ = step(runner, EXAMPLES[ProcessExited], float(second), limits)
        assert runner.state is RunnerState.BACKOFF
        assert runner.deadline is not None
        pauses.append(runner.deadline - second)
        runner = loading_again(runner)
    assert pauses == [0.0, 1.0, 2.0, 4.0, 5.0, 5.0]
    failed, _ = step(runner, EXAMPLES[ProcessExited], 6.0, limits)
    assert (failed.state, failed.deadline) == (RunnerState.FAILED, 106.0)
    forgiven, _ = step(failed, DeadlinePassed(MODEL, 1), 106.0, limits)
    assert (forgiven.state, forgiven.crashes) == (RunnerState.STOPPED, ())
    later, _ = step(runner, EXAMPLES[ProcessExited], 1000.0, limits)
    assert later.state is RunnerState.BACKOFF


@pytest.mark.parametrize("state", [RunnerState.BACKOFF, RunnerState.FAILED])
def test_a_runner_that_is_forgiven_may_be_tried_at_once_with_a_clean_record(state: RunnerState) -> None:
    runner, _ = step(runner_in(state, crashes=(1.0, 2.0), deadline=90.0), ResetRequested(MODEL, 1), 3.0, LIMITS)
    assert (runner.state, runner.crashes, runner.deadline) == (RunnerState.STOPPED, (), None)


def test_only_a_start_after_a_failure_is_a_restart() -> None:
    runner, _ = step(runner_in(RunnerState.LOADING), EXAMPLES[ProcessExited], 0.0, LIMITS)
    restarts = []
    for generation in (2, 3):
        runner, _ = step(
            replace(runner, state=RunnerState.STOPPED), StartRequested(MODEL, generation, make_plan()), 0.0, LIMITS
        )
        restarts.append(runner.restarts)
    assert restarts == [1, 1], "the second start followed an unload"


def test_a_load_that_ran_out_of_memory_is_tried_again_at_once_with_ever_larger_margins_and_then_given_up() -> None:
    """Each margin is more than what the failed plan left free there, so no plan comes twice."""
    use = PlannedUse("CUDA0", 1000 * MIB, 1000 * MIB, headroom_bytes=30 * MIB)
    plan = replace(make_plan(), uses=(use, PlannedUse("Host", 0, 0)))
    runner, margins = runner_in(RunnerState.LOADING, plan=plan), []
    for second in range(4):
        runner, (report,) = step(runner, OUT_OF_MEMORY, float(second), LIMITS)
        assert (runner.state, runner.deadline, runner.wanted_back) == (RunnerState.BACKOFF, second, True)
        assert isinstance(report, ReportFailure)
        assert report.failure.remedy == runner.remedies[-1]
        margins.append(runner.margins["CUDA0"] // MIB)
        runner = loading_again(runner)
    assert margins == [94, 224, 454, 884]
    assert [step.chosen for step in runner.remedies][-1] == "plan again with 40% more room on CUDA0"
    failed, _ = step(runner, OUT_OF_MEMORY, 4.0, LIMITS)
    assert (failed.state, failed.wanted_back) == (RunnerState.FAILED, False)
    assert failed.last_failure is not None
    assert failed.last_failure.reason == "exit status 1: out of memory on CUDA0: cudaMalloc failed"
    forgiven, _ = step(failed, ResetRequested(MODEL, 1), 5.0, LIMITS)
    assert (forgiven.margins, forgiven.remedies) == ({}, ())


def test_where_nobody_knows_whose_memory_ran_out_there_is_more_room_everywhere() -> None:
    runner, _ = step(runner_in(RunnerState.LOADING), replace(OUT_OF_MEMORY, shortage=Shortage(None)), 0.0, LIMITS)
    assert set(runner.margins) == {"CUDA0", "Host"}


def test_out_of_memory_while_serving_teaches_what_a_runner_takes_there() -> None:
    use = PlannedUse("CUDA0", 1000, 1000, overhead_bytes=512 * MIB)
    serving = runner_in(RunnerState.READY, Child(0.0, url="http://x"), plan=replace(make_plan(), uses=(use,)))
    runner, commands = step(serving, OUT_OF_MEMORY, 5.0, LIMITS)
    assert commands[-1] == Learn(MODEL, "CUDA0", 768 * MIB)
    assert (runner.state, runner.deadline, runner.margins) == (RunnerState.BACKOFF, 5.0, {})


def test_a_child_that_hangs_while_it_loads_is_ended_by_force_and_its_load_failed() -> None:
    stopping, (stop,) = step(runner_in(RunnerState.LOADING), ChildHung(MODEL, 1, "it was stopped"), 5.0, LIMITS)
    assert isinstance(stop, StopProcess)
    assert stop.at_once
    failed, (report,) = step(stopping, ProcessExited(MODEL, 1, "killed by SIGKILL", None, killed=True), 6.0, LIMITS)
    assert isinstance(report, ReportFailure)
    assert (failed.state, report.while_loading) == (RunnerState.BACKOFF, True)


@pytest.mark.parametrize("state", [RunnerState.READY, RunnerState.DRAINING])
def test_a_child_that_hangs_is_ended_by_force_its_clients_told_and_comes_back(state: RunnerState) -> None:
    """Unless it was about to go anyway."""
    reason, deadline = (ASKED, 9.0) if state is RunnerState.DRAINING else (None, None)
    child = Child(0.0, url="http://x", serving={"": 2}, stop_reason=reason)
    busy = runner_in(state, child, deadline=deadline)
    stopping, (stop, lost) = step(busy, ChildHung(MODEL, 1, "no answer to GET /health"), 5.0, LIMITS)
    assert stopping.state is RunnerState.STOPPING
    assert isinstance(stop, StopProcess)
    assert stop.at_once
    assert lost == LoseLeases(MODEL, 1, "it hung: no answer to GET /health")
    failed, (report,) = step(stopping, ProcessExited(MODEL, 1, "killed by SIGKILL", None, killed=True), 6.0, LIMITS)
    assert isinstance(report, ReportFailure)
    assert report.failure.reason == "it hung: no answer to GET /health"
    assert (failed.state, failed.wanted_back) == (RunnerState.BACKOFF, state is RunnerState.READY)


def test_a_busy_runner_drains_until_its_last_request_or_its_deadline() -> None:
    busy = runner_in(RunnerState.READY, Child(0.0, serving={"": 2}))
    draining, commands = step(busy, StopRequested(MODEL, 1, drain_until=9.0), 1.0, LIMITS)
    assert (draining.state, draining.deadline, commands) == (RunnerState.DRAINING, 9.0, ())
    one_left, commands = step(draining, RequestFinished(MODEL, 1), 2.0, LIMITS)
    assert (one_left.state, commands) == (RunnerState.DRAINING, ())
    stopping, commands = step(one_left, RequestFinished(MODEL, 1), 3.0, LIMITS)
    assert (stopping.state, type(commands[0])) == (RunnerState.STOPPING, StopProcess)


@pytest.mark.parametrize(
    "event, said",
    [(DeadlinePassed(MODEL, 1), "10 s of DRAIN_TIMEOUT"), (StopRequested(MODEL, 1, drain_until=None), "at once")],
)
def test_what_is_cut_short_is_told_at_once_and_not_again(event: RunnerEvent, said: str) -> None:
    """The child may take as long as it likes to go."""
    draining = runner_in(RunnerState.DRAINING, Child(0.0, serving={"": 2}), deadline=9.0)
    stopping, commands = step(draining, event, 9.0, LIMITS)
    assert (stopping.state, stopping.in_flight) == (RunnerState.STOPPING, 2)
    stop, lost = commands
    assert isinstance(stop, StopProcess)
    assert isinstance(lost, LoseLeases)
    assert said in lost.story
    stopped, commands = step(stopping, ProcessExited(MODEL, 1, "killed by SIGKILL", None, killed=True), 10.0, LIMITS)
    assert (stopped.state, stopped.in_flight, commands) == (RunnerState.STOPPED, 0, ())


def test_an_idle_runner_stops_without_draining() -> None:
    idle = runner_in(RunnerState.READY)
    stopping, _ = step(idle, StopRequested(MODEL, 1, drain_until=9.0), 1.0, LIMITS)
    assert stopping.state is RunnerState.STOPPING
    stopped, commands = step(stopping, ProcessExited(MODEL, 1, "exit status 0", None), 2.0, LIMITS)
    assert (stopped.state, stopped.last_failure, commands) == (RunnerState.STOPPED, None, ())


def test_a_child_that_comes_too_late_is_stopped() -> None:
    stopping, commands = step(runner_in(RunnerState.STARTING), StopRequested(MODEL, 1), 0.0, LIMITS)
    assert commands == ()
    _, commands = step(stopping, ProcessSpawned(MODEL, 1, 7), 0.0, LIMITS)
    assert [type(command) for command in commands] == [StopProcess]
