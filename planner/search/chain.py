"""The fastest splits over bins that keep their order, by how many of them are used: a few steps where sets take many.

Of the sets with as many bins the fastest is told only. ``solver`` tells them apart.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from math import inf

from planner.search.bounds import ROUNDING
from planner.search.splits import Problem, Segment, Split
from planner.search.tables import Tables


class Chain:
    """An ordered problem, solved: ``seconds`` has the least seconds by number of bins, where there is a split.

    Where they are not ``counted``, 1 stands for one bin or more, which takes a fraction of the time.
    """

    def __init__(self, problem: Problem, *, counted: bool = True, tables: Tables | None = None) -> None:
        self._problem, self._counted = problem, counted
        self._tables = tables or Tables(problem)
        # By bins gone through and bins used: the least seconds for the first slots, by how many these are.
        self._states: list[list[list[float]]] = [[self._tables.on_host_s]]
        for index in range(len(problem.bins)):
            self._go_through(index)

    @cached_property
    def seconds(self) -> dict[int, float]:
        """Return the least seconds by number of bins."""
        limit_s = self._problem.limit_s * (1 + ROUNDING)
        totals = enumerate(state[-1] for state in self._states[-1])
        least = len(self._problem.bins) if self._problem.all_bins else 0
        return {count: s for count, s in totals if s < inf and s <= limit_s and count >= least}

    def within(self, limit_s: float) -> Chain:
        """Return the same problem, counted, with a limit that is no later; what the bins can take is known by now."""
        return Chain(replace(self._problem, limit_s=limit_s), tables=self._tables.within(limit_s))

    @property
    def least_s(self) -> float:
        """Return the least seconds of all, infinite where there is no split."""
        return min(self.seconds.values(), default=inf)

    def split(self, count: int) -> Split:
        """Return the fastest split over that many bins, one of ``seconds``'s keys."""
        segments: list[Segment] = []
        left, end = count, len(self._problem.reads)
        for index in reversed(range(len(self._problem.bins))):
            before = self._states[index]
            own_s = self._states[index + 1][left][end]
            if left < len(before) and before[left][end] <= own_s:
                continue
            table = self._tables.of(index, first=left == 1)
            segment = next(table.last(index, before[left - 1], end, own_s))
            segments.append(segment)
            left, end = left - 1, segment.start
        return Split(tuple(reversed(segments)), self.seconds[count])

    def _go_through(self, index: int) -> None:
        """Let the bin take slots after those before it, or none."""
        problem, before = self._problem, self._states[-1]
        after = [list(state) for state in before]
        most = problem.max_bins if self._counted else 1
        if len(before) <= most:
            after.append([inf] * (len(problem.reads) + 1))
        rest = range(index, len(problem.bins))
        counts = range(index if problem.all_bins else 0, min(len(before), problem.max_bins))
        promising = [(count, starts) for count in counts if (starts := self._tables.promising(before[count], rest))]
        for count, starts in promising:
            every = range(min(each[0] for _, each in promising), max(each[-1] for _, each in promising) + 1)
            table = self._tables.of(index, first=not count, starts=every)
            table.take(before[count], starts, after[min(count + 1, most)])
        self._states.append(after)
