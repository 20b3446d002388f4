"""What Ollama's scheduler is tested for, and what it was found to lack, with a planner that counts bytes.

Where this scheduler does something else on purpose, the test says what and why. What forces a load anew, and what
follows from a lack of memory, is in ``test_known_reloads`` and ``test_known_shortages``.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from making_plans import Bench, granted, make_plan, refusals
from tiny_machine import ANY, BROKEN, Shop

from planner.types import LoadOptions
from supervisor.core import ledger
from supervisor.core.commands import PlanModel, Reject, Spawn, StopProcess
from supervisor.core.events import (
    BecameReady,
    ChildHung,
    RequestAbandoned,
    RequestFinished,
    ShutdownRequested,
    SpawnFailed,
    StopRequested,
    TimePassed,
)
from supervisor.core.pool import Pool
from supervisor.core.runner import RunnerState
from supervisor.core.types import ModelId, RefusalKind

A, B, C, D, F, S = map(ModelId, "abcdfs")
ON_THE_HOST = LoadOptions(n_gpu_layers=0)


def stopped(bench: Bench) -> set[ModelId]:
    return {command.model for command in bench.all(StopProcess)}


# ---------------------------------------------------------------------------------------------------------------------
# One model


def test_a_pool_that_nobody_asked_for_anything_has_nothing_to_do_and_stops_at_once() -> None:
    bench = Shop()
    assert bench.post(TimePassed()) == ()
    assert bench.post(ShutdownRequested()) == ()
    assert bench.pool == replace(Pool(ANY), draining=True)


def test_a_load_that_works_is_in_use_by_its_client_and_holds_what_was_measured() -> None:
    bench = Shop()
    ticket = bench.arrive(A)
    bench.plan()
    bench.spawn(A)
    assert ledger.held_bytes(bench.pool) == {"CUDA0": 10, "Host": 0}
    assert granted(bench.post(BecameReady(A, 1, "http://a", {"CUDA0": 11}))) == [ticket]
    assert (bench.state(A), bench.pool.runner(A).in_flight) == (RunnerState.READY, 1)
    assert ledger.held_bytes(bench.pool) == {"CUDA0": 11, "Host": 0}


def test_a_child_that_cannot_be_made_is_told_to_its_clients_and_nothing_is_loaded() -> None:
    """Ollama adds that the model may be incompatible; here they read what was wrong, in the words of whoever knows."""
    bench = Shop()
    ticket = bench.arrive(A)
    bench.plan()
    bench.post(SpawnFailed(A, 1, "cannot start /llama-server: No such file"))
    assert refusals(bench.commands) == [(ticket, RefusalKind.LOAD_FAILED)]
    assert bench.one(Reject).refusal.message.endswith("cannot start /llama-server: No such file")
    assert ledger.held_bytes(bench.pool) == {}
    assert bench.loaded() == set()


def test_a_child_that_never_becomes_ready_is_told_to_its_clients_and_gives_all_back_and_the_next_request_tries() -> (
    None
):
    bench = Shop()
    ticket = bench.arrive(A)
    bench.plan()
    bench.spawn(A)
    bench.exit(A, "error loading model")
    assert refusals(bench.commands) == [(ticket, RefusalKind.LOAD_FAILED)]
    assert (bench.pool.runner(A).in_flight, ledger.held_bytes(bench.pool), bench.loaded()) == (0, {}, set())
    bench.post(TimePassed())
    assert bench.questions == [], "nobody asks for it any more"
    bench.load(A)
    assert bench.loaded() == {A}


def test_a_file_that_is_broken_is_told_by_name() -> None:
    bench = Shop()
    ticket = bench.arrive(BROKEN)
    bench.plan()
    assert refusals(bench.commands) == [(ticket, RefusalKind.BAD_MODEL)]
    assert bench.one(Reject).refusal.message == "g: it is broken"


def test_a_model_in_use_is_not_unloaded_however_long_that_takes_and_one_that_is_idle_for_long_is() -> None:
    bench = Shop()
    bench.load(A, busy=True)
    assert bench.wait(1000.0) == ()
    bench.finish(A)
    assert bench.wait(59.0) == ()
    bench.wait(1.0)
    assert str(bench.one(StopProcess).reason) == "idle"
    bench.exit(A)
    assert ledger.held_bytes(bench.pool) == {}


def test_a_model_that_is_unloaded_while_in_use_goes_when_its_client_has_left() -> None:
    bench = Shop()
    bench.load(A, busy=True)
    bench.post(StopRequested(A, 1, drain_until=1000.0))
    assert bench.all(StopProcess) == []
    bench.finish(A)
    assert bench.one(StopProcess).model == A


def test_a_lease_that_comes_back_late_or_twice_harms_nobody() -> None:
    """It speaks of a child that is gone, or of a model that was never loaded."""
    bench = Shop()
    bench.load(A, busy=True)
    bench.exit(A)
    bench.post(RequestFinished(A, 1))
    bench.post(RequestFinished(B, 1))
    bench.post(TimePassed())
    bench.plan()
    bench.finish_load(A)
    bench.arrive(A)
    bench.post(RequestFinished(A, 1))
    assert bench.pool.runner(A).in_flight == 1


# ---------------------------------------------------------------------------------------------------------------------
# Several models


def test_small_models_fit_beside_each_other_and_the_sums_are_per_device() -> None:
    """The second goes where more is free."""
    bench = Shop()
    for model in (C, A, B):
        bench.load(model)
    assert bench.loaded() == {A, B, C}
    assert ledger.held_bytes(bench.pool) == {"CUDA0": 20, "CUDA1": 24, "Host": 0}


def test_what_two_runners_hold_on_two_cards_is_taken_off_each_card_for_the_next() -> None:
    bench = Bench(ANY)
    bench.load_idle(A, make_plan(on={"CUDA0": 5, "CUDA1": 7}))
    bench.load_idle(B, make_plan(on={"CUDA0": 3, "CUDA1": 11}))
    bench.arrive(C)
    question = bench.one(PlanModel)
    assert question.held_bytes() == {"CUDA0": 8, "CUDA1": 18, "Host": 0}
    assert question.held_bytes(loading=True) == {}


def test_models_come_beside_each_other_until_one_needs_the_memory_of_others_which_go_once_all_are_idle() -> None:
    """A and B lie on the cards, C on the host as it was asked to; D takes 44 of 48.

    Ollama evicts A, which is idle, at once. Here it stays until B may go too: should B never end, nothing was lost.
    """
    bench = Shop()
    bench.load(A)
    bench.load(B, busy=True)
    bench.load(C, options=ON_THE_HOST)
    assert ledger.held_bytes(bench.pool) == {"CUDA0": 10, "CUDA1": 14, "Host": 20}
    ticket = bench.arrive(D, options=LoadOptions(n_ctx=15 * 4096))
    bench.plan()
    assert (stopped(bench), bench.loaded()) == (set(), {A, B, C})
    bench.finish(B)
    assert stopped(bench) == {A, B}
    bench.exit(A)
    assert bench.questions == [], "B's memory is not back yet"
    bench.exit(B)
    bench.plan()
    assert granted(bench.finish_load(D)) == [ticket]
    assert bench.loaded() == {C, D}


def test_what_needs_more_evicts_the_idle_first_and_waits_for_the_busy_only_if_it_must() -> None:
    """D takes 30 of 48: with B in use and C idle, C's going is enough."""
    bench = Shop()
    bench.load(B, busy=True)
    bench.load(C)
    bench.arrive(D)
    bench.plan()
    assert stopped(bench) == {C}
    bench.exit(C)
    bench.plan()
    assert granted(bench.finish_load(D)) == [3]
    assert bench.loaded() == {B, D}


