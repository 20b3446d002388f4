"""NVIDIA's cards, through the real pynvml over a stub of the driver's library."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpu.card import Card, Vendor, cuda_overhead_bytes
from gpu.nvml import unless_taken
from planner.types import ProcessUse

MIB = 1024**2
GIB = 1024**3

RTX4090 = """card NVIDIA_GeForce_RTX_4090 GPU-aaaa 0 41 0
memory 25757220864 393216000 1073741824
capability 8 9
bus_bits 384
clock_mhz 10501
cores 16384
process 1 536870912
"""
RTX3060 = """card NVIDIA_GeForce_RTX_3060 GPU-bbbb 0 1 0
memory 12884901888 134217728 0
capability 8 6
bus_bits 192
clock_mhz 7501
cores 3584
"""
CODE = """
import dataclasses, json
from gpu import nvml
found = nvml.probe()
print(json.dumps(dataclasses.asdict(found) | {"warnings": found.warnings}))
"""

Ask = Callable[[str], dict[str, Any]]


@pytest.fixture
def ask(python: Callable[..., str], nvml_folder: Path, tmp_path: Path) -> Ask:
    """Return a function from the stub's fixture text to what the probe found."""

    def probe(text: str) -> dict[str, Any]:
        fixture = tmp_path / "nvml.txt"
        fixture.write_text(text)
        result: dict[str, Any] = json.loads(python(CODE, LD_LIBRARY_PATH=str(nvml_folder), FAKE_NVML=str(fixture)))
        return result

    return probe


def test_two_unequal_cards_are_listed_in_pci_order_with_what_is_free(ask: Ask) -> None:
    found = ask(RTX4090 + RTX3060)
    assert [card["name"] for card in found["cards"]] == ["NVIDIA GeForce RTX 3060", "NVIDIA GeForce RTX 4090"]
    assert [card["pci_bus_id"] for card in found["cards"]] == ["0000:01:00.0", "0000:41:00.0"]
    rtx4090 = found["cards"][1]
    assert rtx4090["total_bytes"] == 25757220864 - 393216000
    assert rtx4090["free_bytes"] == 25757220864 - 393216000 - GIB
    assert rtx4090["uuid"] == "GPU-aaaa"
    assert rtx4090["arch"] == "8.9"
    assert rtx4090["multiprocessors"] == 128
    assert rtx4090["bandwidth_bytes_per_s"] == pytest.approx(1008e9, rel=0.001)
    assert found["warnings"] == []


def test_the_processes_on_a_card_are_named(ask: Ask) -> None:
    (card,) = ask(RTX4090)["cards"]
    own_first = Path("/proc/1/comm").read_text().strip()
    assert card["processes"] == [{"pid": 1, "name": own_first, "used_bytes": 512 * MIB}]


def test_an_old_driver_without_the_second_memory_call_still_gives_what_is_free(ask: Ask) -> None:
    (card,) = ask(RTX3060 + "only_v1\n")["cards"]
    assert card["free_bytes"] == 12884901888 - 134217728


def test_a_lost_card_is_one_warning_and_the_others_go_on(ask: Ask) -> None:
    found = ask(RTX4090 + "error 15\n" + RTX3060)
    assert [card["uuid"] for card in found["cards"]] == ["GPU-bbbb"]
    (warning,) = found["warnings"]
    assert warning.startswith("NVIDIA card 0 is left out, the card has fallen off the bus: reboot")


def test_a_driver_that_was_upgraded_under_us_asks_for_a_reboot(ask: Ask) -> None:
    found = ask("init_error 18\n")
    assert found["cards"] == []
    assert "reboot" in found["warnings"][0]


def test_a_library_that_finds_no_driver_is_no_warning(ask: Ask) -> None:
    assert ask("init_error 12\n")["warnings"] == []


def test_a_unified_part_has_no_figure_of_its_own(ask: Ask) -> None:
    (card,) = ask("card NVIDIA_GB10 GPU-cccc f 1 0\ncapability 12 1\n")["cards"]
    assert card["unified"]
    assert card["total_bytes"] is None
    assert card["free_bytes"] is None
    assert card["pci_bus_id"] == "000f:01:00.0"


def test_a_unified_part_that_reports_too_little_is_not_believed(ask: Ask) -> None:
    (card,) = ask("card NVIDIA_N1X GPU-cccc f 1 0\nmemory 8589934592 0 0\n")["cards"]
    assert card["unified"]
    assert card["total_bytes"] is None


def test_missing_memory_on_any_other_card_is_unknown_and_not_unified(ask: Ask) -> None:
    (card,) = ask("card NVIDIA_RTX_9999 GPU-dddd 0 1 0\n")["cards"]
    assert not card["unified"]
    assert card["free_bytes"] is None


