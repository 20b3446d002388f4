"""The longest context that fits: a search between a length that does and one that does not."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from typing import Final

from planner import budget
from planner.context import CONTEXT_ALIGNMENT
from planner.search.candidates import Candidate

STEP: Final = CONTEXT_ALIGNMENT  # tokens; llama.cpp rounds to these

# Memory grows almost in proportion to the context, so that two lengths foretell where it ends; every third guess
# halves what is left, whatever they foretell.
_HALVES: Final = (False, False, True)


def longest(candidate_at: Callable[[int], Candidate], floor: int, trained: int) -> Candidate | None:
    """Return the candidate with the longest context that fits, mapped weights included; None where none does.

    The trained length is tried first, below it multiples of ``STEP``. One whose figures are not known is returned as it
    is: there is nothing to compare.
    """
    over = candidate_at(trained)
    if over.fits_in_memory or over.unknown:
        return over
    best = candidate_at(floor)
    if not best.fits_in_memory:
        return None
    low, high = floor // STEP, -(-trained // STEP)
    for halve in cycle(_HALVES):
        if high - low <= 1:
            break
        ahead = (high - low) // 2 if halve else int((high - low) * _share(best, over))
        middle = min(max(low + ahead, low + 1), high - 1)
        candidate = candidate_at(middle * STEP)
        if candidate.fits_in_memory:
            low, best = middle, candidate
        else:
            high, over = middle, candidate
    return best


def _share(best: Candidate, over: Candidate) -> float:
    """Return how far from the one to the other the first device would be full, if memory grew evenly in between."""
    shares = []
    for there, beyond in zip(best.usages, over.usages, strict=True):
        room, missing = budget.beyond_reserve(there), budget.beyond_reserve(beyond)
        if room is not None and missing is not None and missing < 0 <= room:
            shares.append(room / (room - missing))
    return min(shares, default=0.5)
