"""Which device is which, though names are given anew when a worker or a card comes or goes."""

from __future__ import annotations

from dataclasses import replace

from planner.types import HOST, HOST_POOL, Device, DeviceKind, DeviceName, Machine, PoolId
from supervisor.device_ids import device_ids, renamed

FIRST, SECOND = "10.0.0.1:50052", "10.0.0.2:50052"


def machine_of(*devices: Device) -> Machine:
    return Machine(devices, Device(HOST, DeviceKind.HOST, 100, 100, HOST_POOL))


def worker(name: str, endpoint: str) -> Device:
    return Device(DeviceName(name), DeviceKind.RPC, 100, 100, PoolId(name), endpoint=endpoint)


def card(name: str, uuid: str | None) -> Device:
    return Device(DeviceName(name), DeviceKind.CUDA, 100, 100, PoolId(name), uuid=uuid)


def test_a_worker_that_dies_keeps_what_is_remembered_of_it_and_so_do_those_that_are_numbered_anew() -> None:
    both = machine_of(worker("RPC0", FIRST), worker("RPC1", SECOND))
    left = machine_of(worker("RPC0", SECOND), replace(worker(f"RPC[{FIRST}]", FIRST), usable=False))
    assert renamed(both, left) == {"RPC0": f"RPC[{FIRST}]", "RPC1": "RPC0"}
    assert renamed(left, both) == {f"RPC[{FIRST}]": "RPC0", "RPC0": "RPC1"}
    assert renamed(both, both) == {}


def test_what_is_gone_goes_by_a_name_that_is_no_device_s_until_it_is_back() -> None:
    two = machine_of(worker("RPC0", FIRST), worker("RPC1", FIRST), worker("RPC2", SECOND))
    left = machine_of(worker("RPC0", SECOND), worker(f"RPC[{FIRST}]", FIRST))
    away = renamed(two, left)
    assert (away["RPC0"], away["RPC2"]) == (f"RPC[{FIRST}]", "RPC0")
    assert away["RPC1"] not in device_ids(left)
    assert renamed(left, two)[away["RPC1"]] == "RPC1"


def test_a_card_is_the_same_under_another_number_and_another_card_is_not_it() -> None:
    before = machine_of(card("CUDA0", "GPU-a"), card("CUDA1", "GPU-b"))
    names = renamed(before, machine_of(card("CUDA0", "GPU-b"), card("CUDA1", "GPU-c")))
    assert names["CUDA1"] == "CUDA0"
    assert names["CUDA0"] not in {"CUDA0", "CUDA1"}


def test_a_card_whose_driver_does_not_answer_for_a_while_is_still_the_one_of_its_name() -> None:
    known, unknown = machine_of(card("CUDA0", "GPU-a")), machine_of(card("CUDA0", None))
    assert "CUDA0" not in renamed(known, unknown)
    assert "CUDA0" not in renamed(unknown, known)


def test_the_parts_of_a_divided_card_are_told_apart() -> None:
    """Their numbers alone do (``GGML_CUDA_DEVICES``)."""
    parts = [replace(card(name, None), pci_bus_id="0000:01:00.0") for name in ("CUDA0", "CUDA1")]
    assert len(set(device_ids(machine_of(*parts)).values())) == len(parts) + 1