@pytest.mark.parametrize("first, other", [(A, B), (B, A)])
def test_where_all_are_busy_it_waits_until_the_first_that_is_enough_falls_idle(first: ModelId, other: ModelId) -> None:
    """Either holds 22 of a card's 24. Ollama waits for that of the shorter keep-alive, whichever falls idle first."""
    bench = Shop()
    bench.load(A, busy=True, options=LoadOptions(n_ctx=13 * 4096))
    bench.load(B, busy=True, options=LoadOptions(n_ctx=9 * 4096))
    bench.arrive(C)
    bench.plan()
    assert stopped(bench) == set()
    bench.finish(first)
    bench.plan()
    assert stopped(bench) == {first}
    assert bench.state(other) is RunnerState.READY


def test_a_few_layers_that_were_asked_for_evict_nobody_though_more_would_fit_without_the_others() -> None:
    bench = Shop()
    bench.load(C)
    bench.load(B)
    bench.arrive(D, options=LoadOptions(n_gpu_layers=4))
    bench.plan()
    assert bench.one(Spawn).plan.taken_bytes() == {"CUDA1": 4, "Host": 26}
    assert bench.loaded() == {B, C}


@pytest.mark.parametrize("n_ctx, goes", [(4096, set()), (8 * 4096, {B})])
def test_the_context_counts_before_anything_is_started(n_ctx: int, goes: set[ModelId]) -> None:
    """C fits beside B; with the longer context, which takes 7 more, it does not."""
    bench = Shop()
    bench.load(B)
    bench.load(A)
    bench.arrive(C, options=LoadOptions(n_ctx=n_ctx))
    bench.plan()
    assert (stopped(bench), bool(bench.all(Spawn))) == (goes, not goes)


@pytest.mark.parametrize("loads, taken", [(False, "CUDA1"), (True, "CUDA0")])
def test_a_card_on_which_something_loads_is_left_alone_where_another_will_do(*, loads: bool, taken: str) -> None:
    """CUDA1 has more free than CUDA0, as far as it is known."""
    bench = Shop()
    bench.load(B)
    bench.arrive(A)
    bench.plan()
    if not loads:
        bench.finish_load(A)
    bench.arrive(S)
    bench.plan()
    assert bench.one(Spawn).plan.taken_bytes()[taken] == 5


