"""Machines that are odd in ways seen in the field: right devices in the right order, one line for each fault."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_server import CUDA_LIST, calls, environ_in, write_script, write_server
from file_trees import MEMINFO, host_tree, write_tree
from test_nvml import RTX3060, RTX4090
from test_rocm import CPU_NODE, NODES, _device, _node

from gpu import host, rocm
from gpu.detect import detect
from gpu.llama import parse_list
from gpu.matching import match
from planner.types import HOST_POOL

MIB = 1024**2
GIB = 1024**3
SHORT_S = 0.3  # for what never answers

LOOK = """
import json, os
from pathlib import Path
from gpu import detect, nvml, show
probe = nvml.probe
nvml.probe = lambda: probe(timeout_s=TIMEOUT)
found = detect.detect(os.environ, llama_server=Path(SERVER))
print(json.dumps(show.as_json(found.machine)))
"""


@pytest.fixture
def look(python: Callable[..., str], nvml_folder: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return a function from NVML's cards and a list of devices to what ``planner devices --json`` would show."""

    def devices(cards: str, listing: str = CUDA_LIST, *, timeout_s: float = 10.0, **variables: str) -> dict[str, Any]:
        server = write_server(tmp_path / "server", listing, backends=("cpu", "cuda"))
        (tmp_path / "nvml.txt").write_text(cards)
        code = LOOK.replace("SERVER", repr(str(server))).replace("TIMEOUT", str(timeout_s))
        stub = {"LD_LIBRARY_PATH": str(nvml_folder), "FAKE_NVML": str(tmp_path / "nvml.txt")}
        result: dict[str, Any] = json.loads(python(code, XDG_CACHE_HOME=str(tmp_path / "c"), **stub, **variables))
        return result

    return devices


def uuids(found: dict[str, Any], *, usable: bool = True) -> list[str | None]:
    """Return the cards that can be used, or those that cannot, in order."""
    return [one["uuid"] for one in found["devices"] if one["kind"] != "host" and one["usable"] is usable]


def alike(number: int, *more: str) -> str:
    """Return one of many cards of one kind, at a bus address of its own."""
    card = RTX3060.replace("GPU-bbbb 0 1 0", f"GPU-{number:04d} 0 {number + 1:x} 0")
    return card + "".join(f"{line}\n" for line in more)


def listing(n_devices: int, name: str = "NVIDIA GeForce RTX 3060") -> str:
    """Return what llama-server lists of so many cards of one kind."""
    lines = (f"  CUDA{number}: {name} (12160 MiB, 12000 MiB free)\n" for number in range(n_devices))
    return f"Available devices:\n{''.join(lines)}"


# ---------------------------------------------------------------------------------------------------------------------
# NVIDIA


def test_a_card_of_which_nothing_but_memory_is_told_is_used(look: Callable[..., dict[str, Any]]) -> None:
    found = look(RTX3060 + "unsupported\n", listing(1))
    (card, _) = found["devices"]
    assert (card["usable"], card["description"]) == (True, "NVIDIA GeForce RTX 3060")
    assert card["free_bytes"] == 12000 * MIB
    assert (card["uuid"], card["pci_bus_id"]) == (None, None)
    assert found["warnings"] == []


def test_two_cards_of_which_nothing_but_memory_is_told_stay_two(look: Callable[..., dict[str, Any]]) -> None:
    found = look((RTX3060 + "unsupported\n") * 2, listing(2))
    assert [one["name"] for one in found["devices"]] == ["CUDA0", "CUDA1", "Host"]
    assert len({one["pool"] for one in found["devices"]}) == 3, "each has memory of its own"


@pytest.mark.parametrize("answered", range(4))
def test_a_card_that_is_lost_while_it_is_asked_is_one_line_and_the_others_go_on(
    look: Callable[..., dict[str, Any]], answered: int
) -> None:
    found = look(alike(0, f"lost_after {answered}") + alike(1), listing(1))
    assert uuids(found) == ["GPU-0001"]
    (warning,) = found["warnings"]
    assert warning.startswith("NVIDIA card 0 is left out, the card has fallen off the bus: reboot")


def test_nine_cards_of_which_four_may_be_opened_are_four_and_one_line(look: Callable[..., dict[str, Any]]) -> None:
    cards = "".join(alike(number, *(["error 4"] if number > 3 else [])) for number in range(9))
    found = look(cards, listing(4))
    assert uuids(found) == ["GPU-0000", "GPU-0001", "GPU-0002", "GPU-0003"]
    (warning,) = found["warnings"]
    assert warning.startswith("NVIDIA cards 4, 5, 6, 7, 8 are left out, this service may not open the card")


