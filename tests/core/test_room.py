"""Who goes, who waits and who is served meanwhile, when a model needs room."""

from __future__ import annotations

from dataclasses import replace

import pytest
from making_plans import CUDA0, LIMITS, Bench, granted, make_plan, refusals

from planner.types import LoadOptions
from supervisor.core import scheduler
from supervisor.core.commands import PlanModel, Reject, Spawn, StopProcess
from supervisor.core.events import BecameReady, RequestAbandoned, SettingsChanged, TimePassed, YieldRequested
from supervisor.core.runner import RunnerState
from supervisor.core.types import Cap, DoesNotFit, MakeRoom, ModelId, ModelSettings, RefusalKind, Standing

A, B, C, D = ModelId("a"), ModelId("b"), ModelId("c"), ModelId("d")
MANY = replace(LIMITS, max_loaded_models=None)
ALONE = replace(LIMITS, max_loaded_models=1)
ON_1 = make_plan(on={"CUDA1": 10})


def room(*victims: ModelId, alternatives: tuple[ModelId, ...] = ()) -> MakeRoom:
    return MakeRoom(frozenset(victims), frozenset((*victims, *alternatives)), frozenset({"CUDA0"}))


def test_models_on_other_devices_are_loaded_side_by_side() -> None:
    bench = Bench(MANY)
    bench.arrive(A)
    bench.answer(make_plan())
    bench.arrive(B)
    assert bench.one(PlanModel).neighbours[0].loading
    bench.answer(ON_1)
    assert (bench.state(A), bench.state(B)) == (RunnerState.STARTING, RunnerState.STARTING)
    assert granted(bench.finish_load(B)) == [2]
    assert granted(bench.finish_load(A)) == [1]


def test_two_loads_never_race_for_the_same_device() -> None:
    """The second waits until it can be seen what the first has taken, and is planned again."""
    bench = Bench(MANY)
    bench.arrive(A)
    bench.answer(make_plan())
    bench.arrive(B)
    bench.answer(make_plan())
    assert bench.commands == ()
    bench.spawn(A)
    bench.post(BecameReady(A, 1, "http://a"))
    assert not bench.one(PlanModel).neighbours[0].loading
    bench.answer(make_plan())
    assert bench.one(Spawn).model == B


def test_two_loads_on_the_host_alone_go_side_by_side_since_their_bytes_were_promised() -> None:
    bench = Bench(MANY)
    for model in (A, B):
        bench.arrive(model)
        bench.answer(make_plan(on={}, host_bytes=10))
    assert bench.state(B) is RunnerState.STARTING


def test_nobody_is_evicted_for_bytes_that_a_load_in_progress_may_not_take_after_all() -> None:
    bench = Bench(MANY)
    bench.load_idle(C)
    bench.arrive(A)
    bench.answer(make_plan())
    bench.arrive(B)
    bench.answer(room(C))
    assert bench.all(StopProcess) == []
    bench.spawn(A)
    bench.exit(A, "failed")
    assert bench.one(PlanModel).model == B


def test_a_load_waits_for_no_model_on_other_devices() -> None:
    """Two have to go for it; meanwhile another is planned and loaded where nothing has to go."""
    bench = Bench(MANY)
    bench.bring_up(A)
    bench.arrive(B)
    bench.answer(room(A))
    bench.arrive(C)
    bench.answer(ON_1)
    assert granted(bench.finish_load(C)) == [3]
    assert bench.state(A) is RunnerState.READY


def test_all_victims_go_together_and_only_then_is_it_planned_again() -> None:
    bench = Bench(MANY)
    for model in (A, C):
        bench.load_idle(model)
    bench.arrive(B)
    bench.answer(room(A, C))
    assert {command.model for command in bench.all(StopProcess)} == {A, C}
    bench.exit(A)
    assert bench.all(PlanModel) == []
    bench.exit(C)
    assert bench.one(PlanModel).neighbours == ()
    bench.answer(make_plan())
    assert bench.one(Spawn).model == B