def test_a_model_that_can_never_fit_is_refused_at_once_and_evicts_nobody() -> None:
    bench = Shop()
    bench.load(B)
    bench.load(C, busy=True)
    ticket = bench.arrive(F)
    bench.plan()
    assert refusals(bench.commands) == [(ticket, RefusalKind.CANNOT_FIT)]
    assert bench.one(Reject).refusal.retry_after_s is None
    assert (stopped(bench), bench.loaded()) == (set(), {B, C})


def test_two_models_that_do_not_fit_together_take_turns_and_serve_whoever_waits_each_time() -> None:
    bench = Shop(n_parallel=3)
    served: list[int] = []
    for _ in range(4):
        for model in (C, D):
            bench.arrive(model)
    for _ in range(5):
        bench.plan()
        for leaving in bench.pool.leaving:
            bench.exit(leaving.model)
        bench.plan()
        for loading in bench.pool.loading:
            served += granted(bench.finish_load(loading.model))
            while bench.pool.runner(loading.model).serving:
                served += granted(bench.finish(loading.model))
    assert sorted(served) == list(range(1, 9))
    assert [bench.pool.runner(model).generation for model in (C, D)] == [1, 1]


# ---------------------------------------------------------------------------------------------------------------------
# Who goes meanwhile, and who leaves


def test_a_victim_that_is_asked_for_again_is_not_kept_by_that() -> None:
    """Else the load that waits for it waits for ever, while everything else looks well."""
    bench = Shop()
    bench.load(C)
    bench.load(B)
    ticket = bench.arrive(D)
    bench.plan()
    (victim,) = stopped(bench)
    late = bench.arrive(victim, keep_alive_s=3600.0)
    assert granted(bench.commands) == []
    bench.exit(victim)
    bench.plan()
    assert granted(bench.finish_load(D)) == [ticket]
    assert [waiting.id for waiting in bench.pool.waiting] == [late]


def test_a_loaded_model_is_served_while_another_loads_and_while_a_third_waits_for_room() -> None:
    """The host has room for S; B loads, and D needs the whole of both cards."""
    bench = Shop(n_parallel=2)
    bench.load(A, busy=True)
    bench.load(S, options=ON_THE_HOST)
    bench.arrive(B)
    bench.plan()
    first = bench.arrive(S)
    assert granted(bench.commands) == [first]
    bench.finish_load(B)
    bench.arrive(D, options=LoadOptions(n_ctx=15 * 4096))
    bench.plan()
    assert bench.pool.loads[D].victims == {A, B}
    second = bench.arrive(S)
    assert granted(bench.commands) == [second]


def test_whoever_unloads_what_was_never_loaded_changes_nothing() -> None:
    bench = Shop()
    assert bench.post(StopRequested(A, 0)) == ()
    assert bench.loaded() == set()


def test_a_child_that_dies_after_it_was_loaded_is_missed_at_once_and_replaced_without_being_asked() -> None:
    bench = Shop()
    bench.load(A, busy=True)
    waiting = bench.arrive(A)
    bench.exit(A)
    assert (bench.loaded(), ledger.held_bytes(bench.pool)) == (set(), {})
    bench.post(TimePassed())
    bench.plan()
    assert bench.one(Spawn).generation == 2
    assert granted(bench.finish_load(A)) == [waiting]


def test_a_child_that_does_not_answer_any_more_is_ended_and_replaced() -> None:
    bench = Shop()
    bench.load(A, busy=True)
    bench.post(ChildHung(A, 1, "no answer to GET /health"))
    assert bench.one(StopProcess).at_once
    waiting = bench.arrive(A)
    assert granted(bench.commands) == []
    bench.exit(A)
    bench.post(TimePassed())
    bench.plan()
    assert granted(bench.finish_load(A)) == [waiting]
    assert bench.pool.runner(A).generation == 2


def test_a_client_that_leaves_before_its_model_was_planned_for_gets_no_answer_and_no_room() -> None:
    bench = Shop()
    bench.load(C)
    bench.load(B)
    ticket = bench.arrive(D)
    bench.post(RequestAbandoned(ticket))
    bench.plan()
    assert bench.commands == ()
    assert bench.loaded() == {B, C}


def test_a_client_that_leaves_the_queue_makes_place_for_another_at_once() -> None:
    bench = Bench(replace(ANY, max_queue=1))
    bench.bring_up(A)
    gone = bench.arrive(A)
    refused = bench.arrive(A)
    assert refusals(bench.commands) == [(refused, RefusalKind.QUEUE_FULL)]
    assert "MAX_QUEUE" in bench.one(Reject).refusal.message
    assert bench.post(RequestAbandoned(gone)) == ()
    next_one = bench.arrive(A)
    assert refusals(bench.commands) == []
    assert granted(bench.finish(A)) == [next_one]


def test_shutting_down_stops_every_runner() -> None:
    bench = Shop()
    for model in (A, B):
        bench.load(model)
    bench.post(ShutdownRequested())
    assert stopped(bench) == {A, B}
    for model in (A, B):
        bench.exit(model)
    assert not bench.pool.has_children