@pytest.mark.parametrize("full", [0, 1])
def test_a_card_too_full_to_be_asked_by_llama_server_keeps_its_place_and_is_not_used(
    look: Callable[..., dict[str, Any]], full: int
) -> None:
    """Its memory is listed as nothing then (ggml_backend_cuda_device_get_memory); each is still taken for itself."""
    lines = listing(2).splitlines()
    lines[1 + full] = f"  CUDA{full}: NVIDIA GeForce RTX 3060 (0 MiB, 0 MiB free)"
    found = look(alike(0) + alike(1), "\n".join(lines))
    assert uuids(found) == ["GPU-0000", "GPU-0001"]
    there = found["devices"][full]
    assert (there["name"], there["free_bytes"]) == (f"CUDA{full}", 0)
    assert there["total_bytes"] == 12160 * MIB
    assert found["devices"][1 - full]["free_bytes"] == 12000 * MIB


def test_a_name_that_is_no_text_loses_no_card(look: Callable[..., dict[str, Any]]) -> None:
    found = look(RTX4090.replace("memory 25757220864", "bad_text\nmemory 25757220864"), listing(1, "NVIDIA X"))
    assert uuids(found) == ["GPU-aaaa"]
    assert found["warnings"] == []


def test_a_driver_that_hangs_in_the_middle_is_cut_off_and_named(look: Callable[..., dict[str, Any]]) -> None:
    found = look(RTX4090 + "hang_at_memory\n", listing(1, "NVIDIA GeForce RTX 4090"), timeout_s=SHORT_S)
    (warning,) = found["warnings"]
    assert warning.startswith("NVIDIA: the driver gave no answer within 0.3 s")
    assert found["devices"][0]["usable"], "llama-server still lists it"


def test_addresses_are_ordered_by_their_numbers(look: Callable[..., dict[str, Any]]) -> None:
    far, near = (RTX3060.replace("GPU-bbbb 0 1 0", where) for where in ("GPU-far 10000 1 0", "GPU-near 2000 1 0"))
    assert uuids(look(far + near, listing(2))) == ["GPU-near", "GPU-far"]


@pytest.mark.parametrize(
    "visible,expected",
    [
        ("GPU-0002", ["GPU-0002"]),
        ("GPU-0002,GPU-0000", ["GPU-0002", "GPU-0000"]),
        ("2,0", ["GPU-0002", "GPU-0000"]),
        ("gpu-0001", ["GPU-0001"]),
        (" 1 , 0 ", ["GPU-0001", "GPU-0000"]),
        ("1,-1,0", ["GPU-0001"]),
        ("1,NoDevFiles", ["GPU-0001"]),
        ("0,99999999999999999999", ["GPU-0000"]),
    ],
)
def test_a_restriction_that_the_operator_made_decides_who_is_who(
    look: Callable[..., dict[str, Any]], visible: str, expected: list[str]
) -> None:
    found = look(alike(0) + alike(1) + alike(2), listing(len(expected)), CUDA_VISIBLE_DEVICES=visible)
    assert uuids(found) == expected
    assert len(uuids(found, usable=False)) == 3 - len(expected)


@pytest.mark.parametrize("visible", ["", "-1", "GPU-", "void", "²"])
def test_a_restriction_that_names_no_card_hides_all_and_each_is_told_of(
    look: Callable[..., dict[str, Any]], visible: str
) -> None:
    found = look(alike(0) + alike(1), "Available devices:\n  (none)\n", CUDA_VISIBLE_DEVICES=visible)
    assert uuids(found, usable=False) == ["GPU-0000", "GPU-0001"]
    assert ["CUDA_VISIBLE_DEVICES" in warning for warning in found["warnings"]] == [True, True]


THREE_PARTS = """card NVIDIA_A100-SXM4-80GB GPU-dddd 0 7 0
memory_error 4
mig
part 0 NVIDIA_A100-SXM4-80GB_MIG_2g.20gb MIG-1 20000000000 100000000 0 28
part 2 NVIDIA_A100-SXM4-80GB_MIG_2g.20gb MIG-2 20000000000 100000000 19900000000 28
part 5 NVIDIA_A100-SXM4-80GB_MIG_2g.20gb MIG-3 20000000000 100000000 0 28
"""


