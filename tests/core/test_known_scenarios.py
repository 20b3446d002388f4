"""What Ollama's scheduler is tested for, and what it was found to lack, with a planner that counts bytes.

The sizes are those of ``tiny_machine``: two cards of 24, a host of 64; model a takes 10, b 14, c 20, d 30, f too much.
"""

from __future__ import annotations

from dataclasses import replace

from making_plans import LIMITS, Bench, granted, refusals
from tiny_machine import BROKEN, answer

from supervisor.api import LoadOptions
from supervisor.core import ledger
from supervisor.core.commands import Command, PlanModel, Reject, Spawn, StopProcess
from supervisor.core.events import (
    ChildHung,
    Event,
    Planned,
    RequestAbandoned,
    RequestFinished,
    ShutdownRequested,
    SpawnFailed,
    TimePassed,
)
from supervisor.core.pool import Pool
from supervisor.core.runner import RunnerState
from supervisor.core.types import ModelId, RefusalKind

A, B, C, D, F = map(ModelId, "abcdf")
ANY = replace(LIMITS, max_loaded_models=None, max_queue=100)


class Shop(Bench):
    """A bench whose planner answers by itself."""

    def __init__(self, n_parallel: int = 1) -> None:
        super().__init__(ANY)
        self.n_parallel = n_parallel
        self.questions: list[PlanModel] = []

    def post(self, event: Event) -> tuple[Command, ...]:
        commands = super().post(event)
        self.questions += self.all(PlanModel)
        return commands

    def plan(self) -> None:
        """Answer every question there is."""
        while self.questions:
            question = self.questions.pop(0)
            self.post(Planned(question.model, question.revision, answer(question, self.n_parallel)))

    def load(self, model: ModelId, *, busy: bool = False) -> None:
        self.arrive(model)
        self.plan()
        self.finish_load(model)
        if not busy:
            self.finish(model)

    def loaded(self) -> set[ModelId]:
        return {one.model for one in self.pool.runners.values() if one.state is RunnerState.READY}


def test_a_pool_that_nobody_asked_for_anything_has_nothing_to_do_and_stops_at_once() -> None:
    bench = Shop()
    assert bench.post(TimePassed()) == ()
    assert bench.post(ShutdownRequested()) == ()
    assert bench.pool == replace(Pool(ANY), draining=True)


def test_a_child_that_cannot_be_made_is_told_to_its_clients_and_nothing_is_loaded() -> None:
    bench = Shop()
    ticket = bench.arrive(A)
    bench.plan()
    bench.post(SpawnFailed(A, 1, "cannot start /llama-server: No such file"))
    assert refusals(bench.commands) == [(ticket, RefusalKind.LOAD_FAILED)]
    assert ledger.held_bytes(bench.pool) == {}


def test_a_file_that_is_broken_is_told_by_name() -> None:
    bench = Shop()
    bench.arrive(BROKEN)
    bench.plan()
    assert bench.one(Reject).refusal.message == "g: it is broken"


def test_small_models_fit_beside_each_other_and_the_sums_are_per_device() -> None:
    """The second goes where more is free; the fourth fits beside all, over both cards."""
    bench = Shop()
    for model in (C, A, B):
        bench.load(model)
    assert bench.loaded() == {A, B, C}
    assert ledger.held_bytes(bench.pool) == {"CUDA0": 20, "CUDA1": 24, "Host": 0}


def test_what_needs_more_evicts_the_idle_first_and_waits_for_the_busy_only_if_it_must() -> None:
    """D takes 30 of 48: with B in use and C idle, C's going is enough."""
    bench = Shop()
    bench.load(B, busy=True)
    bench.load(C)
    bench.arrive(D)
    bench.plan()
    assert [command.model for command in bench.all(StopProcess)] == [C]
    bench.exit(C)
    bench.plan()
    assert granted(bench.finish_load(D)) == [3]
    assert bench.loaded() == {B, D}


def test_where_all_are_busy_it_waits_until_the_first_that_is_enough_falls_idle() -> None:
    bench = Shop()
    bench.load(B, busy=True)
    bench.load(C, busy=True)
    bench.arrive(D)
    bench.plan()
    assert bench.all(StopProcess) == []
    bench.finish(C)
    bench.plan()
    assert [command.model for command in bench.all(StopProcess)] == [C]
    assert bench.state(B) is RunnerState.READY


def test_a_model_that_can_never_fit_is_refused_at_once_and_evicts_nobody() -> None:
    bench = Shop()
    bench.load(B)
    bench.load(C, busy=True)
    ticket = bench.arrive(F)
    bench.plan()
    assert refusals(bench.commands) == [(ticket, RefusalKind.CANNOT_FIT)]
    assert bench.one(Reject).refusal.retry_after_s is None
    assert bench.loaded() == {B, C}


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


def test_a_longer_context_comes_under_continuous_load_too() -> None:
    """Requests for the shorter one never cease, and do not starve it."""
    bench = Shop(n_parallel=2)
    bench.load(A, busy=True)
    bench.arrive(A)
    longer = bench.arrive(A, options=LoadOptions(n_ctx=8192))
    for _ in range(10):
        bench.plan()
        bench.arrive(A)
        assert granted(bench.commands) == []
    bench.finish(A)
    bench.finish(A)
    bench.exit(A)
    bench.plan()
    assert bench.one(Spawn).plan.serves.n_ctx == 8192
    assert longer in granted(bench.finish_load(A))


def test_a_child_that_hangs_or_dies_after_it_was_loaded_is_replaced_without_being_asked() -> None:
    bench = Shop()
    bench.load(A, busy=True)
    bench.post(ChildHung(A, 1, "no answer to GET /health"))
    bench.exit(A)
    bench.post(TimePassed())
    bench.plan()
    assert bench.one(Spawn).generation == 2
    bench.finish_load(A)
    bench.exit(A)
    bench.wait(1.0)
    bench.plan()
    assert bench.one(Spawn).generation == 3


def test_a_lease_that_comes_back_late_or_twice_harms_nobody() -> None:
    """It speaks of a child that is gone."""
    bench = Shop()
    bench.load(A, busy=True)
    bench.exit(A)
    bench.post(RequestFinished(A, 1))
    bench.post(TimePassed())
    bench.plan()
    bench.finish_load(A)
    bench.post(RequestFinished(A, 1))
    assert bench.pool.runner(A).in_flight == 0


def test_a_client_that_left_before_its_model_was_planned_for_gets_no_answer_and_no_room() -> None:
    bench = Shop()
    bench.load(C)
    bench.load(B)
    ticket = bench.arrive(D)
    bench.post(RequestAbandoned(ticket))
    bench.plan()
    assert bench.commands == ()
    assert bench.loaded() == {B, C}


def test_shutting_down_stops_every_runner() -> None:
    bench = Shop()
    for model in (A, B):
        bench.load(model)
    bench.post(ShutdownRequested())
    assert {command.model for command in bench.all(StopProcess)} == {A, B}
