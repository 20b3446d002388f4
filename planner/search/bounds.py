"""What no split is below, told without solving. ``solver`` leaves out by it what has no room or is too slow."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from math import inf
from typing import Final, NamedTuple

from planner.search.splits import Bin, Problem

ROUNDING: Final = 1e-9  # seconds and bytes are sums in another order than the ones they are compared with


class Left(NamedTuple):
    """Bins together: their room, the speed of the fastest of them and the host, and how fast they read at best.

    ``reads`` are the most bytes that the fastest ones can be made to read, by how many these are, ``seconds`` what that
    takes, and ``speeds`` whose turn it is then: the host's at last.
    """

    room: float
    fastest: float
    reads: list[float]
    seconds: list[float]
    speeds: list[float]

    @classmethod
    def of(cls, bins: Sequence[Bin], most_density: float, host_bytes_per_s: float) -> Left:
        """Return this of bins of which a byte of room is read at most that often."""
        rooms = sorted(((each.bytes_per_s, max(*each.rooms, 0.0)) for each in bins), reverse=True)
        faster = [(speed, room * most_density) for speed, room in rooms if speed > host_bytes_per_s]
        reads = [0.0, *accumulate(read for _, read in faster)]
        seconds = [0.0, *accumulate(read / speed for speed, read in faster)]
        speeds = [*(speed for speed, _ in faster), host_bytes_per_s]
        return cls(sum(room for _, room in rooms) * (1 + ROUNDING), speeds[0], reads, seconds, speeds)

    def least_s(self, read: float) -> float:
        """Return the seconds that no split of so many read bytes over these bins and the host is below."""
        full = bisect_right(self.reads, read) - 1
        return self.seconds[full] + (read - self.reads[full]) / self.speeds[full]


def full_sizes(problem: Problem) -> list[int]:
    """Return the bytes of each slot in the bin that needs the least for it."""
    return _least(each.sizes for each in problem.bins)


def most_density(problem: Problem) -> float:
    """Return how many bytes are read at most for each byte of room."""
    parts = [*zip(problem.reads, full_sizes(problem), strict=False)]
    if problem.max_spilled:
        least = _least(each.spill_sizes for each in problem.bins)
        by_slot = zip(problem.spill_slots, problem.spill_reads, least, strict=False)
        for slot, read, size in by_slot:
            parts.append((read, size))
            parts[slot] = (parts[slot][0] - read, parts[slot][1] - size)
    return max((read / size if size > 0 else inf for read, size in parts if read > 0), default=0.0)


def least_density(problem: Problem) -> float:
    """Return how many bytes are read at least for each byte that is left to the host of slots in bins."""
    if not problem.max_spilled or not problem.bins:
        return 0.0
    sizes = _most(each.spill_sizes for each in problem.bins)
    return min((read / size for read, size in zip(problem.spill_reads, sizes, strict=True) if size), default=0.0)


def least_sizes(problem: Problem) -> list[int]:
    """Return bytes of each slot that every bin needs for it: what may be left to the host is left out."""
    least = full_sizes(problem)
    if least and problem.max_spilled:
        spills = _most(each.spill_sizes for each in problem.bins)
        for slot, size in zip(problem.spill_slots, spills, strict=True):
            least[slot] -= size
    return least


def bound_s(problem: Problem) -> float:
    """Return seconds that no split is below: slots cut as one likes, the most read bytes into the fastest bins.

    Infinite where everything has to be in bins and they cannot hold it.
    """
    by_speed = sorted(problem.bins, key=lambda each: -each.bytes_per_s)
    spill_read, spill_size = [0.0] * len(problem.reads), [0.0] * len(problem.reads)
    least_spills = _least(each.spill_sizes for each in by_speed)
    parts: list[tuple[float, float]] = list(zip(problem.spill_reads, least_spills, strict=True))
    for slot, (read, size) in zip(problem.spill_slots, parts, strict=True):
        spill_read[slot] += read
        spill_size[slot] += size
    wholes = full_sizes(problem)
    parts += [(read - spill_read[slot], wholes[slot] - spill_size[slot]) for slot, read in enumerate(problem.reads)]
    parts.sort(key=lambda part: part[0] / part[1] if part[1] > 0 else inf, reverse=True)
    only_bins = problem.on_host == 0 and not problem.max_spilled
    seconds, bins = problem.fixed_s, iter(by_speed)
    room, speed = 0.0, problem.host_bytes_per_s
    for part in parts:
        read, size = part
        while size > room:
            seconds += read * room / size / speed
            read, size = read * (1 - room / size), size - room
            each = next(bins, None)
            if each is None or each.bytes_per_s < problem.host_bytes_per_s:
                if only_bins and each is None:
                    return inf
                room, speed, bins = inf, problem.host_bytes_per_s, iter(())
            else:
                room, speed = max(*each.rooms, 0.0), each.bytes_per_s
        seconds += read / speed
        room -= size
    return seconds


def _least(tables: Iterable[Sequence[int]]) -> list[int]:
    """Return the least size of each slot or part; most bins have the same sizes, which are looked at once."""
    first, *others = {*tables} or {()}
    return [*map(min, first, *others)] if others else [*first]


def _most(tables: Iterable[Sequence[int]]) -> list[int]:
    """Return the largest size of each slot or part."""
    first, *others = {*tables} or {()}
    return [*map(max, first, *others)] if others else [*first]