def test_of_three_instances_the_full_one_has_nothing_free_and_keeps_its_place(
    look: Callable[..., dict[str, Any]],
) -> None:
    found = look(THREE_PARTS, listing(1, "NVIDIA A100-SXM4-80GB MIG 2g.20gb"), CUDA_VISIBLE_DEVICES="MIG-2")
    first, *_ = found["devices"]
    assert (first["uuid"], first["free_bytes"]) == ("MIG-2", 0)
    assert uuids(found, usable=False) == ["MIG-1", "MIG-3"]


def test_a_divided_card_that_is_named_as_a_whole_shows_its_first_instance(look: Callable[..., dict[str, Any]]) -> None:
    found = look(THREE_PARTS, listing(1, "NVIDIA A100-SXM4-80GB MIG 2g.20gb"), CUDA_VISIBLE_DEVICES="GPU-dddd")
    assert uuids(found) == ["MIG-1"]


@pytest.mark.parametrize("name", ["Orin", "NVIDIA Tegra X1", "NVIDIA Thor", "NVIDIA GB10"])
def test_a_unified_part_without_nvml_shares_the_hosts_memory_all_the_same(tmp_path: Path, name: str) -> None:
    server = write_server(tmp_path / "a", f"Available devices:\n  CUDA0: {name} (62841 MiB, 60000 MiB free)\n")
    (device,) = detect(environ_in(tmp_path), llama_server=server, root=host_tree(tmp_path / "root")).machine.devices
    assert device.pool == HOST_POOL
    assert device.free_bytes == 32 * GIB


# ---------------------------------------------------------------------------------------------------------------------
# AMD


@pytest.mark.parametrize(
    "text,free",
    [
        ("", None),
        ("-1", None),
        ("0x40000000", None),
        ("1e9", None),
        ("²", None),
        ("9" * 5000, None),
        ("1073741824 1", None),
        ("\x00", None),
        ("0", 24 * GIB),
        (str(25 * GIB), 0),
    ],
)
def test_a_figure_that_is_no_number_is_unknown_and_loses_no_card(tmp_path: Path, text: str, free: int | None) -> None:
    tree = _node(1, 128, 0x300) | _device(128, 24 * GIB, 0)
    write_tree(tmp_path, tree | {"sys/class/drm/renderD128/device/mem_info_vram_used": text})
    found = rocm.probe(tmp_path, can_open=True)
    assert [(card.total_bytes, card.free_bytes) for card in found.cards] == [(24 * GIB, free)]
    assert found.warnings == ()


@pytest.mark.parametrize("properties", ["", "simd_count -4", "simd_count " + "9" * 5000, "\x00\xff", "simd_count"])
def test_a_node_whose_properties_make_no_sense_is_no_card(tmp_path: Path, properties: str) -> None:
    write_tree(tmp_path, CPU_NODE | {f"{NODES}/1/properties": properties} | _node(2, 129, 0x400))
    assert [card.pci_bus_id for card in rocm.probe(tmp_path, can_open=True).cards] == ["0000:04:00.0"]


def test_a_node_that_may_not_be_read_hides_its_card_and_no_other(tmp_path: Path) -> None:
    write_tree(tmp_path, CPU_NODE | _node(2, 129, 0x400) | {f"{NODES}/1/gpu_id": 0})
    (tmp_path / NODES / "1/properties").mkdir()  # unreadable for root, too
    assert [card.pci_bus_id for card in rocm.probe(tmp_path, can_open=True).cards] == ["0000:04:00.0"]


def test_a_card_of_an_unknown_generation_is_matched_by_its_maker(tmp_path: Path) -> None:
    write_tree(tmp_path, _node(1, 128, 0x300, gfx_target_version=0) | _device(128, 24 * GIB, GIB))
    cards = rocm.probe(tmp_path, can_open=True).cards
    listed = parse_list("  ROCm0: AMD Radeon Graphics (24560 MiB, 24560 MiB free)\n")
    ((_, card),) = match(listed, cards, {})
    assert card is cards[0]
    assert card.arch is None


def _partitions(n_parts: int, mode: str) -> dict[str, str | int]:
    tree = CPU_NODE
    for part in range(n_parts):
        tree = tree | _node(1 + part, 128 + part, 0x300, gfx_target_version=90402)
        tree = tree | {f"{NODES}/{1 + part}/mem_banks/0/properties": f"heap_type 1\nsize_in_bytes {48 * GIB}"}
    folder = "sys/bus/pci/devices/0000:03:00.0"
    figures = {f"{folder}/mem_info_vram_total": 192 * GIB, f"{folder}/mem_info_vram_used": 8 * GIB}
    return tree | figures | {f"{folder}/current_memory_partition": mode}


