"""Which card is which of llama-server's devices."""

from __future__ import annotations

import pytest

from gpu.card import Card, Vendor
from gpu.llama import ListedDevice, parse_list
from gpu.matching import match, unmatched, visible_cuda, visible_hip


def _card(name: str, uuid: str, vendor: Vendor = Vendor.NVIDIA) -> Card:
    return Card(vendor, name, pci_bus_id=None, uuid=uuid)


ALIKE = [_card("NVIDIA GeForce RTX 3090", "GPU-1"), _card("NVIDIA GeForce RTX 3090", "GPU-2")]


@pytest.mark.parametrize(
    "variable,expected",
    [
        (None, ["GPU-1", "GPU-2"]),
        ("1,0", ["GPU-2", "GPU-1"]),
        ("GPU-2", ["GPU-2"]),
        ("", []),
        ("-1,0", []),
        ("0,7,1", ["GPU-1"]),
        ("0,0", ["GPU-1"]),
        ("GPU-", []),
    ],
)
def test_cuda_shows_what_its_variable_names_until_the_first_bad_entry(
    variable: str | None, expected: list[str]
) -> None:
    environ = {} if variable is None else {"CUDA_VISIBLE_DEVICES": variable}
    assert [card.uuid for card in visible_cuda(ALIKE, environ)] == expected


@pytest.mark.parametrize(
    "environ,expected",
    [
        ({"ROCR_VISIBLE_DEVICES": "1"}, ["GPU-2"]),
        ({"ROCR_VISIBLE_DEVICES": "1,0", "HIP_VISIBLE_DEVICES": "1"}, ["GPU-1"]),
        ({"CUDA_VISIBLE_DEVICES": "1"}, ["GPU-2"]),
        ({"CUDA_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "0"}, ["GPU-1"]),
        ({"CUDA_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": ""}, ["GPU-2"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, ["GPU-1", "GPU-2"]),
        ({"ROCR_VISIBLE_DEVICES": ""}, []),
    ],
)
def test_hip_filters_after_its_runtime_and_reads_cudas_variable(environ: dict[str, str], expected: list[str]) -> None:
    assert [card.uuid for card in visible_hip(ALIKE, environ)] == expected


def _listed(*devices: str) -> tuple[ListedDevice, ...]:
    return parse_list("".join(f"  {device} (24000 MiB, 23000 MiB free)\n" for device in devices))


def test_one_card_seen_by_two_backends_is_one_device() -> None:
    listed = _listed("CUDA0: NVIDIA GeForce RTX 3090", "Vulkan0: NVIDIA GeForce RTX 3090")
    pairs = match(listed, ALIKE[:1], {})
    assert [(device.name, card) for device, card in pairs] == [("CUDA0", ALIKE[0])]


def test_a_second_card_of_the_same_name_is_no_second_name_of_the_first() -> None:
    """Where CUDA shows one of two alike, and no library knows them, Vulkan's second one is the other card."""
    listed = _listed("CUDA0: NVIDIA X", "Vulkan0: NVIDIA X", "Vulkan1: NVIDIA X")
    assert [device.name for device, _ in match(listed, [], {})] == ["CUDA0", "Vulkan1"]


def test_vulkan_alone_may_use_a_card_of_nvidias() -> None:
    listed = _listed("Vulkan0: NVIDIA GeForce RTX 3090")
    assert match(listed, ALIKE[:1], {}) == ((listed[0], ALIKE[0]),)


def test_vulkan_alone_may_use_a_card_of_amds_that_sysfs_has_no_name_for() -> None:
    card = Card(Vendor.AMD, "AMD gfx1100", pci_bus_id="0000:03:00.0", arch="gfx1100")
    listed = _listed("Vulkan0: AMD Radeon RX 7900 XTX (RADV NAVI31)")
    assert match(listed, [card], {}) == ((listed[0], card),)


def test_another_vendors_card_stays_unmatched() -> None:
    listed = _listed("Vulkan0: Intel(R) Arc(tm) A770 Graphics")
    pairs = match(listed, ALIKE, {})
    assert pairs == ((listed[0], None),)
    assert unmatched(pairs, ALIKE) == tuple(ALIKE)
