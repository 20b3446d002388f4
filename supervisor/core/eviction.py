"""Which runners go, so that a model fits as well as it would without any of them: the cheapest set, by bytes.

Whether a set will do only a planner can say, and that takes time. So the plan with all of them gone comes first: it is
the best there can be, and where its bytes would fit with a set gone, by arithmetic alone, that set will do. It bounds
the search from above; cheaper sets are planned for in the order of their cost, a few of them. More memory never makes a
plan worse, so what is part of a set that failed is not tried.

A device that takes one runner at a time, and is asked for by name, is a problem while another has it. So a problem
counts only where it is one on an empty machine too.

Cost, most important first: a runner in use (it has to be waited for), the highest priority in the set, and the seconds
that loading it all again would cost. Pinned runners are in no set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Final

from planner.types import HOST
from supervisor.core.types import (
    DoesNotFit,
    LoadPlan,
    MakeRoom,
    ModelId,
    Neighbour,
    PlanOutcome,
    PlanProblem,
    Standing,
)

MAX_CANDIDATES: Final = 10  # 1024 sets are ordered in a few milliseconds; of more runners the cheapest
MAX_PLANS: Final = 8  # beyond the two that bound the search; at 150 ms each, about a second
NOWHERE: Final = (-1, False)  # worse than any plan
LEAST_PRIORITY: Final = -(2**31)

PlanWith = Callable[[frozenset[ModelId]], LoadPlan | DoesNotFit | PlanProblem]
Quality = tuple[int, bool]  # how well it is placed, then whether its context is long enough
Victims = tuple[Neighbour, ...]


def choose(
    plan_with: PlanWith, neighbours: Sequence[Neighbour], available_bytes: Mapping[str, int | None], surplus: int = 0
) -> PlanOutcome:
    """Return the plan to launch, who has to go first, or why neither will do.

    ``plan_with`` plans as if the given neighbours were gone. ``available_bytes`` is what a plan may take on each device
    while all of them are there (None: no limit is known). At least ``surplus`` of them have to go.
    """
    fixed = [one for one in neighbours if one.standing is Standing.FIXED]
    movable = [one for one in neighbours if one.standing is not Standing.FIXED]
    here = plan_with(frozenset())
    quality = NOWHERE if surplus else _quality(here, neighbours)
    if isinstance(here, LoadPlan) and here.is_best_possible and quality > NOWHERE:
        return here
    if isinstance(here, PlanProblem):
        alone = plan_with(frozenset(one.model for one in neighbours)) if neighbours else here
        if isinstance(alone, PlanProblem):
            return alone
    if surplus > len(movable):
        return DoesNotFit(f"{_names(fixed)} may not go, and MAX_LOADED_MODELS allows no more", never=False)
    best = plan_with(frozenset(one.model for one in movable)) if movable else here
    if not isinstance(best, LoadPlan) or not _is_good(best, fixed):
        return _no_fit(best, fixed)
    candidates = _candidates(movable, best, surplus)
    is_best = quality >= _quality_of(best)
    in_bytes = None if isinstance(here, PlanProblem) else available_bytes
    victims = () if is_best else _cheapest(plan_with, candidates, neighbours, best, in_bytes, surplus)
    has_to_wait = any(one.standing is Standing.BUSY for one in victims)
    if is_best or (has_to_wait and quality >= (best.quality, False)):  # nobody waits for a longer context alone
        return here
    return MakeRoom(
        victims=frozenset(one.model for one in victims),
        alternatives=frozenset(one.model for one in candidates),
        contended=_devices(victims),
    )


def cheapest_for(neighbours: Sequence[Neighbour], devices: frozenset[str], wanted_bytes: int) -> frozenset[ModelId]:
    """Return the cheapest set of runners that gives so much back on these devices; all that may go, where none does."""
    gives = {one.model: sum(one.held_bytes.get(device, 0) for device in devices) for one in neighbours}
    movable = [one for one in neighbours if one.standing is not Standing.FIXED and gives[one.model] > 0]
    movable = sorted(movable, key=lambda one: _cost((one,)))
    for some in _by_cost(movable[:MAX_CANDIDATES]):
        if sum(gives[one.model] for one in some) >= wanted_bytes:
            return frozenset(one.model for one in some)
    return frozenset(one.model for one in movable)


def _cheapest(
    plan_with: PlanWith,
    candidates: Sequence[Neighbour],
    neighbours: Sequence[Neighbour],
    best: LoadPlan,
    available_bytes: Mapping[str, int | None] | None,
    surplus: int,
) -> Victims:
    """Return who goes. ``available_bytes`` None: what is in the way is no lack of bytes, so they tell nothing."""
    failed: list[frozenset[ModelId]] = [] if surplus else [frozenset()]
    plans = 0
    for some in _by_cost(candidates):
        gone = frozenset(one.model for one in some)
        if len(some) < surplus or any(gone <= other for other in failed):
            continue
        if available_bytes is not None and best.is_known and _would_hold(best, some, available_bytes):
            return some
        if plans == MAX_PLANS or (available_bytes is not None and _is_hopeless(best, some, available_bytes)):
            continue
        plans += 1
        attempt = plan_with(gone)
        left = [one for one in neighbours if one.model not in gone]
        if _quality(attempt, left) >= _quality_of(best):
            return some
        failed.append(gone)
    return tuple(one for one in neighbours if one.standing is not Standing.FIXED)


def _candidates(movable: Sequence[Neighbour], best: LoadPlan, surplus: int) -> list[Neighbour]:
    """Return whose going can help: those on devices, where the best plan uses devices. The cheapest of them."""
    on_devices = HOST not in best.contended and not surplus
    useful = [one for one in movable if not on_devices or HOST not in _devices([one])]
    return sorted(useful, key=lambda one: _cost((one,)))[:MAX_CANDIDATES]


def _by_cost(candidates: Sequence[Neighbour]) -> Iterator[Victims]:
    sets = [some for size in range(len(candidates) + 1) for some in combinations(candidates, size)]
    yield from sorted(sets, key=_cost)


def _cost(some: Victims) -> tuple[bool, int, float, int]:
    staying = [one for one in some if one.standing is not Standing.LEAVING]
    busy = any(one.standing is Standing.BUSY for one in staying)
    priority = max((one.priority for one in staying), default=LEAST_PRIORITY)
    return busy, priority, sum(one.cost_s for one in some), len(some)


def _would_hold(plan: LoadPlan, gone: Victims, available_bytes: Mapping[str, int | None]) -> bool:
    """Say whether the plan's own bytes are there once these are gone."""
    for device, needed in plan.taken_bytes().items():
        here = available_bytes.get(device)
        if here is not None and needed > here + sum(one.held_bytes.get(device, 0) for one in gone):
            return False
    return True


