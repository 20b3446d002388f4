"""Memory for another program: who goes for it, who finishes first, and what may be loaded meanwhile."""

from __future__ import annotations

import math
from dataclasses import replace

from making_plans import CUDA0, LIMITS, Bench, granted, make_plan, refusals

from supervisor.core import ledger, yielding
from supervisor.core.commands import LoseLeases, PlanModel, Reject, StopProcess
from supervisor.core.events import (
    BecameReady,
    SettingsChanged,
    ShutdownRequested,
    StopRequested,
    YieldEnded,
    YieldRequested,
)
from supervisor.core.runner import RunnerState
from supervisor.core.types import Cap, DoesNotFit, ModelId, ModelSettings, RefusalKind, StopReason

A, B, C = ModelId("a"), ModelId("b"), ModelId("c")
MANY = replace(LIMITS, max_loaded_models=None)
ALL = YieldRequested(CUDA0, wanted_bytes=20, free_bytes=10, until=100.0)  # of which one runner's 10 have to go


def awaited(bench: Bench) -> dict[ModelId, int]:
    return yielding.awaited_bytes(bench.pool, CUDA0, bench.now)


def test_a_runner_in_use_takes_no_new_request_goes_when_it_has_finished_and_is_loaded_below_the_cap_only() -> None:
    bench = Bench(MANY)
    bench.bring_up(A, make_plan(n_parallel=2))
    bench.post(ALL)
    assert (bench.state(A), bench.all(StopProcess), awaited(bench)) == (RunnerState.DRAINING, [], {A: 10})
    late = bench.arrive(A)
    assert granted(bench.commands) == []
    bench.finish(A)
    assert bench.one(StopProcess).model == A
    bench.exit(A)
    assert (awaited(bench), bench.one(PlanModel).caps) == ({}, (Cap(CUDA0, 0),))
    bench.answer(DoesNotFit("Does not fit", never=False, yielded=True))
    assert refusals(bench.commands) == [(late, RefusalKind.CANNOT_FIT)]
    assert bench.one(Reject).refusal.retry_after_s == 100.0


def test_nobody_is_cut_short_for_it_though_its_time_is_over() -> None:
    bench = Bench(MANY)
    bench.bring_up(A)
    bench.post(ALL)
    assert bench.wait(1000.0) == ()
    assert (bench.state(A), bench.pool.runner(A).in_flight) == (RunnerState.DRAINING, 1)


def test_who_is_idle_goes_alone_where_that_is_enough() -> None:
    bench = Bench(MANY)
    bench.bring_up(A)
    bench.load_idle(B)
    bench.post(ALL)
    assert (bench.state(A), bench.state(B), awaited(bench)) == (RunnerState.READY, RunnerState.STOPPING, {})


def test_where_the_idle_are_not_enough_those_in_use_go_as_well() -> None:
    bench = Bench(MANY)
    bench.bring_up(A)
    bench.load_idle(B)
    bench.post(replace(ALL, wanted_bytes=30))
    assert (bench.state(A), bench.state(B), awaited(bench)) == (RunnerState.DRAINING, RunnerState.STOPPING, {A: 10})


def test_a_pinned_runner_stays_and_is_not_waited_for() -> None:
    bench = Bench(MANY)
    bench.post(SettingsChanged({A: ModelSettings(pinned=True)}))
    bench.load_idle(A)
    bench.post(ALL)
    assert (bench.state(A), awaited(bench)) == (RunnerState.READY, {})


def test_one_that_loads_serves_who_waited_for_it_before_it_goes() -> None:
    bench = Bench(MANY)
    first, second = bench.arrive(A), bench.arrive(A)
    bench.answer_to(A, make_plan())
    bench.post(ALL)
    assert (bench.state(A), awaited(bench)) == (RunnerState.STARTING, {A: 10})
    assert granted(bench.finish_load(A)) == [first]
    assert (bench.state(A), awaited(bench)) == (RunnerState.READY, {A: 10})
    assert granted(bench.finish(A)) == [second]
    assert bench.state(A) is RunnerState.DRAINING
    bench.finish(A)
    assert bench.one(StopProcess).reason == StopReason(f"{yielding.FOR_OTHERS}; drained", evicts=True)


def test_what_is_loaded_below_the_cap_and_turns_out_larger_is_not_loaded_over_and_over() -> None:
    bench = Bench(MANY)
    bench.post(ALL)
    bench.now = 1.0
    bench.arrive(A)
    bench.answer(make_plan(on={"CUDA0": 1}))
    bench.spawn(A)
    bench.post(BecameReady(A, 1, "http://a", {"CUDA0": 15}))
    bench.finish(A)
    assert ledger.held_bytes(bench.pool)["CUDA0"] == 15
    assert bench.state(A) is RunnerState.READY


