"""What the solver is asked of one question: a problem for each mode, and which of its splits are of that mode."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import Final, NamedTuple

from planner.flag_values import MAX_DEVICES
from planner.search.bounds import ROUNDING, bound_s
from planner.search.chain import Chain
from planner.search.learned import Mode
from planner.search.splits import Problem, Split
from planner.speed import EQUAL_SPEED

LIKELY: Final = 1.1  # times the seconds that no split is below: the fastest splits of most models are within


class Subproblem(NamedTuple):
    """A problem in one mode, and how many devices at least and at most make a split of that mode."""

    mode: Mode
    problem: Problem
    least: int = 0
    most: int = MAX_DEVICES

    def chained(self, limit_s: float, *, counted: bool = True) -> Chain:
        """Return the fastest splits within these seconds by number of devices, the devices in order."""
        most = min(self.most, len(self.problem.bins))
        return Chain(replace(self.problem, max_bins=most, limit_s=limit_s), counted=counted)

    def least_s(self, limit_s: float) -> float:
        """Return the least seconds of all splits, infinite where none is within these."""
        if bound_s(self.problem) > limit_s * (1 + ROUNDING):
            return inf
        return min(self.by_count(self.chained(limit_s, counted=self._counts)).values(), default=inf)

    def fastest(self, limit_s: float) -> Chain:
        """Return the splits within these seconds: at least the fastest, and all that count as equal to it.

        Where any number of devices will do, there are very many; those that are not as fast are not told apart.
        """
        if self._counts:
            return self.chained(limit_s)
        likely_s = bound_s(self.problem) * LIKELY
        if likely_s >= limit_s:
            return self.chained(limit_s)
        most_s, chain = likely_s, self.chained(likely_s, counted=False)
        if chain.least_s == inf:
            most_s, chain = limit_s, self.chained(limit_s, counted=False)
        equal_s = min(chain.least_s * EQUAL_SPEED, limit_s)
        return chain.within(equal_s) if equal_s <= most_s else self.chained(equal_s)

    @property
    def _counts(self) -> bool:
        """Say whether it matters for the answer how many devices there are."""
        return self.least > 0 or self.most < len(self.problem.bins)

    def by_count(self, chain: Chain) -> dict[int, float]:
        """Return the least seconds for each number of devices that makes a split of this mode."""
        return {count: s for count, s in chain.seconds.items() if self.least <= count <= self.most}

    def has(self, mode: Mode, split: Split) -> bool:
        """Say whether this split in that mode is one of this subproblem."""
        return mode is self.mode and self.least <= len(split.segments) <= self.most
