"""The best contiguous split there is, by dynamic programming: slots into bins, each costing seconds and bytes.

Knows nothing of models: ``planner.search.best`` makes the problem and has its answer accounted for. A state is a set of
bins and the slots that they hold, the first ones; a bin then takes the slots that follow. So every order of every
subset of bins and every cut is covered, in time that grows with the subsets and not with the orders.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import heapify, heappop, heappush
from itertools import accumulate, count, pairwise
from math import inf
from operator import add
from typing import NamedTuple

from planner.search.bounds import ROUNDING, Left, full_sizes, least_density, least_sizes, most_density


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


class _Row(NamedTuple):
    """The ways in which a bin's slots may end before one slot: the possible starts, and what spilling adds.

    ``spill_s`` are the seconds of the first starts, up to ``whole``; from there on nothing is spilled. Where the bin
    holds no slots that end there, the first start is the end itself.
    """

    start: int
    whole: int
    after: int
    spill_s: list[float]

    def ways(self) -> Iterator[tuple[int, float]]:
        """Yield every start, and what spilling adds."""
        yield from enumerate(self.spill_s, self.start)
        yield from ((start, 0.0) for start in range(self.whole, self.after))


class Solver:
    """A problem, solved: ``seconds`` has the least seconds for every set of bins (a bit each) that has an answer."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._n = len(problem.reads)
        self._tables = Tables(problem)
        self._states: dict[int, list[float]] = {0: self._tables.on_host_s}
        self.seconds: dict[int, float] = {}
        self._run()

    def split(self, used: int) -> Split:
        """Return the split of this set of bins, one of ``seconds``'s keys."""
        segments: list[Segment] = []
        end, left = self._n, used
        while left:
            segment = next(self._last_segments(left, end))
            segments.append(segment)
            end, left = segment.start, left ^ 1 << segment.bin
        return Split(tuple(reversed(segments)), self.seconds[used])

    def splits(self, is_out: Callable[[Segment], bool]) -> Iterator[Split]:
        """Yield every split within the limit, the fastest first, also those that leave more to the host than they must.

        What is left of a split is known to take at least what its state says, so none is begun in vain. Those with a
        later segment that ``is_out`` by now are left out.
        """
        order = count()
        ends: list[tuple[float, int, int, int, float, tuple[Segment, ...]]] = [
            (seconds, next(order), used, self._n, 0.0, ()) for used, seconds in self.seconds.items()
        ]
        heapify(ends)
        while ends:
            seconds, _, left, end, after_s, segments = heappop(ends)
            if any(map(is_out, segments if left else segments[1:])):
                continue
            if not left:
                yield Split(segments, seconds)
                continue
            last = left.bit_length() - 1
            for index in (last,) if self._problem.ordered else range(last + 1):
                before = self._states.get(left ^ 1 << index) if left >> index & 1 else None
                if before is None:
                    continue
                table = self._tables.of(index, first=left == 1 << index)
                for own_s, segment in table.every(index, before, end):
                    least_s = before[segment.start] + own_s + after_s
                    if least_s <= self._tables.limit_s:
                        rest = (left ^ 1 << index, segment.start, own_s + after_s, (segment, *segments))
                        heappush(ends, (least_s, next(order), *rest))

    def _run(self) -> None:
        """Go through the sets of bins, small ones first; a set's number is larger than those of its parts."""
        for used in range(1 << len(self._problem.bins)):
            state = self._states.get(used)
            if state is None:
                continue
            if state[self._n] < inf and state[self._n] <= self._tables.limit_s:
                self.seconds[used] = state[self._n]
            if used.bit_count() < self._problem.max_bins and (starts := self._promising(used, state)):
                for index in self._next_bins(used):
                    into = self._states.setdefault(used | 1 << index, [inf] * (self._n + 1))
                    self._tables.of(index, first=not used).take(state, starts, into)

    def _promising(self, used: int, state: list[float]) -> range:
        everyone = range(len(self._problem.bins))
        left = [i for i in everyone if not (used >> i if self._problem.ordered else used >> i & 1)]
        return self._tables.promising(state, left)

    def _next_bins(self, used: int) -> Iterator[int]:
        """Yield the bins that may come next. Of bins that are alike, the first that is left stands for all."""
        problem, twins = self._problem, self._tables.twins
        count = len(problem.bins)
        if problem.ordered:
            after = used.bit_length()
            for index in range(after, min(after + 1, count) if problem.all_bins else count):
                if index == after or twins[index] != twins[index - 1]:
                    yield index
            return
        seen = set()
        for index in range(count):
            if not used >> index & 1 and twins[index] not in seen:
                seen.add(twins[index])
                yield index

    def _last_segments(self, used: int, end: int) -> Iterator[Segment]:
        """Yield the last segments of the best splits of the first slots over these bins."""
        for index in reversed(range(len(self._problem.bins))):
            before = self._states.get(used ^ 1 << index) if used >> index & 1 else None
            if before is not None:
                table = self._tables.of(index, first=used == 1 << index)
                yield from table.last(index, before, end, self._states[used][end])


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
        for start, spill_s in row.ways():
            if before[start] + self._own_s(start, end) + spill_s <= least_s * (1 + ROUNDING):
                yield Segment(index, start, end, *self._spilled(start, end))

    def every(self, index: int, before: list[float], end: int) -> Iterator[tuple[float, Segment]]:
        """Yield every segment to this end after a state, and its seconds."""
        row = self._row(end)
        for start, _ in row.ways():
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