def test_one_that_goes_when_it_has_finished_may_be_hurried() -> None:
    """It had for ever; whoever unloads it, or stops the service, allows less."""
    bench = Bench(MANY)
    for model in (A, B):
        bench.bring_up(model)
    bench.post(replace(ALL, wanted_bytes=30))
    assert [bench.pool.runner(model).deadline for model in (A, B)] == [math.inf, math.inf]
    bench.post(StopRequested(A, 1, drain_until=5.0, reason=StopReason("it was unloaded")))
    assert bench.pool.runner(A).deadline == 5.0
    bench.post(ShutdownRequested())
    assert [bench.pool.runner(model).deadline for model in (A, B)] == [5.0, 10.0]
    bench.wait(5.0)
    assert bench.one(LoseLeases).story.startswith("it was unloaded")


def test_runners_on_any_device_go_for_memory_that_devices_share_and_one_set_of_them_for_all_that_want_some() -> None:
    """As the host's, of which an integrated GPU takes its own: the cheapest that is enough goes, wherever it lies."""
    shared = frozenset({"Host", "Vulkan0"})
    bench = Bench(MANY)
    bench.load_idle(A, make_plan(on={"Vulkan0": 10}, host_bytes=2))
    bench.load_idle(B, make_plan(on={"Vulkan0": 40}))
    bench.load_idle(C, make_plan(on={}, host_bytes=8))
    bench.post(YieldRequested(shared, wanted_bytes=15, free_bytes=5, until=100.0))
    assert [one.model for one in bench.all(StopProcess)] == [A]
    assert ledger.caps(bench.pool, bench.now) == (Cap(shared, 50),)
    assert {row.device: row.cap_bytes for row in ledger.rows(bench.pool, {"Host": 5, "CUDA0": 5}, bench.now)} == {
        "Host": 50,
        "CUDA0": None,
    }


def test_who_has_to_go_for_one_program_is_enough_for_the_next() -> None:
    """One that has to serve first who waited for it: meanwhile nobody else goes in its place."""
    everything = YieldRequested(frozenset({"RPC0", "RPC1", "Host"}), wanted_bytes=20, free_bytes=12, until=100.0)
    for first in ((), (YieldRequested(frozenset({"RPC0"}), wanted_bytes=40, free_bytes=12, until=100.0),)):
        bench = Bench(MANY)
        bench.load_idle(B, make_plan(on={"RPC1": 10}))
        bench.arrive(A)
        bench.answer_to(A, make_plan(on={"RPC0": 30}))
        for event in (*first, everything):
            bench.post(event)
        assert (bench.state(B), set(yielding.awaited_bytes(bench.pool, everything.devices, bench.now))) == (
            (RunnerState.READY, {A}) if first else (RunnerState.STOPPING, set())
        )


def test_memory_that_is_given_back_early_is_planned_with_at_once_and_that_of_other_devices_stays_given() -> None:
    bench = Bench(MANY)
    bench.load_idle(A)
    bench.post(ALL)
    bench.exit(A)
    bench.post(replace(ALL, devices=frozenset({"CUDA1"}), free_bytes=20))
    bench.arrive(A)
    assert {one.devices for one in bench.one(PlanModel).caps} == {CUDA0, frozenset({"CUDA1"})}
    bench.post(YieldEnded(CUDA0))
    assert bench.one(PlanModel).caps == (Cap(frozenset({"CUDA1"}), 0),), "the plan in the making is made again"
    bench.post(YieldEnded(frozenset({"CUDA1", "Host"})))
    assert bench.one(PlanModel).caps == ()


def test_who_goes_for_memory_that_is_given_back_early_still_goes_and_nobody_else_does() -> None:
    bench = Bench(MANY)
    bench.bring_up(A)
    first = bench.arrive(B)
    bench.answer_to(B, make_plan())
    bench.post(replace(ALL, wanted_bytes=1000))
    bench.post(YieldEnded(CUDA0))
    assert granted(bench.finish_load(B)) == [first]
    bench.finish(A)
    bench.finish(B)
    assert (bench.state(A), bench.state(B)) == (RunnerState.STOPPING, RunnerState.READY)


def test_memory_on_another_device_is_left_alone() -> None:
    bench = Bench(MANY)
    bench.load_idle(C, make_plan(on={"CUDA1": 10}))
    bench.post(ALL)
    assert bench.state(C) is RunnerState.READY
