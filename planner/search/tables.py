"""What each bin of a problem can take and what that costs, worked out once for all splits."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from copy import copy
from functools import lru_cache
from itertools import accumulate, pairwise
from math import inf
from operator import add
from typing import NamedTuple

from planner.search.bounds import ROUNDING, Left, full_sizes, least_density, least_sizes, most_density
from planner.search.splits import Bin, Problem, Segment


class _Row(NamedTuple):
    """How a bin's slots may end before one slot: the possible starts, and what spilling adds.

    ``spill_s`` are the seconds of the first starts, up to ``whole``; from there on nothing is spilled. Where the bin
    holds no slots that end there, the first start is the end itself.
    """

    start: int
    whole: int
    after: int
    spill_s: list[float]

    def starts(self) -> Iterator[tuple[int, float]]:
        """Yield every start, and what spilling adds."""
        yield from enumerate(self.spill_s, self.start)
        yield from ((start, 0.0) for start in range(self.whole, self.after))


class Tables:
    """What the bins of a problem can take, and which beginnings of a split are worth going on with."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._reads = [0.0, *accumulate(problem.reads)]
        self._full_sizes = [0, *accumulate(full_sizes(problem))]
        self._least_sizes = [0, *accumulate(least_sizes(problem))]
        self._least_density = least_density(problem)
        self._most_density = most_density(problem)
        self._left: dict[tuple[int, ...], Left] = {}
        self._by_role: dict[tuple[int, bool], _Table] = {}
        self.limit_s = problem.limit_s * (1 + ROUNDING)
        self.twins = [problem.bins.index(each) for each in problem.bins]

    def within(self, limit_s: float) -> Tables:
        """Return the same with a limit that is no later: what is in them beyond it does no harm."""
        same = copy(self)
        same.limit_s = limit_s * (1 + ROUNDING)
        return same

    @property
    def on_host_s(self) -> list[float]:
        """Return the seconds with the first slots on the host, by how many these are."""
        problem, allowed = self._problem, self._problem.on_host
        seconds = (read / problem.host_bytes_per_s + problem.fixed_s for read in self._reads)
        return [s if allowed in {None, count} else inf for count, s in enumerate(seconds)]

    def of(self, index: int, *, first: bool, starts: range | None = None) -> _Table:
        """Return what this bin can take as the first one or a later one, from these starts or from any."""
        starts = starts or range(len(self._reads))
        key = (self.twins[index], first)
        known = self._by_role.get(key)
        if known is None or known.starts[0] > starts[0] or known.starts[-1] < starts[-1]:
            bin_ = self._problem.bins[index]
            most_extra_s = self._most_extra_s(bin_)
            known = self._by_role[key] = _Table(self._problem, bin_, self._reads, most_extra_s, starts, first=first)
        return known

    def _most_extra_s(self, bin_: Bin) -> float:
        """Return the seconds that leaving parts of this bin's slots to the host may add, within the limit."""
        problem = self._problem
        fastest = max(problem.host_bytes_per_s, *(each.bytes_per_s for each in problem.bins))
        least_s = problem.fixed_s + self._reads[-1] / fastest
        return self.limit_s - least_s if bin_.bytes_per_s >= problem.host_bytes_per_s else inf

    def promising(self, state: list[float], left: Sequence[int]) -> range:
        """Return the least range of a state's slots from which the bins that are left may hold the rest in time.

        What they have no room for is read on the host, at least as many bytes as of the parts that are read least.
        """
        if not left:
            return range(0)
        rest = self._of_left(tuple(left))
        reads, sizes = self._reads, self._full_sizes
        more_on_host_s = self._least_density * (1 / self._problem.host_bytes_per_s - 1 / rest.fastest)
        first = bisect_left(self._least_sizes, self._least_sizes[-1] - rest.room)
        over, limit_s = sizes[-1] - rest.room, self.limit_s
        within = [
            end
            for end in range(first, len(reads) - 1)
            if state[end] < inf
            and state[end] + (reads[-1] - reads[end]) / rest.fastest + max(over - sizes[end], 0.0) * more_on_host_s
            <= limit_s
            and state[end] + rest.least_s(reads[-1] - reads[end]) <= limit_s
        ]
        return range(within[0], within[-1] + 1) if within else range(0)

    def _of_left(self, left: tuple[int, ...]) -> Left:
        """Return what is known of these bins together."""
        if left not in self._left:
            bins = [self._problem.bins[index] for index in left]
            self._left[left] = Left.of(bins, self._most_density, self._problem.host_bytes_per_s)
        return self._left[left]


