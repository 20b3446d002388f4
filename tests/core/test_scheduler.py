"""Admission, loading and making room: events in, commands out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

import pytest
from making_plans import make_plan

from planner.types import Shortfall
from supervisor.core import scheduler
from supervisor.core.commands import Command, Grant, PlanModel, ReadMachine, Reject, Spawn, StopProcess
from supervisor.core.events import (
    BecameReady,
    Event,
    Planned,
    ProcessExited,
    ProcessSpawned,
    RequestAbandoned,
    RequestArrived,
    RequestFinished,
    ShutdownRequested,
    TimePassed,
)
from supervisor.core.invariants import violations
from supervisor.core.pool import Pool
from supervisor.core.runner import RunnerState
from supervisor.core.settling import SETTLE_WITHIN_S
from supervisor.core.types import DoesNotFit, Limits, LoadPlan, ModelId, PlanProblem, RefusalKind, TicketId

T = TypeVar("T")
A, B, C = ModelId("a"), ModelId("b"), ModelId("c")
LIMITS = Limits(max_loaded_models=2, max_queue=4, keep_alive_s=60.0, load_timeout_s=30.0, drain_timeout_s=10.0)
NO_FIT = DoesNotFit("Does not fit: CUDA0 lacks 5 bytes", (Shortfall("CUDA0", 15, 10),))


class Bench:
    """A pool and the commands that its last event caused; invariants are checked after every step."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        self.pool = Pool(limits)
        self.now = 0.0
        self.commands: tuple[Command, ...] = ()
        self._ticket = 0

    def post(self, event: Event) -> tuple[Command, ...]:
        self.pool, self.commands = scheduler.step(self.pool, event, self.now)
        assert violations(self.pool) == []
        return self.commands

    def arrive(self, model: ModelId) -> TicketId:
        self._ticket += 1
        self.post(RequestArrived(TicketId(self._ticket), model))
        return TicketId(self._ticket)

    def answer(self, outcome: LoadPlan | DoesNotFit | PlanProblem) -> tuple[Command, ...]:
        """Answer the question to the planner that the last commands contain."""
        question = self.one(PlanModel)
        return self.post(Planned(question.model, question.revision, outcome))

    def bring_up(self, model: ModelId, plan: LoadPlan | None = None) -> TicketId:
        """Load a model for one request and grant it."""
        ticket = self.arrive(model)
        self.answer(plan or make_plan())
        self.finish_load(model)
        return ticket

    def finish_load(self, model: ModelId) -> tuple[Command, ...]:
        generation = self.pool.runner(model).generation
        self.post(ProcessSpawned(model, generation, 100))
        return self.post(BecameReady(model, generation, f"http://{model}"))

    def finish(self, model: ModelId) -> tuple[Command, ...]:
        return self.post(RequestFinished(model, self.pool.runner(model).generation))

    def exit(self, model: ModelId, last_error: str | None = None) -> tuple[Command, ...]:
        return self.post(ProcessExited(model, self.pool.runner(model).generation, "exit status 1", last_error))

    def one(self, kind: type[T]) -> T:
        """Return the only command of this kind among the last ones."""
        found = [command for command in self.commands if isinstance(command, kind)]
        assert len(found) == 1, self.commands
        return found[0]

    def state(self, model: ModelId) -> RunnerState:
        return self.pool.runner(model).state


def granted(commands: Iterable[Command]) -> list[int]:
    return [command.ticket for command in commands if isinstance(command, Grant)]


def refusals(commands: Iterable[Command]) -> list[tuple[int, RefusalKind]]:
    return [(command.ticket, command.refusal.kind) for command in commands if isinstance(command, Reject)]


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


def test_one_load_at_a_time() -> None:
    """Two loads that each see the same free bytes would both take them."""
    bench = Bench()
    bench.arrive(A)
    bench.answer(make_plan())
    bench.arrive(B)
    assert bench.commands == ()
    bench.finish_load(A)
    assert bench.one(PlanModel).model == B
    assert bench.one(PlanModel).held == {"CUDA0": 10, "Host": 0}


def test_a_model_that_is_refused_refuses_everybody_who_waits_for_it() -> None:
    bench = Bench()
    first = bench.arrive(A)
    question = bench.one(PlanModel)
    second = bench.arrive(A)
    bench.post(Planned(A, question.revision, PlanProblem("is no model")))
    assert refusals(bench.commands) == [(first, RefusalKind.BAD_MODEL), (second, RefusalKind.BAD_MODEL)]
    assert bench.pool.load is None


def test_what_does_not_fit_on_an_empty_machine_is_refused_for_good() -> None:
    bench = Bench()
    bench.arrive(A)
    bench.answer(NO_FIT)
    refusal = bench.one(Reject).refusal
    assert (refusal.kind, refusal.retry_after_s, refusal.causes) == (RefusalKind.CANNOT_FIT, None, NO_FIT.causes)
    assert refusal.message == "a: Does not fit: CUDA0 lacks 5 bytes"


