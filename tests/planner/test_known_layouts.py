"""Layouts that people know from other planners: what two cards have room for, big layers, a pinned number of layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
from test_exhaust import HOST_BYTES, REQUEST, Layers

from planner.build import PINNED_BUILD
from planner.model import ModelFacts
from planner.search.placement import search
from planner.types import (
    HOST,
    HOST_POOL,
    Device,
    DeviceKind,
    DeviceName,
    Machine,
    NoFit,
    PerDevice,
    Plan,
    PlanOutcome,
    PlanRequest,
    Policy,
    PoolId,
)

PLENTY = 1 << 30
N_LAYERS = 5
SLOTS = N_LAYERS + 1  # the output counts as one more layer, which comes first
NOTHING_SET = Policy()
SMALL, LARGE = ("q4_0", "q4_0", "q4_0"), ("f32", "f32", "f32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFacts:
    """Return a model of equal layers."""
    return Layers((("f16", "f16", "f16"),) * N_LAYERS, "f16", 0).write(tmp_path_factory.mktemp("known") / "equal.gguf")


def cards(*sizes: int) -> Machine:
    devices = tuple(
        Device(DeviceName(f"CUDA{i}"), DeviceKind.CUDA, size, size, PoolId(f"p{i}"), overhead_bytes=0)
        for i, size in enumerate(sizes)
    )
    return Machine(devices, Device(HOST, DeviceKind.HOST, HOST_BYTES, HOST_BYTES, HOST_POOL), what_if=True)


def asked(
    model: ModelFacts, where: Machine, request: PlanRequest = REQUEST, policy: Policy = NOTHING_SET
) -> PlanOutcome:
    return search(model, request, where, policy, PINNED_BUILD)


def planned(model: ModelFacts, where: Machine, request: PlanRequest = REQUEST, policy: Policy = NOTHING_SET) -> Plan:
    outcome = asked(model, where, request, policy)
    assert isinstance(outcome, Plan)
    return outcome


def needed(model: ModelFacts, request: PlanRequest, n_cards: int) -> list[int]:
    """Return what each card needs for a pinned layout."""
    plan = planned(model, cards(*[PLENTY] * n_cards), request)
    return [usage.known_bytes for usage in plan.usages[:n_cards]]


@pytest.mark.parametrize("counts", [(1, 1), (2, 1), (1, 2), (2, 2), (3, 1), (3, 3), (1, 5)])
def test_what_two_cards_have_room_for_lies_on_them(model: ModelFacts, counts: tuple[int, int]) -> None:
    """Cards with room for just so many layers hold them, or what is faster still."""
    pinned = replace(REQUEST, n_gpu_layers=sum(counts), tensor_split=tuple(map(float, counts)))
    where = cards(*needed(model, pinned, 2))
    known, found = planned(model, where, pinned), planned(model, where)
    assert known.decode is not None
    assert found.decode is not None
    assert found.decode.tokens_per_second >= known.decode.tokens_per_second
    assert sum(usage.model.bytes or 0 for usage in found.usages[:2]) >= sum(
        usage.model.bytes or 0 for usage in known.usages[:2]
    )


@pytest.mark.parametrize("count", [0, *range(2, SLOTS + 1)])
def test_a_card_that_is_full_leaves_the_work_to_the_other(model: ModelFacts, count: int) -> None:
    """The output alone would be read faster there, but the way to the card and back costs more than that."""
    (room,) = needed(model, replace(REQUEST, n_gpu_layers=count), 1)
    plan = planned(model, cards(0, room))
    assert plan.placement.devices == (("CUDA1",) if count else ())
    assert plan.usages[0].known_bytes == 0


@pytest.mark.parametrize("first", [False, True])
def test_a_large_layer_goes_to_the_card_that_has_room_for_it(tmp_path: Path, *, first: bool) -> None:
    """Also where that is the second one, and the layer the first: llama.cpp is told another order of devices."""
    model = Layers((LARGE, SMALL, SMALL), "q4_0", 0).write(tmp_path / "uneven.gguf")
    large, small = needed(model, replace(REQUEST, n_gpu_layers="all", tensor_split=(1.0, 3.0)), 2)
    plan = planned(model, cards(large, small) if first else cards(small, large))
    names = [plan.placement.devices[index] for index in plan.placement.layer_devices]
    big, rest = ("CUDA0", "CUDA1") if first else ("CUDA1", "CUDA0")
    assert names == [big, rest, rest]


@pytest.mark.parametrize("n_gpu_layers, on_devices", [(0, 0), (1, 1), (2, 2), (SLOTS, SLOTS), (999, SLOTS)])
def test_so_many_layers_as_were_asked_for_go_to_two_cards_that_hold_no_more_each_than_half(
    model: ModelFacts, n_gpu_layers: int, on_devices: int
) -> None:
    """Neither more, where there is room, nor all on one card that has none for them."""
    half = max(needed(model, replace(REQUEST, n_gpu_layers="all", tensor_split=(1.0, 1.0)), 2))
    plan = planned(model, cards(half, half), replace(REQUEST, n_gpu_layers=n_gpu_layers))
    slots = [*plan.placement.layer_devices, plan.placement.output_device]
    assert sum(index >= 0 for index in slots) == on_devices
    assert len(plan.placement.devices) == (0 if not on_devices else 1 if on_devices <= SLOTS // 2 else 2)


def test_more_layers_than_there_is_room_for_are_refused_and_not_forced(model: ModelFacts) -> None:
    (room,) = needed(model, replace(REQUEST, n_gpu_layers=SLOTS - 1), 1)
    outcome = asked(model, cards(room), replace(REQUEST, n_gpu_layers=999))
    assert isinstance(outcome, NoFit)
    assert {near.change: near.fits for near in outcome.nearest}["-ngl auto"]


def test_without_a_card_nothing_is_held_on_one(model: ModelFacts) -> None:
    """An empty machine's answer is a plan on the CPU, with no compute buffer but the host's."""
    plan = planned(model, cards(), replace(REQUEST, n_gpu_layers=0))
    assert [usage.name for usage in plan.usages] == ["Host"]
    assert plan.usages[0].layers == tuple(range(N_LAYERS))


@pytest.mark.parametrize(
    "policy",
    [
        Policy(gpu_overhead=PerDevice(by_name=MappingProxyType({"CUDA0": 3 * PLENTY}))),
        Policy(
            max_vram=PerDevice(by_name=MappingProxyType({"CUDA0": PLENTY})),
            held=MappingProxyType({"CUDA0": 3 * PLENTY}),
        ),
        Policy(promised=MappingProxyType({"CUDA0": 3 * PLENTY})),
    ],
    ids=["reserve", "cap", "promise"],
)
def test_a_card_of_which_less_than_nothing_is_left_is_not_used(model: ModelFacts, policy: Policy) -> None:
    """Where a difference of unsigned numbers would be taken for a card of any size."""
    plan = planned(model, cards(PLENTY, PLENTY // 2), policy=policy)
    assert plan.usages[0].budget_bytes == -2 * PLENTY
    assert plan.placement.devices == ("CUDA1",)
    assert planned(model, cards(PLENTY), policy=policy).placement.devices == ()
