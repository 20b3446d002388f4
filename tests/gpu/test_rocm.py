"""AMD's cards, from a tree of the kernel's files and through the real pyrsmi over a stub of AMD's library."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from file_trees import write_tree

from gpu import rocm, rocm_names
from gpu.card import Card

GIB = 1024**3
NODES = "sys/class/kfd/kfd/topology/nodes"


def _node(number: int, minor: int, location: int, **more: int) -> dict[str, str | int]:
    properties = {
        "cpu_cores_count": 0,
        "simd_count": 96,
        "drm_render_minor": minor,
        "location_id": location,
        "domain": 0,
        "gfx_target_version": 110000,
        "unique_id": 0,
    } | more
    return {
        f"{NODES}/{number}/properties": "\n".join(f"{name} {value}" for name, value in properties.items()),
        f"{NODES}/{number}/gpu_id": 1000 + number,
    }


def _device(minor: int, vram: int, used: int, gtt: int = GIB, gtt_used: int = 0) -> dict[str, str | int]:
    folder = f"sys/class/drm/renderD{minor}/device"
    return {
        f"{folder}/mem_info_vram_total": vram,
        f"{folder}/mem_info_vram_used": used,
        f"{folder}/mem_info_gtt_total": gtt,
        f"{folder}/mem_info_gtt_used": gtt_used,
    }


CPU_NODE: dict[str, str | int] = {f"{NODES}/0/properties": "cpu_cores_count 16\nsimd_count 0"}
TWO_CARDS = (
    CPU_NODE
    | _node(1, 128, 0x03 << 8, unique_id=0x1234)
    | _device(128, 24 * GIB, GIB)
    | {f"{NODES}/1/mem_banks/0/properties": "width 384\nmem_clk_max 10000"}
    | _node(2, 129, 0x44 << 8 | 2 << 3, gfx_target_version=90010)
    | _device(129, 16 * GIB, 0)
)


@pytest.fixture
def cards(tmp_path: Path) -> Callable[..., tuple[Card, ...]]:
    """Return a function from a tree of files to the cards found in it."""

    def find(files: dict[str, str | int], *, can_open: bool | None = True) -> tuple[Card, ...]:
        write_tree(tmp_path, files)
        return rocm.probe(tmp_path, can_open=can_open).cards

    return find


def test_cards_come_in_kfds_order_with_what_is_free(cards: Callable[..., tuple[Card, ...]]) -> None:
    first, second = cards(TWO_CARDS)
    assert (first.total_bytes, first.free_bytes) == (24 * GIB, 23 * GIB)
    assert (first.pci_bus_id, second.pci_bus_id) == ("0000:03:00.0", "0000:44:02.0")
    assert (first.arch, second.arch) == ("gfx1100", "gfx90a")
    assert (first.uuid, second.uuid) == ("GPU-0000000000001234", None)
    assert (first.bandwidth_bytes_per_s, second.bandwidth_bytes_per_s) == (960 * 10**9, None)


def test_an_apu_has_the_memory_that_the_kernel_lends_it_and_shares_the_hosts(
    cards: Callable[..., tuple[Card, ...]],
) -> None:
    tree = _node(1, 128, 0x600, cpu_cores_count=32) | _device(128, GIB // 2, 0, gtt=96 * GIB, gtt_used=6 * GIB)
    (card,) = cards(tree)
    assert card.unified
    assert (card.total_bytes, card.free_bytes) == (96 * GIB, 90 * GIB)


def test_a_small_carve_out_beside_much_shared_memory_is_an_apu_too(cards: Callable[..., tuple[Card, ...]]) -> None:
    (card,) = cards(_node(1, 128, 0x600) | _device(128, GIB, 0, gtt=16 * GIB))
    assert card.unified


def test_a_card_of_its_own_is_not_unified_however_much_memory_may_be_shared(
    cards: Callable[..., tuple[Card, ...]],
) -> None:
    (card,) = cards(_node(1, 128, 0x600) | _device(128, 24 * GIB, 0, gtt=128 * GIB))
    assert not card.unified


def test_a_card_that_this_process_may_not_open_says_so(cards: Callable[..., tuple[Card, ...]]) -> None:
    (card,) = cards(_node(1, 128, 0x300) | _device(128, GIB, 0), can_open=None)
    assert card.why_not is not None
    assert "/dev/kfd" in str(card.why_not)
    assert "render" in str(card.why_not)


def test_processes_that_hold_memory_are_listed(cards: Callable[..., tuple[Card, ...]]) -> None:
    processes: dict[str, str | int] = {
        "sys/class/kfd/kfd/proc/77/vram_1001": 5 * GIB,
        "sys/class/kfd/kfd/proc/78/vram_1002": GIB,
        "proc/77/comm": "trainer",
    }
    first, _ = cards(TWO_CARDS | processes)
    assert [(p.pid, p.name, p.used_bytes) for p in first.processes] == [(77, "trainer", 5 * GIB)]


def test_missing_files_leave_figures_unknown_and_no_card_out(cards: Callable[..., tuple[Card, ...]]) -> None:
    (card,) = cards(_node(1, 128, 0x300))
    assert card.total_bytes is None
    assert card.free_bytes is None


def test_a_driver_that_does_not_answer_is_given_up_and_named_and_not_waited_for_twice(tmp_path: Path) -> None:
    write_tree(tmp_path, _node(1, 128, 0x300))
    stuck = tmp_path / "sys/class/drm/renderD128/device/mem_info_vram_total"
    stuck.parent.mkdir(parents=True)
    os.mkfifo(stuck)  # whoever opens it for reading waits for a writer
    try:
        (fault,) = rocm.probe(tmp_path, can_open=True, timeout_s=0.1).faults
        assert "AMD: the driver's files gave no answer within 0.1 s" in fault.what
        again = rocm.probe(tmp_path, can_open=True, timeout_s=3600.0)
        assert again.cards == ()
    finally:
        stuck.open("w").close()


def test_a_machine_without_kfd_has_no_card_and_says_where_was_looked(tmp_path: Path) -> None:
    found = rocm.probe(tmp_path)
    assert found.cards == ()
    assert found.warnings == ()
    assert "not there" in found.looked_for[0]


def test_pyrsmi_gives_names_in_spite_of_handles_that_it_would_cut(rocm_path: Path) -> None:
    found = rocm_names.ask(os.environ | {"ROCM_PATH": str(rocm_path)})
    assert {pci: row["name"] for pci, row in found.items()} == {
        "0000:03:00.0": "AMD Radeon RX 7900 XTX",
        "0000:44:00.0": "AMD Radeon RX 7600 XT",
    }
    assert found["0000:03:00.0"]["total_bytes"] == 25753026560


def test_without_amds_library_pyrsmi_gives_nothing_and_no_error(tmp_path: Path) -> None:
    assert rocm_names.ask(os.environ | {"ROCM_PATH": str(tmp_path)}) == {}


def test_a_library_that_does_not_answer_is_given_up_when_its_time_is_over(rocm_path: Path) -> None:
    assert rocm_names.ask(os.environ | {"ROCM_PATH": str(rocm_path)}, timeout_s=0.0) == {}


def test_a_suspended_card_is_told_from_the_topology_and_not_read(cards: Callable[..., tuple[Card, ...]]) -> None:
    unread = {  # would the driver's files be read, the card would have these figures
        "sys/class/drm/renderD128/device/power/runtime_status": "suspended",
        f"{NODES}/1/mem_banks/0/properties": f"heap_type 1\nsize_in_bytes {24 * GIB}\nwidth 384\nmem_clk_max 10000",
    }
    (card,) = cards(_node(1, 128, 0x300) | _device(128, GIB, GIB) | unread)
    assert card.asleep
    assert (card.total_bytes, card.free_bytes) == (24 * GIB, 24 * GIB)


def test_partitions_of_one_card_share_its_memory_and_an_id_that_both_carry_names_neither(
    cards: Callable[..., tuple[Card, ...]],
) -> None:
    address = 0x05 << 8
    whole = {
        "sys/bus/pci/devices/0000:05:00.0/mem_info_vram_total": 192 * GIB,
        "sys/bus/pci/devices/0000:05:00.0/mem_info_vram_used": 2 * GIB,
        "sys/bus/pci/devices/0000:05:00.0/current_memory_partition": "NPS1",
    }
    second_on = 1 << 28  # the topology numbers partitions in the highest bits
    nodes = _node(1, 128, address, unique_id=7) | _node(2, 129, address | second_on, unique_id=7)
    first, second = cards(nodes | whole)
    assert first.pool == second.pool == "0000:05:00.0"
    assert first.free_bytes == second.free_bytes == 190 * GIB
    assert first.uuid is second.uuid is None


def test_where_the_memory_is_divided_too_each_partition_has_its_part(cards: Callable[..., tuple[Card, ...]]) -> None:
    bank = f"heap_type 1\nsize_in_bytes {48 * GIB}"
    files = {
        "sys/bus/pci/devices/0000:05:00.0/mem_info_vram_total": 192 * GIB,
        "sys/bus/pci/devices/0000:05:00.0/current_memory_partition": "NPS4",
        f"{NODES}/1/mem_banks/0/properties": bank,
        f"{NODES}/2/mem_banks/0/properties": bank,
    }
    first, second = cards(_node(1, 128, 0x500) | _node(2, 129, 0x500) | files)
    assert first.pool != second.pool
    assert (first.total_bytes, first.free_bytes) == (48 * GIB, None)


def test_what_the_driver_may_borrow_of_the_host_is_told_apart(cards: Callable[..., tuple[Card, ...]]) -> None:
    (card,) = cards(_node(1, 128, 0x300) | _device(128, 24 * GIB, 0, gtt=32 * GIB))
    assert (card.total_bytes, card.gtt_bytes) == (24 * GIB, 32 * GIB)
