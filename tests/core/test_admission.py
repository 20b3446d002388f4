"""Who may wait, and who is served next."""

from __future__ import annotations

from dataclasses import replace

from making_plans import LIMITS, Bench, granted, make_plan, refusals

from planner.types import LoadOptions
from supervisor.core.commands import PlanModel, Reject, Spawn, StopProcess
from supervisor.core.events import RequestAbandoned, TimePassed
from supervisor.core.runner import RunnerState
from supervisor.core.types import DoesNotFit, ModelId, RefusalKind

A, B = ModelId("a"), ModelId("b")
MANY = replace(LIMITS, max_queue=100)
SHORT, LONG = LoadOptions(n_ctx=2048), LoadOptions(n_ctx=8192)


def test_a_free_slot_goes_to_the_client_that_is_served_least_in_turn_and_then_to_the_oldest_request() -> None:
    bench = Bench(MANY)
    bench.bring_up(A, make_plan(n_parallel=2), client="greedy")
    second = bench.arrive(A, "greedy")
    assert granted(bench.commands) == [second]
    third, fourth = bench.arrive(A, "greedy"), bench.arrive(A, "greedy")
    modest, other = bench.arrive(A, "modest"), bench.arrive(A, "other")
    assert granted(bench.finish(A, "greedy")) == [modest]
    assert granted(bench.finish(A, "greedy")) == [other]
    assert granted(bench.finish(A, "modest")) == [third]
    assert granted(bench.finish(A, "other")) == [fourth]


def test_with_a_single_slot_clients_take_turns_however_many_requests_one_has_waiting() -> None:
    bench = Bench(MANY)
    bench.bring_up(A, client="greedy")
    greedy = [bench.arrive(A, "greedy") for _ in range(3)]
    modest = [bench.arrive(A, "modest") for _ in range(2)]
    order = [granted(bench.finish(A, client))[0] for client in ("greedy", "modest", "greedy", "modest", "greedy")]
    assert order == [modest[0], greedy[0], modest[1], greedy[1], greedy[2]]


def test_what_a_client_is_served_by_other_models_counts_too() -> None:
    bench = Bench(MANY)
    bench.bring_up(A, client="busy elsewhere")
    bench.bring_up(B, client="third")
    bench.arrive(B, "busy elsewhere")
    idle = bench.arrive(B, "idle")
    assert granted(bench.finish(B, "third")) == [idle]


def test_one_client_may_not_fill_the_queue() -> None:
    bench = Bench(replace(MANY, client_queue=2))
    bench.bring_up(A, client="greedy")
    for _ in range(2):
        bench.arrive(A, "greedy")
    refused = bench.arrive(A, "greedy")
    assert refusals(bench.commands) == [(refused, RefusalKind.CLIENT_LIMIT)]
    assert bench.one(Reject).refusal.retry_after_s is not None
    bench.arrive(A, "modest")
    assert refusals(bench.commands) == []


def test_the_queue_to_a_loaded_model_is_bounded_too() -> None:
    bench = Bench(replace(LIMITS, max_queue=2))
    bench.bring_up(A)
    for _ in range(2):
        bench.arrive(A)
    refused = bench.arrive(A)
    assert refusals(bench.commands) == [(refused, RefusalKind.QUEUE_FULL)]


def test_nobody_waits_for_longer_than_queue_timeout_and_is_told_when_to_come_back() -> None:
    """After as long as the model took to load, since that was measured."""
    bench = Bench(replace(LIMITS, queue_timeout_s=100.0))
    bench.arrive(A)
    bench.answer(make_plan())
    bench.now = 20.0
    bench.finish_load(A)
    late = bench.arrive(A)
    bench.now = 119.0
    assert refusals(bench.post(TimePassed())) == []
    bench.now = 120.0
    assert refusals(bench.post(TimePassed())) == [(late, RefusalKind.QUEUE_TIMEOUT)]
    assert bench.one(Reject).refusal.retry_after_s == 20.0


def test_a_client_that_leaves_the_queue_leaves_at_once_and_the_next_is_served() -> None:
    bench = Bench()
    bench.bring_up(A)
    gone, stays = bench.arrive(A), bench.arrive(A)
    bench.post(RequestAbandoned(gone))
    assert granted(bench.finish(A)) == [stays]


def test_a_shorter_context_or_none_is_served_by_the_runner_as_it_is_loaded() -> None:
    bench = Bench()
    bench.arrive(A, options=LONG)
    assert bench.one(PlanModel).options == LONG
    bench.answer(make_plan(n_parallel=3, serves=LONG))
    bench.finish_load(A)
    for options in (SHORT, LoadOptions()):
        ticket = bench.arrive(A, options=options)
        assert granted(bench.commands) == [ticket]


def test_a_longer_context_drains_the_runner_and_loads_it_again() -> None:
    """Under continuous load too: whoever comes later waits behind the request that needs it."""
    bench = Bench()
    bench.bring_up(A, make_plan(n_parallel=2, serves=SHORT))
    longer = bench.arrive(A, options=LONG)
    younger = bench.arrive(A)
    assert granted(bench.commands) == []
    assert bench.pool.loads[A].options == LONG
    bench.answer_to(A, make_plan(n_parallel=2, serves=LONG))
    assert bench.state(A) is RunnerState.DRAINING
    bench.finish(A)
    bench.exit(A)
    bench.answer(make_plan(n_parallel=2, serves=LONG))
    assert bench.one(Spawn).plan.serves == LONG
    assert granted(bench.finish_load(A)) == [longer, younger]


def test_a_longer_context_that_cannot_be_had_is_refused_and_the_runner_stays() -> None:
    bench = Bench()
    bench.bring_up(A, make_plan(serves=SHORT))
    bench.finish(A)
    longer = bench.arrive(A, options=LONG)
    younger = bench.arrive(A)
    bench.answer_to(A, DoesNotFit("Does not fit"))
    assert refusals(bench.commands) == [(longer, RefusalKind.CANNOT_FIT)]
    assert granted(bench.commands) == [younger]
    assert bench.all(StopProcess) == []


def test_a_context_that_is_too_long_for_the_machine_takes_only_those_with_it_who_ask_for_it() -> None:
    bench = Bench()
    longer = bench.arrive(A, options=LONG)
    modest = bench.arrive(A)
    bench.answer_to(A, DoesNotFit("Does not fit"))
    assert refusals(bench.commands) == [(longer, RefusalKind.CANNOT_FIT)]
    assert bench.one(PlanModel).options == LoadOptions()
    bench.answer(make_plan())
    assert granted(bench.finish_load(A)) == [modest]


def test_another_option_than_it_was_loaded_with_loads_it_again_and_no_option_does_not() -> None:
    bench = Bench()
    few_layers, as_loaded = LoadOptions(n_gpu_layers=1), LoadOptions(n_gpu_layers=3, n_batch=512)
    bench.bring_up(A, make_plan(serves=as_loaded))
    bench.finish(A)
    for options in (LoadOptions(), as_loaded, LoadOptions(n_gpu_layers=99)):
        ticket = bench.arrive(A, options=options)
        assert granted(bench.commands) == [ticket]
        bench.finish(A)
    bench.arrive(A, options=few_layers)
    assert bench.one(PlanModel).options == few_layers


def test_a_runner_serves_what_it_was_loaded_for_whatever_came_of_it() -> None:
    """Else a context that llama-server rounded down would be loaded again and again."""
    bench = Bench()
    ticket = bench.arrive(A, options=LONG)
    bench.answer(make_plan(serves=SHORT))
    assert granted(bench.finish_load(A)) == [ticket]
    assert bench.pool.loads == {}
