"""The host's memory, through the real psutil over trees of /proc and of control groups."""

from __future__ import annotations

import tempfile
from pathlib import Path

import psutil
import pytest
from file_trees import write_tree
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu import host

GIB = 1024**3
KIB_PER_GIB = 1024**2


def _meminfo(total_gib: int, available_gib: int) -> str:
    rows = {
        "MemTotal": total_gib,
        "MemFree": available_gib // 2,
        "MemAvailable": available_gib,
        "Buffers": 0,
        "Cached": available_gib // 2,
        "SReclaimable": 0,
        "Shmem": 0,
        "Active": 0,
        "Inactive": 0,
        "Slab": 0,
    }
    return "\n".join(f"{name}: {gib * KIB_PER_GIB} kB" for name, gib in rows.items())


V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw"
V1_MOUNT = "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"


def _machine(root: Path, *, own: str, mount: str, files: dict[str, str | int]) -> host.HostMemory:
    proc: dict[str, str | int] = {
        "proc/meminfo": _meminfo(64, 48),
        "proc/self/cgroup": own,
        "proc/self/mountinfo": mount,
    }
    write_tree(root, proc | files)
    return host.read(root)


def test_without_limits_it_is_what_the_kernel_calls_available(tmp_path: Path) -> None:
    memory = _machine(tmp_path, own="0::/user.slice", mount=V2_MOUNT, files={})
    assert (memory.total_bytes, memory.available_bytes) == (64 * GIB, 48 * GIB)
    assert memory.limited_by is None


def test_a_limit_above_us_binds_as_well_as_our_own(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/system.slice"
    memory = _machine(
        tmp_path,
        own="0::/system.slice/planner.service",
        mount=V2_MOUNT,
        files={
            f"{group}/memory.max": 16 * GIB,
            f"{group}/memory.current": 10 * GIB,
            f"{group}/planner.service/memory.max": "max",
            f"{group}/planner.service/memory.current": GIB,
        },
    )
    assert (memory.total_bytes, memory.available_bytes) == (16 * GIB, 6 * GIB)
    assert memory.limited_by == "control group /sys/fs/cgroup/system.slice"


def test_page_cache_that_can_be_dropped_counts_as_free_but_not_while_it_is_dirty(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/a"
    stat = f"anon {GIB}\nfile {9 * GIB}\ninactive_file {6 * GIB}\nactive_file {3 * GIB}\nfile_dirty {GIB}"
    memory = _machine(
        tmp_path,
        own="0::/a",
        mount=V2_MOUNT,
        files={f"{group}/memory.max": 12 * GIB, f"{group}/memory.current": 10 * GIB, f"{group}/memory.stat": stat},
    )
    assert memory.available_bytes == 10 * GIB


def test_beyond_memory_high_a_group_is_throttled_so_it_is_a_limit(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/a"
    memory = _machine(
        tmp_path,
        own="0::/a",
        mount=V2_MOUNT,
        files={f"{group}/memory.max": 12 * GIB, f"{group}/memory.high": 8 * GIB, f"{group}/memory.current": 0},
    )
    assert (memory.total_bytes, memory.available_bytes) == (8 * GIB, 8 * GIB)


@pytest.mark.parametrize("limit,available", [(4 * GIB, 3 * GIB), (0x7FFFFFFFFFFFF000, 48 * GIB)])
def test_version_1_limits_bind_and_its_no_limit_does_not(tmp_path: Path, limit: int, available: int) -> None:
    group = "sys/fs/cgroup/memory/box"
    memory = _machine(
        tmp_path,
        own="4:memory:/box\n0::/",
        mount=V1_MOUNT,
        files={f"{group}/memory.limit_in_bytes": limit, f"{group}/memory.usage_in_bytes": GIB},
    )
    assert memory.available_bytes == available


def test_in_a_container_the_limit_is_read_at_the_mount_itself(tmp_path: Path) -> None:
    memory = _machine(
        tmp_path,
        own="0::/",
        mount=V2_MOUNT,
        files={"sys/fs/cgroup/memory.max": 2 * GIB, "sys/fs/cgroup/memory.current": 0},
    )
    assert memory.total_bytes == 2 * GIB


def test_a_group_over_its_limit_leaves_nothing_rather_than_less(tmp_path: Path) -> None:
    memory = _machine(
        tmp_path,
        own="0::/",
        mount=V2_MOUNT,
        files={"sys/fs/cgroup/memory.max": GIB, "sys/fs/cgroup/memory.current": 2 * GIB},
    )
    assert memory.available_bytes == 0


@settings(max_examples=25)  # each example is a tree of files
@given(limits=st.lists(st.integers(0, 96), min_size=1, max_size=4), used=st.integers(0, 96))
def test_one_more_limit_never_gives_more_memory(limits: list[int], used: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root, own, before = Path(folder), "", None
        for limit in limits:
            own += "/a"
            group: dict[str, str | int] = {
                f"sys/fs/cgroup{own}/memory.max": limit * GIB,
                f"sys/fs/cgroup{own}/memory.current": used * GIB,
            }
            now = _machine(root, own=f"0::{own}", mount=V2_MOUNT, files=group)
            assert 0 <= now.available_bytes <= now.total_bytes
            assert before is None or now.available_bytes <= before.available_bytes
            assert before is None or now.total_bytes <= before.total_bytes
            before = now


def test_hugepages_are_told_and_swap_is_never_planned_into(tmp_path: Path) -> None:
    more = "\nSwapTotal: 2048 kB\nSwapFree: 1024 kB\nHugePages_Total: 4"
    write_tree(tmp_path, {"proc/meminfo": _meminfo(64, 48) + more})
    memory = host.read(tmp_path)
    assert memory.has_hugepages
    assert memory.available_bytes == 48 * GIB


def test_weights_that_our_runners_have_mapped_are_not_available(tmp_path: Path) -> None:
    write_tree(
        tmp_path,
        {
            "proc/50/task/50/children": "61 62 ",
            "proc/50/task/51/children": "63",
            "proc/61/comm": "llama-server",
            "proc/61/status": "Name: llama-server\nRssAnon:\t1 kB\nRssFile:\t  4096 kB\n",
            "proc/62/comm": "python3",
            "proc/62/status": "RssFile: 8192 kB",
            "proc/63/comm": "llama-server",
            "proc/63/status": "RssFile: 1024 kB",
        },
    )
    assert host.mapped_bytes(host.runners(50, tmp_path), tmp_path) == 5 * 1024**2
    left = host.HostMemory(64 * GIB, 48 * GIB).without(5 * 1024**2)
    assert left.available_bytes == 48 * GIB - 5 * 1024**2
    assert host.runners(1234, tmp_path) == frozenset(), "a process that is gone"
    assert host.mapped_bytes([1234], tmp_path) == 0


def test_this_machine_has_no_more_than_the_kernel_says() -> None:
    memory = host.read()
    assert 0 < memory.available_bytes <= memory.total_bytes <= psutil.virtual_memory().total
    assert memory.device().kind == "host"
    assert memory.pool().free_bytes == memory.available_bytes
