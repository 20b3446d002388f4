"""Devices that are called otherwise: what is held, yielded and to be left free follows them."""

from __future__ import annotations

from dataclasses import replace

from making_plans import LIMITS, Bench, granted, make_plan

from supervisor.core import ledger
from supervisor.core.commands import Learn, PlanModel, StopProcess
from supervisor.core.events import BecameReady, DevicesRenamed, TimePassed, YieldEnded, YieldRequested
from supervisor.core.loglines import Shortage
from supervisor.core.runner import RunnerState
from supervisor.core.types import Cap, ModelId

A, B = ModelId("a"), ModelId("b")
MANY = replace(LIMITS, max_loaded_models=None)
ON_SECOND = make_plan(on={"RPC1": 10})
FIRST_DIED = DevicesRenamed({"RPC0": "RPC[first]", "RPC1": "RPC0"})
FIRST_IS_BACK = DevicesRenamed({"RPC[first]": "RPC0", "RPC0": "RPC1"})


def test_what_is_held_and_what_was_given_back_follows_the_device() -> None:
    bench = Bench(MANY)
    bench.load_idle(A, ON_SECOND)
    bench.post(FIRST_DIED)
    assert ledger.held_bytes(bench.pool) == {"RPC0": 10, "Host": 0}
    bench.exit(A)
    bench.post(FIRST_IS_BACK)
    assert ledger.gone_bytes(bench.pool, bench.now) == {"RPC1": 10, "Host": 0}


def test_memory_that_was_yielded_stays_so_on_the_device_and_is_not_so_on_the_one_that_has_its_name_then() -> None:
    bench = Bench(MANY)
    bench.load_idle(A, ON_SECOND)
    bench.load_idle(B, make_plan(on={"RPC2": 10}))
    bench.post(YieldRequested(frozenset({"RPC1"}), wanted_bytes=5, free_bytes=5, until=100.0))
    bench.post(DevicesRenamed({"RPC1": "RPC0", "RPC2": "RPC1"}))
    assert ledger.caps(bench.pool, bench.now) == (Cap(frozenset({"RPC0"}), 10),)
    bench.post(YieldRequested(frozenset({"RPC0"}), wanted_bytes=10, free_bytes=5, until=100.0))
    assert [one.model for one in bench.all(StopProcess)] == [A]
    bench.post(YieldEnded(frozenset({"RPC0"})))
    assert ledger.caps(bench.pool, bench.now) == ()


def test_a_device_that_is_gone_keeps_its_cap_until_it_is_back() -> None:
    bench = Bench(MANY)
    bench.post(YieldRequested(frozenset({"RPC0"}), wanted_bytes=5, free_bytes=5, until=100.0))
    for event, device in ((FIRST_DIED, "RPC[first]"), (FIRST_IS_BACK, "RPC0")):
        bench.post(event)
        assert [one.devices for one in ledger.caps(bench.pool, bench.now)] == [frozenset({device})]


def test_a_plan_that_is_being_made_meanwhile_is_made_again_with_the_new_names() -> None:
    bench = Bench(MANY)
    bench.post(YieldRequested(frozenset({"RPC1"}), wanted_bytes=5, free_bytes=5, until=100.0))
    ticket = bench.arrive(A)
    before = bench.one(PlanModel)
    bench.post(FIRST_DIED)
    again = bench.one(PlanModel)
    assert again.caps == (Cap(frozenset({"RPC0"}), 0),)
    assert again.revision > before.revision
    bench.answer(make_plan(on={"RPC1": 10}))
    assert granted(bench.finish_load(A)) == [ticket]


def test_what_has_to_be_left_free_since_memory_ran_out_is_left_free_on_the_same_device() -> None:
    bench = Bench(MANY)
    bench.arrive(A)
    bench.answer(ON_SECOND)
    bench.spawn(A)
    bench.exit(A, "out of memory", Shortage("RPC1"))
    bench.post(FIRST_DIED)
    bench.post(TimePassed())
    assert set(bench.one(PlanModel).margins) == {"RPC0"}


def test_what_a_child_says_of_a_device_by_its_name_of_before_is_taken_for_the_same_device() -> None:
    bench = Bench(MANY)
    bench.arrive(A)
    bench.answer(make_plan(on={"CUDA0": 10, "CUDA1": 10}))
    bench.spawn(A)
    bench.post(DevicesRenamed({"CUDA0": "GPU-gone#0", "CUDA1": "CUDA0"}))
    bench.post(BecameReady(A, 1, "http://a", {"CUDA0": 11, "CUDA1": 12}))
    assert bench.state(A) is RunnerState.READY
    assert ledger.held_bytes(bench.pool) == {"GPU-gone#0": 11, "CUDA0": 12, "Host": 0}
    bench.post(DevicesRenamed({"CUDA0": "CUDA3"}))
    bench.exit(A, "out of memory", Shortage("CUDA1"))
    assert bench.one(Learn).device == "CUDA3"
    failure = bench.pool.runner(A).last_failure
    assert failure is not None
    assert "out of memory on CUDA3" in failure.reason
