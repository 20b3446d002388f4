"""Machines that the user names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gpu import host, whatif
from planner.types import HOST_POOL, DeviceKind

MIB = 1024**2
GIB = 1024**3


def test_devices_keep_their_order_kind_and_free_memory() -> None:
    specs = ["CUDA0=24GiB", "rocm1=11500MiB", "RPC0@10.0.0.2:50052=1000"]
    machine = whatif.machine(specs, host_memory_bytes=64 * GIB)
    assert [(d.name, d.kind, d.free_bytes) for d in machine.devices] == [
        ("CUDA0", DeviceKind.CUDA, 24 * GIB),
        ("ROCm1", DeviceKind.ROCM, 11500 * MIB),
        ("RPC0", DeviceKind.RPC, 1000),
    ]
    assert machine.devices[2].endpoint == "10.0.0.2:50052"
    assert machine.host.free_bytes == 64 * GIB
    assert machine.what_if
    assert {pool.id for pool in machine.pools} == {HOST_POOL, "CUDA0", "ROCm1", "RPC0"}


def test_cards_come_from_the_catalogue_with_their_bandwidth() -> None:
    machine = whatif.machine([], ["rtx4090:2"])
    assert [device.name for device in machine.devices] == ["CUDA0", "CUDA1"]
    card = machine.devices[0]
    assert card.bandwidth_bytes_per_s == 1008 * 10**9
    assert card.free_bytes is not None
    assert 23 * GIB < card.free_bytes < 24 * GIB
    assert card.compute_capability == "8.9"


def test_cards_are_numbered_after_devices_that_have_their_names() -> None:
    machine = whatif.machine(["CUDA0=8G", "CUDA2=8G"], ["rtx3060:2", "rx7900xtx"], host_memory_bytes=GIB)
    assert [device.name for device in machine.devices] == ["CUDA0", "CUDA2", "CUDA1", "CUDA3", "ROCm0"]


@pytest.mark.parametrize("spelling", ["rtx4090", "4090", "RTX 4090", "rtx-4090", "NVIDIA GeForce RTX 4090"])
def test_a_card_may_be_spelled_as_people_do(spelling: str) -> None:
    assert whatif.machine([], [spelling]).devices[0].description.startswith("GeForce RTX 4090")


def test_a_unified_card_is_the_host_that_was_not_given() -> None:
    machine = whatif.machine([], ["gb10"])
    assert machine.devices[0].pool == HOST_POOL
    assert machine.devices[0].free_bytes == machine.host.free_bytes == 128 * GIB


def test_no_spec_is_a_machine_without_gpus_on_this_host() -> None:
    machine = whatif.machine()
    assert machine.devices == ()
    assert machine.host.total_bytes == host.read().total_bytes


@pytest.mark.parametrize(
    "specs,cards,says",
    [
        (["CUDA0"], [], "NAME=SIZE"),
        (["CUDA=1G"], [], "NAME=SIZE"),
        (["GPU0=1G"], [], "known are CUDA0"),
        (["CUDA0=lots"], [], "'lots' is not a size"),
        (["CUDA0@h:1=1G"], [], "only an RPC device"),
        (["CUDA0=1G", "cuda0=2G"], [], "CUDA0 is named twice"),
        ([], ["rtx4095"], "nearest: rtx4090"),
        ([], ["rtx4090:0"], "not a count"),
        ([], ["rtx4090:²"], "not a count"),
        ([], ["rtx4090:16", "rtx3060"], "17 devices"),
        ([], ["custom:bw=900"], "write custom:mem=SIZE"),
        ([], ["custom:mem=much"], "'much' is not a size"),
        ([], ["custom:mem=1G,colour=red"], "'colour' is unknown"),
        ([], ["custom:mem=1G,kind=tpu"], "kind=cuda|rocm|vulkan"),
    ],
)
def test_a_bad_spec_is_one_line_that_says_what_is_wrong(specs: list[str], cards: list[str], says: str) -> None:
    with pytest.raises(whatif.WhatIfError, match=re.escape(says)) as caught:
        whatif.machine(specs, cards, host_memory_bytes=GIB)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("specs", [["custom:mem=24GiB,bw=900"], ["custom:mem=24GiB", "bw=900"]])
def test_a_card_that_nobody_knows_is_described_also_where_a_comma_parted_it(specs: list[str]) -> None:
    (card,) = whatif.machine([], specs, host_memory_bytes=GIB).devices
    assert (card.name, card.bandwidth_bytes_per_s) == ("CUDA0", 900 * 10**9)
    assert card.free_bytes == round(24 * GIB * 0.985)


def test_a_described_card_may_be_of_another_kind_and_of_unknown_speed() -> None:
    cards = whatif.machine([], ["custom:mem=16G,kind=rocm", "custom:mem=8G,kind=vulkan"]).devices
    assert [(card.name, card.bandwidth_bytes_per_s) for card in cards] == [("ROCm0", None), ("Vulkan0", None)]


def test_the_users_own_catalogue_adds_cards_and_wins_over_ours(tmp_path: Path) -> None:
    own = tmp_path / "cards.json"
    own.write_text(
        """{"cards": [
        {"key": "mine", "name": "My Card", "vendor": "amd", "nominal_gib": 20, "bandwidth_gbs": 700.5},
        {"key": "rtx4090", "name": "RTX 4090 48GB", "vendor": "nv", "nominal_gib": 48, "bandwidth_gbs": 1008}]}"""
    )
    mine, modified = whatif.machine([], ["mine", "4090"], more_cards=own).devices
    assert (mine.name, mine.bandwidth_bytes_per_s) == ("ROCm0", 700_500_000_000)
    assert modified.description.startswith("RTX 4090 48GB")
    assert whatif.machine([], ["rtx3060"], more_cards=tmp_path / "none.json").devices


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"cards": [1]}', '{"cards": [{"key": "a"}]}', '{"cards": [{"key":'])
def test_a_catalogue_of_another_form_is_one_line_that_shows_the_form(tmp_path: Path, text: str) -> None:
    own = tmp_path / "cards.json"
    own.write_text(text)
    with pytest.raises(whatif.WhatIfError, match=r"cards\.json: no card catalogue .*nominal_gib") as caught:
        whatif.machine([], ["rtx4090"], more_cards=own)
    assert "\n" not in str(caught.value)


def test_a_host_of_another_size_reaches_every_device_that_shares_it() -> None:
    machine = whatif.with_host_memory(whatif.machine(["CUDA0=8G"], ["gb10"]), 32 * GIB)
    assert machine.host.free_bytes == 32 * GIB
    assert machine.device("CUDA1").free_bytes == 32 * GIB
    assert machine.device("CUDA0").free_bytes == 8 * GIB
    assert next(pool.free_bytes for pool in machine.pools if pool.id == HOST_POOL) == 32 * GIB


def test_every_card_of_the_catalogue_makes_a_machine() -> None:
    for key, card in whatif.catalogue().items():
        (device,) = whatif.machine([], [key]).devices
        assert device.description.startswith(card.name)
        assert device.free_bytes
