"""Small problems are searched to their end: every split that weights and caches allow, the fastest first.

What a device takes beyond its layers is told from other splits (``best``); a split that needs less may be missed so.
Here nothing is told: each is accounted for, until one fits or none is left that would be better.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from heapq import merge
from typing import TYPE_CHECKING, Final

from planner.search.learned import Mode
from planner.search.roles import Roles
from planner.search.solver import Solver, Split
from planner.speed import EQUAL_SPEED

if TYPE_CHECKING:
    from planner.search.best import Best, Found, Way
    from planner.types.request import PlanRequest

SMALL: Final = 44  # slots times devices: ten layers and the output on four devices
# Splits that do not fit, one after the other: each takes one to seven milliseconds, by the model's graph.
MAX_CHECKED: Final = 1000


def improved(best: Best, request: PlanRequest, limit_s: float, found: Found | None) -> Found | None:
    """Return a split that the objective puts before the one that was found, or that one where there is none.

    All on devices comes first; then the speed, where it differs by more than what is equal; then the fewest devices.
    """
    if not best.is_small:
        return found
    question = best.question(request, told=False)
    roles = Roles(question)
    for tier in best.tiers(question, request):
        here = found is not None and any(way.has(found.choice.mode, found.choice.split) for way in tier)
        most_s = found.choice.split.seconds / EQUAL_SPEED if found is not None and here else limit_s
        faster = _first(best, request, roles, tier, most_s)
        if faster is not None or here:
            found = faster or found
            break
    return found and _earliest(best, request, _on_fewest(best, request, roles, found, limit_s))


def _on_fewest(best: Best, request: PlanRequest, roles: Roles, found: Found, limit_s: float) -> Found:
    """Return the split on the fewest devices that is as fast and lies alike."""
    limit_s = min(found.choice.split.seconds * EQUAL_SPEED, limit_s)
    for tier in best.tiers(roles.question, request):
        while any(way.has(found.choice.mode, found.choice.split) for way in tier):
            most = len(found.choice.split.segments) - 1
            ways = [way._replace(most=min(way.most, most)) for way in tier]
            fewer = _first(best, request, roles, ways, limit_s)
            # The split that was found may itself be slower than the fastest by what counts as equal.
            if fewer is None or _first(best, request, roles, tier, fewer.choice.split.seconds / EQUAL_SPEED):
                return found
            found = fewer
    return found


def _earliest(best: Best, request: PlanRequest, found: Found) -> Found:
    """Return the split over the same devices that is as fast and keeps most to llama-server's order of them.

    Another order, taken for a split that did not fit then, may be left without being any faster.
    """
    known, segments = best.devices, found.choice.split.segments
    used = [known[segment.bin] for segment in segments]
    own = sorted(used, key=best.accountant.devices.index)
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


def _first(best: Best, request: PlanRequest, roles: Roles, tier: Sequence[Way], limit_s: float) -> Found | None:
    """Return the fastest split of these ways that fits and takes at most these seconds."""
    splits = merge(*(_splits(best, way, limit_s, roles) for way in tier), key=lambda each: each[1].seconds)
    n_checked = 0
    for way, split in splits:
        if roles.overruns(way.mode, split):
            continue
        found = best.accounted(request, way.mode, split)
        if found.candidate.fits:
            return found
        roles.learn(way.mode, split, found.candidate.usages)
        n_checked += 1
        if n_checked == MAX_CHECKED:
            break
    return None


def _splits(best: Best, way: Way, limit_s: float, roles: Roles) -> Iterator[tuple[Way, Split]]:
    solver = Solver(replace(way.problem, ordered=best.order_is_settled, max_bins=way.most, limit_s=limit_s))
    for split in solver.splits(lambda segment: roles.never_fits(way.mode, segment)):
        if way.has(way.mode, split):
            yield way, split
