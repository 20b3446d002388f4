"""What ``planner doctor`` looks at, read from trees of files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from file_trees import write_tree

from gpu import facts
from gpu.detect import detect
from gpu.facts import PciGpu
from planner.types import Device, DeviceKind, DeviceName, PoolId, ProcessUse

GIB = 1024**3


def test_the_surroundings_are_read_from_the_kernels_files(tmp_path: Path) -> None:
    gpu = "sys/bus/pci/devices/0000:01:00.0"
    write_tree(
        tmp_path,
        {
            "proc/meminfo": "MemTotal: 1024 kB\nMemFree: 1 kB\nMemAvailable: 512 kB\nBuffers: 0 kB\nCached: 0 kB",
            f"{gpu}/vendor": "0x10de",
            f"{gpu}/class": "0x030000",
            "sys/bus/pci/devices/0000:00:1f.0/vendor": "0x8086",
            "sys/bus/pci/devices/0000:00:1f.0/class": "0x060100",
            ".dockerenv": "",
            "dev/nvidiactl": "",
            "proc/self/limits": "Max open files            1024                 4096                 files",
            "proc/self/cgroup": "0::/system.slice/planner.service",
            "proc/900/cmdline": "/v/bin/python\0/v/bin/planner\0serve\0",
            "proc/900/limits": "Max open files            512                  512                  files",
            "proc/901/cmdline": "/usr/bin/vi\0planner\0",
            "proc/77/stat": "77 (llama server) S 900 77 77",
            "proc/77/cgroup": "0::/user.slice/user@0.service/app.slice/x.service",
        },
    )
    (tmp_path / "drivers/nouveau").mkdir(parents=True)
    (tmp_path / gpu / "driver").symlink_to(tmp_path / "drivers/nouveau")
    detected = detect(
        {"XDG_CACHE_HOME": str(tmp_path / "c"), "PATH": ""}, llama_server=tmp_path / "none", root=tmp_path
    )
    use = ProcessUse(77, "llama-server", GIB)
    held = Device(DeviceName("CUDA0"), DeviceKind.CUDA, GIB, GIB, PoolId("p"), processes=(use,))
    machine = replace(detected.machine, devices=(held,))
    found = facts.gather(replace(detected, machine=machine), {}, tmp_path)
    assert found.pci == (PciGpu("NVIDIA", "0000:01:00.0", "nouveau"),)
    assert found.in_container
    assert found.nodes == {"nvidiactl"}
    assert found.unit == "planner.service"
    assert [(one.who, one.open_files) for one in found.services] == [
        ("this process", 1024),
        ("planner serve (process 900)", 512),
    ]
    (holder,) = found.holders
    assert (holder.parent, holder.unit) == ("/v/bin/python /v/bin/planner serve", "x.service")


SERVES = "/v/bin/planner\0serve\0"
UNIFIED = "1 1 0:1 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw"
PIDS = "1 1 0:1 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids"


@pytest.mark.parametrize(
    "files,left,by",
    [
        ({"proc/900/limits": "Max processes  unlimited  unlimited  processes"}, None, None),
        (
            {
                "proc/900/cgroup": "0::/a/planner.service",
                "proc/900/mountinfo": UNIFIED,
                "sys/fs/cgroup/a/pids.max": "100",
                "sys/fs/cgroup/a/pids.current": "70",
                "sys/fs/cgroup/a/planner.service/pids.max": "40",
                "sys/fs/cgroup/a/planner.service/pids.current": "5",
            },
            30,
            "control group /sys/fs/cgroup/a",
        ),
        (
            {
                "proc/900/cgroup": "5:pids:/x\n0::/",
                "proc/900/mountinfo": PIDS,
                "sys/fs/cgroup/pids/x/pids.max": "9",
                "sys/fs/cgroup/pids/x/pids.current": "4",
                "sys/fs/cgroup/pids/pids.max": "max",
            },
            5,
            "control group /sys/fs/cgroup/pids/x",
        ),
        (
            {"proc/900/cgroup": "0::/a", "proc/900/mountinfo": UNIFIED, "sys/fs/cgroup/a/pids.max": "100"},
            None,
            None,
        ),
        (
            {
                "proc/900/limits": "Max processes  100  100  processes",
                "proc/900/status": "Uid:\t1000\t1000\nThreads:\t7",
                "proc/901/status": "Uid:\t1000\t1000\nThreads:\t13",
                "proc/902/status": "Uid:\t1001\t1001\nThreads:\t50",
            },
            80,
            "limit of processes for its user",
        ),
        (
            {
                "proc/900/limits": "Max processes  100  100  processes",
                "proc/900/status": "Uid:\t0\t0\nThreads:\t99",
            },
            None,
            None,
        ),
    ],
)
def test_how_many_threads_a_service_may_start_is_told_by_its_tightest_limit(
    tmp_path: Path, files: dict[str, str | int], left: int | None, by: str | None
) -> None:
    write_tree(tmp_path, {"proc/900/cmdline": SERVES} | files)
    detected = detect({"PATH": ""}, llama_server=tmp_path / "none", root=tmp_path)
    service = facts.gather(detected, {}, tmp_path).services[-1]
    assert service.who == "planner serve (process 900)"
    assert (service.threads.left, service.threads.by) == (left, by) if service.threads else left is None
