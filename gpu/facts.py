"""What ``planner doctor`` looks at: one snapshot of the machine, its drivers, this process and its surroundings.

Everything is read here and judged in ``gpu.doctor``, so that each judgement can be tried on a snapshot made by hand.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Final

from gpu import control_groups, host
from gpu.card import Card, Fault, Probe
from gpu.control_groups import ThreadLimit
from gpu.detect import Detected
from gpu.host import HostMemory
from gpu.kernel_files import text
from gpu.rpc import Worker
from planner.types import LlamaBuild, Machine

_VENDORS: Final = {"0x10de": "NVIDIA", "0x1002": "AMD", "0x8086": "Intel"}
_GPU_CLASSES: Final = ("0x03", "0x12")  # display controllers, processing accelerators (PCI code and id assignment)
_NODES: Final = ("nvidiactl", "nvidia-uvm", "dxg", "kfd", "dri")
_CONTAINER_FILES: Final = (".dockerenv", "run/.containerenv")
_CONTAINER_VARIABLES: Final = ("container", "KUBERNETES_SERVICE_HOST")
MAX_PROCESSES: Final = 65536  # of a walk over /proc; the kernel's own default for the highest process id is half of it


@dataclass(frozen=True, slots=True)
class PciGpu:
    """A GPU as the bus shows it, driver or not."""

    vendor: str
    address: str
    driver: str | None


@dataclass(frozen=True, slots=True)
class Service:
    """A process that is, or would become, the service: what its limits allow. None: no limit.

    ``threads`` is how many more it may start, with what it starts.
    """

    who: str
    memlock_bytes: int | None
    open_files: int | None
    memory: HostMemory | None = None
    threads: ThreadLimit | None = None


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that holds memory on a device. ``parent`` is its parent's command, None where it has none but init."""

    device: str
    pid: int
    name: str | None
    used_bytes: int | None
    parent: str | None = None
    unit: str | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """The snapshot. ``nodes`` are the device files in /dev that are there, of those that matter.

    ``services`` are this process first, then every ``planner serve`` that runs. ``pynvml_shim`` is the file of a
    package that stands before or around NVIDIA's own.
    """

    machine: Machine
    build: LlamaBuild
    tried: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    nvidia: Probe = field(default_factory=Probe)
    amd: Probe = field(default_factory=Probe)
    cards: Mapping[str, Card] = field(default_factory=lambda: MappingProxyType({}))
    left_idle: Mapping[str, Fault] = field(default_factory=lambda: MappingProxyType({}))
    workers: tuple[Worker, ...] = ()
    memory: HostMemory | None = None
    pci: tuple[PciGpu, ...] = ()
    nodes: frozenset[str] = frozenset()
    in_container: bool = False
    unit: str | None = None
    environ: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    services: tuple[Service, ...] = ()
    n_cores: int = 1
    holders: tuple[Holder, ...] = ()
    pynvml_shim: str | None = None
    pynvml_shadow: str | None = None


def gather(detected: Detected, environ: Mapping[str, str], root: Path = Path("/")) -> Facts:
    """Return the snapshot of this moment. Raises nothing: what cannot be read is not in it."""
    shim, shadow = _pynvml()
    return Facts(
        machine=detected.machine,
        build=detected.llama.build,
        tried=detected.llama.tried,
        failed=detected.llama.failed,
        nvidia=detected.nvidia,
        amd=detected.amd,
        cards=detected.cards,
        left_idle=detected.left_idle,
        workers=detected.workers,
        memory=detected.memory,
        pci=_pci(root),
        nodes=frozenset(name for name in _NODES if (root / "dev" / name).exists()),
        in_container=any((root / name).exists() for name in _CONTAINER_FILES)
        or any(environ.get(name) for name in _CONTAINER_VARIABLES),
        unit=_unit("self", root),
        environ=environ,
        services=tuple(_services(root)),
        n_cores=len(os.sched_getaffinity(0)),
        holders=tuple(_holders(detected.machine, root)),
        pynvml_shim=shim,
        pynvml_shadow=shadow,
    )


def _pci(root: Path) -> tuple[PciGpu, ...]:
    found = []
    for device in sorted((root / "sys/bus/pci/devices").glob("*")):
        vendor = _VENDORS.get(text(device / "vendor"))
        if vendor is not None and text(device / "class").startswith(_GPU_CLASSES):
            driver = device / "driver"
            found.append(PciGpu(vendor, device.name, driver.resolve().name if driver.exists() else None))
    return tuple(found)


def _services(root: Path) -> Iterator[Service]:
    yield _service("self", "this process", root, with_memory=False)
    for pid in _pids(root):
        if re.search(r"\bplanner\0(?:.*\0)?serve\0?$", text(root / "proc" / pid / "cmdline")):
            yield _service(pid, f"planner serve (process {pid})", root, with_memory=True)


def _service(process: str, who: str, root: Path, *, with_memory: bool) -> Service:
    return Service(
        who,
        memlock_bytes=host.limit_of(process, "Max locked memory", root),
        open_files=host.limit_of(process, "Max open files", root),
        memory=host.read(root, process=process) if with_memory else None,
        threads=_threads_left(process, root),
    )


def _threads_left(process: str, root: Path) -> ThreadLimit | None:
    """Return the tighter of what control groups and RLIMIT_NPROC leave; the kernel counts that one by user."""
    limits = [control_groups.thread_limit(process, root)]
    most = host.limit_of(process, "Max processes", root)
    user = _status(process, "Uid", root)
    if most is not None and user not in {None, 0}:  # root is exempt
        running = (pid for pid in _pids(root) if _status(pid, "Uid", root) == user)
        used = sum(_status(pid, "Threads", root) or 0 for pid in running)
        limits.append(ThreadLimit(max(most - used, 0), "limit of processes for its user"))
    return min((limit for limit in limits if limit is not None), key=lambda limit: limit.left, default=None)


def _status(process: str, name: str, root: Path) -> int | None:
    """Return the first number of this line of /proc/PID/status."""
    found = re.search(rf"^{name}:\s+([0-9]{{1,20}})\b", text(root / "proc" / process / "status"), re.MULTILINE)
    return int(found.group(1)) if found else None


def _holders(machine: Machine, root: Path) -> Iterator[Holder]:
    for device in machine.devices:
        for process in device.processes:
            stat = text(root / f"proc/{process.pid}/stat").rpartition(")")[2].split()
            parent = stat[1] if len(stat) > 1 else "0"
            command = text(root / "proc" / parent / "cmdline").replace("\0", " ").strip() if parent not in "01" else ""
            unit = _unit(str(process.pid), root)
            yield Holder(device.name, process.pid, process.name, process.used_bytes, command or None, unit)


def _pids(root: Path) -> list[str]:
    try:
        names = [entry.name for entry in os.scandir(root / "proc") if entry.name.isdigit()]
    except OSError:
        return []
    return sorted(names, key=int)[:MAX_PROCESSES]


def _unit(process: str, root: Path) -> str | None:
    """Return the systemd service that a process belongs to, by its control group."""
    found = re.findall(r"/([^/\s]+\.service)(?:/|$)", text(root / "proc" / process / "cgroup"), re.MULTILINE)
    services = [name for name in found if not name.startswith("user@")]
    return services[-1] if services else None


def _pynvml() -> tuple[str | None, str | None]:
    """Return the deprecated distribution's hook, and a package that hides NVIDIA's module, where they are installed."""
    hook, module = find_spec("_pynvml_redirector"), find_spec("pynvml")
    shadow = module.origin if module is not None and (module.origin or "").endswith("__init__.py") else None
    return (None if hook is None else hook.origin), shadow
