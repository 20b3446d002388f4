"""The host's memory: what the kernel says is available, within the limits of every control group above us.

``MemAvailable`` knows nothing of control groups, and llama.cpp's own figure for the CPU is all RAM; neither is used
alone.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from planner.types import HOST, HOST_POOL, Device, DeviceKind, MemoryPool
from planner.units import KIB

_SYSFS_CGROUP_TYPES: Final = frozenset({"cgroup", "cgroup2"})
# What "no limit" reads as under version 1: the largest page-aligned 63-bit number, on any page size.
_V1_NO_LIMIT: Final = 2**62
RUNNER_NAME: Final = "llama-server"  # comm, which the kernel cuts at 15 characters
_MAX_LEVELS: Final = 64  # deeper nesting than any system makes: the walk up is bounded


@dataclass(frozen=True, slots=True)
class HostMemory:
    """``total_bytes`` and ``available_bytes`` within every limit; ``limited_by`` names the group that binds, if one.

    Swap is told and never planned into. ``memlock_bytes`` None: no limit. ``numa_free_bytes`` has one figure per node.
    """

    total_bytes: int
    available_bytes: int
    limited_by: str | None = None
    swap_total_bytes: int | None = None
    swap_free_bytes: int | None = None
    memlock_bytes: int | None = None
    numa_free_bytes: tuple[int, ...] = ()
    has_hugepages: bool = False

    def without(self, mapped_bytes: int) -> HostMemory:
        """Return what is left beside weights that runners have mapped: the kernel calls their pages available."""
        return replace(self, available_bytes=max(self.available_bytes - mapped_bytes, 0))

    def device(self) -> Device:
        """Return the host as a device. It has no overhead: what llama-server takes there is all reported."""
        return Device(
            HOST,
            DeviceKind.HOST,
            total_bytes=self.total_bytes,
            free_bytes=self.available_bytes,
            pool=HOST_POOL,
            description="host memory" + (f", limited by {self.limited_by}" if self.limited_by else ""),
            overhead_bytes=0,
        )

    def pool(self) -> MemoryPool:
        """Return the pool that the host and every unified device share."""
        return MemoryPool(HOST_POOL, self.total_bytes, self.available_bytes)


def read(root: Path = Path("/"), *, process: str = "self") -> HostMemory:
    """Return the host's memory as a process in the control group of ``process`` can have it. ``root`` is for tests."""
    import psutil  # noqa: PLC0415 - 15 ms, paid where memory is really read

    # psutil's own way to read another tree.
    before, psutil.PROCFS_PATH = psutil.PROCFS_PATH, str(root / "proc")
    try:
        with warnings.catch_warnings():
            # A sandbox's /proc/meminfo lacks fields that nobody here asks for.
            warnings.simplefilter("ignore", RuntimeWarning)
            memory = psutil.virtual_memory()
    finally:
        psutil.PROCFS_PATH = before
    total, available, limited_by = memory.total, memory.available, None
    for folder, is_v2 in _levels(root, process):
        level = _level(folder, is_v2=is_v2)
        if level is None:
            continue
        limit, free = level
        total = min(total, limit)
        if free < available:
            available, limited_by = free, f"control group {'/' + str(folder.relative_to(root))}"
    meminfo = _meminfo(root)
    return HostMemory(
        total,
        max(available, 0),
        limited_by,
        swap_total_bytes=meminfo.get("SwapTotal"),
        swap_free_bytes=meminfo.get("SwapFree"),
        memlock_bytes=limit_of(process, "Max locked memory", root),
        numa_free_bytes=_numa_free(root),
        has_hugepages=meminfo.get("HugePages_Total", 0) > 0,
    )


def mapped_bytes(parent: int, root: Path = Path("/")) -> int:
    """Return the resident file pages of every llama-server that this process started: weights that it has mapped."""
    total = 0
    for file in sorted((root / "proc" / str(parent) / "task").glob("*/children")):
        for pid in "".join(_lines(file)).split():
            if process_name(int(pid), root) == RUNNER_NAME:
                status = "\n".join(_lines(root / "proc" / pid / "status"))
                total += sum(int(kib) * KIB for kib in re.findall(r"^RssFile:\s+(\d+) kB$", status, re.MULTILINE))
    return total


