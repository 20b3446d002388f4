"""Admission, loading and going: events in, commands out."""

from __future__ import annotations

import math
from dataclasses import replace

from making_plans import LIMITS, Bench, granted, make_plan, refusals

from planner.types import Shortfall
from supervisor.core import scheduler
from supervisor.core.commands import Grant, LoseLeases, PlanModel, ReadMachine, Reject, Spawn, StopProcess
from supervisor.core.events import (
    Planned,
    ProcessSpawned,
    RequestAbandoned,
    ResetRequested,
    SettingsChanged,
    ShutdownRequested,
    StopRequested,
    TimePassed,
)
from supervisor.core.loglines import Shortage
from supervisor.core.runner import RunnerState
from supervisor.core.settling import SETTLE_WITHIN_S
from supervisor.core.types import DoesNotFit, MakeRoom, ModelId, ModelSettings, PlanProblem, RefusalKind, StopReason

A, B, C = ModelId("a"), ModelId("b"), ModelId("c")
ALONE = replace(LIMITS, max_loaded_models=1)
NO_FIT = DoesNotFit("Does not fit: CUDA0 lacks 5 bytes", (Shortfall("CUDA0", 15, 10),))


def test_a_request_for_a_model_that_is_not_loaded_loads_it_and_is_granted() -> None:
    bench = Bench()
    ticket = bench.arrive(A)
    bench.answer(make_plan())
    assert bench.one(Spawn).model == A
    assert granted(bench.finish_load(A)) == [ticket]
    assert bench.one(Grant).url == "http://a"


def test_a_load_is_joined_and_every_slot_is_used() -> None:
    bench = Bench()
    first = bench.arrive(A)
    question = bench.one(PlanModel)
    second, third = bench.arrive(A), bench.arrive(A)
    assert bench.commands == ()
    bench.post(Planned(A, question.revision, make_plan(n_parallel=2)))
    assert granted(bench.finish_load(A)) == [first, second]
    assert granted(bench.finish(A)) == [third]


def test_a_model_that_is_refused_refuses_everybody_who_waits_for_it() -> None:
    bench = Bench()
    first = bench.arrive(A)
    question = bench.one(PlanModel)
    second = bench.arrive(A)
    bench.post(Planned(A, question.revision, PlanProblem("is no model")))
    assert refusals(bench.commands) == [(first, RefusalKind.BAD_MODEL), (second, RefusalKind.BAD_MODEL)]
    assert bench.pool.loads == {}


def test_what_does_not_fit_on_an_empty_machine_is_refused_for_good() -> None:
    bench = Bench()
    bench.arrive(A)
    bench.answer(NO_FIT)
    refusal = bench.one(Reject).refusal
    assert (refusal.kind, refusal.retry_after_s, refusal.causes) == (RefusalKind.CANNOT_FIT, None, NO_FIT.causes)
    assert refusal.message == "a: Does not fit: CUDA0 lacks 5 bytes"


def test_a_load_goes_on_when_its_client_has_gone() -> None:
    bench = Bench()
    ticket = bench.arrive(A)
    bench.answer(make_plan())
    bench.post(RequestAbandoned(ticket))
    assert granted(bench.finish_load(A)) == []
    assert bench.state(A) is RunnerState.READY


def test_a_plan_for_a_machine_that_has_changed_is_made_again() -> None:
    bench = Bench()
    bench.bring_up(A)
    bench.arrive(B)
    stale = bench.one(PlanModel)
    bench.exit(A)
    fresh = bench.one(PlanModel)
    assert fresh.revision > stale.revision
    assert fresh.neighbours == ()
    assert bench.post(Planned(B, stale.revision, make_plan())) == ()
    bench.post(Planned(B, fresh.revision, make_plan()))
    assert bench.one(Spawn).model == B


def test_a_crash_elsewhere_does_not_disturb_a_load_that_is_launched() -> None:
    bench = Bench()
    bench.bring_up(A)
    bench.arrive(B)
    bench.answer(make_plan())
    bench.exit(A)
    assert [type(command) for command in bench.commands if isinstance(command, PlanModel)] == []
    assert granted(bench.finish_load(B)) == [2]


