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

from gpu.host import HostMemory
from gpu.rpc import Worker, WorkerState, probe_all
from planner.types import HOST_POOL, Device, DeviceKind, DeviceName, PoolId


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
    """Devices of the workers that can be used, numbered through, and one placeholder for each that cannot."""

    devices: tuple[Device, ...]
    absent: tuple[Device, ...]
    warnings: tuple[str, ...]
    workers: tuple[Worker, ...] = ()


def rpc_devices(
    servers: Sequence[RpcServer],
    *,
    protocol: str | None,
    memory: HostMemory,
    leased: frozenset[str] = frozenset(),
    previous: Sequence[Device] = (),
) -> RpcDevices:
    """Return the workers' devices, in the order of ``servers``. Takes at most the probe's time limit.

    The devices of ``leased`` workers keep the names that they have in ``previous``, whoever else comes or goes: what
    runs there is known by them. The others are numbered around them.
    """
    kept = {endpoint: [one for one in previous if one.endpoint == endpoint and one.usable] for endpoint in leased}
    taken = {device.name for devices in kept.values() for device in devices}
    free_names = (name for number in count() if (name := DeviceName(f"RPC{number}")) not in taken)
    to_probe = [server.endpoint for server in servers if server.endpoint not in leased]
    workers = {worker.endpoint: worker for worker in _told_apart(probe_all(to_probe, protocol=protocol))}
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
            warnings += _doubts(server, worker, protocol)
        else:
            absent.append(_placeholder(worker))
            warnings.append(f"RPC worker left out: {worker.why_not}")
    return RpcDevices(tuple(devices), tuple(absent), tuple(warnings), tuple(workers.values()))


def _told_apart(workers: Sequence[Worker]) -> list[Worker]:
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
            why = f"{worker.endpoint} is the same worker as {same}: take one of them out of RPC_SERVERS"
            told.append(replace(worker, state=WorkerState.INCOMPATIBLE, devices=(), why_not=why))
    return told


def _device(server: RpcServer, worker: Worker, index: int, memory: HostMemory) -> Device:
    device = worker.devices[index]
    total, free = device.total_bytes, device.free_bytes
    here = device.is_cpu and worker.is_here
    if here:
        total, free = min(total, memory.total_bytes), min(free, memory.available_bytes)
    if server.cap_bytes is not None:
        total, free = min(total, server.cap_bytes), min(free, server.cap_bytes)
    host = server.endpoint.rpartition(":")[0]
    # Two CPU workers on one machine hand out the same RAM; a worker's GPUs are pools of their own.
    pool = HOST_POOL if here else PoolId(f"host of {host}") if device.is_cpu else None
    return Device(
        name=DeviceName(""),
        kind=DeviceKind.RPC,
        total_bytes=total,
        free_bytes=free,
        pool=pool or PoolId(f"{server.endpoint}/{index}"),
        description=f"{server.endpoint} ({'CPU' if device.is_cpu else 'GPU'} worker)",
        endpoint=server.endpoint,
        alignment_bytes=device.alignment_bytes,
        overhead_bytes=0,
    )


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
        why_not=worker.why_not,
    )
