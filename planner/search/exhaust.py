"""Small problems are searched to their end: every split that weights and caches allow, the fastest first.

What a device takes beyond its layers is told from other splits in ``optimizer``, so that one that needs less may be
missed. Here nothing is told: each is accounted for, until one fits or none is left that would be better.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from heapq import merge
from typing import TYPE_CHECKING, Final

from planner.search.learned import Mode
from planner.search.roles import Roles
from planner.search.solver import Solver
from planner.search.splits import Split
from planner.speed import EQUAL_SPEED

if TYPE_CHECKING:
    from planner.search.optimizer import Evaluation, Optimizer
    from planner.search.subproblems import Subproblem
    from planner.types.request import PlanRequest

SMALL: Final = 44  # slots times devices: ten layers and the output on four devices
# Splits that do not fit, one after the other: each takes one to seven milliseconds, by the model's graph.
MAX_CHECKED: Final = 1000


def improved(optimizer: Optimizer, request: PlanRequest, limit_s: float, found: Evaluation | None) -> Evaluation | None:
    """Return a split that the objective puts before the one that was found, or that one where there is none.

    All on devices comes first; then the speed, where it differs by more than what is equal; then the fewest devices.
    """
    if not optimizer.is_small:
        return found
    question = optimizer.question(request, told=False)
    roles = Roles(question)
    for tier in optimizer.tiers(question, request):
        here = found is not None and _lies_in(tier, found)
        most_s = found.proposal.split.seconds / EQUAL_SPEED if found is not None and here else limit_s
        faster = _first(optimizer, request, roles, tier, most_s)
        if faster is not None or here:
            found = faster or found
            break
    return found and _earliest(request, _on_fewest(optimizer, request, roles, found, limit_s))


def _on_fewest(
    optimizer: Optimizer, request: PlanRequest, roles: Roles, found: Evaluation, limit_s: float
) -> Evaluation:
    """Return the split on the fewest devices that is as fast and lies alike."""
    limit_s = min(found.proposal.split.seconds * EQUAL_SPEED, limit_s)
    for tier in optimizer.tiers(roles.question, request):
        while _lies_in(tier, found):
            most = len(found.proposal.split.segments) - 1
            on_fewer = [each._replace(most=min(each.most, most)) for each in tier]
            fewer = _first(optimizer, request, roles, on_fewer, limit_s)
            # The split that was found may itself be slower than the fastest by what counts as equal.
            if fewer is None or _first(optimizer, request, roles, tier, fewer.proposal.split.seconds / EQUAL_SPEED):
                return found
            found = fewer
    return found


def _lies_in(tier: Sequence[Subproblem], found: Evaluation) -> bool:
    return any(subproblem.has(found.proposal.mode, found.proposal.split) for subproblem in tier)


def _earliest(request: PlanRequest, found: Evaluation) -> Evaluation:
    """Return the split over the same devices that is as fast and keeps most to llama-server's order of them.

    Another order, taken for a split that did not fit then, may be left without being any faster.
    """
    optimizer, split = found.optimizer, found.proposal.split
    used = [optimizer.devices[segment.bin] for segment in split.segments]
    own = sorted(used, key=optimizer.accountant.devices.index)
    if used == own or found.proposal.mode is not Mode.WITH_HOST:
        return found
    alone = replace(optimizer, devices=tuple(own))
    for subproblem in (each for tier in alone.tiers(alone.question(request), request) for each in tier):
        if not subproblem.has(found.proposal.mode, split):
            continue
        solver = Solver(replace(subproblem.problem, ordered=False, limit_s=split.seconds))
        everyone = (1 << len(own)) - 1
        if everyone in solver.seconds:
            other = solver.split(everyone)
            reordered = optimizer.in_order_of([own[segment.bin] for segment in other.segments])
            renamed = tuple(segment._replace(bin=index) for index, segment in enumerate(other.segments))
            earlier = reordered.accounted(request, subproblem.mode, replace(other, segments=renamed))
            if earlier.candidate.fits:
                return earlier
    return found


def _first(
    optimizer: Optimizer, request: PlanRequest, roles: Roles, tier: Sequence[Subproblem], limit_s: float
) -> Evaluation | None:
    """Return the fastest split of these subproblems that fits and takes at most these seconds."""
    splits = merge(
        *(_splits(optimizer, subproblem, limit_s, roles) for subproblem in tier), key=lambda each: each[1].seconds
    )
    n_checked = 0
    for subproblem, split in splits:
        if roles.overruns(subproblem.mode, split):
            continue
        found = optimizer.accounted(request, subproblem.mode, split)
        if found.candidate.fits:
            return found
        roles.learn(subproblem.mode, split, found.candidate.usages)
        n_checked += 1
        if n_checked == MAX_CHECKED or found.candidate.host_is_too_small:
            break
    return None


def _splits(
    optimizer: Optimizer, subproblem: Subproblem, limit_s: float, roles: Roles
) -> Iterator[tuple[Subproblem, Split]]:
    solver = Solver(
        replace(subproblem.problem, ordered=optimizer.order_is_pinned, max_bins=subproblem.most, limit_s=limit_s)
    )
    for split in solver.splits(lambda segment: roles.never_fits(subproblem.mode, segment)):
        if subproblem.has(subproblem.mode, split):
            yield subproblem, split
