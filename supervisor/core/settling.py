"""Whether a driver shows already that a runner has gone.

A process's memory is its own until the kernel has reaped it, but a GPU's driver may go on showing it as used for half a
second to a second and a half after that. A plan made meanwhile would move layers to the host, or evict, for nothing.

Only local devices can lag. The host's kernel gives memory back before the exit is told, and an RPC worker answers its
next client only after it has freed what the last one held.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

SETTLE_WITHIN_S: Final = 5.0  # then the figure is believed: somebody else has taken what was given back
ENOUGH: Final = 0.75  # of what a runner held: its plan is no measurement of the driver's own share


@dataclass(frozen=True, slots=True)
class Reading:
    """What a driver called free, by device, what runners of ours that had finished loading held, and what others load.

    Of what is ``promised`` to those a driver shows something between nothing and all.
    """

    free_bytes: Mapping[str, int]
    held_bytes: Mapping[str, int]
    promised_bytes: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))


def unsettled(before: Reading, now: Reading, gone_bytes: Mapping[str, int]) -> tuple[str, ...]:
    """Return the devices whose driver still shows most of what runners held that have just gone (``gone_bytes``).

    ``before`` is an earlier reading: what our runners held then and do not hold now should be free on top of it.
    """
    return tuple(
        device
        for device, gone in gone_bytes.items()
        if device in before.free_bytes and device in now.free_bytes
        if now.free_bytes[device] < _expected(device, before, now) - (1 - ENOUGH) * gone
    )


def latest(before: Reading | None, now: Reading) -> Reading:
    """Return the reading to compare later ones with: now's, and before's where something loads at present.

    Nobody could tell later how much of a load that failed the driver showed already.
    """
    free, held = dict(now.free_bytes), dict(now.held_bytes)
    for device in (one for one, size in now.promised_bytes.items() if size):
        free.pop(device, None)
        if before is not None and device in before.free_bytes:
            free[device], held[device] = before.free_bytes[device], before.held_bytes.get(device, 0)
    return Reading(free, held)


def _expected(device: str, before: Reading, now: Reading) -> int:
    given_back = before.held_bytes.get(device, 0) - now.held_bytes.get(device, 0)
    return before.free_bytes[device] + given_back - now.promised_bytes.get(device, 0)