def test_no_victim_goes_before_all_of_them_can() -> None:
    """Else an idle one would be lost for nothing, should the busy one never end."""
    bench = Bench(MANY)
    bench.load_idle(A)
    bench.bring_up(C)
    bench.arrive(B)
    bench.answer(room(A, C))
    assert bench.all(StopProcess) == []
    bench.finish(C)
    assert {command.model for command in bench.all(StopProcess)} == {A, C}


def test_a_busy_victim_is_waited_for_and_takes_up_no_younger_request() -> None:
    bench = Bench(ALONE)
    bench.bring_up(A, make_plan(n_parallel=2))
    waiting = bench.arrive(B)
    bench.answer(room(A))
    younger = bench.arrive(A)
    assert granted(bench.commands) == [], "a free slot, but granting it would keep B waiting for ever"
    bench.finish(A)
    assert bench.one(StopProcess).model == A
    bench.exit(A)
    bench.answer(make_plan())
    assert granted(bench.finish_load(B)) == [waiting]
    assert [ticket.id for ticket in bench.pool.waiting] == [younger]


def test_a_loaded_model_that_need_not_go_is_served_while_another_waits_for_room() -> None:
    bench = Bench(MANY)
    bench.bring_up(A)
    bench.load_idle(C, ON_1)
    bench.arrive(B)
    bench.answer(room(A))
    served = bench.arrive(C)
    assert granted(bench.commands) == [served]


def test_a_loaded_model_is_served_while_another_loads() -> None:
    bench = Bench(MANY)
    bench.load_idle(A)
    bench.arrive(B)
    bench.answer(ON_1)
    served = bench.arrive(A)
    assert granted(bench.commands) == [served]


def test_the_first_of_the_right_runners_to_fall_idle_will_do() -> None:
    """C was busy when A was chosen, and might do instead; D lies elsewhere."""
    bench = Bench(MANY)
    for model, plan in ((A, make_plan()), (C, make_plan()), (D, ON_1)):
        bench.bring_up(model, plan)
    bench.arrive(B)
    bench.answer(room(A, alternatives=(C,)))
    bench.finish(D)
    assert bench.all(PlanModel) == []
    bench.finish(C)
    standings = {one.model: one.standing for one in bench.one(PlanModel).neighbours}
    assert standings == {A: Standing.BUSY, C: Standing.IDLE, D: Standing.IDLE}
    bench.answer(room(C))
    assert bench.one(StopProcess).model == C


def test_a_victim_takes_up_no_work_once_it_was_told_to_go() -> None:
    bench = Bench(ALONE)
    bench.load_idle(A)
    bench.arrive(B)
    bench.answer(room(A))
    assert bench.state(A) is RunnerState.STOPPING
    late = bench.arrive(A, keep_alive_s=600.0)
    assert granted(bench.commands) == []
    bench.exit(A)
    bench.answer(make_plan())
    assert granted(bench.finish_load(B)) == [2]
    assert [ticket.id for ticket in bench.pool.waiting] == [late]


def test_a_runner_just_loaded_serves_who_waited_for_it_before_it_goes() -> None:
    """Else two models would take turns in being loaded, and serve nobody."""
    bench = Bench(ALONE)
    first = bench.arrive(A)
    bench.answer(make_plan())
    waiting = bench.arrive(B)
    bench.answer(room(A))
    second = bench.arrive(A)
    assert granted(bench.finish_load(A)) == [first]
    bench.answer(room(A))
    assert granted(bench.finish(A)) == [second], "it is younger than B's, and it is owed"
    younger = bench.arrive(A)
    assert granted(bench.commands) == []
    bench.finish(A)
    assert bench.one(StopProcess).model == A
    bench.exit(A)
    bench.answer(make_plan())
    assert granted(bench.finish_load(B)) == [waiting]
    assert [ticket.id for ticket in bench.pool.waiting] == [younger]