def test_a_wedged_driver_is_given_up_when_its_time_is_over(
    python: Callable[..., str], nvml_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "nvml.txt").write_text("hang\n")
    code = CODE.replace("probe()", "probe(timeout_s=0.1)")
    found = json.loads(python(code, LD_LIBRARY_PATH=str(nvml_folder), FAKE_NVML=str(tmp_path / "nvml.txt")))
    assert found["cards"] == []
    assert "no answer within 0.1 s" in found["warnings"][0]


def test_no_library_means_no_card_and_no_warning(python: Callable[..., str]) -> None:
    found = json.loads(python(CODE))
    assert found["cards"] == []
    assert found["warnings"] == []


def test_the_probe_leaves_pynvml_alone_where_there_is_no_driver(python: Callable[..., str]) -> None:
    assert python("import sys; from gpu import nvml; nvml.probe(); print('pynvml' in sys.modules)").strip() == "False"


@pytest.mark.parametrize("arch,multiprocessors,mib", [("8.9", 34, 110 + 4), ("12.0", 188, 555 + 32)])
def test_a_context_grows_with_the_card_as_it_was_measured(arch: str, multiprocessors: int, mib: int) -> None:
    overhead = cuda_overhead_bytes(arch, multiprocessors)
    assert overhead is not None
    assert overhead >= mib * MIB


def test_the_overhead_of_a_card_of_unknown_size_is_left_to_the_general_rule() -> None:
    assert cuda_overhead_bytes("8.9", None) is None


A100_DIVIDED = """card NVIDIA_A100-SXM4-80GB GPU-dddd 0 7 0
memory_error 4
capability 8 0
bus_bits 5120
clock_mhz 1593
mig
part 1 NVIDIA_A100-SXM4-80GB_MIG_3g.40gb MIG-1111 42278584320 30000000 0 42
part 3 NVIDIA_A100-SXM4-80GB_MIG_2g.20gb MIG-2222 20937965568 20000000 1000000000 28
"""


def test_of_a_divided_card_its_parts_are_listed_each_with_its_own_memory(ask: Ask) -> None:
    first, second = ask(A100_DIVIDED)["cards"]
    assert [part["uuid"] for part in (first, second)] == ["MIG-1111", "MIG-2222"]
    assert first["free_bytes"] == 42278584320 - 30000000
    assert second["free_bytes"] == 20937965568 - 20000000 - 1000000000
    assert (first["multiprocessors"], second["multiprocessors"]) == (42, 28)
    assert first["pci_bus_id"] == second["pci_bus_id"] == "0000:07:00.0"
    assert first["part_of"] == "GPU-dddd"


def test_a_divided_card_without_instances_is_one_fault_that_says_how_to_make_some(ask: Ask) -> None:
    found = ask(A100_DIVIDED.partition("part")[0] + RTX3060)
    assert [card["uuid"] for card in found["cards"]] == ["GPU-bbbb"]
    assert "nvidia-smi mig -i 0" in found["warnings"][0]


def test_a_card_that_may_not_be_opened_is_one_fault_and_the_others_go_on(ask: Ask) -> None:
    found = ask(RTX4090 + "error 4\n" + RTX3060)
    assert [card["uuid"] for card in found["cards"]] == ["GPU-bbbb"]
    assert "may not open the card" in found["warnings"][0]


def test_a_failure_that_passes_is_asked_about_once_more(ask: Ask) -> None:
    found = ask(RTX4090 + "transient 10\n")
    assert [card["uuid"] for card in found["cards"]] == ["GPU-aaaa"]
    assert found["warnings"] == []


def test_how_a_card_is_connected_and_used_is_told(ask: Ask) -> None:
    (card,) = ask(RTX4090 + "pcie 4 8 16\nnvlink 0 42 0\nnvlink 0 42 0\ndisplay 1\nnuma 1\n")["cards"]
    assert card["link"] == {
        "pcie_generation": 4,
        "pcie_lanes": 8,
        "pcie_lanes_max": 16,
        "nvlink_peers": ["0000:42:00.0"],
    }
    assert (card["drives_display"], card["numa_node"], card["compute_mode"]) == (True, 1, "default")
    assert card["driver"] == "580.65.06"
    assert card["reserved_bytes"] == 393216000


@pytest.mark.parametrize("mode,why", [(0, None), (2, "prohibited"), (3, None)])
def test_a_card_that_a_setting_closes_to_us_says_which(ask: Ask, mode: int, why: str | None) -> None:
    (card,) = ask(RTX4090 + f"compute_mode {mode}\n")["cards"]
    assert card["why_not"] is None if why is None else why in card["why_not"]["what"]


def test_an_exclusive_card_is_closed_to_us_while_another_program_has_it_and_not_while_our_own_runner_has() -> None:
    card = Card(
        Vendor.NVIDIA, "A card", None, compute_mode="exclusive", processes=(ProcessUse(7, "llama-server", None),)
    )
    assert "exclusive and process 7 (llama-server) has it" in str(unless_taken(card, frozenset()).why_not)
    assert unless_taken(card, frozenset({7})).why_not is None
    assert unless_taken(replace(card, processes=()), frozenset()).why_not is None
