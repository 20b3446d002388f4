"""What follows when memory runs out: Ollama's cases.

It retries once, with all other models evicted or a shorter context. Here the planner is asked again with a larger
margin on the device that ran out, up to four times: it evicts only whom it must, and shortens only what is not pinned.
"""

from __future__ import annotations

from making_plans import Bench, granted, make_plan, refusals
from tiny_machine import ANY

from planner.types import LoadOptions
from supervisor.core.commands import Learn, PlanModel, StopProcess
from supervisor.core.events import TimePassed
from supervisor.core.loglines import Shortage
from supervisor.core.runner import RunnerState
from supervisor.core.types import DoesNotFit, MakeRoom, ModelId, RefusalKind

A, B = ModelId("a"), ModelId("b")
OUT = Shortage("CUDA0")


def run_out(bench: Bench, options: LoadOptions) -> int:
    """Let the first load of A run out of memory; return the ticket that waits for it."""
    ticket = bench.arrive(A, options=options)
    bench.answer(make_plan())
    bench.spawn(A)
    bench.exit(A, "cudaMalloc failed: out of memory", OUT)
    return ticket


def test_a_load_that_ran_out_of_memory_evicts_an_idle_model_only_where_the_planner_says_so() -> None:
    bench = Bench(ANY)
    bench.load_idle(B)
    ticket = run_out(bench, LoadOptions())
    assert (refusals(bench.commands), bench.all(StopProcess)) == ([], [])
    bench.post(TimePassed())
    question = bench.one(PlanModel)
    assert ([one.model for one in question.neighbours], set(question.margins)) == ([B], {"CUDA0"})
    bench.answer(MakeRoom(frozenset({B})))
    assert bench.one(StopProcess).model == B
    bench.exit(B)
    bench.answer(make_plan())
    assert granted(bench.finish_load(A)) == [ticket]


def test_a_first_load_that_ran_out_of_memory_succeeds_with_what_the_planner_gives_up() -> None:
    bench = Bench(ANY)
    ticket = run_out(bench, LoadOptions())
    bench.post(TimePassed())
    bench.answer(make_plan(on={"CUDA0": 6}, serves=LoadOptions(n_ctx=32_768)))
    assert granted(bench.finish_load(A)) == [ticket]
    assert [step.step for step in bench.pool.runner(A).remedies] == ["out of memory"]


def test_one_that_ran_out_of_memory_and_does_not_fit_for_now_only_has_not_failed() -> None:
    bench = Bench(ANY)
    ticket = run_out(bench, LoadOptions())
    bench.post(TimePassed())
    bench.answer(DoesNotFit("Does not fit; b may not go for it", never=False))
    assert refusals(bench.commands) == [(ticket, RefusalKind.CANNOT_FIT)]
    assert bench.state(A) is RunnerState.STOPPED


def test_a_context_that_was_asked_for_is_kept_when_memory_ran_out() -> None:
    bench = Bench(ANY)
    run_out(bench, LoadOptions(n_ctx=262_144))
    bench.post(TimePassed())
    assert bench.one(PlanModel).options == LoadOptions(n_ctx=262_144)


def test_a_load_that_failed_for_another_reason_is_told_at_once_and_evicts_nobody() -> None:
    bench = Bench(ANY)
    bench.load_idle(B)
    ticket = bench.arrive(A)
    bench.answer(make_plan())
    bench.spawn(A)
    bench.exit(A, "unknown model architecture")
    assert refusals(bench.commands) == [(ticket, RefusalKind.LOAD_FAILED)]
    assert bench.post(TimePassed()) == ()
    assert (bench.pool.runner(A).margins, bench.state(B)) == ({}, RunnerState.READY)


def test_memory_that_runs_out_while_serving_ends_one_runner_and_is_learned() -> None:
    """Ollama unloads every model. Here the others go on, and the next load of anything leaves more room there."""
    bench = Bench(ANY)
    bench.bring_up(A)
    bench.bring_up(B)
    bench.exit(A, "cudaMalloc failed: out of memory", OUT)
    assert bench.one(Learn).device == "CUDA0"
    assert (bench.state(A), bench.state(B)) == (RunnerState.BACKOFF, RunnerState.READY)
    assert bench.pool.runner(B).in_flight == 1