@pytest.mark.parametrize("mode,n_pools,free_bytes", [("NPS1", 1, 184 * GIB), ("NPS4", 4, None)])
def test_partitions_of_one_card_share_its_memory_or_have_a_quarter_each(
    tmp_path: Path, mode: str, n_pools: int, free_bytes: int | None
) -> None:
    write_tree(tmp_path / "root", _partitions(4, mode) | {"proc/meminfo": MEMINFO, "dev/kfd": ""})
    for part in range(4):
        write_tree(tmp_path / "root", {f"dev/dri/renderD{128 + part}": ""})
    size = "196592 MiB, 196000" if mode == "NPS1" else "49152 MiB, 49000"
    lines = "".join(f"  ROCm{number}: AMD Instinct MI300X ({size} MiB free)\n" for number in range(4))
    server = write_server(tmp_path / "a", f"Available devices:\n{lines}", backends=("cpu", "hip"))
    machine = detect(environ_in(tmp_path), llama_server=server, root=tmp_path / "root").machine
    assert [device.name for device in machine.devices] == ["ROCm0", "ROCm1", "ROCm2", "ROCm3"]
    assert len({device.pool for device in machine.devices}) == n_pools
    (pool,) = {pool.free_bytes for pool in machine.pools if pool.id == machine.devices[0].pool}
    assert pool == (free_bytes or 49000 * MIB)


def test_an_apu_with_a_small_carve_out_beside_a_card_is_left_out_and_shares_the_hosts_memory(tmp_path: Path) -> None:
    apu = _node(2, 129, 0xC00, gfx_target_version=110501) | _device(129, 512 * MIB, 0, gtt=48 * GIB)
    card = _node(1, 128, 0x300) | _device(128, 24 * GIB, GIB)
    files: dict[str, str | int] = {"dev/kfd": "", "dev/dri/renderD128": "", "dev/dri/renderD129": ""}
    write_tree(tmp_path / "root", CPU_NODE | card | apu | files | {"proc/meminfo": MEMINFO})
    lines = """Available devices:
  ROCm0: AMD Radeon RX 7900 XTX (24560 MiB, 24560 MiB free)
  ROCm1: AMD Radeon 8060S (49152 MiB, 49000 MiB free)
"""
    server = write_server(tmp_path / "a", lines, backends=("cpu", "hip"))
    environ = environ_in(tmp_path) | {"HSA_OVERRIDE_GFX_VERSION": "11.0.0"}
    discrete, integrated = detect(environ, llama_server=server, root=tmp_path / "root").machine.devices
    assert (discrete.usable, integrated.usable) == (True, False)
    assert integrated.pool == HOST_POOL
    assert integrated.free_bytes == 32 * GIB, "no more than the host has"


@pytest.mark.parametrize(
    "gtt_gib,meminfo,listed_mib,total_gib,free_gib",
    [
        (96, MEMINFO, 98000, 64, 32),
        (20, MEMINFO, 98000, 20, 16),
        (96, MEMINFO, 8192, 64, 8),
        (96, f"{MEMINFO}\nHugePages_Total: 8", 8192, 64, 32),
    ],
    ids=["lent more than there is", "lent little", "seen less", "huge pages taken for all memory"],
)
def test_an_apu_alone_has_the_least_of_what_is_lent_what_is_there_and_what_llama_server_sees(
    tmp_path: Path, gtt_gib: int, meminfo: str, listed_mib: int, total_gib: int, free_gib: int
) -> None:
    apu = _node(1, 128, 0x600) | _device(128, 512 * MIB, 0, gtt=gtt_gib * GIB, gtt_used=4 * GIB)
    files: dict[str, str | int] = {"dev/kfd": "", "dev/dri/renderD128": "", "proc/meminfo": meminfo}
    write_tree(tmp_path / "root", CPU_NODE | apu | files)
    listed = f"Available devices:\n  ROCm0: AMD Radeon 8060S (98304 MiB, {listed_mib} MiB free)\n"
    server = write_server(tmp_path / "a", listed, backends=("cpu", "hip"))
    (device,) = detect(environ_in(tmp_path), llama_server=server, root=tmp_path / "root").machine.devices
    assert (device.pool, device.total_bytes, device.free_bytes) == (HOST_POOL, total_gib * GIB, free_gib * GIB)


# ---------------------------------------------------------------------------------------------------------------------
# The host


