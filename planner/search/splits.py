"""What the solver is asked, in numbers alone, and what it answers: slots split over bins, for seconds and bytes."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Bin:
    """A device. ``rooms`` are its bytes for slots: in the middle, with the output, as the first bin, as both.

    ``sizes`` are bytes per slot here; ``spill_sizes`` per part that may be left to the host (``Problem.spill_slots``).
    Entering or leaving it takes ``crossing_s``.
    """

    rooms: tuple[float, float, float, float]
    sizes: tuple[int, ...]
    spill_sizes: tuple[int, ...]
    bytes_per_s: float
    crossing_s: float

    def room(self, *, first: bool, output: bool) -> float:
        """Return its bytes in this role."""
        return self.rooms[2 * first + output]


@dataclass(frozen=True, slots=True)
class Problem:
    """Slots in order, the output last, and bins.

    ``reads`` are the bytes that one token has read of each slot. ``on_host`` says how many first slots stay there: None
    for any number. Of a bin's slots, the first parts in ``spill_slots``'s order may be left to the host, of at most
    ``max_spilled`` slots; ``spill_reads`` is what is read of them. ``fixed_s`` is spent anyway. ``ordered`` keeps the
    bins in order; ``all_bins`` uses all of them, else at most ``max_bins`` are. Splits that take more than ``limit_s``
    are of no interest.
    """

    bins: tuple[Bin, ...]
    reads: tuple[float, ...]
    host_bytes_per_s: float
    on_host: int | None = 0
    spill_slots: tuple[int, ...] = ()
    spill_reads: tuple[float, ...] = ()
    max_spilled: int = 0
    fixed_s: float = 0.0
    ordered: bool = False
    all_bins: bool = False
    max_bins: int = 1 << 30
    limit_s: float = inf


class Segment(NamedTuple):
    """Slots of a bin, from ``start`` to before ``end``; parts ``spill_start`` to before ``spill_end`` are not there."""

    bin: int
    start: int
    end: int
    spill_start: int = 0
    spill_end: int = 0


@dataclass(frozen=True, slots=True)
class Split:
    """An answer: the segments in the slots' order, and the seconds of a token."""

    segments: tuple[Segment, ...]
    seconds: float
