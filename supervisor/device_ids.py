"""What tells a device from others whatever it is called, for names are given anew when a worker or a card goes.

llama.cpp numbers devices through, so RPC1 becomes RPC0 once the first worker is dead. What is remembered of a device
follows it: on disk it goes by its id, in the ledger by its name of the moment, which ``renamed`` keeps up.
"""

from __future__ import annotations

from collections import Counter
from typing import Final, NewType

from planner.types import Device, Machine

DeviceId = NewType("DeviceId", str)

SEVERAL: Final = "#"  # between a place and which of the devices there it is


def device_ids(machine: Machine) -> dict[str, DeviceId]:
    """Return the id of each device by its name, the host's among them.

    That is its UUID, its PCI address or its worker's endpoint, else its name, and which of the devices there it is: a
    worker may have several, and a card can be divided (``GGML_CUDA_DEVICES``).
    """
    before: Counter[str] = Counter()
    ids: dict[str, DeviceId] = {}
    for device in (*machine.devices, machine.host):
        place = _place(device) or device.name
        ids[device.name] = DeviceId(f"{place}{SEVERAL}{before[place]}")
        before[place] += 1
    return ids


def place_of(device: DeviceId) -> str:
    """Return where a device is, whichever of those there it is."""
    return device.rpartition(SEVERAL)[0]


def renamed(before: Machine, now: Machine) -> dict[str, str]:
    """Return by which names to remember now what was remembered by others, of devices of ``before``.

    What is gone is remembered by its id, which is no device's name, until it is back. A device that nothing tells from
    others, since its driver does not answer, say, is the one of its name.
    """
    then, names = device_ids(before), {device: name for name, device in device_ids(now).items()}
    unmarked = {one.name for one in (*before.devices, *now.devices) if _place(one) is None}
    fresh = names.keys() - set(then.values())
    same = {names[device] for device in fresh} & unmarked
    moved = {name: names.get(device, name if name in same else device) for name, device in then.items()}
    back: dict[str, str] = {device: names[device] for device in fresh}
    return {old: new for old, new in {**back, **moved}.items() if old != new}


def _place(device: Device) -> str | None:
    return device.uuid or device.pci_bus_id or device.endpoint