@pytest.mark.parametrize(
    "meminfo,available",
    [
        ("MemTotal: 67108864 kB\nMemAvailable: 99999999999 kB", 64 * GIB),
        ("MemTotal: 67108864 kB\nMemFree: 1048576 kB\nCached: 2097152 kB\nShmem: 1048576 kB", 2 * GIB),
        ("MemTotal: 67108864 kB\nMemFree: 1048576 kB\nMemAvailable: lots\nCached: 0 kB", GIB),
        ("MemTotal: 67108864 kB\nMemAvailable: -5 kB\nMemFree: 1048576 kB", GIB),
        ("\x00\xffgarbage\nMemTotal: 67108864 kB\r\nMemAvailable: 1048576 kB\r", GIB),
    ],
)
def test_an_odd_meminfo_is_read_as_far_as_it_makes_sense(tmp_path: Path, meminfo: str, available: int) -> None:
    memory = host.read(host_tree(tmp_path / "root", **{"proc/meminfo": meminfo}))
    assert (memory.total_bytes, memory.available_bytes) == (64 * GIB, available)


@pytest.mark.parametrize("meminfo", [None, "", "nonsense", "MemTotal: " + "9" * 5000 + " kB"])
def test_where_proc_is_hidden_the_c_library_tells(tmp_path: Path, meminfo: str | None) -> None:
    if meminfo is not None:
        write_tree(tmp_path, {"proc/meminfo": meminfo})
    memory = host.read(tmp_path)
    assert memory.total_bytes == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < memory.available_bytes <= memory.total_bytes


GROUP = "sys/fs/cgroup/a/b"
V2 = {"proc/self/cgroup": "0::/a/b", "proc/self/mountinfo": "1 1 0:1 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw"}


@pytest.mark.parametrize(
    "files,available",
    [
        ({f"{GROUP}/memory.max": "max", f"{GROUP}/memory.high": "max", f"{GROUP}/memory.current": 5}, 32 * GIB),
        ({f"{GROUP}/memory.max": 8 * GIB}, 8 * GIB),
        ({f"{GROUP}/memory.max": 8 * GIB, f"{GROUP}/memory.current": "max"}, 8 * GIB),
        ({f"{GROUP}/memory.max": 8 * GIB, f"{GROUP}/memory.current": 9 * GIB}, 0),
        ({f"{GROUP}/memory.max": "-1", f"{GROUP}/memory.high": 6 * GIB, f"{GROUP}/memory.current": GIB}, 5 * GIB),
        ({f"{GROUP}/memory.low": GIB, f"{GROUP}/memory.min": GIB, f"{GROUP}/memory.current": GIB}, 32 * GIB),
        ({"sys/fs/cgroup/a/memory.max": 4 * GIB, "sys/fs/cgroup/a/memory.current": GIB}, 3 * GIB),
        (
            {
                f"{GROUP}/memory.max": 8 * GIB,
                f"{GROUP}/memory.current": GIB,
                f"{GROUP}/memory.stat": f"inactive_file {99 * GIB}",
            },
            8 * GIB,
        ),
        ({f"{GROUP}/memory.max": "²"}, 32 * GIB),
    ],
)
def test_a_group_leaves_what_its_numbers_say(tmp_path: Path, files: dict[str, str | int], available: int) -> None:
    write_tree(tmp_path, {"proc/meminfo": MEMINFO} | V2 | files)
    assert host.read(tmp_path).available_bytes == available


def test_a_mount_table_and_a_group_that_make_no_sense_limit_nothing(tmp_path: Path) -> None:
    odd = {"proc/self/cgroup": "0::/../../x\n::\nnonsense", "proc/self/mountinfo": "1\n - \n1 1 0:1 / - cgroup2 x y"}
    write_tree(tmp_path, {"proc/meminfo": MEMINFO} | odd)
    assert host.read(tmp_path).available_bytes == 32 * GIB


# ---------------------------------------------------------------------------------------------------------------------
# All at once


def test_a_machine_where_everything_is_odd_is_still_a_machine(tmp_path: Path) -> None:
    write_tree(tmp_path / "root", {f"{NODES}/x/properties": "simd_count 4", f"{NODES}/1/properties": "simd_count 4"})
    script = write_script(tmp_path, f"echo $1 >> {tmp_path}/calls; kill -{signal.SIGABRT.value} $$")
    found = detect({"PATH": ""}, llama_server=script, root=tmp_path / "root")
    (card,) = found.machine.devices
    assert not card.usable
    assert "no llama-server found" in str(card.why_not) or "may not open" in str(card.why_not)
    assert found.machine.host.free_bytes
    assert calls(tmp_path) == ["--version"]
