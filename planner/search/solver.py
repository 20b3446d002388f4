"""The best contiguous split there is, by dynamic programming: slots into bins, each costing seconds and bytes.

Knows nothing of models: ``problems`` makes the problem, and ``optimizer`` has its answer accounted for. A state is a
set of bins and the slots that they hold, the first ones; a bin then takes the slots that follow. So every order of
every subset of bins and every cut is covered, in time that grows with the subsets and not with the orders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush
from itertools import count
from math import inf

from planner.search.splits import Problem, Segment, Split
from planner.search.tables import Tables


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
