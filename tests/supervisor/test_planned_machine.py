"""The machine as a plan may count on it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner.budget import budgets
from planner.types import HOST, HOST_POOL, Device, DeviceKind, DeviceName, Machine, MemoryPool, Policy, PoolId
from supervisor.core.types import Cap
from supervisor.planning.planned_machine import Share, capped, emptied, occupied, shares, without

HOST_DEVICE = Device(HOST, DeviceKind.HOST, 1000, 400, HOST_POOL)


def machine_of(*devices: Device) -> Machine:
    pools = {HOST_POOL: MemoryPool(HOST_POOL, 1000, 400)}
    for device in devices:
        pools.setdefault(device.pool, MemoryPool(device.pool, device.total_bytes, device.free_bytes))
    return Machine(devices, HOST_DEVICE, tuple(pools.values()))


def free(machine: Machine) -> tuple[dict[str, int | None], dict[str, int | None]]:
    """Return what is free by device and by pool."""
    devices = {str(device.name): device.free_bytes for device in (*machine.devices, machine.host)}
    return devices, {str(pool.id): pool.free_bytes for pool in machine.pools}


@pytest.mark.parametrize("held, expected", [(30, 80), (90, 100)])
def test_what_our_runners_hold_is_free_again_up_to_what_there_is(held: int, expected: int) -> None:
    card = Device(DeviceName("CUDA0"), DeviceKind.CUDA, 100, 50, PoolId("card"))
    devices, pools = free(emptied(machine_of(card), {"CUDA0": held, HOST: 10}))
    assert devices == {"CUDA0": expected, HOST: 410}
    assert pools == {"card": expected, HOST_POOL: 410}


def test_devices_of_one_pool_give_back_to_all_of_it() -> None:
    """An integrated GPU and the host draw from the same memory."""
    shared = Device(DeviceName("Vulkan0"), DeviceKind.VULKAN, 1000, 400, HOST_POOL)
    devices, pools = free(emptied(machine_of(shared), {"Vulkan0": 100, HOST: 50}))
    assert devices == {"Vulkan0": 550, HOST: 550}
    assert pools == {HOST_POOL: 550}


def test_a_worker_s_figure_is_from_before_its_lease_but_the_host_s_is_from_now() -> None:
    local = Device(DeviceName("RPC0"), DeviceKind.RPC, 200, 200, HOST_POOL, endpoint="127.0.0.1:1")
    remote = Device(DeviceName("RPC1"), DeviceKind.RPC, 200, 200, PoolId("far"), endpoint="10.0.0.2:1")
    devices, pools = free(emptied(machine_of(local, remote), {"RPC0": 70, "RPC1": 70}))
    assert devices == {"RPC0": 200, "RPC1": 200, HOST: 470}
    assert pools == {HOST_POOL: 470, "far": 200}


@pytest.mark.parametrize("held, left", [(70, 130), (230, -30)])
def test_what_a_runner_holds_of_a_worker_is_taken_off_its_figure_and_off_the_memory_behind_it_signed(
    held: int, left: int
) -> None:
    far = Device(DeviceName("RPC0"), DeviceKind.RPC, 200, 200, PoolId("far"), endpoint="10.0.0.2:1")
    beside = replace(far, name=DeviceName("RPC1"), endpoint="10.0.0.2:2")
    devices, pools = free(occupied(machine_of(far, beside), {"RPC0": held, HOST: 50}))
    assert devices == {"RPC0": left, "RPC1": left, HOST: 400}, "both draw from one memory"
    assert pools == {"far": left, HOST_POOL: 400}


def test_a_worker_of_this_machine_has_no_more_left_than_the_host_has_now() -> None:
    local = Device(DeviceName("RPC0"), DeviceKind.RPC, 900, 900, HOST_POOL, endpoint="127.0.0.1:1")
    card = Device(DeviceName("CUDA0"), DeviceKind.CUDA, 100, 50, PoolId("card"))
    devices, pools = free(occupied(machine_of(local, card), {"RPC0": 70, "CUDA0": 30}))
    assert devices == {"RPC0": 400, "CUDA0": 50, HOST: 400}
    assert pools == {HOST_POOL: 400, "card": 50}


def test_what_is_not_known_stays_unknown() -> None:
    card = Device(DeviceName("Vulkan0"), DeviceKind.VULKAN, None, None, PoolId("card"))
    silent = Device(DeviceName("RPC0"), DeviceKind.RPC, None, None, PoolId("far"), endpoint="10.0.0.2:1")
    assert emptied(machine_of(card), {"Vulkan0": 5}).devices == (card,)
    assert occupied(machine_of(card, silent), {"Vulkan0": 5, "RPC0": 5}).devices == (card, silent)


def test_who_wants_memory_of_a_device_wants_it_of_all_that_share_it_and_of_the_device_where_that_is_a_part() -> None:
    card = Device(DeviceName("CUDA0"), DeviceKind.CUDA, 100, 50, PoolId("card"))
    whole = Device(DeviceName("Vulkan0"), DeviceKind.VULKAN, 1000, 300, HOST_POOL)
    part = Device(DeviceName("RPC0"), DeviceKind.RPC, 200, 130, HOST_POOL, endpoint="127.0.0.1:1")
    there = machine_of(card, whole, part)
    all_of_it = Share(frozenset({"Vulkan0", "RPC0", HOST}), 400)
    assert shares(there, "CUDA0") == (Share(frozenset({"CUDA0"}), 50),)
    assert shares(there, "RPC0") == (Share(frozenset({"RPC0"}), 130), all_of_it)
    assert shares(there, "Vulkan0") == shares(there, HOST) == (all_of_it,)
    with pytest.raises(KeyError):
        shares(there, "CUDA7")


@pytest.mark.parametrize("devices", [frozenset({HOST}), frozenset({HOST, "Vulkan0"})])
def test_of_memory_of_which_nobody_knows_what_is_free_our_runners_may_have_what_a_cap_leaves(
    devices: frozenset[str],
) -> None:
    """And not all they like, nor nothing."""
    shared = Device(DeviceName("Vulkan0"), DeviceKind.VULKAN, None, None, HOST_POOL)
    unknown = Machine(
        (shared,), Device(HOST, DeviceKind.HOST, None, None, HOST_POOL), (MemoryPool(HOST_POOL, None, None),)
    )
    policy = Policy(held={HOST: 30, "Vulkan0": 20}, promised={HOST: 10})
    assert budgets(unknown, policy).of(HOST) is None
    limits = budgets(*capped(unknown, policy, [Cap(devices, 90)]))
    room = 90 - sum(policy.held[name] for name in devices)
    assert (limits.of(HOST), limits.shared_pools) == (room, {HOST_POOL: room})


def test_a_device_that_is_not_to_be_used_is_left_out_and_said_so() -> None:
    busy = Device(DeviceName("RPC0"), DeviceKind.RPC, 200, 200, PoolId("a"), endpoint="10.0.0.2:1")
    idle = replace(busy, name=DeviceName("RPC1"), endpoint="10.0.0.2:2")
    left_out = without(machine_of(busy, idle), lambda device: device.name == "RPC0", "it serves another")
    first, second = left_out.devices
    assert (first.usable, first.why_not) == (False, "it serves another")
    assert second == idle