def test_one_client_s_queue_keeps_a_model_loaded_no_longer_than_its_turn_while_another_client_waits() -> None:
    """A took 10 s to load; having served for 30 it goes, and serves the rest of the queue when it comes again."""
    bench = Bench(replace(ALONE, max_queue=100))
    greedy = [bench.arrive(A, "greedy") for _ in range(4)]
    bench.answer_to(A, make_plan())
    modest = bench.arrive(B, "modest")
    bench.answer(room(A))
    bench.now = 10.0
    served = granted(bench.finish_load(A))
    bench.answer(room(A))
    for bench.now in (25.0, 40.0):
        served += granted(bench.finish(A, "greedy"))
    assert served == greedy[:3]
    bench.now = 41.0
    assert granted(bench.finish(A, "greedy")) == []
    assert bench.one(StopProcess).model == A
    bench.exit(A)
    bench.answer_to(B, make_plan())
    bench.answer_to(A, room(B))
    assert granted(bench.finish_load(B)) == [modest]
    bench.answer_to(A, room(B))
    bench.finish(B, "modest")
    bench.exit(B)
    bench.answer(make_plan())
    assert granted(bench.finish_load(A)) == greedy[3:]


def test_a_runner_whose_turn_is_over_owes_nobody_anything_while_it_finishes() -> None:
    bench = Bench(replace(ALONE, max_queue=100))
    for _ in range(3):
        bench.arrive(A, "greedy")
    bench.answer_to(A, make_plan(n_parallel=2))
    bench.arrive(B, "modest")
    bench.answer(room(A))
    bench.finish_load(A)
    bench.answer(room(A))
    bench.now = 1.0
    assert granted(bench.finish(A, "greedy")) == []
    assert (bench.pool.runner(A).in_flight, [ticket.owed for ticket in bench.pool.waiting]) == (1, [False, False])
    bench.finish(A, "greedy")
    assert bench.one(StopProcess).model == A


def test_a_client_that_has_all_to_itself_has_its_queue_served_before_its_other_model_is_loaded() -> None:
    bench = Bench(replace(ALONE, max_queue=100))
    first, second = bench.arrive(A, "greedy"), bench.arrive(A, "greedy")
    bench.answer_to(A, make_plan())
    bench.arrive(B, "greedy")
    bench.answer(room(A))
    bench.now = 10.0
    assert granted(bench.finish_load(A)) == [first]
    bench.answer(room(A))
    bench.now = 1000.0
    assert granted(bench.finish(A, "greedy")) == [second]


def test_waiting_for_room_ends_after_load_timeout() -> None:
    bench = Bench(ALONE)
    bench.bring_up(A)
    ticket = bench.arrive(B)
    bench.answer(room(A))
    assert scheduler.next_deadline(bench.pool) == 30.0
    bench.wait(30.0)
    assert refusals(bench.commands) == [(ticket, RefusalKind.LOAD_TIMEOUT)]
    served = bench.arrive(A)
    bench.finish(A)
    assert granted(bench.commands) == [served], "nothing holds it back any more"


def test_nobody_goes_for_a_client_that_has_gone() -> None:
    bench = Bench(ALONE)
    bench.bring_up(A)
    ticket = bench.arrive(B)
    bench.answer(room(A))
    bench.post(RequestAbandoned(ticket))
    bench.finish(A)
    assert bench.commands == ()
    assert bench.state(A) is RunnerState.READY


def test_a_pinned_runner_never_may_go_and_a_priority_is_told() -> None:
    bench = Bench(MANY)
    bench.post(SettingsChanged({A: ModelSettings(pinned=True), C: ModelSettings(priority=7)}))
    bench.load_idle(A)
    bench.load_idle(C)
    bench.arrive(B)
    pinned, other = bench.one(PlanModel).neighbours
    assert (pinned.standing, other.standing, other.priority) == (Standing.FIXED, Standing.IDLE, 7)
    assert bench.pool.runner(A).deadline is None, "nor is it ever idle for too long"


def test_one_that_is_pinned_while_it_is_to_go_stays() -> None:
    bench = Bench(ALONE)
    bench.bring_up(A)
    bench.arrive(B)
    bench.answer(room(A))
    bench.post(SettingsChanged({A: ModelSettings(pinned=True)}))
    assert bench.one(PlanModel).neighbours[0].standing is Standing.FIXED
    bench.answer(DoesNotFit("no", never=False))
    assert bench.one(Reject).refusal.retry_after_s == 5.0