def test_what_can_never_fit_is_refused_at_once_although_others_are_loaded() -> None:
    bench = Bench()
    bench.bring_up(A)
    bench.arrive(B)
    bench.answer(NO_FIT)
    assert bench.one(PlanModel).assume_empty
    bench.answer(NO_FIT)
    assert refusals(bench.commands) == [(2, RefusalKind.CANNOT_FIT)]
    assert bench.state(A) is RunnerState.READY, "nobody was evicted for it"


@pytest.mark.parametrize("beside", [NO_FIT, make_plan(layers=1), make_plan(fit_by_llama=True)])
def test_room_is_made_where_a_model_would_fit_better_without_the_others(beside: LoadPlan | DoesNotFit) -> None:
    """Not at all beside them, partly on the CPU, or of unknown size: it waits for the idle runner to be gone."""
    bench = Bench()
    bench.bring_up(A)
    bench.finish(A)
    bench.arrive(B)
    bench.answer(beside)
    bench.answer(make_plan())
    assert bench.one(StopProcess).model == A
    bench.exit(A)
    assert not bench.one(PlanModel).assume_empty
    bench.answer(make_plan())
    assert bench.one(Spawn).model == B


def test_a_partial_plan_is_launched_where_an_empty_machine_would_give_no_better() -> None:
    bench = Bench()
    bench.bring_up(A)
    bench.finish(A)
    bench.arrive(B)
    bench.answer(make_plan(layers=1))
    bench.answer(make_plan(layers=1))
    assert bench.one(Spawn).model == B
    assert bench.state(A) is RunnerState.READY


def test_the_least_recently_used_idle_runner_goes_first() -> None:
    bench = Bench()
    for model in (A, B):
        bench.bring_up(model)
    for moment, model in ((1.0, B), (2.0, A)):
        bench.now = moment
        bench.finish(model)
    bench.arrive(C)
    bench.answer(make_plan())
    assert bench.one(StopProcess).model == B, "MAX_LOADED_MODELS is 2"


def test_a_busy_runner_is_never_evicted_and_younger_tickets_wait_behind() -> None:
    bench = Bench(replace(LIMITS, max_loaded_models=1))
    bench.bring_up(A, make_plan(n_parallel=2))
    waiting = bench.arrive(B)
    bench.answer(make_plan())
    assert bench.commands == ()
    younger = bench.arrive(A)
    assert granted(bench.commands) == [], "a free slot, but granting it would keep B waiting for ever"
    bench.finish(A)
    assert bench.one(StopProcess).model == A
    bench.exit(A)
    bench.answer(make_plan())
    assert granted(bench.finish_load(B)) == [waiting]
    assert [ticket.id for ticket in bench.pool.waiting] == [younger]


def test_waiting_for_room_ends_after_load_timeout() -> None:
    bench = Bench(replace(LIMITS, max_loaded_models=1))
    bench.bring_up(A)
    ticket = bench.arrive(B)
    bench.answer(make_plan())
    assert scheduler.next_deadline(bench.pool) == 30.0
    bench.now = 30.0
    bench.post(TimePassed())
    assert refusals(bench.commands) == [(ticket, RefusalKind.LOAD_TIMEOUT)]


def test_nobody_is_evicted_for_a_client_that_has_gone() -> None:
    bench = Bench(replace(LIMITS, max_loaded_models=1))
    bench.bring_up(A)
    ticket = bench.arrive(B)
    bench.answer(make_plan())
    bench.post(RequestAbandoned(ticket))
    bench.finish(A)
    assert bench.commands == ()
    assert bench.state(A) is RunnerState.READY


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
    assert fresh.held == {}
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
    assert bench.one(StopProcess).reason == "idle"


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
    bench.bring_up(A, make_plan(size_bytes=10))
    bench.finish(A)
    bench.exit(A)
    bench.arrive(B)
    question = bench.one(PlanModel)
    assert (question.held, question.gone) == ({}, {"CUDA0": 10, "Host": 0})
    bench.answer(PlanProblem("no"))
    bench.now += SETTLE_WITHIN_S
    bench.arrive(B)
    assert bench.one(PlanModel).gone == {}


def test_the_machine_is_read_again_when_memory_was_taken_or_given_back() -> None:
    """Not where a plan is asked for in the same moment, which reads it anyway."""
    bench = Bench(replace(LIMITS, max_loaded_models=1))
    bench.bring_up(A, make_plan(size_bytes=10))
    assert bench.one(ReadMachine) == ReadMachine(A, {"CUDA0": 10, "Host": 0}, {})
    bench.finish(A)
    bench.arrive(B)
    bench.answer(make_plan())
    assert bench.state(A) is RunnerState.STOPPING
    bench.exit(A)
    assert [type(command) for command in bench.commands] == [PlanModel]
    bench.answer(make_plan())
    bench.finish_load(B)
    bench.exit(B)
    assert bench.one(ReadMachine).gone["CUDA0"] == 20, "both have just gone"
