"""The split is the best of all, brute force says so; more room makes none worse, and of twins the first is used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, pairwise, permutations
from math import inf

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from planner.search.bounds import bound_s
from planner.search.chain import Chain
from planner.search.solver import Solver
from planner.search.splits import Bin, Problem, Split

MAX_SLOTS = 11  # ten layers and the output
FAST = st.sampled_from([4.0, 7.0, 10.0])


@st.composite
def problems(draw: st.DrawFn, *, max_slots: int = MAX_SLOTS, max_bins: int = 4) -> Problem:
    """Draw slots of random sizes, unequal bins, and what may be left to the host: nothing, slots, parts of slots."""
    n_slots = draw(st.integers(2, max_slots))
    sizes = draw(st.lists(st.integers(1, 30), min_size=n_slots, max_size=n_slots))
    active = draw(st.sampled_from([0.25, 1.0]))
    with_parts = draw(st.sets(st.integers(0, n_slots - 2)))
    spill_slots = tuple(slot for slot in sorted(with_parts) for _ in range(2))
    spill_sizes = tuple(sizes[slot] * 4 // 10 for slot in spill_slots)
    spill_reads = tuple(size * active for size in spill_sizes)
    lighter = {slot: 2 * (size - read) for slot, size, read in zip(spill_slots, spill_sizes, spill_reads, strict=True)}
    reads = tuple(size - lighter.get(slot, 0.0) for slot, size in enumerate(sizes))
    bins = []
    for _ in range(draw(st.integers(1, max_bins))):
        room = draw(st.integers(0, 2 * sum(sizes) // 3 + 1))
        taken = draw(st.tuples(st.integers(0, 5), st.integers(0, 5)))
        rooms = (room, room - taken[0], room - taken[1], room - sum(taken))
        bins.append(Bin(rooms, tuple(sizes), spill_sizes, draw(FAST), draw(st.sampled_from([0.0, 0.01]))))
    return Problem(
        bins=tuple(bins),
        reads=reads,
        host_bytes_per_s=1.0,
        on_host=draw(st.sampled_from([0, None])),
        spill_slots=spill_slots,
        spill_reads=spill_reads,
        max_spilled=draw(st.sampled_from([0, 1, 99])),
        ordered=draw(st.booleans()),
    )


def every_way(problem: Problem) -> Iterator[float]:
    """Yield the seconds of every split that has room."""
    n_slots = len(problem.reads)
    if problem.on_host is None:
        yield sum(problem.reads) / problem.host_bytes_per_s
    costs: dict[tuple[int, int, int, bool], float] = {}
    for start in range(n_slots) if problem.on_host is None else (0,):
        for count in range(1, len(problem.bins) + 1):
            orders = combinations if problem.ordered else permutations
            for cuts in combinations(range(start + 1, n_slots), count - 1):
                ends = list(pairwise((start, *cuts, n_slots)))
                for order in orders(range(len(problem.bins)), count):
                    seconds = sum(problem.reads[:start]) / problem.host_bytes_per_s
                    for place, (index, (begin, end)) in enumerate(zip(order, ends, strict=True)):
                        key = (index, begin, end, place == 0)
                        if key not in costs:
                            costs[key] = cost_of(problem, *key)
                        seconds += costs[key]
                    yield seconds


def cost_of(problem: Problem, index: int, start: int, end: int, first: bool) -> float:  # noqa: FBT001 - part of a key
    """Return the seconds of these slots by spilling one part after the other until there is room; else infinite."""
    bin_ = problem.bins[index]
    room = bin_.room(first=first, output=end == len(problem.reads))
    size, away, slots = sum(bin_.sizes[start:end]), 0.0, set()
    for part, slot in enumerate(problem.spill_slots):
        if size > room and start <= slot < end and (slot in slots or len(slots) < problem.max_spilled):
            size -= bin_.spill_sizes[part]
            away += problem.spill_reads[part]
            slots.add(slot)
    if size > room:
        return inf
    seconds = (sum(problem.reads[start:end]) - away) / bin_.bytes_per_s + away / problem.host_bytes_per_s
    return seconds + 2 * bin_.crossing_s * (1 + len(slots))


def best_of(problem: Problem) -> Split | None:
    solver = Solver(problem)
    if not solver.seconds:
        return None
    return solver.split(min(solver.seconds, key=lambda used: solver.seconds[used]))


def some_split(problem: Problem) -> Split:
    """Return the best split; a problem that has none is not looked at any further."""
    split = best_of(problem)
    assume(split is not None)
    assert split is not None
    return split


def least(problem: Problem) -> float:
    split = best_of(problem)
    return inf if split is None else split.seconds


@settings(max_examples=100)
@given(problem=problems())
def test_no_split_is_faster_than_the_one_that_is_found(problem: Problem) -> None:
    assert least(problem) == pytest.approx(min(every_way(problem), default=inf))


@settings(max_examples=100)
@given(problem=problems())
def test_of_as_many_bins_in_order_the_fastest_split_is_told(problem: Problem) -> None:
    ordered = replace(problem, ordered=True)
    by_set, chain = Solver(ordered).seconds, Chain(ordered)
    counts = {used.bit_count() for used in by_set}
    least_s = {count: min(s for used, s in by_set.items() if used.bit_count() == count) for count in counts}
    assert chain.seconds == pytest.approx(least_s)
    for count, seconds in least_s.items():
        split = chain.split(count)
        assert (len(split.segments), split.seconds) == (count, pytest.approx(seconds))
        assert [segment.bin for segment in split.segments] == sorted({segment.bin for segment in split.segments})


@settings(max_examples=50)
@given(problem=problems(max_slots=5, max_bins=3))
def test_every_split_is_yielded_once_and_the_fastest_first(problem: Problem) -> None:
    """The one for each set of bins that is the fastest is among them."""
    solver = Solver(problem)
    splits = list(solver.splits(lambda _: False))
    seconds = [split.seconds for split in splits]
    assert seconds == pytest.approx(sorted(seconds))
    assert len(set(splits)) == len(splits)
    used = {sum(1 << segment.bin for segment in split.segments) for split in splits}
    assert used == set(solver.seconds)
    assert min(seconds, default=inf) == pytest.approx(min(solver.seconds.values(), default=inf))


@settings(max_examples=100)
@given(problem=problems())
def test_nothing_is_below_the_bound(problem: Problem) -> None:
    assert bound_s(problem) <= least(problem) * (1 + 1e-9)


@settings(max_examples=100)
@given(problem=problems(), limit=st.floats(0.5, 2.0))
def test_a_limit_takes_away_slower_splits_only(problem: Problem, limit: float) -> None:
    every = Solver(problem).seconds
    limit_s = limit * min(every.values(), default=1.0)
    within = {used: seconds for used, seconds in every.items() if seconds <= limit_s}
    assert Solver(replace(problem, limit_s=limit_s)).seconds == pytest.approx(within)


@settings(max_examples=100)
@given(problem=problems())
def test_every_slot_lies_somewhere_once_and_costs_what_is_said(problem: Problem) -> None:
    split = some_split(problem)
    ends = [(segment.start, segment.end) for segment in split.segments]
    assert all(before[1] == after[0] for before, after in pairwise(ends))
    assert not ends or ends[-1][1] == len(problem.reads)
    assert not (problem.on_host == 0 and ends[0][0])
    assert len({segment.bin for segment in split.segments}) == len(split.segments)
    seconds = sum(problem.reads[: ends[0][0]] if ends else problem.reads) / problem.host_bytes_per_s
    for place, segment in enumerate(split.segments):
        bin_ = problem.bins[segment.bin]
        spilled = slice(segment.spill_start, segment.spill_end)
        size = sum(bin_.sizes[segment.start : segment.end]) - sum(bin_.spill_sizes[spilled])
        assert size <= bin_.room(first=place == 0, output=segment.end == len(problem.reads))
        assert all(segment.start <= slot < segment.end for slot in problem.spill_slots[spilled])
        seconds += cost_of(problem, segment.bin, segment.start, segment.end, first=place == 0)
    assert seconds == pytest.approx(split.seconds)


@settings(max_examples=50)
@given(problem=problems(), more=st.integers(1, 20), which=st.integers(0, 3))
def test_more_room_never_makes_it_slower(problem: Problem, more: int, which: int) -> None:
    bins = list(problem.bins)
    old = bins[which % len(bins)]
    one, two, three, four = (room + more for room in old.rooms)
    bins[which % len(bins)] = replace(old, rooms=(one, two, three, four))
    assert least(replace(problem, bins=tuple(bins))) <= least(problem) * (1 + 1e-9)


@settings(max_examples=50)
@given(problem=problems())
def test_a_bin_that_is_not_used_can_be_taken_away(problem: Problem) -> None:
    split = best_of(problem)
    used = {segment.bin for segment in split.segments} if split else set()
    kept = [bin_ for index, bin_ in enumerate(problem.bins) if index in used]
    assert least(replace(problem, bins=tuple(kept))) == pytest.approx(least(problem))


@settings(max_examples=50)
@given(problem=problems(max_bins=3))
def test_of_bins_that_are_alike_the_first_are_used(problem: Problem) -> None:
    doubled = replace(problem, bins=(*problem.bins, problem.bins[0]), ordered=False)
    assume(problem.bins.count(problem.bins[0]) == 1)
    split = some_split(doubled)
    used = [segment.bin for segment in split.segments]
    assert len(problem.bins) not in used or used.index(0) < used.index(len(problem.bins))
