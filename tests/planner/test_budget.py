"""What a runner takes on a device beside llama.cpp's buffers: whose figure holds, and what it is said to be from."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import pytest
from machines import machine_of

from planner.budget import OVERHEAD_BYTES, overhead_bytes, with_overheads
from planner.types import DeviceKind, LearnedOverhead, PerDevice, Policy
from planner.units import MIB

LEARNED = MappingProxyType({"CUDA0": LearnedOverhead(700 * MIB, "qwen3-14b", "2026-11-20")})
TOLD = PerDevice(by_name=MappingProxyType({"CUDA0": 600 * MIB}))


@pytest.mark.parametrize(
    "policy, size_bytes, because",
    [
        (Policy(), OVERHEAD_BYTES[DeviceKind.CUDA], ""),
        (Policy(learned_overhead=LEARNED), 700 * MIB, "learned from an out-of-memory of qwen3-14b on 2026-11-20"),
        (Policy(device_overhead=TOLD), 600 * MIB, "it is the setting PLANNER_DEVICE_OVERHEAD"),
        (
            Policy(device_overhead=TOLD, learned_overhead=LEARNED),
            600 * MIB,
            "it is the setting PLANNER_DEVICE_OVERHEAD",
        ),
        (Policy(device_overhead=PerDevice(default=0)), 0, "it is the setting PLANNER_DEVICE_OVERHEAD"),
    ],
)
def test_the_operator_s_figure_comes_before_the_learned_one_and_that_before_the_built_in(
    policy: Policy, size_bytes: int, because: str
) -> None:
    first, _ = with_overheads(machine_of(DeviceKind.CUDA, 2), policy).devices
    assert (overhead_bytes(first), first.overhead_because) == (size_bytes, because)


@pytest.mark.parametrize("policy", [Policy(device_overhead=TOLD), Policy(learned_overhead=LEARNED)])
def test_a_figure_for_one_device_leaves_the_others_their_own(policy: Policy) -> None:
    machine = machine_of(DeviceKind.CUDA, 2)
    measured = replace(machine, devices=(machine.devices[0], replace(machine.devices[1], overhead_bytes=5 * MIB)))
    assert with_overheads(measured, policy).devices[1] == measured.devices[1]
    assert with_overheads(measured, policy).host == measured.host
