"""How much a plan may take on each device, what a candidate takes of it, and where that is too much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from planner.types.machine import Device, DeviceKind, Machine, PoolId
from planner.types.plan import Placement, Plan, Shortfall
from planner.types.request import Policy
from planner.types.usage import DeviceUsage, Figure, HostDetail
from planner.units import GIB, MIB, format_size

if TYPE_CHECKING:
    from planner.accounting import MemoryLedger

# What one process takes on a device beside llama.cpp's buffers: the driver's context with its kernels, cuBLAS's
# workspace (4 or 32 MiB), and the pool that grows with the first long prompt and is never given back. Contexts of
# 107 to 612 MiB were seen on CUDA, growing with the number of multiprocessors; a device that was measured says so in
# ``Device.overhead_bytes``. A remote worker's context is its own affair: it is part of what the worker reports as used.
OVERHEAD_BYTES: Final[Mapping[DeviceKind, int]] = MappingProxyType(
    {
        DeviceKind.CUDA: 512 * MIB,
        DeviceKind.ROCM: 512 * MIB,
        DeviceKind.SYCL: 512 * MIB,
        DeviceKind.VULKAN: 256 * MIB,
    }
)

# What stays free on the host where the search chooses how long a context is: llama-server itself, the drivers and
# whatever else runs there live beside what llama.cpp reports. As much as llama.cpp's own
# fit leaves free on a device (common/common.h, ``fit_params_target``), but no more than this part of a small machine.
HOST_RESERVE_BYTES: Final = GIB
HOST_RESERVE_PART: Final = 8


@dataclass(frozen=True, slots=True)
class Budgets:
    """Bytes that a plan may take, per device and per pool that several devices share. None: not known, so no limit."""

    by_name: Mapping[str, int | None]
    shared_pools: Mapping[PoolId, int]

    def of(self, name: str) -> int | None:
        """Return the budget of this device: signed, since more may be promised than is free."""
        return self.by_name[name]


def overhead_bytes(device: Device) -> int:
    """Return what a runner takes on this device beside what llama.cpp reports."""
    return OVERHEAD_BYTES.get(device.kind, 0) if device.overhead_bytes is None else device.overhead_bytes


def with_overheads(machine: Machine, policy: Policy) -> Machine:
    """Return the machine with the overhead that holds for each device, and why, ready to be planned for.

    The operator's figure comes first, then what was learned, then the device's own or its kind's.
    """
    return replace(machine, devices=tuple(_with_overhead(device, policy) for device in machine.devices))


def _with_overhead(device: Device, policy: Policy) -> Device:
    if (told := policy.device_overhead.of(device.name)) is not None:
        return replace(device, overhead_bytes=told, overhead_because="it is the setting PLANNER_DEVICE_OVERHEAD")
    if (learned := policy.learned_overhead.get(device.name)) is not None:
        because = f"learned from an out-of-memory of {learned.model} on {learned.day}"
        return replace(device, overhead_bytes=learned.size_bytes, overhead_because=because)
    return device


def budgets(machine: Machine, policy: Policy) -> Budgets:
    """Return min(free - promised - GPU_OVERHEAD, MAX_VRAM - held) per device; of the host, free - promised."""
    by_name: dict[str, int | None] = {device.name: _gpu_budget(device, policy) for device in machine.devices}
    host = machine.host
    by_name[host.name] = None if host.free_bytes is None else host.free_bytes - policy.promised.get(host.name, 0)
    return Budgets(by_name, _shared_pools(machine, policy))


def _gpu_budget(device: Device, policy: Policy) -> int | None:
    limits = []
    if device.free_bytes is not None:
        promised = policy.promised.get(device.name, 0)
        limits.append(device.free_bytes - promised - (policy.gpu_overhead.of(device.name) or 0))
    if (most := policy.max_vram.of(device.name)) is not None:
        limits.append(most - policy.held.get(device.name, 0))
    return min(limits, default=None)


def _shared_pools(machine: Machine, policy: Policy) -> dict[PoolId, int]:
    """Return what is free in each pool that more than one device draws from, promises taken off."""
    everyone = (*machine.devices, machine.host)
    shared = {}
    for pool in machine.pools:
        members = [device.name for device in everyone if device.pool == pool.id]
        if len(members) > 1 and pool.free_bytes is not None:
            shared[pool.id] = pool.free_bytes - sum(policy.promised.get(name, 0) for name in members)
    return shared


def usages(machine: Machine, placement: Placement, ledger: MemoryLedger, limits: Budgets) -> tuple[DeviceUsage, ...]:
    """Return what this candidate takes on every device of the machine, unused ones with zeros, and the host last."""
    rank = {name: index for index, name in enumerate(placement.devices)}
    rows = []
    for device in (*machine.devices, machine.host):
        is_host = device is machine.host
        index = -1 if is_host else rank.get(device.name)
        figures = ledger.elsewhere.get(device.name) if index is None else (*ledger.devices, ledger.host)[index]
        row = DeviceUsage(device.name, device.kind, device.total_bytes, device.free_bytes, limits.of(device.name))
        if figures is not None:
            row = replace(
                row,
                layers=tuple(il for il, where in enumerate(placement.layer_devices) if where == index),
                output=placement.output_device == index,
                model=figures.model,
                context=figures.context,
                compute=figures.compute,
                overhead_bytes=overhead_bytes(device),
                overhead_because=device.overhead_because,
                needed_bytes=_needed_bytes(ledger) if is_host else None,
                image_reserve_bytes=figures.image_reserve_bytes,
            )
        rows.append(row)
    return tuple(rows)


def host_bytes(context: Figure, compute: Figure, detail: HostDetail) -> int:
    """Return the bytes that the host must really have: what is known, but for what is mapped (page cache)."""
    weights = (detail.allocated_bytes, detail.pinned_bytes)
    parts = (*weights, context.bytes, compute.bytes, detail.output_buffer_bytes, detail.later_bytes)
    return sum(part or 0 for part in parts)


def _needed_bytes(ledger: MemoryLedger) -> int | None:
    """Return what the host's memory has to hold for nothing to be read from the disk again; None: what is planned."""
    resident_bytes = ledger.host_detail.resident_bytes
    if resident_bytes is None:
        return None
    return host_bytes(ledger.host.context, ledger.host.compute, ledger.host_detail) + resident_bytes


