"""RPC workers as devices: names as llama.cpp gives them, memory as far as it can be believed.

llama.cpp numbers the devices of all workers on ``--rpc`` through: RPC0, RPC1, ... (ggml-rpc.cpp,
ggml_backend_rpc_add_server). Only workers that answer are put there, so only they are numbered; the others are listed
as ``RPC[host:port]``, marked unusable.

A CPU worker reports the whole RAM of its machine as free, whatever is in use. One on this machine shares the host's
pool and its available memory; one elsewhere is believed with a warning, unless RPC_SERVERS caps it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Protocol

from gpu.card import Fault
from gpu.host import HostMemory
from gpu.rpc import Worker, WorkerState, probe_all
from planner.types import HOST_POOL, Device, DeviceKind, DeviceName, Machine, MemoryPool, PoolId


class RpcServer(Protocol):
    """A worker as the settings name it."""

    @property
    def endpoint(self) -> str:
        """Return ``host:port``."""
        ...

    @property
    def cap_bytes(self) -> int | None:
        """Return the most that may be used of each of its devices, None for no limit."""
        ...


@dataclass(frozen=True, slots=True)
class RpcDevices:
    """Devices of the workers that can be used, numbered through, and one placeholder for each that cannot.

    ``pools`` are the memories of other machines, of which several devices may be parts.
    """

    devices: tuple[Device, ...]
    absent: tuple[Device, ...]
    warnings: tuple[str, ...]
    workers: tuple[Worker, ...] = ()
    pools: tuple[MemoryPool, ...] = ()


def ask_workers(
    servers: Sequence[RpcServer],
    *,
    protocol: str | None,
    leased: frozenset[str] = frozenset(),
    before: Sequence[Worker] = (),
    insist: frozenset[str] = frozenset(),
) -> tuple[Worker, ...]:
    """Return what the workers answer that are not ``leased``, in order. Takes at most the probe's time limit.

    Those that kept silent ``before`` are left alone for a while and stay as they were, but for those that we ``insist``
    on.
    """
    endpoints = [server.endpoint for server in servers if server.endpoint not in leased]
    resting = {one.endpoint: one for one in before if one.is_resting and one.endpoint not in insist}
    asked = probe_all([endpoint for endpoint in endpoints if endpoint not in resting], protocol=protocol)
    told = resting | {worker.endpoint: worker for worker in asked}
    return _told_apart([told[endpoint] for endpoint in endpoints])


def rpc_devices(
    servers: Sequence[RpcServer],
    asked: Sequence[Worker],
    *,
    protocol: str | None,
    memory: HostMemory,
    known: Machine | None = None,
) -> RpcDevices:
    """Return the workers' devices, in the order of ``servers``.

    The devices of workers that were not ``asked``, since a runner of ours holds them, stay as they were ``known``,
    whoever else comes or goes: what runs there is known by their names. The others are numbered around them.
    """
    workers = {worker.endpoint: worker for worker in asked}
    before = () if known is None else known.devices
    kept = {
        server.endpoint: [device for device in before if device.endpoint == server.endpoint and device.usable]
        for server in servers
        if server.endpoint not in workers
    }
    taken = {device.name for devices in kept.values() for device in devices}
    free_names = (name for number in count() if (name := DeviceName(f"RPC{number}")) not in taken)
    pools = {} if known is None else {pool.id: pool for pool in known.pools}
    devices: list[Device] = []
    absent: list[Device] = []
    warnings: list[str] = []
    for server in servers:
        worker = workers.get(server.endpoint)
        if worker is None:
            devices += kept[server.endpoint]
        elif worker.state is WorkerState.READY:
            found = (_device(server, worker, index, memory) for index in range(len(worker.devices)))
            devices += (replace(device, name=next(free_names)) for device in found)
            pools |= {pool.id: pool for pool in _pools(worker)}
            warnings += _doubts(server, worker, protocol)
        else:
            absent.append(_placeholder(worker))
            warnings.append(f"RPC worker left out, its devices have no numbers: {worker.why_not}")
    behind = {device.pool for device in devices} - {HOST_POOL}
    shared = tuple(pool for pool in pools.values() if pool.id in behind)
    return RpcDevices(tuple(devices), tuple(absent), tuple(warnings), tuple(asked), shared)


def _told_apart(workers: Sequence[Worker]) -> tuple[Worker, ...]:
    """Return the workers, each but the first of one that is named twice (by name and by address) as unusable.

    It serves one client, and llama.cpp would be two and wait for itself.
    """
    first: dict[str, str] = {}
    told = []
    for worker in workers:
        same = first.setdefault(worker.address or worker.endpoint, worker.endpoint)
        if same == worker.endpoint:
            told.append(worker)
        else:
            why_not = Fault(f"{worker.endpoint} is the same worker as {same}", "take one of them out of RPC_SERVERS")
            told.append(replace(worker, state=WorkerState.INCOMPATIBLE, devices=(), why_not=why_not))
    return tuple(told)


def _device(server: RpcServer, worker: Worker, index: int, memory: HostMemory) -> Device:
    device = worker.devices[index]
    total, free = device.total_bytes, device.free_bytes
    here = device.is_cpu and worker.is_here
    if here:
        total, free = min(total, memory.total_bytes), min(free, memory.available_bytes)
    if server.cap_bytes is not None:
        total, free = min(total, server.cap_bytes), min(free, server.cap_bytes)
    return Device(
        name=DeviceName(""),
        kind=DeviceKind.RPC,
        total_bytes=total,
        free_bytes=free,
        pool=_pool_of(worker, index),
        description=f"{server.endpoint} ({'CPU' if device.is_cpu else 'GPU'} worker)",
        endpoint=server.endpoint,
        alignment_bytes=device.alignment_bytes,
        overhead_bytes=0,
    )


def _pool_of(worker: Worker, index: int) -> PoolId:
    """Two CPU workers on one machine hand out the same RAM; a worker's GPUs are pools of their own."""
    if not worker.devices[index].is_cpu:
        return PoolId(f"{worker.endpoint}/{index}")
    return HOST_POOL if worker.is_here else PoolId(f"host of {worker.endpoint.rpartition(':')[0]}")


def _pools(worker: Worker) -> list[MemoryPool]:
    """Return the memory behind each device: all of it, however little of it a device may use."""
    return [
        MemoryPool(_pool_of(worker, index), device.total_bytes, device.free_bytes)
        for index, device in enumerate(worker.devices)
    ]


def _doubts(server: RpcServer, worker: Worker, protocol: str | None) -> list[str]:
    """Return a line for each thing that is believed of a worker without knowing it."""
    doubts = []
    if protocol is None:
        doubts.append(
            f"RPC worker {worker.endpoint} speaks protocol {worker.protocol}, and of this llama-server it is not known "
            f"which it speaks: run ggml-rpc-server of its build there"
        )
    uncapped_cpu = any(device.is_cpu for device in worker.devices) and server.cap_bytes is None
    if uncapped_cpu and not worker.is_here:
        endpoint = server.endpoint
        doubts.append(
            f"RPC worker {endpoint} is a CPU and reports all RAM there as free: cap it, RPC_SERVERS={endpoint}=SIZE"
        )
    return doubts


def _placeholder(worker: Worker) -> Device:
    return Device(
        name=DeviceName(f"RPC[{worker.endpoint}]"),
        kind=DeviceKind.RPC,
        total_bytes=None,
        free_bytes=None,
        pool=PoolId(worker.endpoint),
        description=f"{worker.endpoint} ({worker.state})",
        endpoint=worker.endpoint,
        overhead_bytes=0,
        usable=False,
        why_not=str(worker.why_not),
    )
