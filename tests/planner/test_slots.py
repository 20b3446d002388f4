"""The planner chooses how many conversations there are at a time: as many as cost the first one nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_exhaust import Cards, Layers, cards, models

from planner import flags
from planner.build import PINNED_BUILD
from planner.model import ModelFacts, read_model
from planner.search.placement import search
from planner.search.slots import ENOUGH_CTX, TRIED
from planner.speed import EQUAL_SPEED
from planner.types import (
    HOST,
    HOST_POOL,
    Decision,
    Device,
    DeviceKind,
    DeviceName,
    Machine,
    MemoryPool,
    NoFit,
    Plan,
    PlanRequest,
    Policy,
    PoolId,
    Role,
)
from planner.units import MIB

OPEN = Policy(n_parallel="auto", cache_ram_mib=0)
ONE = Policy(cache_ram_mib=0)
EXAMPLES = 12


@pytest.fixture(scope="module")
def model(endless_model: Path) -> ModelFacts:
    """Return 13 MB that take 32,768 tokens of 16 KiB each."""
    return read_model(str(endless_model))


def machine(*mib: int, host_mib: int = 8192) -> Machine:
    devices = tuple(
        Device(DeviceName(f"RPC{i}"), DeviceKind.RPC, size * MIB, size * MIB, PoolId(f"p{i}"), overhead_bytes=0)
        for i, size in enumerate(mib)
    )
    host = Device(HOST, DeviceKind.HOST, host_mib * MIB, host_mib * MIB, HOST_POOL)
    return Machine(devices, host, pools=(MemoryPool(HOST_POOL, host_mib * MIB, host_mib * MIB),), what_if=True)


def planned(model: ModelFacts, where: Machine, request: PlanRequest, policy: Policy = OPEN) -> Plan:
    plan = search(model, request, where, policy, PINNED_BUILD)
    assert isinstance(plan, Plan)
    return plan


def decision(plan: Plan) -> Decision:
    (found,) = (each for each in plan.decisions if each.step == "slots")
    return found


def layers_on_devices(plan: Plan) -> int:
    return sum(index >= 0 for index in plan.placement.layer_devices)


def weights_on_devices(plan: Plan) -> int:
    return sum(usage.model.bytes or 0 for usage in plan.usages if usage.kind is not DeviceKind.HOST)


def test_four_are_had_where_four_fit_each_with_its_own_context(model: ModelFacts) -> None:
    plan = planned(model, machine(4096), PlanRequest())
    assert (plan.request.n_parallel, plan.request.kv_unified, plan.n_ctx_per_slot) == (4, False, 32_768)
    assert plan.launch.argv[plan.launch.argv.index("-c") + 1] == str(4 * 32_768)
    assert decision(plan).chosen == "4"


def test_fewer_are_had_where_four_contexts_would_be_too_short(model: ModelFacts) -> None:
    """As the room shrinks there are fewer slots, and never one more with less than what is enough."""
    plans = [planned(model, machine(mib), PlanRequest()) for mib in (600, 300, 260, 200, 150, 60)]
    counts = [plan.request.slots for plan in plans]
    assert counts == sorted(counts, reverse=True)
    assert set(counts) == {1, *TRIED}
    assert all((plan.n_ctx_per_slot or 0) >= ENOUGH_CTX for plan in plans if plan.request.slots > 1)
    with_two = next(plan for plan in plans if plan.request.slots == max(TRIED) // 2)
    assert decision(with_two).because.startswith("with 4 the context of each would fall to ")


def test_a_context_that_is_asked_for_is_kept_whole(model: ModelFacts) -> None:
    for mib in (600, 300, 150):
        plan = planned(model, machine(mib), PlanRequest(n_ctx_per_slot=32_000))
        assert plan.n_ctx_per_slot == 32_000
        assert (
            plan.placement.n_gpu_layers
            == planned(model, machine(mib), PlanRequest(n_ctx=32_000), ONE).placement.n_gpu_layers
        )
    assert planned(model, machine(150), PlanRequest(n_ctx_per_slot=32_000)).request.slots == 1


def test_of_a_sum_that_is_pinned_each_conversation_gets_enough(model: ModelFacts) -> None:
    """It is what all slots have together, as with llama-server."""
    where = machine(4096)
    counts = {
        total: planned(model, where, PlanRequest(n_ctx=total)).request.slots for total in (16_384, 32_768, 65_536)
    }
    assert counts == {16_384: 1, 32_768: 2, 65_536: 4}


def test_no_layer_leaves_a_device_for_another_conversation(model: ModelFacts) -> None:
    """Where it could have one on the host."""
    request = PlanRequest(n_ctx_per_slot=2048)
    for mib in (20, 30, 40, 60, 90, 130, 200):
        alone, plan = planned(model, machine(mib), request, ONE), planned(model, machine(mib), request)
        assert layers_on_devices(plan) == layers_on_devices(alone)
    assert decision(planned(model, machine(30), request)) == Decision(
        "slots", "1", "with 2 less of the model would lie on the devices that one takes"
    )


def test_no_second_device_is_taken_for_another_conversation(model: ModelFacts) -> None:
    """Other models may want it."""
    request = PlanRequest(n_ctx_per_slot=4096)
    needed_mib = (planned(model, machine(4096), request, ONE).usages[0].known_bytes >> 20) + 2
    for devices in (None, ("RPC0", "RPC1")):
        plan = planned(model, machine(needed_mib, needed_mib), replace(request, devices=devices))
        assert (plan.request.slots, len(plan.placement.devices)) == (1, 1)


def test_what_does_not_fit_once_is_refused_as_one_conversation_is(model: ModelFacts) -> None:
    request, where = PlanRequest(n_gpu_layers="all", n_ctx_per_slot=2048), machine(4)
    auto, one = (search(model, request, where, policy, PINNED_BUILD) for policy in (OPEN, ONE))
    assert isinstance(auto, NoFit)
    assert isinstance(one, NoFit)
    assert (auto.causes, auto.nearest) == (one.causes, one.nearest)


def test_what_gives_way_to_fit_at_all_is_not_given_up_for_slots(model: ModelFacts) -> None:
    """Slots go before the micro-batch does, whichever device is short."""
    request = PlanRequest(n_gpu_layers="all", n_ctx_per_slot=2048)
    seen = set()
    for mib in range(20, 90, 4):
        outcomes = [search(model, request, machine(mib), policy, PINNED_BUILD) for policy in (OPEN, ONE)]
        plans = [outcome for outcome in outcomes if isinstance(outcome, Plan)]
        assert len({plan.request.n_ubatch for plan in plans}) <= 1
        seen |= {(plan.request.slots, plan.request.n_ubatch) for plan in plans[:1]}
    assert {slots for slots, n_ubatch in seen if n_ubatch != max(size or 0 for _, size in seen)} == {1}


def test_the_flag_wins_over_the_setting_and_the_other_way_round_a_number_does(model: ModelFacts) -> None:
    where = machine(4096)
    for words, policy, slots in (
        (["-np", "auto"], ONE, 4),
        (["-np", "-1"], replace(ONE, n_parallel=3), 4),
        (["-np", "3"], OPEN, 3),
        ([], replace(ONE, n_parallel=3), 3),
    ):
        assert planned(model, where, flags.parse(words).request, policy).request.n_parallel == slots


def test_a_context_that_could_be_longer_on_more_devices_is_shared_on_those_that_one_takes(model: ModelFacts) -> None:
    """It is enough for each."""
    whole_mib = (planned(model, machine(4096), PlanRequest(), ONE).usages[0].known_bytes >> 20) + 90
    plan = planned(model, machine(whole_mib, whole_mib), PlanRequest())
    assert (plan.request.slots, plan.placement.devices) == (2, ("RPC0",))
    assert ENOUGH_CTX <= (plan.n_ctx_per_slot or 0) < 32_768
    assert "devices" in {each.step for each in plan.decisions}


@pytest.mark.parametrize("role", [Role.EMBEDDING, Role.RERANK])
def test_texts_are_embedded_and_ranked_side_by_side_too(model: ModelFacts, role: Role) -> None:
    alone = planned(model, machine(8192), PlanRequest(role=role), ONE)
    plan = planned(model, machine(8192), PlanRequest(role=role))
    assert (plan.request.slots, plan.n_ctx_per_slot) == (4, alone.n_ctx_per_slot)


@settings(max_examples=EXAMPLES)
@given(layers=models(most=6), where=cards(most=3), n_ctx=st.sampled_from(["auto", 256, 1024]))
def test_slots_that_are_chosen_never_cost_what_one_has(
    layers: Layers, where: Cards, n_ctx: int | str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The plan fits, no less of the model lies on devices, no more of them are used, and no token takes longer."""
    model = layers.write(tmp_path_factory.getbasetemp() / "slots.gguf")
    there = where.machine(model)
    request = (
        PlanRequest(n_ubatch=8, n_ctx="auto") if n_ctx == "auto" else PlanRequest(n_ubatch=8, n_ctx_per_slot=int(n_ctx))
    )
    alone, plan = planned(model, there, request, ONE), planned(model, there, request)
    assert plan.request.slots in {1, *TRIED}
    assert all((usage.headroom_bytes or 0) >= 0 for usage in plan.usages if usage.kind is not DeviceKind.HOST)
    assert layers_on_devices(plan) >= layers_on_devices(alone)
    assert weights_on_devices(plan) >= weights_on_devices(alone)
    assert len(plan.placement.devices) <= len(alone.placement.devices)
    assert alone.decode is not None
    assert plan.decode is not None
    assert plan.decode.tokens_per_second * EQUAL_SPEED >= alone.decode.tokens_per_second
    assert (plan.n_ctx_per_slot or 0) >= min(alone.n_ctx_per_slot or 0, ENOUGH_CTX)
    if plan.request.slots == 1:
        assert plan.placement == alone.placement


@settings(max_examples=EXAMPLES)
@given(layers=models(most=6), where=cards(most=3), slots=st.integers(1, 5))
def test_a_number_that_is_told_is_planned_as_ever(
    layers: Layers, where: Cards, slots: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = layers.write(tmp_path_factory.getbasetemp() / "told.gguf")
    request = PlanRequest(n_ubatch=8, n_ctx_per_slot=256, n_parallel=slots)
    there = where.machine(model)
    assert search(model, request, there, OPEN, PINNED_BUILD) == search(model, request, there, ONE, PINNED_BUILD)