def test_the_queue_is_bounded_but_a_free_slot_needs_no_queue() -> None:
    bench = Bench(replace(LIMITS, max_queue=1))
    bench.bring_up(A, make_plan(n_parallel=2))
    bench.arrive(B)
    refused = bench.arrive(B)
    assert refusals(bench.commands) == [(refused, RefusalKind.QUEUE_FULL)]
    assert bench.one(Reject).refusal.retry_after_s is not None
    served = bench.arrive(A)
    assert granted(bench.commands) == [served]


def test_a_failed_load_tells_its_waiters_the_last_error_line() -> None:
    bench = Bench()
    ticket = bench.arrive(A)
    bench.answer(make_plan())
    bench.post(ProcessSpawned(A, 1, 100))
    bench.exit(A, "unable to allocate CUDA0 buffer")
    assert refusals(bench.commands) == [(ticket, RefusalKind.LOAD_FAILED)]
    assert bench.one(Reject).refusal.message.endswith("unable to allocate CUDA0 buffer")


def test_a_load_that_was_killed_is_tried_again_once_for_each_who_waits() -> None:
    bench = Bench()
    first = bench.arrive(A)
    bench.answer(make_plan())
    bench.spawn(A)
    bench.exit(A, killed=True)
    assert refusals(bench.commands) == []
    bench.post(TimePassed())
    second = bench.arrive(A)
    bench.answer_to(A, make_plan())
    bench.spawn(A)
    bench.exit(A, killed=True)
    assert refusals(bench.commands) == [(first, RefusalKind.LOAD_FAILED)]
    bench.wait(1.0)
    bench.answer_to(A, make_plan())
    assert granted(bench.finish_load(A)) == [second]


def test_a_load_that_was_killed_while_its_last_client_had_left_is_not_tried_again() -> None:
    bench = Bench()
    bench.post(RequestAbandoned(bench.arrive(A)))
    bench.answer_to(A, make_plan())
    bench.spawn(A)
    bench.exit(A, killed=True)
    bench.wait(60.0)
    assert bench.all(PlanModel) == []


def test_a_stuck_load_that_was_killed_by_us_is_not_tried_again() -> None:
    bench = Bench()
    ticket = bench.arrive(A)
    bench.answer(make_plan())
    bench.spawn(A)
    bench.wait(bench.pool.limits.load_timeout_s)
    assert refusals(bench.commands) == [(ticket, RefusalKind.LOAD_TIMEOUT)]
    bench.exit(A, killed=True)
    bench.wait(60.0)
    assert bench.all(PlanModel) == []


def test_who_waits_for_a_load_that_is_stopped_is_told_so_whatever_failed_before() -> None:
    bench = Bench()
    bench.arrive(A)
    bench.answer(make_plan())
    bench.spawn(A)
    bench.exit(A, "boom")
    bench.wait(1.0)
    ticket = bench.arrive(A)
    bench.answer(make_plan())
    bench.spawn(A)
    bench.post(StopRequested(A, bench.pool.runner(A).generation))
    assert refusals(bench.commands) == [(ticket, RefusalKind.LOAD_FAILED)]
    assert bench.one(Reject).refusal.message.endswith("it was stopped")


def test_a_crashed_runner_comes_back_and_who_waited_is_served_by_the_new_child() -> None:
    bench = Bench()
    bench.bring_up(A)
    ticket = bench.arrive(A)
    bench.exit(A)
    assert scheduler.next_deadline(bench.pool) == 0.0, "the first retry does not wait"
    bench.post(TimePassed())
    bench.answer(make_plan())
    assert bench.one(Spawn).generation == 2
    assert granted(bench.finish_load(A)) == [ticket]


def test_a_model_in_use_that_crashed_is_loaded_again_without_being_asked() -> None:
    bench = Bench()
    bench.bring_up(A)
    bench.exit(A)
    bench.post(TimePassed())
    bench.answer(make_plan())
    assert bench.one(Spawn).model == A


def test_a_model_that_always_crashes_is_refused_at_once_until_its_failures_have_aged() -> None:
    bench = Bench(replace(LIMITS, max_crashes=2))
    for _ in range(2):
        bench.post(TimePassed())
        bench.arrive(A)
        bench.answer(make_plan())
        bench.post(ProcessSpawned(A, bench.pool.runner(A).generation, 100))
        bench.exit(A, "boom")
    assert bench.state(A) is RunnerState.FAILED
    bench.arrive(A)
    refusal = bench.one(Reject).refusal
    assert (refusal.kind, refusal.retry_after_s) == (RefusalKind.LOAD_FAILED, 300.0)
    assert f"planner reset {A}" in refusal.message
    bench.now = 300.0
    bench.post(TimePassed())
    bench.arrive(A)
    assert bench.one(PlanModel).model == A


