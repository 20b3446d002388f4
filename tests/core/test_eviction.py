"""Who goes: the cheapest set of runners without which a model fits as well as it can."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from making_plans import make_plan

from supervisor.core.eviction import MAX_PLANS, cheapest_for, choose
from supervisor.core.types import DoesNotFit, LoadPlan, MakeRoom, ModelId, Neighbour, PlanOutcome, PlanProblem, Standing

TOTAL = {"CUDA0": 24, "CUDA1": 12}
NO_FIT = DoesNotFit("Does not fit")


def runner(
    name: str, *, on: Mapping[str, int], cost: float = 1.0, standing: Standing = Standing.IDLE, priority: int = 0
) -> Neighbour:
    return Neighbour(ModelId(name), standing, on, cost, priority)


class Planner:
    """Plans a model of so many bytes on the first card that holds it, as if only those were there that are not gone."""

    def __init__(self, size: int, *neighbours: Neighbour, surplus: int = 0) -> None:
        self.size, self.neighbours, self.surplus = size, neighbours, surplus
        self.asked: list[frozenset[ModelId]] = []

    def free(self, gone: frozenset[ModelId]) -> dict[str, int]:
        left = [one for one in self.neighbours if one.model not in gone]
        return {device: size - sum(one.held_bytes.get(device, 0) for one in left) for device, size in TOTAL.items()}

    def plan_with(self, gone: frozenset[ModelId]) -> LoadPlan | DoesNotFit | PlanProblem:
        self.asked.append(gone)
        fitting = [device for device, free in self.free(gone).items() if free >= self.size]
        return make_plan(on={fitting[0]: self.size}) if fitting else NO_FIT

    def choose(self) -> PlanOutcome:
        return choose(self.plan_with, self.neighbours, dict(self.free(frozenset())), self.surplus)

    def victims(self) -> set[str]:
        outcome = self.choose()
        assert isinstance(outcome, MakeRoom), outcome
        return set(outcome.victims)


def test_nobody_goes_where_it_fits_beside_all() -> None:
    outcome = Planner(10, runner("a", on={"CUDA0": 5})).choose()
    assert outcome == make_plan(on={"CUDA0": 10})


def test_only_those_go_whose_bytes_lie_where_they_are_needed() -> None:
    """One on the other card, however cheap, frees nothing that helps."""
    small = runner("small", on={"CUDA1": 12}, cost=0.1)
    assert Planner(20, runner("big", on={"CUDA0": 20}, cost=9.0), small).victims() == {"big"}


@pytest.mark.parametrize("cost, victims", [(3.0, {"a", "b"}), (1.5, {"big"})])
def test_two_small_runners_go_instead_of_a_big_one_where_they_cost_less(cost: float, victims: set[str]) -> None:
    small = (runner("a", on={"CUDA0": 6}, cost=1.0), runner("b", on={"CUDA0": 6}, cost=1.0))
    elsewhere = runner("x", on={"CUDA1": 12}, standing=Standing.FIXED)
    assert Planner(12, *small, runner("big", on={"CUDA0": 12}, cost=cost), elsewhere).victims() == victims


def test_a_cheaper_runner_on_another_card_than_the_best_plan_s_goes_where_that_will_do() -> None:
    """With everybody gone it would lie on the first card; without the second's runner it lies on the second."""
    first, second = runner("a", on={"CUDA0": 24}, cost=5.0), runner("b", on={"CUDA1": 12}, cost=1.0)
    assert Planner(10, first, second).victims() == {"b"}


def test_a_runner_of_lower_priority_goes_first_whatever_it_costs() -> None:
    dear = runner("dear", on={"CUDA0": 24}, cost=100.0)
    valued = runner("valued", on={"CUDA1": 12}, cost=1.0, priority=1)
    assert Planner(10, dear, valued).victims() == {"dear"}


def test_an_idle_runner_goes_before_a_busy_one_whatever_it_costs_and_one_that_leaves_before_both() -> None:
    busy = runner("busy", on={"CUDA1": 12}, cost=0.1, standing=Standing.BUSY)
    idle = runner("idle", on={"CUDA0": 24}, cost=50.0)
    assert Planner(10, busy, idle).victims() == {"idle"}
    leaving = runner("leaving", on={"CUDA0": 24}, cost=0.0, standing=Standing.LEAVING, priority=9)
    assert Planner(10, busy, leaving).victims() == {"leaving"}
    outcome = Planner(10, busy, runner("other", on={"CUDA0": 24}, cost=1.0, standing=Standing.BUSY)).choose()
    assert isinstance(outcome, MakeRoom)
    assert (set(outcome.victims), set(outcome.alternatives)) == ({"busy"}, {"busy", "other"})


def test_a_pinned_runner_stays_and_the_refusal_names_it() -> None:
    pinned = runner("pinned", on={"CUDA0": 20}, standing=Standing.FIXED)
    outcome = Planner(20, pinned, runner("a", on={"CUDA1": 12})).choose()
    assert outcome == DoesNotFit("Does not fit; pinned may not go for it", never=False)


def test_what_does_not_fit_on_an_empty_machine_is_known_with_two_plans_and_nobody_goes() -> None:
    planner = Planner(30, *(runner(str(name), on={"CUDA0": 4}) for name in range(6)))
    assert planner.choose() == NO_FIT
    assert len(planner.asked) == 2