@pytest.mark.parametrize("never, retry_after_s", [(True, None), (False, 5.0)])
def test_what_can_never_fit_is_refused_for_good_and_evicts_nobody(*, never: bool, retry_after_s: float | None) -> None:
    bench = Bench(MANY)
    bench.load_idle(A)
    ticket = bench.arrive(B)
    bench.answer(DoesNotFit("Does not fit", never=never))
    assert refusals(bench.commands) == [(ticket, RefusalKind.CANNOT_FIT)]
    refusal = bench.one(Reject).refusal
    assert (refusal.never, refusal.retry_after_s) == (never, retry_after_s)
    assert bench.state(A) is RunnerState.READY


def test_so_many_have_to_go_as_max_loaded_models_says_and_those_that_leave_count_until_they_have() -> None:
    bench = Bench()
    bench.load_idle(A)
    bench.load_idle(C)
    bench.arrive(B)
    assert bench.one(PlanModel).surplus == 1
    bench.answer(room(A))
    assert bench.all(Spawn) == []
    bench.exit(A)
    assert bench.one(PlanModel).surplus == 0


def test_nobody_is_refused_for_a_pinned_model_s_sake_before_that_is_loaded_and_known_to_leave_too_little() -> None:
    """What is promised to it comes off what its driver shows, of which it has taken a part already."""
    no_room = DoesNotFit("Does not fit; a may not go for it", never=False)
    bench = Bench(MANY)
    bench.post(SettingsChanged({A: ModelSettings(pinned=True)}))
    bench.arrive(A)
    bench.answer(make_plan())
    waiting = bench.arrive(B)
    bench.answer(no_room)
    assert refusals(bench.commands) == []
    bench.finish_load(A)
    assert bench.one(PlanModel).model == B
    bench.answer(no_room)
    assert refusals(bench.commands) == [(waiting, RefusalKind.CANNOT_FIT)]


def test_memory_is_yielded_by_the_cheapest_idle_runners_and_given_to_no_load_for_a_while() -> None:
    """The long idle one goes, not the one on another device nor the one in use."""
    bench = Bench(MANY)
    for model, plan in ((A, make_plan()), (B, make_plan()), (C, ON_1)):
        bench.load_idle(model, plan)
    bench.bring_up(D)
    bench.now = 30.0
    bench.arrive(B)
    bench.finish(B)
    bench.post(YieldRequested(CUDA0, wanted_bytes=12, free_bytes=5, until=100.0))
    assert bench.one(StopProcess).model == A
    bench.exit(A)
    bench.arrive(A)
    assert bench.one(PlanModel).caps == (Cap(CUDA0, 23),)
    bench.answer(DoesNotFit("Does not fit", never=False, yielded=True))
    assert bench.one(Reject).refusal.retry_after_s == 70.0
    bench.wait(70.0)
    bench.arrive(A)
    assert bench.one(PlanModel).caps == ()


def test_what_never_fits_is_refused_for_good_though_memory_is_another_program_s_for_now() -> None:
    bench = Bench(MANY)
    bench.post(YieldRequested(CUDA0, 12, 50, until=100.0))
    bench.arrive(A)
    bench.answer(DoesNotFit("Does not fit"))
    refusal = bench.one(Reject).refusal
    assert (refusal.retry_after_s, refusal.message) == (None, "a: Does not fit")


def test_a_plan_that_was_being_made_when_memory_was_yielded_is_made_again() -> None:
    bench = Bench(MANY)
    bench.arrive(A)
    stale = bench.one(PlanModel)
    bench.post(YieldRequested(CUDA0, 12, 50, until=100.0))
    fresh = bench.one(PlanModel)
    assert (fresh.revision > stale.revision, fresh.caps) == (True, (Cap(CUDA0, 38),))


def test_the_shell_is_told_when_the_next_deadline_is() -> None:
    bench = Bench(replace(MANY, queue_timeout_s=20.0))
    bench.arrive(A)
    assert scheduler.next_deadline(bench.pool) == 20.0
    bench.post(YieldRequested(CUDA0, 1, 1, until=7.0))
    assert scheduler.next_deadline(bench.pool) == 7.0
    assert bench.pool.runner(A).options == LoadOptions()
    bench.post(TimePassed())