def _meminfo(root: Path) -> dict[str, int]:
    """Return the fields of /proc/meminfo: bytes where it says kB, else counts."""
    text = "\n".join(_lines(root / "proc/meminfo"))
    rows = re.findall(r"^(\w+):\s+(\d+)( kB)?$", text, re.MULTILINE)
    return {name: int(value) * (KIB if unit else 1) for name, value, unit in rows}


def limit_of(process: str, name: str, root: Path = Path("/")) -> int | None:
    """Return a process's soft limit by the kernel's name for it (/proc/PID/limits); None: unlimited, or not to be seen.

    What this process may lock or open, a runner that it starts may.
    """
    limits = "\n".join(_lines(root / "proc" / process / "limits"))
    found = re.search(rf"^{name}\s+(\d+)\s", limits, re.MULTILINE)
    return int(found.group(1)) if found else None


def _numa_free(root: Path) -> tuple[int, ...]:
    """Return what is free on each NUMA node, in the order of their numbers."""
    nodes = {}
    for file in (root / "sys/devices/system/node").glob("node[0-9]*/meminfo"):
        found = re.search(r"MemFree:\s+(\d+) kB", "\n".join(_lines(file)))
        if found:
            nodes[int(file.parent.name.removeprefix("node"))] = int(found.group(1)) * KIB
    return tuple(nodes[number] for number in sorted(nodes))


def process_name(pid: int, root: Path = Path("/")) -> str | None:
    """Return a process's short name, or None where it cannot be seen."""
    return next(iter(_lines(root / "proc" / str(pid) / "comm")), None)


def _levels(root: Path, process: str) -> list[tuple[Path, bool]]:
    """Return the folders of our memory control group and of all groups above it, and whether each is version 2."""
    levels: list[tuple[Path, bool]] = []
    for mount, mount_root, is_v2 in _mounts(root, process):
        path = _own_path(root, process, is_v2=is_v2)
        if path is None:
            continue
        # Inside a container the mount may show only a part of the hierarchy; what lies above it cannot be read.
        below = path.removeprefix(mount_root) if path.startswith(mount_root) else ""
        folder = root / mount.lstrip("/") / below.lstrip("/")
        top = root / mount.lstrip("/")
        for _ in range(_MAX_LEVELS):
            levels.append((folder, is_v2))
            if folder == top or top not in folder.parents:
                break
            folder = folder.parent
    return levels


def _mounts(root: Path, process: str) -> list[tuple[str, str, bool]]:
    """Return (mount point, its root in the hierarchy, version 2) of every hierarchy that may govern memory."""
    found = []
    for line in _lines(root / "proc" / process / "mountinfo"):
        fields, _, rest = line.partition(" - ")
        parts, kinds = fields.split(), rest.split()
        if len(parts) < 5 or len(kinds) < 3 or kinds[0] not in _SYSFS_CGROUP_TYPES:  # noqa: PLR2004 - proc(5)
            continue
        is_v2 = kinds[0] == "cgroup2"
        if is_v2 or "memory" in kinds[2].split(","):
            found.append((parts[4], parts[3], is_v2))
    return found


def _own_path(root: Path, process: str, *, is_v2: bool) -> str | None:
    for line in _lines(root / "proc" / process / "cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if (number == "0" and not controllers) if is_v2 else ("memory" in controllers.split(",")):
            return path
    return None


def _level(folder: Path, *, is_v2: bool) -> tuple[int, int] | None:
    """Return (limit, free) of one group, or None where it has no limit.

    Free counts reclaimable page cache, else one mapped model would look like memory in use for ever. Beyond
    ``memory.high`` a group is throttled, so it counts as a limit too.
    """
    names = ("memory.max", "memory.high") if is_v2 else ("memory.limit_in_bytes",)
    limits = [limit for name in names if (limit := _number(folder / name)) is not None and limit < _V1_NO_LIMIT]
    used = _number(folder / ("memory.current" if is_v2 else "memory.usage_in_bytes"))
    if not limits or used is None:
        return None
    prefix = "" if is_v2 else "total_"
    stat = dict(re.findall(r"^(\w+) (\d+)$", "\n".join(_lines(folder / "memory.stat")), re.MULTILINE))
    cache = sum(int(stat.get(prefix + name, 0)) for name in ("inactive_file", "active_file", "slab_reclaimable"))
    dirty = int(stat.get("file_dirty" if is_v2 else "total_dirty", 0))
    return min(limits), min(limits) - used + max(cache - dirty, 0)


def _number(path: Path) -> int | None:
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
