"""Laws that every plan keeps: more memory helps, idle devices do not matter, names and twins make no difference."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from test_exhaust import DIVIDED, REQUEST, Cards, Layers, cards, kind_of, models

from planner.build import PINNED_BUILD
from planner.model import ModelFacts
from planner.search.placement import search
from planner.speed import EQUAL_SPEED
from planner.types import DeviceName, Machine, Plan, PlanRequest, Policy

MIB = 1024 * 1024
ROUNDING = 1e-9
EXAMPLES = 25


def planned(model: ModelFacts, machine: Machine, request: PlanRequest = REQUEST) -> Plan:
    plan = search(model, request, machine, Policy(), PINNED_BUILD)
    assert isinstance(plan, Plan)
    return plan


def tokens_per_s(plan: Plan) -> float:
    assert plan.decode is not None
    return plan.decode.tokens_per_second


def written(layers: Layers, factory: pytest.TempPathFactory) -> ModelFacts:
    return layers.write(factory.getbasetemp() / "laws.gguf")


@settings(max_examples=EXAMPLES)
@given(layers=models(most=6), where=cards(most=3), which=st.integers(0, 2), more=st.integers(1, 16 * MIB))
def test_more_memory_never_makes_a_plan_worse(
    layers: Layers, where: Cards, which: int, more: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What was all on devices still is, and no token takes longer by more than what counts as equal.

    Where layers are divided between devices, these are filled in order and no speeds compared.
    """
    model = written(layers, tmp_path_factory)
    machine = where.machine(model)
    devices = list(machine.devices)
    old = devices[which % len(devices)]
    devices[which % len(devices)] = replace(old, free_bytes=(old.free_bytes or 0) + more)
    less, larger = planned(model, machine), planned(model, replace(machine, devices=tuple(devices)))
    assert kind_of(larger, model) <= kind_of(less, model)
    if kind_of(larger, model) == kind_of(less, model) != DIVIDED:
        assert tokens_per_s(larger) * EQUAL_SPEED >= tokens_per_s(less) * (1 - ROUNDING)


@settings(max_examples=EXAMPLES)
@given(layers=models(most=6), where=cards(most=3), more=st.integers(1, 64 * MIB))
def test_more_memory_never_makes_a_context_shorter(
    layers: Layers, where: Cards, more: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Where everything lies on devices and still does."""
    model = written(layers, tmp_path_factory)
    machine, request = where.machine(model), PlanRequest(n_ctx="auto", n_ubatch=8)
    roomier = replace(
        machine, devices=tuple(replace(each, free_bytes=(each.free_bytes or 0) + more) for each in machine.devices)
    )
    less, larger = planned(model, machine, request), planned(model, roomier, request)
    assume(kind_of(less, model) < DIVIDED)
    assert (larger.n_ctx_per_slot or 0) >= (less.n_ctx_per_slot or 0)


@settings(max_examples=EXAMPLES)
@given(layers=models(most=6), where=cards(most=3))
def test_a_device_that_is_not_used_can_be_taken_away(
    layers: Layers, where: Cards, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = written(layers, tmp_path_factory)
    machine = where.machine(model)
    plan = planned(model, machine)
    used = tuple(device for device in machine.devices if device.name in plan.placement.devices)
    assume(used)
    assert planned(model, replace(machine, devices=used)).placement == plan.placement


@settings(max_examples=EXAMPLES)
@given(layers=models(most=6), where=cards(most=3), order=st.permutations(range(3)))
def test_other_names_change_names_only(
    layers: Layers, where: Cards, order: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = written(layers, tmp_path_factory)
    machine = where.machine(model)
    new_names = {str(each.name): DeviceName(f"CUDA{order[i] + 5}") for i, each in enumerate(machine.devices)}
    devices = tuple(replace(each, name=new_names[each.name]) for each in machine.devices)
    plan, renamed = planned(model, machine), planned(model, replace(machine, devices=devices))
    names = tuple(new_names[name] for name in plan.placement.devices)
    assert renamed.placement == replace(plan.placement, devices=names)
    assert renamed.decode == plan.decode or tokens_per_s(renamed) == pytest.approx(tokens_per_s(plan))


@settings(max_examples=EXAMPLES)
@example(
    layers=Layers((("q4_0", "q4_0", "f16"), ("q4_0", "f32", "q4_0")), "f16", 8),
    where=Cards((1.0, 0.5, 1.0), 0.5, (None, None, 800 * 10**9)),
)
@example(
    layers=Layers((("q8_0", "f32", "f32"), ("q8_0", "f32", "f32")), "q8_0", 0),
    where=Cards((0.5, 0.3125, 0.5), 0.5703125, (200 * 10**9, None, None)),
)
@given(layers=models(most=6), where=cards(most=3))
def test_equal_cards_are_interchangeable(
    layers: Layers, where: Cards, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One of two twins is left out of use: it is the second, and without the first that one plays its part."""
    model = written(layers, tmp_path_factory)
    machine = where.machine(model)
    first = machine.devices[0]
    twin = replace(first, name=DeviceName("CUDA9"))
    plan = planned(model, replace(machine, devices=(first, twin, *machine.devices[1:])))
    used = plan.placement.devices
    assert twin.name not in used or first.name in used
    assume(twin.name not in used and first.name in used)
    other = planned(model, replace(machine, devices=(twin, *machine.devices[1:]))).placement
    names = tuple(str(twin.name) if name == first.name else name for name in used)
    assert other == replace(plan.placement, devices=names)
