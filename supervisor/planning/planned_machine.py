"""The machine as a plan may count on it, and as it is shown: with what our runners hold taken off or given back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from planner.types import HOST, Device, DeviceKind, Machine, MemoryPool, PerDevice, Policy, PoolId
from supervisor.core.types import Cap

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


def with_margins(policy: Policy, machine: Machine, margins: Mapping[str, int]) -> Policy:
    """Return the policy that leaves these margins free beside what it leaves free already."""
    names = [str(device.name) for device in machine.devices if device.name in margins]
    overhead = {name: (policy.gpu_overhead.of(name) or 0) + margins[name] for name in names}
    promised = {**policy.promised, HOST: policy.promised.get(HOST, 0) + margins.get(HOST, 0)}
    return replace(
        policy,
        gpu_overhead=PerDevice(policy.gpu_overhead.default, {**policy.gpu_overhead.by_name, **overhead}),
        promised=promised,
    )


def capped(machine: Machine, policy: Policy, caps: Iterable[Cap]) -> tuple[Machine, Policy]:
    """Return the machine and the policy with which our runners stay below these caps."""
    for cap in caps:
        machine, policy = _below(machine, policy, cap)
    return machine, policy


def _below(machine: Machine, policy: Policy, cap: Cap) -> tuple[Machine, Policy]:
    """Return both with room for what the cap leaves: on each of its devices, and in the memory that they share.

    Where the host is among them that is the host's, of which what is beyond the cap counts as promised. Where nobody
    knows what is free there, that is what the cap leaves.
    """
    room = cap.most_bytes - sum(policy.held.get(name, 0) for name in cap.devices)
    promised = sum(policy.promised.get(name, 0) for name in cap.devices)
    most = dict(policy.max_vram.by_name)
    for name in {device.name for device in machine.devices} & cap.devices:
        here, before = room + policy.held.get(name, 0), policy.max_vram.of(name)
        most[name] = here if before is None else min(here, before)
    policy = replace(policy, max_vram=PerDevice(policy.max_vram.default, most))
    host = machine.host
    if HOST in cap.devices and host.free_bytes is not None:
        beyond = max(0, host.free_bytes - room - promised)
        return machine, replace(policy, promised={**policy.promised, HOST: policy.promised.get(HOST, 0) + beyond})
    if HOST in cap.devices:
        machine = replace(machine, host=replace(host, free_bytes=room + promised))
        return _with_at_most(machine, frozenset({host.pool}), room + promised), policy
    shared = {device.pool for device in machine.devices if device.name in cap.devices} if len(cap.devices) > 1 else ()
    return _with_at_most(machine, frozenset(shared), room + promised), policy


def _with_at_most(machine: Machine, shared: frozenset[PoolId], free_bytes: int) -> Machine:
    """Return the machine with no more than this free in these pools."""

    def limited(pool: MemoryPool) -> MemoryPool:
        least = free_bytes if pool.free_bytes is None else min(pool.free_bytes, free_bytes)
        return replace(pool, free_bytes=least) if pool.id in shared else pool

    return replace(machine, pools=tuple(map(limited, machine.pools)))


@dataclass(frozen=True, slots=True)
class Share:
    """What is free for some devices together, None where that is not known."""

    devices: frozenset[str]
    free_bytes: int | None


def shares(machine: Machine, name: str) -> tuple[Share, ...]:
    """Return what has to be free where a program wants memory of a device: there, and for all that share its memory.

    Where a device may have all of the memory that it shares, that alone decides. Raises KeyError.
    """
    device = machine.device(name)
    own = Share(frozenset({name}), device.free_bytes)
    behind = next((pool for pool in machine.pools if pool.id == device.pool), None)
    sharing = frozenset(str(one.name) for one in (*machine.devices, machine.host) if one.pool == device.pool)
    if behind is None or len(sharing) == 1:
        return (own,)
    is_part = None not in {device.total_bytes, behind.total_bytes} and device.total_bytes != behind.total_bytes
    return (*((own,) if is_part else ()), Share(sharing, behind.free_bytes))