def test_as_many_have_to_go_as_there_are_too_many_though_it_would_fit_beside_them() -> None:
    cheap, dear = runner("cheap", on={"CUDA0": 1}), runner("dear", on={"CUDA1": 1}, cost=9.0)
    assert Planner(5, cheap, dear, surplus=1).victims() == {"cheap"}
    assert Planner(5, cheap, dear, surplus=2).victims() == {"cheap", "dear"}
    pinned = runner("pinned", on={"CUDA0": 1}, standing=Standing.FIXED)
    assert isinstance(Planner(5, pinned, surplus=1).choose(), DoesNotFit)


def test_a_plan_of_unknown_size_is_launched_alone_or_not_at_all() -> None:
    unknown = make_plan(is_known=False)
    idle = [runner("a", on={"CUDA0": 1}), runner("b", on={"CUDA1": 1})]
    outcome = choose(lambda _: unknown, idle, {})
    assert isinstance(outcome, MakeRoom)
    assert outcome.victims == {"a", "b"}
    pinned = runner("p", on={"CUDA0": 1}, standing=Standing.FIXED)
    assert isinstance(choose(lambda _: unknown, [pinned], {}), DoesNotFit)
    assert choose(lambda _: unknown, [], {}) == unknown


def test_a_partial_plan_is_launched_where_an_empty_machine_would_give_no_better() -> None:
    partial = make_plan(quality=1)
    assert choose(lambda _: partial, [runner("a", on={"CUDA0": 1})], {}) == partial


def test_a_problem_is_told_without_looking_further() -> None:
    problem = PlanProblem("is no model")
    assert choose(lambda _: problem, [runner("a", on={"CUDA0": 1})], {}) == problem


class LeasedPlanner(Planner):
    """Plans a model that is asked to lie on CUDA0, which takes one runner at a time."""

    def plan_with(self, gone: frozenset[ModelId]) -> LoadPlan | DoesNotFit | PlanProblem:
        if any("CUDA0" in one.held_bytes for one in self.neighbours if one.model not in gone):
            return PlanProblem("another runner has it")
        return make_plan(on={"CUDA0": self.size})


def test_who_has_the_only_device_that_will_do_goes_though_a_cheaper_one_would_give_more_bytes() -> None:
    holder, cheap = runner("holder", on={"CUDA0": 2}, cost=9.0), runner("cheap", on={"CUDA1": 12}, cost=0.1)
    assert LeasedPlanner(5, holder, cheap).victims() == {"holder"}


def test_who_has_it_and_is_pinned_is_named_and_the_model_may_be_tried_again() -> None:
    holder = runner("holder", on={"CUDA0": 2}, standing=Standing.FIXED)
    outcome = LeasedPlanner(5, holder, runner("cheap", on={"CUDA1": 12})).choose()
    assert outcome == DoesNotFit("another runner has it; holder may not go for it", never=False)


@given(
    size=st.integers(1, 30),
    held=st.lists(
        st.tuples(st.sampled_from(["CUDA0", "CUDA1"]), st.integers(1, 6), st.integers(1, 9), st.integers(0, 1)),
        max_size=6,
    ),
)
def test_the_set_is_enough_and_cheapest_among_those_that_arithmetic_finds(
    size: int, held: list[tuple[str, int, int, int]]
) -> None:
    """Checked against every set there is; no more plans are asked for than the bound says."""
    neighbours = [
        runner(f"m{index}", on={device: part}, cost=float(cost), priority=priority)
        for index, (device, part, cost, priority) in enumerate(held)
    ]
    planner = Planner(size, *neighbours)
    outcome = planner.choose()
    assert len(planner.asked) <= MAX_PLANS + 2
    enough = [
        some
        for count in range(len(neighbours) + 1)
        for some in combinations(neighbours, count)
        if isinstance(planner.plan_with(frozenset(one.model for one in some)), LoadPlan)
    ]
    match outcome:
        case LoadPlan():
            assert () in enough
        case DoesNotFit():
            assert enough == []
        case MakeRoom(victims=victims):
            chosen = [one for one in neighbours if one.model in victims]
            assert tuple(chosen) in enough
            least = min((max(one.priority for one in some), sum(one.cost_s for one in some)) for some in enough)
            best = planner.plan_with(frozenset(one.model for one in neighbours))
            assert isinstance(best, LoadPlan)
            (device,) = best.contended
            by_arithmetic = [some for some in enough if planner.free(_models(some))[device] >= size]
            bound = min((max(one.priority for one in some), sum(one.cost_s for one in some)) for some in by_arithmetic)
            assert least <= (max(one.priority for one in chosen), sum(one.cost_s for one in chosen)) <= bound


def _models(some: tuple[Neighbour, ...]) -> frozenset[ModelId]:
    return frozenset(one.model for one in some)


def test_memory_for_others_comes_from_the_cheapest_runners_on_that_device_those_in_use_last() -> None:
    neighbours = [
        runner("a", on={"CUDA0": 6}, cost=1.0),
        runner("b", on={"CUDA0": 12}, cost=1.5),
        runner("c", on={"CUDA1": 12}, cost=0.1),
        runner("d", on={"CUDA0": 12}, cost=0.1, standing=Standing.BUSY),
        runner("e", on={"CUDA0": 12}, cost=0.1, standing=Standing.FIXED),
    ]
    assert cheapest_for(neighbours, frozenset({"CUDA0"}), 5) == {"a"}
    assert cheapest_for(neighbours, frozenset({"CUDA0"}), 10) == {"b"}
    assert cheapest_for(neighbours, frozenset({"CUDA0"}), 18) == {"a", "b"}
    assert cheapest_for(neighbours, frozenset({"CUDA0"}), 19) == {"b", "d"}
    assert cheapest_for(neighbours, frozenset({"CUDA0"}), 100) == {"a", "b", "d"}
    assert cheapest_for(neighbours, frozenset({"CUDA0"}), 0) == frozenset()
