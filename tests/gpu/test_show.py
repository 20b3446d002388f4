"""The table of ``planner devices``, as a person sees it."""

from __future__ import annotations

from dataclasses import replace

from gpu import show, whatif
from gpu.card import Card, Link, Vendor
from planner.types import Device, DeviceKind, DeviceName, Machine, PoolId, ProcessUse

GIB = 1024**3

CARD = Card(
    Vendor.NVIDIA, "NVIDIA GeForce RTX 4090", "0000:41:00.0", arch="8.9", link=Link(4, 16, 16), drives_display=True
)
CUDA0 = Device(
    DeviceName("CUDA0"),
    DeviceKind.CUDA,
    24 * GIB,
    23 * GIB,
    PoolId("p"),
    "NVIDIA GeForce RTX 4090",
    bandwidth_bytes_per_s=1008 * 10**9,
    processes=(ProcessUse(7, "Xorg", GIB), ProcessUse(8, None, None)),
)
LOST = Device(
    DeviceName("RPC[10.0.0.2:50052]"),
    DeviceKind.RPC,
    None,
    None,
    PoolId("w"),
    "10.0.0.2:50052 (unreachable)",
    usable=False,
    why_not="cannot connect to 10.0.0.2:50052 (Connection refused): start ggml-rpc-server there",
)
HOST = whatif.machine(host_memory_bytes=64 * GIB).host
MACHINE = Machine((CUDA0, LOST), HOST, warnings=("the driver is old", f"left out: {LOST.why_not}"))


def test_at_80_columns_names_and_figures_stay_whole() -> None:
    assert show.as_text(MACHINE, {"CUDA0": CARD}, 80).splitlines() == [
        "device                   free     total  bandwidth  description",
        "CUDA0                23.0 GiB  24.0 GiB  1008 GB/s  NVIDIA GeForce RTX 4090",
        "                     held by process 7 (Xorg): 1.0 GiB",
        "                     held by process 8 (not to be seen from here): ?",
        "RPC[10.0.0.2:50052]         ?         ?          ?  10.0.0.2:50052 (unreachable)",
        "                     not used: cannot connect to 10.0.0.2:50052 (Connection",
        "                       refused): start ggml-rpc-server there",
        "Host                 64.0 GiB  64.0 GiB          ?  host memory",
        "",
        "warning: the driver is old",
    ]


def test_at_120_columns_there_is_room_for_how_a_card_is_connected() -> None:
    (line,) = (line for line in show.as_text(MACHINE, {"CUDA0": CARD}, 120).splitlines() if "CUDA0" in line)
    assert line.endswith("NVIDIA GeForce RTX 4090, at 0000:41:00.0, compute 8.9, PCIe 4 x16")


def test_no_line_of_the_table_is_wider_than_the_terminal() -> None:
    named = replace(CUDA0, description="A name of a card that is longer than any that a vendor ever printed on one")
    for columns in (66, 80, 100, 120):
        text = show.as_text(replace(MACHINE, devices=(named, LOST)), {"CUDA0": CARD}, columns)
        assert max(map(len, text.splitlines())) <= columns


def test_devices_that_share_one_memory_say_so() -> None:
    both = (replace(CUDA0, processes=()), replace(CUDA0, name=DeviceName("CUDA1"), processes=()))
    text = show.as_text(Machine(both, HOST))
    assert text.count("CUDA0 and CUDA1 share one memory") == 1
    unified = show.as_text(whatif.machine([], ["gb10"]))
    assert "its memory is the host's" in unified


def test_without_a_gpu_it_is_said_where_was_looked() -> None:
    text = show.as_text(replace(whatif.machine(host_memory_bytes=GIB), looked_for=("NVIDIA: libnvidia-ml.so.1",)))
    assert text.splitlines()[-2:] == ["No GPU found. Looked for:", "  NVIDIA: libnvidia-ml.so.1"]