def test_an_idle_model_is_unloaded_after_keep_alive() -> None:
    bench = Bench()
    bench.bring_up(A)
    bench.finish(A)
    bench.now = 60.0
    bench.post(TimePassed())
    assert str(bench.one(StopProcess).reason) == "idle"


def test_keep_alive_zero_unloads_at_once_but_serves_who_waits_first() -> None:
    bench = Bench(replace(LIMITS, keep_alive_s=0.0))
    bench.bring_up(A)
    second = bench.arrive(A)
    assert granted(bench.finish(A)) == [second]
    bench.finish(A)
    assert scheduler.next_deadline(bench.pool) == bench.now
    bench.post(TimePassed())
    assert bench.one(StopProcess).model == A


def test_shutting_down_refuses_drains_and_hurries_when_asked_twice() -> None:
    bench = Bench()
    bench.bring_up(A)
    waiting = bench.arrive(B)
    bench.post(ShutdownRequested())
    assert refusals(bench.commands) == [(waiting, RefusalKind.SHUTTING_DOWN)]
    assert bench.state(A) is RunnerState.DRAINING
    late = bench.arrive(A)
    assert refusals(bench.commands) == [(late, RefusalKind.SHUTTING_DOWN)]
    bench.post(ShutdownRequested())
    assert bench.one(StopProcess).model == A
    bench.exit(A)
    assert not bench.pool.has_children


def test_a_plan_made_just_after_a_runner_s_exit_is_told_what_it_held() -> None:
    """A driver may still show it; later on nobody waits for that any more."""
    bench = Bench(replace(LIMITS, keep_alive_s=0.0))
    bench.bring_up(A, make_plan())
    bench.finish(A)
    bench.exit(A)
    bench.arrive(B)
    question = bench.one(PlanModel)
    assert (question.neighbours, question.gone) == ((), {"CUDA0": 10, "Host": 0})
    bench.answer(PlanProblem("no"))
    bench.now += SETTLE_WITHIN_S
    bench.arrive(B)
    assert bench.one(PlanModel).gone == {}


def test_the_machine_is_read_again_when_memory_was_taken_or_given_back() -> None:
    """Not where a plan is asked for in the same moment, which reads it anyway."""
    bench = Bench(ALONE)
    bench.bring_up(A, make_plan())
    assert bench.one(ReadMachine) == ReadMachine(A, {})
    bench.finish(A)
    bench.arrive(B)
    bench.answer(MakeRoom(frozenset({A})))
    assert bench.state(A) is RunnerState.STOPPING
    bench.exit(A)
    assert [type(command) for command in bench.commands] == [PlanModel]
    bench.answer(make_plan())
    bench.finish_load(B)
    bench.exit(B)
    assert bench.one(ReadMachine).gone["CUDA0"] == 20, "both have just gone"


def test_a_request_s_keep_alive_is_the_runner_s_from_then_on_and_counts_from_the_end_of_the_last_request() -> None:
    bench = Bench()
    bench.bring_up(A)
    bench.finish(A)
    for keep_alive_s, unloaded_at in ((5.0, 15.0), (None, 15.0), (math.inf, None), (0.0, 10.0)):
        bench.arrive(A, keep_alive_s=keep_alive_s)
        bench.now = 10.0
        bench.finish(A)
        assert scheduler.next_deadline(bench.pool) == unloaded_at


def test_the_settings_of_a_model_say_how_long_it_stays_where_no_request_does() -> None:
    bench = Bench()
    bench.post(SettingsChanged({A: ModelSettings(keep_alive_s=7.0)}))
    bench.load_idle(A)
    assert bench.pool.runner(A).deadline == 7.0
    bench.post(SettingsChanged({A: ModelSettings(keep_alive_s=9.0)}))
    assert bench.pool.runner(A).deadline == 9.0


def test_a_runner_whose_launch_is_another_now_drains_and_comes_back_and_others_are_not_touched() -> None:
    bench = Bench()
    for model in (A, B):
        bench.bring_up(model)
    untouched = bench.pool.runner(B)
    bench.post(SettingsChanged({A: ModelSettings(launch="-c 8192"), B: ModelSettings(priority=1)}))
    assert (bench.state(A), bench.pool.runner(B)) == (RunnerState.DRAINING, untouched)
    waiting = bench.arrive(A)
    bench.finish(A)
    assert str(bench.one(StopProcess).reason) == "its settings have changed; drained"
    bench.exit(A)
    assert bench.one(PlanModel).launch == "-c 8192"
    bench.answer(make_plan())
    assert granted(bench.finish_load(A)) == [waiting]
    assert bench.post(SettingsChanged({A: ModelSettings(launch="-c 8192")})) == ()


