"""What is loaded beside a model, added to the model's own bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Final

from planner.accounting import DeviceBytes, MemoryLedger
from planner.types.machine import HOST
from planner.types.plan import Placement
from planner.types.usage import NOTHING, UNKNOWN_FIGURE, Figure, HostDetail, Source

EMPTY: Final = DeviceBytes(NOTHING, NOTHING, NOTHING)
NO_DETAIL: Final = HostDetail()
_WEAKER: Final = tuple(Source)  # in order of strength


@dataclass(frozen=True, slots=True)
class Charge:
    """What one thing beside the model takes: bytes by device name, the host's under ``HOST``.

    ``not_built`` says why figures are unknown; it is empty where none is.
    """

    name: str
    devices: Mapping[str, DeviceBytes]
    host_detail: HostDetail = NO_DETAIL
    not_built: tuple[str, ...] = ()

    @property
    def by_device(self) -> dict[str, int | None]:
        """Return the bytes of each device that holds a part, None where they are not known."""
        parts = {
            name: (each.model.bytes, each.context.bytes, each.compute.bytes) for name, each in self.devices.items()
        }
        sums = {name: None if None in each else sum(part or 0 for part in each) for name, each in parts.items()}
        return {name: size for name, size in sums.items() if size != 0}

    @property
    def kept_for_images(self) -> dict[str, int]:
        """Return what is kept free on each device for a large image, where it is."""
        kept = {name: each.image_reserve_bytes for name, each in self.devices.items()}
        kept[HOST] = self.host_detail.image_reserve_bytes or 0
        return {name: size for name, size in kept.items() if size}


def charged(ledger: MemoryLedger, placement: Placement, charges: Iterable[Charge]) -> MemoryLedger:
    """Return the ledger with all of this in its figures. A sum is no better founded than its weakest part."""
    for charge in charges:
        rest = dict(charge.devices)
        ledger = replace(
            ledger,
            devices=tuple(
                _plus(own, rest.pop(name, EMPTY)) for own, name in zip(ledger.devices, placement.devices, strict=True)
            ),
            host=_plus(ledger.host, rest.pop(HOST, EMPTY)),
            elsewhere={
                name: _plus(ledger.elsewhere.get(name, EMPTY), rest.get(name, EMPTY))
                for name in {**ledger.elsewhere, **rest}
            },
            host_detail=_detail(ledger.host_detail, charge.host_detail),
            not_built=(*ledger.not_built, *charge.not_built),
        )
    return ledger


def _plus(one: DeviceBytes, other: DeviceBytes) -> DeviceBytes:
    return DeviceBytes(
        _sum(one.model, other.model),
        _sum(one.context, other.context),
        _sum(one.compute, other.compute),
        one.image_reserve_bytes + other.image_reserve_bytes,
    )


def _sum(one: Figure, other: Figure) -> Figure:
    if NOTHING in {one, other}:
        return other if one == NOTHING else one
    if one.bytes is None or other.bytes is None:
        return UNKNOWN_FIGURE
    return Figure(one.bytes + other.bytes, max(one.source, other.source, key=_WEAKER.index))


def _detail(one: HostDetail, other: HostDetail) -> HostDetail:
    sums: dict[str, int | None] = {}
    for field in fields(HostDetail):
        pair = (getattr(one, field.name), getattr(other, field.name))
        sums[field.name] = None if None in pair else sum(pair)
    return HostDetail(**sums)
