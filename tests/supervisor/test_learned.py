"""What runners turned out to take beside llama.cpp's buffers is kept, and told of the right devices."""

from __future__ import annotations

from pathlib import Path

import pytest
from event_log import EventLog

from planner.types import HOST, HOST_POOL, Device, DeviceKind, DeviceName, Machine, PoolId
from supervisor.learned import FILE_NAME, MOST_BYTES, Learned

MIB = 1024 * 1024


def machine_of(*names_and_uuids: tuple[str, str | None]) -> Machine:
    devices = tuple(
        Device(DeviceName(name), DeviceKind.CUDA, 100, 100, PoolId(name), uuid=uuid) for name, uuid in names_and_uuids
    )
    return Machine(devices, Device(HOST, DeviceKind.HOST, 100, 100, HOST_POOL))


def test_what_was_learned_is_told_after_a_restart_and_of_the_card_whatever_its_name_is_then(tmp_path: Path) -> None:
    Learned(tmp_path).learn(machine_of(("CUDA0", "GPU-a")), "CUDA0", 768 * MIB, "qwen")
    told = Learned(tmp_path).by_device(machine_of(("CUDA0", "GPU-b"), ("CUDA1", "GPU-a")))
    assert {device: (each.size_bytes, each.model) for device, each in told.items()} == {"CUDA1": (768 * MIB, "qwen")}


def test_a_card_without_an_identifier_goes_by_its_name_and_a_device_that_is_not_there_is_nobody(tmp_path: Path) -> None:
    learned = Learned(tmp_path)
    machine = machine_of(("Vulkan0", None))
    learned.learn(machine, "Vulkan0", 1, "m")
    learned.learn(machine, "CUDA7", 1, "m")
    learned.learn(None, "Vulkan0", 2, "m")
    assert {device: each.size_bytes for device, each in learned.by_device(machine).items()} == {"Vulkan0": 1}
    assert learned.by_device(None) == {}


def worker(*names: str) -> Machine:
    devices = tuple(
        Device(DeviceName(name), DeviceKind.RPC, 100, 100, PoolId(name), endpoint="10.0.0.2:50052") for name in names
    )
    return Machine(devices, Device(HOST, DeviceKind.HOST, 100, 100, HOST_POOL))


def test_the_devices_of_one_worker_are_told_apart_by_their_order_there(tmp_path: Path) -> None:
    Learned(tmp_path).learn(worker("RPC0", "RPC1"), "RPC1", 5, "m")
    told = Learned(tmp_path).by_device(worker("RPC3", "RPC4"))
    assert {device: each.size_bytes for device, each in told.items()} == {"RPC4": 5}


def test_what_was_learned_of_a_worker_before_its_devices_were_told_apart_holds_for_each(tmp_path: Path) -> None:
    known = '{"10.0.0.2:50052": {"size_bytes": 7, "model": "m", "day": "2026-11-01"}}'
    (tmp_path / FILE_NAME).write_text(known)
    learned, machine = Learned(tmp_path), worker("RPC0", "RPC1")
    learned.learn(machine, "RPC1", 9, "m")
    assert {device: each.size_bytes for device, each in learned.by_device(machine).items()} == {"RPC0": 7, "RPC1": 9}


def test_no_more_is_learned_than_a_runner_can_take(tmp_path: Path) -> None:
    learned, machine = Learned(tmp_path), machine_of(("CUDA0", "GPU-a"))
    learned.learn(machine, "CUDA0", 100 * MOST_BYTES, "m")
    assert learned.by_device(machine)["CUDA0"].size_bytes == MOST_BYTES


@pytest.mark.parametrize("text", ["", "{", "[]", '{"GPU-a": {"size": 1}}', '{"GPU-a": 5}'])
def test_a_file_that_makes_no_sense_is_said_and_costs_nothing_more(tmp_path: Path, log: EventLog, text: str) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    learned, machine = Learned(tmp_path), machine_of(("CUDA0", "GPU-a"))
    assert learned.by_device(machine) == {}
    assert len(log.of("learned.not_read")) == 1
    learned.learn(machine, "CUDA0", 5, "m")
    assert Learned(tmp_path).by_device(machine)["CUDA0"].size_bytes == 5


def test_a_folder_that_cannot_be_written_is_said_and_what_was_learned_holds_meanwhile(
    tmp_path: Path, log: EventLog
) -> None:
    learned, machine = Learned(tmp_path / "nowhere"), machine_of(("CUDA0", "GPU-a"))
    learned.learn(machine, "CUDA0", 5, "m")
    assert learned.by_device(machine)["CUDA0"].size_bytes == 5
    assert len(log.of("learned.not_written")) == 1
