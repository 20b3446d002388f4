"""What keeps a plan from being better, and what one more GiB would buy: only what planning for it has shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from planner.build import PINNED_BUILD
from planner.limits import limits, one_more_gib
from planner.model import ModelFacts, read_model
from planner.search.placement import search
from planner.types import (
    HOST,
    HOST_POOL,
    Device,
    DeviceKind,
    DeviceName,
    Machine,
    Plan,
    PlanOutcome,
    PlanRequest,
    Policy,
    PoolId,
)
from planner.units import GIB, MIB


@pytest.fixture
def model(endless_model: Path) -> ModelFacts:
    """Return 13 MB that take 32,768 tokens of 16 KiB."""
    return read_model(str(endless_model))


def machine(*sizes: int) -> Machine:
    devices = tuple(
        Device(DeviceName(f"RPC{i}"), DeviceKind.RPC, size, size, PoolId(f"p{i}"), endpoint=f"h:{i}")
        for i, size in enumerate(sizes)
    )
    return Machine(devices, Device(HOST, DeviceKind.HOST, GIB, GIB, HOST_POOL))


def planning(model: ModelFacts, request: PlanRequest) -> Callable[[Machine], PlanOutcome]:
    return lambda where: search(model, request, where, Policy(cache_ram_mib=0), PINNED_BUILD)


def planned(plans: Callable[[Machine], PlanOutcome], where: Machine) -> Plan:
    outcome = plans(where)
    assert isinstance(outcome, Plan)
    return outcome


def test_a_context_that_was_cut_short_grows(model: ModelFacts) -> None:
    plans, where = planning(model, PlanRequest()), machine(100 * MIB)
    plan = planned(plans, where)
    assert (plan.n_ctx_per_slot or 0) < 32_768
    (line,) = one_more_gib(plan, where, plans)
    assert line.startswith(f"on RPC0: 32,768 tokens of context instead of {plan.n_ctx_per_slot:,}")
    assert any(line.startswith("memory: no more fits on RPC0 (") for line in limits(plan))


def test_layers_that_did_not_fit_come_to_the_device(model: ModelFacts) -> None:
    plans, where = planning(model, PlanRequest(n_ctx=4096)), machine(24 * MIB)
    plan = planned(plans, where)
    (line,) = one_more_gib(plan, where, plans)
    assert "more layer" in line
    assert "tokens a second instead of" in line
    assert any("reading on the CPU" in line for line in limits(plan))


def test_the_card_that_has_most_because_it_is_fast_is_named(model: ModelFacts) -> None:
    plans = planning(model, PlanRequest(n_ctx=16_384, n_gpu_layers="all"))
    needed = planned(plans, machine(GIB)).usages[0].known_bytes
    slow, fast = machine(needed * 2 // 3, needed * 9 // 10).devices
    cards = (replace(slow, bandwidth_bytes_per_s=10**11), replace(fast, bandwidth_bytes_per_s=10**12))
    plan = planned(plans, replace(machine(), devices=cards))
    assert set(plan.placement.devices) == {"RPC0", "RPC1"}
    assert "RPC1 holds most of it because it reads fastest: 1,000 GB/s" in limits(plan)


def test_where_everything_fits_nothing_is_bought_and_nothing_planned(model: ModelFacts) -> None:
    where = machine(2 * GIB)
    plan = planned(planning(model, PlanRequest()), where)

    def never(changed: Machine) -> PlanOutcome:
        raise AssertionError(changed)

    assert list(one_more_gib(plan, where, never)) == []
    assert not any(line.startswith("memory") for line in limits(plan))


def test_a_pinned_context_is_nobody_s_shortage(model: ModelFacts) -> None:
    where = machine(100 * MIB)
    plans = planning(model, PlanRequest(n_ctx=4096))
    assert list(one_more_gib(planned(plans, where), where, plans)) == []


def test_devices_that_are_alike_are_tried_once(model: ModelFacts) -> None:
    plans, where = planning(model, PlanRequest(n_ctx=4096)), machine(12 * MIB, 12 * MIB)
    tried: list[Machine] = []

    def counted(changed: Machine) -> PlanOutcome:
        tried.append(changed)
        return plans(changed)

    list(one_more_gib(planned(plans, where), where, counted))
    assert len(tried) == 1


def test_what_llama_cpp_places_itself_has_no_known_limits(model: ModelFacts) -> None:
    where = machine(24 * MIB)
    plans = planning(model, PlanRequest())
    plan = replace(planned(plans, where), fit_by_llama=True)
    assert list(limits(plan)) == []
    assert list(one_more_gib(plan, where, plans)) == []
