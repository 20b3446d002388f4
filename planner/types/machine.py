"""What there is: the devices, the memory behind them, and the llama.cpp that will use them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NewType

DeviceName = NewType("DeviceName", str)
PoolId = NewType("PoolId", str)
HOST: Final = DeviceName("Host")
HOST_POOL: Final = PoolId("host")


class DeviceKind(StrEnum):
    """What a device is, as far as llama.cpp's placement rules differ by it."""

    CUDA = "cuda"
    ROCM = "rocm"
    VULKAN = "vulkan"
    SYCL = "sycl"
    METAL = "metal"
    RPC = "rpc"
    HOST = "host"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class MemoryPool:
    """Memory that a budget belongs to. Two devices may share one (an APU and the host, two names for one card)."""

    id: PoolId
    total_bytes: int | None
    free_bytes: int | None


@dataclass(frozen=True, slots=True)
class ProcessUse:
    """What one process holds on a device, as the driver reports it."""

    pid: int
    name: str | None
    used_bytes: int | None


@dataclass(frozen=True, slots=True)
class Device:
    """One device as llama-server will see it, or the host.

    ``free_bytes`` leaves out what the driver reserves. ``endpoint`` is a worker's ``host:port`` (RPC kind only).
    ``alignment_bytes`` overrides the kind's rule where it is known (an RPC worker on CUDA aligns as CUDA does).
    """

    name: DeviceName
    kind: DeviceKind
    total_bytes: int | None
    free_bytes: int | None
    pool: PoolId
    description: str = ""
    uuid: str | None = None
    pci_bus_id: str | None = None
    bandwidth_bytes_per_s: int | None = None
    compute_capability: str | None = None
    endpoint: str | None = None
    alignment_bytes: int | None = None
    overhead_bytes: int | None = None  # what llama.cpp does not report; None: the kind's default
    overhead_because: str = ""  # where that figure comes from; empty: it is the built-in one
    usable: bool = True
    why_not: str | None = None
    processes: tuple[ProcessUse, ...] = ()
    exclusive: bool = False  # it takes one process at a time, as an RPC worker does


@dataclass(frozen=True, slots=True)
class Machine:
    """A snapshot of the devices, in the order llama-server will use, and of the host.

    ``what_if`` says that the devices were named by the user and need not exist here.
    """

    devices: tuple[Device, ...]
    host: Device
    pools: tuple[MemoryPool, ...] = ()
    warnings: tuple[str, ...] = ()
    looked_for: tuple[str, ...] = ()
    what_if: bool = False

    def device(self, name: str) -> Device:
        """Return the device of that name, the host included. Raises KeyError."""
        for device in (*self.devices, self.host):
            if device.name == name:
                return device
        raise KeyError(name)


@dataclass(frozen=True, slots=True)
class LlamaBuild:
    """The llama.cpp that will be launched. The formulas are exact for one commit (``planner.build.PINNED_COMMIT``).

    ``path`` is None where none is installed: plans are then made for the pinned build. ``cpu_features`` say which
    tensor types its CPU backend repacks (ggml-cpu/repack.cpp).
    """

    path: str | None
    version: str | None
    commit: str | None
    backends: frozenset[str] = frozenset()
    rpc_protocol: str | None = None
    cpu_features: frozenset[str] = frozenset()
    library_path: str | None = None