class _Table:
    """What one bin can take from these starts and what that costs, in the role of the first or of a later one."""

    def __init__(
        self, problem: Problem, bin_: Bin, reads: list[float], most_extra_s: float, starts: range, *, first: bool
    ) -> None:
        self._problem, self._bin, self._first, self._most_extra_s = problem, bin_, first, most_extra_s
        self.starts = starts
        self._crossings_s = 2 * bin_.crossing_s
        self._minus_reads_s = [-read / bin_.bytes_per_s for read in reads]
        self._sizes = _sums(bin_.sizes)
        self._spill_sizes = _sums(bin_.spill_sizes)
        self._first_part, self._slots_until = _part_slots(problem.spill_slots, len(bin_.sizes))
        slower = 1 / problem.host_bytes_per_s - 1 / bin_.bytes_per_s
        away_s = _sums(problem.spill_reads)
        self._spill_s = [
            s * slower + self._crossings_s * slots for s, slots in zip(away_s, self._slots_until, strict=False)
        ]
        parts_before = (self._spill_sizes[part] for part in self._first_part)
        self._beyond_parts = [parts - size for parts, size in zip(parts_before, self._sizes, strict=True)]
        self._rows: dict[int, _Row] = {}

    def take(self, state: list[float], starts: range, into: list[float]) -> None:
        """Take slots from one of these starts of a state, as many as there is room for, to any end."""
        low, high = starts[0], starts[-1] + 1
        # The seconds less those that the slots take in this bin.
        before = list(map(add, state[low:high], self._minus_reads_s[low:high]))
        for end, row in self._reached(starts):
            first, whole = max(row.start, low), max(row.whole, low)
            least_s = min(before[whole - low : end - low], default=inf)
            if first < whole:
                spilling = map(add, before[first - low : whole - low], row.spill_s[first - row.start :])
                least_s = min(least_s, *spilling)
            seconds = least_s - self._minus_reads_s[end] + self._crossings_s
            into[end] = min(into[end], seconds)

    def _reached(self, starts: range) -> Iterator[tuple[int, _Row]]:
        """Yield every end that one of these starts reaches, and its row. What reaches an end reaches those before it.

        But for the last, where the bin has another room: it holds the output.
        """
        last = len(self._bin.sizes)
        for end in range(starts[0] + 1, last):
            row = self._row(end)
            if row.start > starts[-1]:
                break
            if row.start < end:
                yield end, row
        row = self._row(last)
        if row.start <= starts[-1]:
            yield last, row

    def last(self, index: int, before: list[float], end: int, least_s: float) -> Iterator[Segment]:
        """Yield the segments to this end that make these seconds of a state, with as little left out as must be."""
        row = self._row(end)
        for start, spill_s in row.starts():
            if before[start] + self._own_s(start, end) + spill_s <= least_s * (1 + ROUNDING):
                yield Segment(index, start, end, *self._spilled(start, end))

    def every(self, index: int, before: list[float], end: int) -> Iterator[tuple[float, Segment]]:
        """Yield every segment to this end after a state, and its seconds."""
        row = self._row(end)
        for start, _ in row.starts():
            if before[start] == inf:
                continue
            begin, least = self._spilled(start, end)
            own_s = self._own_s(start, end)
            yield own_s + self._spill_s[least] - self._spill_s[begin], Segment(index, start, end, begin, least)
            for until in range(least + 1, self._first_part[end] + 1 if self._problem.max_spilled else 0):
                if self._slots_until[until] - self._slots_until[begin] > self._problem.max_spilled:
                    break
                yield own_s + self._spill_s[until] - self._spill_s[begin], Segment(index, start, end, begin, until)

    def _own_s(self, start: int, end: int) -> float:
        return self._minus_reads_s[start] - self._minus_reads_s[end] + self._crossings_s

    def _spilled(self, start: int, end: int) -> tuple[int, int]:
        """Return the parts that are left to the host where these slots lie here: as few as there must be."""
        lacking = self._sizes[end] - self._sizes[start] - self._room(end)
        begin = self._first_part[start]
        if lacking <= 0:
            return (begin, begin)
        return (begin, bisect_left(self._spill_sizes, self._spill_sizes[begin] + lacking))

    def _room(self, end: int) -> float:
        return self._bin.room(first=self._first, output=end == len(self._bin.sizes))

    def _row(self, end: int) -> _Row:
        """Return the row of this end, of the table's starts."""
        if end not in self._rows:
            self._rows[end] = self._made_row(end)
        return self._rows[end]

    def _made_row(self, end: int) -> _Row:
        spill_sizes, spill_s, beyond_parts = self._spill_sizes, self._spill_s, self._beyond_parts
        first_part, slots_until = self._first_part, self._slots_until
        most, most_extra_s = self._problem.max_spilled, self._most_extra_s
        last_part, lacking = first_part[end], self._sizes[end] - self._room(end)
        lowest, after = self.starts[0], min(self.starts[-1] + 1, end)
        whole = max(bisect_left(self._sizes, lacking), lowest)  # the first start that spills nothing
        first_whole = min(whole, after)
        extra: list[float] = []
        for start in range(first_whole - 1, lowest - 1, -1) if most else ():
            begin = first_part[start]
            until = bisect_left(spill_sizes, lacking + beyond_parts[start])
            if until > last_part or slots_until[until] - slots_until[begin] > most:
                break
            extra_s = spill_s[until] - spill_s[begin]
            if extra_s > most_extra_s:  # and more of it with every slot
                break
            extra.append(extra_s)
        if first_whole == after and not extra:
            return _Row(min(whole, end), after, after, [])
        return _Row(first_whole - len(extra), first_whole, after, extra[::-1])


@lru_cache(maxsize=16)
def _sums(values: tuple[float, ...]) -> list[float]:
    """Return the sums of the first of these."""
    return [0.0, *accumulate(map(float, values))]


@lru_cache(maxsize=16)
def _part_slots(spill_slots: tuple[int, ...], n_slots: int) -> tuple[list[int], list[int]]:
    """Return the first part of each slot or a later one, and how many slots the first parts are of."""
    first_part = [bisect_left(spill_slots, slot) for slot in range(n_slots + 1)]
    starts = [True, *(a != b for a, b in pairwise(spill_slots))]
    return first_part, [0, *accumulate(starts[: len(spill_slots)])]
