"""Whether a runner uses the devices that its plan counts on, by what its log says of them.

llama-server numbers devices among those that it sees; a variable, a driver or a card that went away between plan and
start can give a name to another card. ``using device`` lines carry the PCI address, and of a worker its endpoint.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from supervisor.core.loglines import UsingDevice

_VIRTUAL: Final = re.compile(r"-v\d+$")  # one of several devices on a card (ggml-cuda.cu, GGML_CUDA_DEVICES)


@dataclass(frozen=True, slots=True)
class PinnedDevice:
    """A device of a plan: the plan's name, the runner's name for it, and what tells it from others, where known."""

    name: str
    child_name: str
    pci_bus_id: str | None = None
    endpoint: str | None = None


def mismatch(planned: Sequence[PinnedDevice], used: Sequence[UsingDevice]) -> str | None:
    """Return what is wrong with the devices used so far, in one line, or None.

    The main model's devices come first and in order; what follows belongs to other models of the same runner.
    """
    for place, fact in zip(planned, used, strict=False):
        if place.child_name != fact.name:
            return f"it uses {fact.name} ({fact.description}) where {place.child_name} was planned"
        if place.endpoint is not None and fact.description != place.endpoint:
            return f"its {fact.name} is the worker {fact.description}, planned was {place.endpoint} ({place.name})"
        address = None if fact.device_id is None else _VIRTUAL.sub("", fact.device_id)
        if None not in {place.pci_bus_id, address} and place.pci_bus_id != address:
            what = f"its {fact.name} is the card at {address} ({fact.description})"
            return f"{what}, planned was the one at {place.pci_bus_id} ({place.name})"
    return None


def missing(planned: Sequence[PinnedDevice], used: Sequence[UsingDevice]) -> str | None:
    """Return what a runner that has loaded never named, in one line, or None."""
    names = ", ".join(place.child_name for place in planned[len(used) :])
    return f"it has loaded without using {names}, which was planned" if names else None