def test_settings_that_change_while_a_model_loads_load_it_again_for_those_who_wait() -> None:
    bench = Bench()
    ticket = bench.arrive(A)
    bench.answer(make_plan())
    bench.spawn(A)
    bench.post(SettingsChanged({A: ModelSettings(launch="-c 8192")}))
    assert (bench.state(A), refusals(bench.commands)) == (RunnerState.STOPPING, [])
    bench.exit(A)
    bench.answer(make_plan())
    assert granted(bench.finish_load(A)) == [ticket]


def test_a_model_is_preloaded_without_being_asked_for_and_evicts_nobody() -> None:
    bench = Bench()
    bench.post(SettingsChanged({A: ModelSettings(preload=True)}))
    bench.answer(make_plan())
    bench.finish_load(A)
    assert (bench.state(A), granted(bench.commands)) == (RunnerState.READY, [])
    bench.post(SettingsChanged({A: ModelSettings(preload=True), B: ModelSettings(preload=True)}))
    bench.answer(MakeRoom(frozenset({A})))
    assert (bench.commands, bench.pool.loads) == ((), {})
    assert bench.state(A) is RunnerState.READY


def test_a_load_that_ran_out_of_memory_is_planned_again_with_more_room_while_its_clients_wait() -> None:
    """The fifth time in a row it is given up, with its story."""
    bench = Bench()
    ticket = bench.arrive(A)
    for step in range(5):
        margins = bench.one(PlanModel).margins
        assert ("CUDA0" in margins) == (step > 0)
        bench.answer(make_plan())
        bench.spawn(A)
        bench.exit(A, "cudaMalloc failed", Shortage("CUDA0"))
        assert refusals(bench.commands) == ([] if step < 4 else [(ticket, RefusalKind.LOAD_FAILED)])
        bench.post(TimePassed())
    assert bench.state(A) is RunnerState.FAILED
    assert [one.step for one in bench.pool.runner(A).remedies] == ["out of memory"] * 4


def test_a_model_that_does_not_fit_with_the_room_that_it_needs_has_failed_with_its_story() -> None:
    bench = Bench()
    ticket = bench.arrive(A)
    bench.answer(make_plan())
    bench.spawn(A)
    bench.exit(A, "cudaMalloc failed", Shortage("CUDA0"))
    bench.post(TimePassed())
    bench.answer(NO_FIT)
    assert refusals(bench.commands) == [(ticket, RefusalKind.LOAD_FAILED)]
    assert "out of memory on CUDA0: cudaMalloc failed" in bench.one(Reject).refusal.message
    assert bench.state(A) is RunnerState.FAILED


def test_a_runner_that_failed_for_good_may_be_reset() -> None:
    bench = Bench(replace(LIMITS, max_crashes=1))
    bench.arrive(A)
    bench.answer(make_plan())
    bench.spawn(A)
    bench.exit(A, "boom")
    assert bench.state(A) is RunnerState.FAILED
    bench.post(ResetRequested(A, 1))
    bench.arrive(A)
    assert bench.one(PlanModel).model == A


def test_a_runner_that_is_unloaded_finishes_its_streams_and_then_serves_who_waits_with_another_child() -> None:
    bench = Bench()
    bench.bring_up(A)
    bench.post(StopRequested(A, 1, drain_until=10.0, reason=StopReason("it was unloaded")))
    waiting = bench.arrive(A)
    assert granted(bench.commands) == []
    bench.finish(A)
    bench.exit(A)
    bench.answer(make_plan())
    assert granted(bench.finish_load(A)) == [waiting]


def test_a_drain_that_takes_too_long_is_cut_short_and_says_for_what() -> None:
    bench = Bench()
    bench.bring_up(A)
    bench.post(StopRequested(A, 1, drain_until=10.0, reason=StopReason("it was unloaded")))
    bench.wait(10.0)
    assert bench.one(LoseLeases).story == "it was unloaded, and this did not finish in the 10 s of DRAIN_TIMEOUT"
