"""The machine as a plan may count on it, and as it is shown: with what our runners hold taken off or given back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

from planner.types import Device, DeviceKind, Machine, MemoryPool, PoolId

Memory = TypeVar("Memory", Device, MemoryPool)


def emptied(machine: Machine, held: Mapping[str, int]) -> Machine:
    """Return the machine as if our runners were gone: devices and pools as they share them.

    A held worker's own figure is from before our runner had it already (see ``occupied``); the host's, from which one
    on this machine takes its memory, is from now.
    """
    given_back: Counter[PoolId] = Counter()
    for device in (*machine.devices, machine.host):
        if device.kind is not DeviceKind.RPC or device.pool == machine.host.pool:
            given_back[device.pool] += held.get(device.name, 0)
    return replace(
        machine,
        devices=tuple(
            device if device.kind is DeviceKind.RPC else _grown(device, given_back[device.pool])
            for device in machine.devices
        ),
        host=_grown(machine.host, given_back[machine.host.pool]),
        pools=tuple(_grown(pool, given_back[pool.id]) for pool in machine.pools),
    )


def occupied(machine: Machine, held: Mapping[str, int]) -> Machine:
    """Return the machine with what our runners hold taken off the RPC workers. Signed: it may be more than there was.

    A worker that serves cannot be asked, so its figure, and that of the memory behind it, is from before our runner had
    it. The host's, from which one on this machine takes its memory, is from now.
    """
    workers = [device for device in machine.devices if device.kind is DeviceKind.RPC]
    taken: Counter[PoolId] = Counter()
    for device in workers:
        if device.pool != machine.host.pool:
            taken[device.pool] += held.get(device.name, 0)
    pools = {pool.id: _less(pool, taken[pool.id]) for pool in machine.pools}

    def left(device: Device) -> Device:
        rest, behind = _less(device, held.get(device.name, 0)), pools.get(device.pool)
        if rest.free_bytes is None or behind is None or behind.free_bytes is None:
            return rest
        return replace(rest, free_bytes=min(rest.free_bytes, behind.free_bytes))

    devices = tuple(left(device) if device.kind is DeviceKind.RPC else device for device in machine.devices)
    return replace(machine, devices=devices, pools=tuple(pools.values()))


def _less(memory: Memory, taken: int) -> Memory:
    return memory if memory.free_bytes is None else replace(memory, free_bytes=memory.free_bytes - taken)


def _grown(memory: Memory, given_back: int) -> Memory:
    if memory.free_bytes is None:
        return memory
    free_bytes = memory.free_bytes + given_back
    return replace(memory, free_bytes=free_bytes if memory.total_bytes is None else min(free_bytes, memory.total_bytes))


def without(machine: Machine, leaves_out: Callable[[Device], bool], why_not: str) -> Machine:
    """Return the machine on which these devices, as ``leaves_out`` says, cannot be used, and why not."""
    return replace(
        machine,
        devices=tuple(
            replace(device, usable=False, why_not=why_not) if leaves_out(device) else device
            for device in machine.devices
        ),
    )
