"""What a plan takes: bytes on each device and on the host, each figure with where it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from planner.types.machine import DeviceKind


class Source(StrEnum):
    """Where a figure comes from, strongest claim first."""

    EXACT = "exact"  # a closed rule of llama.cpp's, equal to the byte
    SIMULATED = "simulated"  # llama.cpp's graph and allocator replayed
    ORACLE = "oracle"  # llama.cpp itself was asked, by a size-only load
    MEASURED = "measured"  # read from the log of a runner that really loaded
    ESTIMATED = "estimated"  # a closed form that errs upwards
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Figure:
    """A number of bytes and where it comes from. ``bytes is None`` exactly where the source is unknown."""

    bytes: int | None
    source: Source

    def __post_init__(self) -> None:
        """Hold the two halves together: an unknown source has no number, every other one has."""
        if (self.bytes is None) != (self.source is Source.UNKNOWN):
            msg = f"a figure from {self.source} cannot be {self.bytes}"
            raise ValueError(msg)


UNKNOWN_FIGURE: Final = Figure(None, Source.UNKNOWN)
NOTHING: Final = Figure(0, Source.EXACT)


@dataclass(frozen=True, slots=True)
class DeviceUsage:
    """What a plan takes on one device. model, context and compute mean what llama.cpp's memory breakdown means."""

    name: str
    kind: DeviceKind
    total_bytes: int | None
    free_bytes: int | None
    budget_bytes: int | None
    layers: tuple[int, ...] = ()
    output: bool = False
    model: Figure = NOTHING
    context: Figure = NOTHING
    compute: Figure = NOTHING
    overhead_bytes: int = 0
    overhead_because: str = ""
    needed_bytes: int | None = None  # of the host, where it is not what is planned: see HostDetail
    image_reserve_bytes: int = 0  # of a device: kept free for the largest image, which llama.cpp allocates for then

    @property
    def planned_bytes(self) -> int | None:
        """Return model + context + compute + overhead, or None where one of them is unknown."""
        unknown = None in {self.model.bytes, self.context.bytes, self.compute.bytes}
        return None if unknown else self.known_bytes

    @property
    def occupied_bytes(self) -> int | None:
        """Return what has to be in memory at a time, which is what is planned but on the host."""
        planned = self.planned_bytes
        return planned if planned is None or self.needed_bytes is None else self.needed_bytes

    @property
    def known_bytes(self) -> int:
        """Return the sum of what is known: it takes at least that much."""
        parts = (self.model.bytes, self.context.bytes, self.compute.bytes)
        return sum(part or 0 for part in parts) + self.overhead_bytes

    @property
    def claimed_bytes(self) -> int:
        """Return what nobody else can have of it: what is known, and what is kept free for a large image."""
        return self.known_bytes + self.image_reserve_bytes

    @property
    def headroom_bytes(self) -> int | None:
        """Return what the budget leaves, negative where it is overrun, None where either side is unknown."""
        occupied = self.occupied_bytes
        if occupied is None or self.budget_bytes is None:
            return None
        return self.budget_bytes - occupied - self.image_reserve_bytes


@dataclass(frozen=True, slots=True)
class HostDetail:
    """What the host's account holds beyond a device's. Mapped bytes are page cache, not allocations.

    A mapped range goes from the first of the host's tensors in a file to the last, whatever lies between them.
    ``resident_bytes`` of it have to stay in memory, or parts are read from the disk again for each token: the host's
    own tensors, the whole range where it is locked. The prompt cache, the checkpoints of contexts and the reserve for a
    large image are taken in use only, and are at most that much.
    """

    mapped_bytes: int | None = 0
    resident_bytes: int | None = 0
    allocated_bytes: int | None = 0
    pinned_bytes: int | None = 0
    output_buffer_bytes: int | None = 0
    prompt_cache_bytes: int | None = 0
    checkpoint_bytes: int | None = 0
    image_reserve_bytes: int | None = 0

    @property
    def later_bytes(self) -> int:
        """Return what is taken in use only, as far as it is known."""
        return sum(each or 0 for each in (self.prompt_cache_bytes, self.checkpoint_bytes, self.image_reserve_bytes))


UNKNOWN_DETAIL: Final = HostDetail(None, None, None, None, None, None, None, None)
