"""Several models on one machine at a time: whether they fit together, and where each of them goes.

Each is planned beside those that were placed before it, whose bytes count as promised. Who comes first matters to who
gets what, so that orders are tried, and the answer is that of the best one: the order in which models were named does
not matter. Where their slots are free and crowd each other out, each has one; where contexts do that, all of them get
the same shorter one, but for those that need more for an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from types import MappingProxyType
from typing import Final, NamedTuple

from planner.budget import taken_bytes
from planner.context import CONTEXT_ALIGNMENT
from planner.model import ModelFacts
from planner.requirement import left_on_host
from planner.search import slots
from planner.search.placement import MIN_CONTEXT, shortest_context
from planner.types.machine import HOST
from planner.types.plan import Plan, PlanOutcome
from planner.types.request import PlanRequest, Policy

# All orders of up to this many models are tried, fifteen searches at most. Of more models two are, the largest first
# and the smallest first: best fit decreasing is seldom beaten, and nobody waits for all orders of five.
MAX_MODELS_IN_ANY_ORDER: Final = 3
CONTEXT_HALVINGS: Final = 6  # of the way from the least context to the longest: within a sixtieth of it


class Wanted(NamedTuple):
    """A model, and what is asked of it."""

    model: ModelFacts
    request: PlanRequest


Search = Callable[[Wanted, Policy], PlanOutcome]


@dataclass(frozen=True, slots=True)
class Together:
    """The outcome of each model, in the order in which they were named.

    ``left_bytes`` is what all of them leave of each device's budget, None where that is not known.
    """

    outcomes: tuple[PlanOutcome, ...]
    left_bytes: Mapping[str, int | None]

    @property
    def fits(self) -> bool:
        """Say whether all of them can be loaded at a time."""
        return all(isinstance(outcome, Plan) for outcome in self.outcomes)


def together(wanted: Sequence[Wanted], policy: Policy, search: Search, advise: Search | None = None) -> Together:
    """Return the best that orders and contexts allow: most models that fit, most of them wholly on devices.

    ``search`` is asked in every attempt; ``advise`` once for each model that does not fit in the best of them, and its
    answer is returned. Raises InvalidRequest as the searches do.
    """
    sized = sorted(
        enumerate(wanted), key=lambda each: (-each[1].model.summary.tensor_bytes, each[1].model.summary.path)
    )
    canonical = [each for _, each in sized]
    found = _best(canonical, policy, search, _orders(len(canonical)))
    if not found.is_complete and any(slots.are_open(each.request, policy) for each in wanted):
        canonical = [each._replace(request=slots.one_where_open(each.request, policy)) for each in canonical]
        one_each = _best(canonical, policy, search, _orders(len(canonical)))
        found = one_each if one_each.rank > found.rank else found
    if not found.is_complete and any(_is_free(each, policy) for each in wanted):
        found = _with_shorter_contexts(canonical, policy, search, found)
    outcomes = found.outcomes if advise is None else found.advised(advise)
    back = {named: rank for rank, (named, _) in enumerate(sized)}
    return Together(tuple(outcomes[back[index]] for index in range(len(wanted))), found.left_bytes)


@dataclass(frozen=True, slots=True)
class _Attempt:
    """The outcomes in canonical order, and what was ``asked`` for each, of the models planned in another ``order``."""

    order: tuple[int, ...]
    asked: tuple[tuple[Wanted, Policy], ...]
    outcomes: tuple[PlanOutcome, ...]
    left_bytes: Mapping[str, int | None]

    def advised(self, advise: Search) -> tuple[PlanOutcome, ...]:
        """Return the outcomes, those without a plan asked for once more."""
        pairs = zip(self.outcomes, self.asked, strict=True)
        return tuple(outcome if isinstance(outcome, Plan) else advise(*asked) for outcome, asked in pairs)

    @property
    def rank(self) -> tuple[int, int]:
        """Return how many fit, and how many of them lie wholly on devices: the more the better."""
        plans = [outcome for outcome in self.outcomes if isinstance(outcome, Plan)]
        return len(plans), sum(left_on_host(plan) is None for plan in plans)

    @property
    def fits(self) -> bool:
        """Say whether all of them fit."""
        return self.rank[0] == len(self.outcomes)

    @property
    def speed(self) -> float:
        """Return the product of the predicted speeds, for attempts of the same rank."""
        product = 1.0
        for outcome in self.outcomes:
            if isinstance(outcome, Plan) and outcome.decode is not None:
                product *= outcome.decode.tokens_per_second
        return product

    @property
    def is_complete(self) -> bool:
        """Say whether nothing better could come: all of them fit, wholly on devices."""
        return self.rank == (len(self.outcomes), len(self.outcomes))


def _best(
    wanted: Sequence[Wanted],
    policy: Policy,
    search: Search,
    orders: Iterable[tuple[int, ...]],
    *,
    all_or_none: bool = False,
) -> _Attempt:
    """Return the best attempt of these orders; the first one with which everything lies on devices is taken.

    With ``all_or_none`` an attempt ends with the first model that does not fit, and has the outcomes up to there.
    """
    planned: dict[tuple[int, ...], PlanOutcome] = {}
    best: _Attempt | None = None
    for order in orders:
        attempt = _in_order(wanted, order, policy, search, planned, all_or_none=all_or_none)
        if best is None or (attempt.rank, attempt.speed) > (best.rank, best.speed):
            best = attempt
        if best.is_complete:
            break
    return best or _Attempt((), (), (), MappingProxyType({}))


def _orders(count: int) -> Iterator[tuple[int, ...]]:
    if count <= MAX_MODELS_IN_ANY_ORDER:
        yield from permutations(range(count))
    else:
        yield tuple(range(count))
        yield tuple(reversed(range(count)))


def _in_order(
    wanted: Sequence[Wanted],
    order: tuple[int, ...],
    policy: Policy,
    search: Search,
    planned: dict[tuple[int, ...], PlanOutcome],
    *,
    all_or_none: bool,
) -> _Attempt:
    """Plan one model after the other. Orders that begin alike share what was ``planned`` for their beginning."""
    outcomes: dict[int, PlanOutcome] = {}
    asked: dict[int, tuple[Wanted, Policy]] = {}
    left: dict[str, int | None] = {}
    resident = 0
    for place, index in enumerate(order):
        begun = order[: place + 1]
        if begun not in planned:
            planned[begun] = search(wanted[index], policy)
        outcome = outcomes[index] = planned[begun]
        asked[index] = wanted[index], policy
        if isinstance(outcome, Plan):
            policy = _beside(policy, outcome)
            left = {usage.name: usage.headroom_bytes for usage in outcome.usages}
            room = left[HOST]
            left[HOST] = None if room is None else room - resident  # promises leave out what is mapped
            resident += outcome.host.resident_bytes or 0
        elif all_or_none:
            break
    canonical = sorted(outcomes)
    return _Attempt(order, tuple(asked[i] for i in canonical), tuple(outcomes[i] for i in canonical), left)


def _beside(policy: Policy, plan: Plan) -> Policy:
    """Return the policy under which the next model is planned: this plan's bytes are promised, and ours."""
    taken = taken_bytes(plan)

    def plus(known: Mapping[str, int]) -> Mapping[str, int]:
        return MappingProxyType({name: known.get(name, 0) + taken.get(name, 0) for name in {**known, **taken}})

    on_devices = {name: size for name, size in plus(policy.held).items() if name != HOST}
    return replace(policy, promised=plus(policy.promised), held=MappingProxyType(on_devices))


