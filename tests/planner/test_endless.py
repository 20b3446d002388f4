"""Where the host has enough, the plan that was made as if it had no end is the plan of any moment, to the byte."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_exhaust import Cards, Layers, cards, models

from planner import explain
from planner.build import PINNED_BUILD
from planner.model import ModelFacts, read_model
from planner.search.endless import held_against, with_endless_host
from planner.search.placement import search
from planner.types import (
    HOST,
    HOST_POOL,
    Device,
    DeviceKind,
    DeviceName,
    Machine,
    MemoryPool,
    Plan,
    PlanOutcome,
    PlanRequest,
    Policy,
)

MIB = 1024 * 1024
GIB = 1024 * MIB
EXAMPLES = 150
REQUESTS = st.builds(
    PlanRequest,
    n_ctx=st.sampled_from([None, "auto", 0, 512]),
    n_parallel=st.sampled_from([None, "auto", 1, 3]),
    n_ubatch=st.sampled_from([None, 8]),
    n_gpu_layers=st.sampled_from([None, None, "all", 0, 1]),
    cache_ram_mib=st.sampled_from([None, None, 0, 64]),
    kv_offload=st.sampled_from([None, None, False]),
    split_mode=st.sampled_from([None, None, "none", "tensor"]),
    devices=st.sampled_from([None, None, ()]),
)
POLICIES = st.builds(
    Policy,
    n_parallel=st.sampled_from([1, 2, "auto"]),
    n_ctx_per_slot=st.sampled_from([None, None, 256]),
    cache_ram_mib=st.sampled_from([0, 16, 1024]),
    promised=st.dictionaries(st.just(HOST), st.integers(0, 2 * GIB)),
    spread=st.booleans(),
)
HOSTS = st.one_of(st.integers(0, 64 * MIB), st.integers(0, 4 * GIB), st.integers(8 * GIB, 64 * GIB))


@pytest.fixture
def model(chat_model: Path) -> ModelFacts:
    return read_model(chat_model)


@pytest.fixture
def no_cards() -> Machine:
    return Machine((), Device(HOST, DeviceKind.HOST, 64 * GIB, 64 * GIB, HOST_POOL))


def with_host(machine: Machine, free_bytes: int) -> Machine:
    host = replace(machine.host, free_bytes=free_bytes, total_bytes=64 * GIB)
    return replace(machine, host=host, pools=(MemoryPool(host.pool, 64 * GIB, free_bytes),))


def found(model: ModelFacts, request: PlanRequest, machine: Machine, policy: Policy) -> PlanOutcome:
    return search(model, request, machine, policy, PINNED_BUILD, advises=False)


@settings(max_examples=EXAMPLES)
@given(
    layers=models(most=4), where=cards(most=2), has_cards=st.booleans(), request_=REQUESTS, policy=POLICIES, free=HOSTS
)
def test_a_plan_made_with_an_endless_host_is_the_plan_of_now_where_it_has_room(
    *,
    layers: Layers,
    where: Cards,
    has_cards: bool,
    request_: PlanRequest,
    policy: Policy,
    free: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    model = layers.write(tmp_path_factory.getbasetemp() / "endless.gguf")
    machine = with_host(where.machine(model), free)
    machine = machine if has_cards else replace(machine, devices=())
    endless = with_endless_host(machine)
    assert endless is not None
    kept = found(model, request_, endless, policy)
    plan = held_against(kept, machine, policy) if isinstance(kept, Plan) else None
    if plan is not None:
        fresh = found(model, request_, machine, policy)
        assert plan == fresh
        assert json.dumps(explain.to_json(plan)) == json.dumps(explain.to_json(fresh))


def test_what_is_free_now_is_what_the_plan_shows(model: ModelFacts, no_cards: Machine) -> None:
    endless = with_endless_host(no_cards)
    assert endless is not None
    kept = found(model, PlanRequest(n_ctx=512), endless, Policy())
    assert isinstance(kept, Plan)
    for free_bytes in (8 * GIB, 9 * GIB + 1):
        plan = held_against(kept, with_host(no_cards, free_bytes), Policy(promised={HOST: GIB}))
        assert plan is not None
        assert (plan.usages[-1].free_bytes, plan.usages[-1].budget_bytes) == (free_bytes, free_bytes - GIB)


def test_nothing_is_kept_where_the_host_has_too_little(model: ModelFacts, no_cards: Machine) -> None:
    endless = with_endless_host(no_cards)
    assert endless is not None
    kept = found(model, PlanRequest(n_ctx=512), endless, Policy())
    assert isinstance(kept, Plan)
    assert held_against(kept, with_host(no_cards, MIB), Policy()) is None


def test_a_device_that_has_its_memory_from_the_host_leaves_nothing_to_be_kept(no_cards: Machine) -> None:
    card = Device(DeviceName("CUDA0"), DeviceKind.CUDA, GIB, GIB, HOST_POOL)
    assert with_endless_host(replace(no_cards, devices=(card,))) is None