def _is_hopeless(best: LoadPlan, gone: Victims, available_bytes: Mapping[str, int | None]) -> bool:
    """Say whether all devices together would have less than the best plan takes: spread wider, it takes more."""
    if best.is_elastic:
        return False
    needed = sum(size for device, size in best.taken_bytes().items() if device != HOST)
    there = 0
    for device, here in available_bytes.items():
        if device == HOST:
            continue
        if here is None:
            return False
        there += max(0, here + sum(one.held_bytes.get(device, 0) for one in gone))
    return there < needed


def _quality(outcome: LoadPlan | DoesNotFit | PlanProblem, left: Sequence[Neighbour]) -> Quality:
    return _quality_of(outcome) if isinstance(outcome, LoadPlan) and _is_good(outcome, left) else NOWHERE


def _quality_of(plan: LoadPlan) -> Quality:
    return plan.quality, plan.is_long_enough


def _is_good(plan: LoadPlan, left: Sequence[Neighbour]) -> bool:
    """Say whether the plan may be launched beside these: one of unknown size has to be alone, and so has its like."""
    return plan.is_known or not left


def _no_fit(best: LoadPlan | DoesNotFit | PlanProblem, fixed: Sequence[Neighbour]) -> DoesNotFit:
    if isinstance(best, PlanProblem):  # a device that it has to use is theirs alone
        return DoesNotFit(f"{best.reason}; {_names(fixed)} may not go for it", never=False)
    if isinstance(best, LoadPlan):
        return DoesNotFit(f"it takes nobody knows how much, so it cannot be loaded beside {_names(fixed)}", never=False)
    if not fixed:
        return best
    return DoesNotFit(f"{best.headline}; {_names(fixed)} may not go for it", best.causes, never=False)


def _names(some: Iterable[Neighbour]) -> str:
    return ", ".join(sorted(one.model for one in some))


def _devices(some: Iterable[Neighbour]) -> frozenset[str]:
    """Return the devices that these hold memory of: the host where it is no other."""
    return frozenset(
        device for one in some for device, size in one.held_bytes.items() if size and device != HOST
    ) or frozenset({HOST})
