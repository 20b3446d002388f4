"""Small problems are searched to their end: every split that weights and caches allow, the fastest first.

What a device takes beyond its layers is told from other splits (``best``); a split that needs less may be missed so.
Here nothing is told: each is accounted for, until one fits or none is left that would be better.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from heapq import merge
from typing import TYPE_CHECKING, Final, NamedTuple

from planner.search.learned import Mode
from planner.search.solver import Segment, Solver, Split
from planner.speed import EQUAL_SPEED
from planner.units import KIB

if TYPE_CHECKING:
    from planner.search.best import Best, Found, Way
    from planner.search.candidates import Candidate
    from planner.search.problems import Question
    from planner.types.request import PlanRequest

SMALL: Final = 44  # slots times devices: ten layers and the output on four devices
MAX_CHECKED: Final = 1000  # splits that do not fit, one after the other; each takes such a small model a millisecond
NEIGHBOURS_BYTES: Final = 128 * KIB  # what the devices before and after were seen to change in a device's buffers


def improved(best: Best, request: PlanRequest, limit_s: float, found: Found | None) -> Found | None:
    """Return a split that the objective puts before the one that was found, or that one where there is none.

    All on devices comes first; then the speed, where it differs by more than what is equal; then the fewest devices.
    """
    if not best.is_small:
        return found
    question = best.question(request, told=False)
    for tier in best.tiers(question, request):
        here = found is not None and any(way.has(found.choice.mode, found.choice.split) for way in tier)
        most_s = found.choice.split.seconds / EQUAL_SPEED if found is not None and here else limit_s
        faster = _first(best, request, tier, most_s)
        if faster is not None or here:
            found = faster or found
            break
    return found and _earliest(best, request, _on_fewest(best, request, found, limit_s))


def _on_fewest(best: Best, request: PlanRequest, found: Found, limit_s: float) -> Found:
    """Return the split on the fewest devices that is as fast and lies alike."""
    limit_s = min(found.choice.split.seconds * EQUAL_SPEED, limit_s)
    for tier in best.tiers(best.question(request, told=False), request):
        while any(way.has(found.choice.mode, found.choice.split) for way in tier):
            most = len(found.choice.split.segments) - 1
            fewer = _first(best, request, [way._replace(most=min(way.most, most)) for way in tier], limit_s)
            if fewer is None:
                return found
            found = fewer
    return found


def _earliest(best: Best, request: PlanRequest, found: Found) -> Found:
    """Return the split over the same devices that is as fast and keeps most to llama-server's order of them.

    Another order, taken for a split that did not fit then, may be left without being any faster.
    """
    known, segments = best.devices, found.choice.split.segments
    used = [known[segment.bin] for segment in segments]
    own = sorted(used, key=best.finder.devices.index)
    if used == own or found.choice.mode is not Mode.WITH_HOST:
        return found
    best.devices = tuple(own)
    for way in (way for tier in best.tiers(best.question(request), request) for way in tier):
        if not way.has(found.choice.mode, found.choice.split):
            continue
        solver = Solver(replace(way.problem, ordered=False, limit_s=found.choice.split.seconds))
        everyone = (1 << len(own)) - 1
        if everyone in solver.seconds:
            split = solver.split(everyone)
            first = [own[segment.bin] for segment in split.segments]
            best.devices = (*first, *(device for device in known if device not in first))
            renamed = tuple(segment._replace(bin=index) for index, segment in enumerate(split.segments))
            earlier = best.accounted(request, way.mode, replace(split, segments=renamed))
            if earlier.candidate.fits:
                return earlier
    best.devices = known
    return found


def _first(best: Best, request: PlanRequest, tier: Sequence[Way], limit_s: float) -> Found | None:
    """Return the fastest split of these ways that fits and takes at most these seconds."""
    question, over = best.question(request, told=False), set[_Key]()
    splits = merge(*(_splits(best, way, limit_s, over) for way in tier), key=lambda each: each[1].seconds)
    n_checked = 0
    for way, split in splits:
        keys = _keys(way, split)
        if over.isdisjoint(keys):
            found = best.accounted(request, way.mode, split)
            if found.candidate.fits:
                return found
            n_checked += 1
            over |= {key for key in keys if _overruns(question, found.candidate, key)}
        if n_checked == MAX_CHECKED:
            break
    return None


class _Key(NamedTuple):
    """A segment in a mode. What the first device needs depends on what is left to the host, wherever: it works on it.

    (ggml-backend.cpp, ``ggml_backend_sched_backend_id_from_cur``: operator offload.)
    """

    mode: Mode
    segment: Segment
    on_host: tuple[tuple[int, int], ...] = ()


def _keys(way: Way, split: Split) -> list[_Key]:
    """Return the keys of a split's segments."""
    keys = [_Key(way.mode, segment) for segment in split.segments]
    if keys and way.mode is Mode.WITH_HOST:
        ranges = [(0, split.segments[0].start), *(segment[-2:] for segment in split.segments)]
        keys[0] = keys[0]._replace(on_host=tuple(ranges))
    return keys


def _overruns(question: Question, attempt: Candidate, key: _Key) -> bool:
    """Say whether the segment's device is short by more than its neighbours make a difference."""
    name = question.devices[key.segment.bin].name
    return any(cause.device == name and cause.shortfall_bytes > NEIGHBOURS_BYTES for cause in attempt.shortfalls)


def _splits(best: Best, way: Way, limit_s: float, over: set[_Key]) -> Iterator[tuple[Way, Split]]:
    solver = Solver(replace(way.problem, ordered=best.order_is_settled, max_bins=way.most, limit_s=limit_s))
    for split in solver.splits(lambda segment: _Key(way.mode, segment) in over):
        if way.has(way.mode, split):
            yield way, split