def host_reserve_bytes(budget_bytes: int) -> int:
    """Return what a context that the search chooses leaves free of this budget of the host's."""
    return min(HOST_RESERVE_BYTES, max(budget_bytes, 0) // HOST_RESERVE_PART)


def beyond_reserve(usage: DeviceUsage) -> int | None:
    """Return a device's headroom; of the host, what it has beyond its reserve."""
    if usage.headroom_bytes is None or usage.kind is not DeviceKind.HOST:
        return usage.headroom_bytes
    return usage.headroom_bytes - host_reserve_bytes(usage.budget_bytes or 0)


def host_warning(host: DeviceUsage, detail: HostDetail) -> str | None:
    """Return what a reader should know where a plan leaves too little of the host's memory, or None."""
    headroom, beyond = host.headroom_bytes, beyond_reserve(host)
    if headroom is None or beyond is None or beyond >= 0:
        return None
    ways = [
        ("a shorter --ctx-size", host.context.bytes),
        ("a smaller --cache-ram", detail.prompt_cache_bytes),
        ("fewer --ctx-checkpoints", detail.checkpoint_bytes),
    ]
    remedy = " or ".join(way for way, size_bytes in ways if size_bytes)
    if headroom < 0:
        mapped = format_size(detail.resident_bytes or 0)
        line = (
            f"the host lacks {format_size(-headroom)}: parts of the {mapped} that it uses of the mapped file are read "
            "again and again"
        )
    else:
        line = f"no more than {format_size(headroom)} of the host's memory is left for other programs"
    return f"{line}; {remedy} leaves more" if remedy else line


def shortfalls(
    machine: Machine, rows: tuple[DeviceUsage, ...], ledger: MemoryLedger, limits: Budgets
) -> tuple[Shortfall, ...]:
    """Return where the candidate needs more than there is: by device, the host by allocations only, then by pool.

    Where a figure is not known, the others alone have to fit.
    """
    needed = {row.name: row.claimed_bytes for row in rows if row.claimed_bytes and row.kind is not DeviceKind.HOST}
    needed[machine.host.name] = host_bytes(ledger.host.context, ledger.host.compute, ledger.host_detail)
    return short_of(machine, needed, limits)


def short_of(machine: Machine, needed: Mapping[str, int], limits: Budgets) -> tuple[Shortfall, ...]:
    """Return where more is needed than there is: by device, then by pool that several devices draw from."""
    short = [
        Shortfall(name, bytes_needed, limit)
        for name, bytes_needed in needed.items()
        if (limit := limits.of(name)) is not None and bytes_needed > limit
    ]
    for pool, limit in limits.shared_pools.items():
        members = [device.name for device in (*machine.devices, machine.host) if device.pool == pool]
        total = sum(needed.get(name, 0) for name in members)
        if total > max(limit, 0) and not any(cause.device in members for cause in short):
            short.append(Shortfall("+".join(members), total, limit))
    return tuple(short)


def taken_bytes(plan: Plan) -> dict[str, int]:
    """Return what has to be there for this plan on each device that it uses and on the host, mapped weights aside.

    Where llama.cpp itself is to place the model, it has its devices for itself.
    """
    taken = {}
    for usage in plan.usages:
        if usage.kind is DeviceKind.HOST:
            taken[usage.name] = host_bytes(usage.context, usage.compute, plan.host)
        elif plan.fit_by_llama and usage.name in plan.placement.devices:
            taken[usage.name] = max(usage.free_bytes or 0, usage.claimed_bytes)
        elif usage.claimed_bytes:
            taken[usage.name] = usage.claimed_bytes
    return taken
