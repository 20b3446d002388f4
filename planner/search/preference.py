"""Of splits as fast as the fastest the one to be proposed: on the fewest devices, with the most room, evenly filled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf
from typing import Final

from planner.flag_values import MAX_DEVICES
from planner.search.chain import Chain
from planner.search.problems import Question
from planner.search.proposals import Proposal
from planner.search.solver import Solver
from planner.search.splits import Split
from planner.search.subproblems import Subproblem
from planner.speed import EQUAL_SPEED

_PERMILLE: Final = 1000


def preferred(
    question: Question,
    chains: Sequence[tuple[Subproblem, Chain]],
    fastest_s: float,
    limit_s: float,
    *,
    spread: bool,
) -> Proposal:
    """Return the split on the fewest devices of those as fast as the fastest; on the most where they are spread.

    Of sets of as many devices the one with the most room is taken, then the first in order. Where some of the
    model is left to the host, it is the fastest. A limit that was given says itself what counts as equal.
    """
    equal_s = limit_s if limit_s < inf else fastest_s * EQUAL_SPEED
    equal_s = inf if spread else equal_s
    splits = [(count, s, i) for i, (each, chain) in enumerate(chains) for count, s in each.by_count(chain).items()]
    count, seconds, which = min((-n if spread else n, s, i) for n, s, i in splits if s <= equal_s)
    subproblem, chain = chains[which]
    if subproblem.problem.on_host is not None:
        split, seconds = _roomiest(question, subproblem, abs(count), equal_s)
    else:
        split = chain.split(abs(count))
    return Proposal(subproblem.mode, split, seconds if spread else fastest_s)


def _roomiest(question: Question, subproblem: Subproblem, count: int, equal_s: float) -> tuple[Split, float]:
    """Return the split on that many devices with the most room, and the seconds of the fastest one on them."""

    def rank(used: int) -> tuple[float, float]:
        room = sum(max(each.rooms) for i, each in enumerate(subproblem.problem.bins) if used >> i & 1)
        return -room, _reversed_bits(used)

    solver = Solver(replace(subproblem.problem, max_bins=count, limit_s=equal_s))
    used = min((used for used in solver.seconds if used.bit_count() == count), key=rank)
    split = solver.split(used)
    most_s = max(split.seconds, split.seconds * EQUAL_SPEED if equal_s == inf else equal_s)
    return _even(question, subproblem, split, most_s), solver.seconds[used]


def _even(question: Question, subproblem: Subproblem, split: Split, limit_s: float) -> Split:
    """Return the split over these devices that fills the fullest least, in permille of its budget."""
    used = [segment.bin for segment in split.segments]
    low, high = 0, _PERMILLE
    while high - low > 1:
        middle = (low + high) // 2
        bins = (question.bin(subproblem.mode, index, middle / _PERMILLE) for index in used)
        emptier = tuple(replace(each, spill_sizes=()) for each in bins)
        chain = Chain(replace(subproblem.problem, bins=emptier, all_bins=True, limit_s=limit_s))
        if chain.seconds:
            found = chain.split(len(used))
            segments = tuple(segment._replace(bin=used[segment.bin]) for segment in found.segments)
            high, split = middle, Split(segments, found.seconds)
        else:
            low = middle
    return split


def _reversed_bits(used: int) -> int:
    """Return a number that is the smaller the earlier the bins of a set are."""
    return -sum(1 << (MAX_DEVICES - index) for index in range(used.bit_length()) if used >> index & 1)
