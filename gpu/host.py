"""The host's memory: what the kernel says is available, within the limits of every control group above us.

``MemAvailable`` knows nothing of control groups, and llama.cpp's own figure for the CPU is all RAM; neither is used
alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from gpu import control_groups
from gpu.kernel_files import lines, number, text
from planner.types import HOST, HOST_POOL, Device, DeviceKind, MemoryPool
from planner.units import KIB

# What "no limit" reads as under version 1: the largest page-aligned 63-bit number, on any page size.
_V1_NO_LIMIT: Final = 2**62
RUNNER_NAME: Final = "llama-server"  # comm, which the kernel cuts at 15 characters


@dataclass(frozen=True, slots=True)
class HostMemory:
    """``total_bytes`` and ``available_bytes`` within every limit; ``limited_by`` names the group that binds, if one.

    Swap is no part of them.
    """

    total_bytes: int
    available_bytes: int
    limited_by: str | None = None
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
    meminfo = _meminfo(root)
    total, available = _whole(meminfo)
    limited_by = None
    for folder, is_v2 in control_groups.levels(root, process, "memory"):
        level = _level(folder, is_v2=is_v2)
        if level is None:
            continue
        limit, free = level
        total = min(total, limit)
        if free < available:
            available, limited_by = free, control_groups.name_of(folder, root)
    return HostMemory(
        total,
        max(available, 0),
        limited_by,
        has_hugepages=meminfo.get("HugePages_Total", 0) > 0,
    )


def _whole(meminfo: dict[str, int]) -> tuple[int, int]:
    """Return the host's memory and what is available of it, before any limit.

    Where /proc/meminfo is hidden, as in some sandboxes, the C library is asked. A kernel without ``MemAvailable`` is
    taken to have what is free and what it caches, as the kernel's own first formula had it.
    """
    total = meminfo.get("MemTotal") or _pages("SC_PHYS_PAGES")
    available = meminfo.get("MemAvailable")
    if available is None:
        parts = [meminfo[name] for name in ("MemFree", "Cached", "SReclaimable") if name in meminfo]
        available = sum(parts) - meminfo.get("Shmem", 0) if parts else _pages("SC_AVPHYS_PAGES")
    return total, max(min(available, total), 0)


def _pages(name: str) -> int:
    return max(os.sysconf(name), 0) * os.sysconf("SC_PAGE_SIZE")


def runners(parent: int, root: Path = Path("/")) -> frozenset[int]:
    """Return the process ids of every llama-server that this process started."""
    threads = root / "proc" / str(parent) / "task"
    children: set[int] = set()
    with suppress(OSError):  # it has ended
        for thread in os.listdir(threads):  # noqa: PTH208 - names only, and fast
            children.update(map(int, text(threads / thread / "children").split()))
    return frozenset(pid for pid in children if process_name(pid, root) == RUNNER_NAME)


def mapped_bytes(pids: Iterable[int], root: Path = Path("/")) -> int:
    """Return the resident file pages of these runners: weights that they have mapped."""
    total = 0
    for pid in pids:
        status = text(root / "proc" / str(pid) / "status")
        total += sum(int(kib) * KIB for kib in re.findall(r"^RssFile:\s+([0-9]{1,20}) kB$", status, re.MULTILINE))
    return total


def _meminfo(root: Path) -> dict[str, int]:
    """Return the fields of /proc/meminfo: bytes where it says kB, else counts."""
    rows = re.findall(r"^(\w+):\s+([0-9]{1,20})( kB)?\s*$", text(root / "proc/meminfo"), re.MULTILINE)
    return {name: int(value) * (KIB if unit else 1) for name, value, unit in rows}


def limit_of(process: str, name: str, root: Path = Path("/")) -> int | None:
    """Return a process's soft limit by the kernel's name for it (/proc/PID/limits); None: unlimited, or not to be seen.

    What this process may lock or open, a runner that it starts may.
    """
    limits = text(root / "proc" / process / "limits") + "\n"
    found = re.search(rf"^{name}\s+([0-9]{{1,20}})\s", limits, re.MULTILINE)
    return int(found.group(1)) if found else None


def process_name(pid: int, root: Path = Path("/")) -> str | None:
    """Return a process's short name, or None where it cannot be seen."""
    return next(iter(lines(root / "proc" / str(pid) / "comm")), None)


def _level(folder: Path, *, is_v2: bool) -> tuple[int, int] | None:
    """Return (limit, free) of one group, or None where it has no limit.

    Free counts reclaimable page cache, else one mapped model would look like memory in use for ever. Beyond
    ``memory.high`` a group is throttled, so it counts as a limit too.
    """
    names = ("memory.max", "memory.high") if is_v2 else ("memory.limit_in_bytes",)
    limits = [limit for name in names if (limit := number(folder / name)) is not None and limit < _V1_NO_LIMIT]
    if not limits:
        return None
    used = number(folder / ("memory.current" if is_v2 else "memory.usage_in_bytes"))
    if used is None:
        return min(limits), min(limits)  # no more is known than that it is no more
    prefix = "" if is_v2 else "total_"
    stat = dict(re.findall(r"^(\w+) ([0-9]{1,20})$", text(folder / "memory.stat"), re.MULTILINE))
    cache = sum(int(stat.get(prefix + name, 0)) for name in ("inactive_file", "active_file", "slab_reclaimable"))
    dirty = int(stat.get("file_dirty" if is_v2 else "total_dirty", 0))
    return min(limits), min(limits) - used + min(max(cache - dirty, 0), used)