# ---------------------------------------------------------------------------------------------------------------------
# Contexts that crowd each other out


def _is_free(wanted: Wanted, policy: Policy) -> bool:
    """Say whether it is the planner who decides how long this model's context is."""
    request = wanted.request
    unpinned = request.n_ctx == "auto" or (request.n_ctx is None and policy.n_ctx_per_slot is None)
    return unpinned and request.n_ctx_per_slot is None


def _with_shorter_contexts(wanted: Sequence[Wanted], policy: Policy, search: Search, found: _Attempt) -> _Attempt:
    """Return the attempt with the longest common context that is better placed than what was found; else that one."""

    def attempt(n_ctx: int, orders: Iterable[tuple[int, ...]], *, all_or_none: bool) -> _Attempt:
        limited = [_limited(each, policy, n_ctx) for each in wanted]
        return _best(limited, policy, search, orders, all_or_none=all_or_none)

    least = best = attempt(MIN_CONTEXT, _orders(len(wanted)), all_or_none=False)
    if least.rank <= found.rank:
        return found
    trained = max(each.model.hparams.n_ctx_train or MIN_CONTEXT for each in wanted if _is_free(each, policy))
    low, high = MIN_CONTEXT // CONTEXT_ALIGNMENT, -(-trained // CONTEXT_ALIGNMENT)
    for _ in range(CONTEXT_HALVINGS if least.fits else 0):
        middle = (low + high) // 2
        tried = attempt(middle * CONTEXT_ALIGNMENT, [least.order], all_or_none=True)
        low, high, best = (middle, high, tried) if tried.rank >= least.rank else (low, middle, best)
    return best


def _limited(wanted: Wanted, policy: Policy, n_ctx: int) -> Wanted:
    """Return the question with this context, if that is free: no less than an image takes, no more than trained."""
    if not _is_free(wanted, policy):
        return wanted
    n_ctx = max(n_ctx, shortest_context(wanted.model, wanted.request))
    n_ctx = min(n_ctx, wanted.model.hparams.n_ctx_train or n_ctx)
    return wanted._replace(request=replace(wanted.request, n_ctx=None, n_ctx_per_slot=n_ctx))
