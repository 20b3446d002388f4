"""What is promised, held, given back and yielded, device by device."""

from __future__ import annotations

from dataclasses import replace

from making_plans import CUDA0, Bench, make_plan

from supervisor.core import ledger
from supervisor.core.events import BecameReady, PromptCacheChanged, YieldRequested
from supervisor.core.settling import SETTLE_WITHIN_S
from supervisor.core.types import ModelId, PlannedUse

A, B = ModelId("a"), ModelId("b")


def row(bench: Bench, device: str, free_bytes: int | None = 50) -> ledger.Row:
    (found,) = ledger.rows(bench.pool, {device: free_bytes}, bench.now)
    return found


def test_a_byte_is_promised_held_given_back_and_forgotten() -> None:
    bench = Bench()
    bench.arrive(A)
    bench.answer(make_plan())
    assert (row(bench, "CUDA0").held_bytes, row(bench, "CUDA0").promised_bytes) == (10, 10)
    bench.finish_load(A)
    assert (row(bench, "CUDA0").held_bytes, row(bench, "CUDA0").promised_bytes) == (10, 0)
    bench.exit(A)
    assert (row(bench, "CUDA0").held_bytes, row(bench, "CUDA0").settling_bytes) == (0, 10)
    bench.now += SETTLE_WITHIN_S
    assert row(bench, "CUDA0").settling_bytes == 0


def test_a_runner_holds_the_larger_of_what_was_planned_and_what_was_measured_with_the_driver_s_share() -> None:
    """On the host what was planned: mapped files are measured with the rest, and are page cache."""
    bench = Bench()
    uses = (PlannedUse("CUDA0", 10, 10, overhead_bytes=3), PlannedUse("Host", 40, 5))
    bench.arrive(A)
    bench.answer(replace(make_plan(), uses=uses))
    bench.spawn(A)
    assert ledger.held_bytes(bench.pool) == {"CUDA0": 10, "Host": 5}
    bench.post(BecameReady(A, 1, "http://a", {"CUDA0": 9, "Host": 44}))
    assert ledger.held_bytes(bench.pool) == {"CUDA0": 12, "Host": 5}
    assert (row(bench, "CUDA0").difference_bytes, row(bench, "Host").difference_bytes) == (2, 4)


def test_what_was_not_measured_makes_the_difference_unknown_and_not_nothing() -> None:
    bench = Bench()
    bench.bring_up(A)
    assert row(bench, "CUDA0").difference_bytes is None
    assert row(bench, "CUDA1").difference_bytes == 0


def test_yielded_memory_caps_what_our_runners_may_hold_until_its_time_is_over_signed() -> None:
    bench = Bench()
    bench.post(YieldRequested(CUDA0, wanted_bytes=60, free_bytes=50, until=9.0))
    bench.post(YieldRequested(CUDA0, wanted_bytes=20, free_bytes=50, until=20.0))
    assert row(bench, "CUDA0").cap_bytes == -10
    bench.wait(9.0)
    assert row(bench, "CUDA0").cap_bytes == 30
    bench.wait(20.0)
    assert row(bench, "CUDA0", free_bytes=None).cap_bytes is None


def test_what_is_taken_in_use_only_is_held_but_neither_shown_nor_free_once_the_runner_has_loaded() -> None:
    bench = Bench()
    bench.arrive(A)
    bench.answer(replace(make_plan(), uses=(PlannedUse("CUDA0", 10, 10, later_bytes=4),)))
    assert (ledger.later_on(bench.pool, CUDA0), ledger.neighbour(bench.pool, bench.pool.runner(A), 0.0).loading) == (
        0,
        True,
    )
    bench.finish_load(A)
    assert ledger.neighbour(bench.pool, bench.pool.runner(A), 0.0).promised_bytes == {"CUDA0": 4}
    bench.post(YieldRequested(CUDA0, wanted_bytes=20, free_bytes=50, until=9.0))
    assert row(bench, "CUDA0").cap_bytes == 36
    bench.post(YieldRequested(CUDA0, wanted_bytes=8, free_bytes=None, until=9.0))
    assert row(bench, "CUDA0").cap_bytes == 2, "of what nobody knows nothing can be taken off"
    bench.exit(A)
    assert ledger.later_on(bench.pool, CUDA0) == 0


def test_of_a_prompt_cache_what_it_has_taken_already_is_not_promised_to_it_as_well() -> None:
    """The kernel shows that as used; what its runner holds in all is the same."""
    bench = Bench()
    bench.bring_up(A, replace(make_plan(), uses=(PlannedUse("Host", 10, 10, later_bytes=4),)))
    for cached, left in ((3, {"Host": 1}), (9, {}), (0, {"Host": 4})):
        bench.post(PromptCacheChanged(A, 1, cached))
        assert ledger.neighbour(bench.pool, bench.pool.runner(A), 0.0).promised_bytes == left
        assert ledger.held_bytes(bench.pool) == {"Host": 10}


def test_memory_that_a_load_was_promised_counts_when_other_memory_is_yielded() -> None:
    bench = Bench()
    bench.arrive(A)
    bench.answer(make_plan())
    bench.post(YieldRequested(CUDA0, wanted_bytes=20, free_bytes=50, until=9.0))
    assert row(bench, "CUDA0").cap_bytes == 40
