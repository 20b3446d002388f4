"""Two cards, a host, and a planner that any reader can follow: what the search is to the real one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Final

from making_plans import make_plan

from supervisor.api import LoadOptions
from supervisor.core import eviction
from supervisor.core.commands import PlanModel
from supervisor.core.types import DoesNotFit, LoadPlan, ModelId, Neighbour, PlanOutcome, PlanProblem

CAPACITY: Final[Mapping[str, int]] = {"CUDA0": 24, "CUDA1": 24, "Host": 64}
SIZES: Final[Mapping[str, int]] = {"a": 10, "b": 14, "c": 20, "d": 30, "e": 70, "f": 1000}
BROKEN: Final = ModelId("g")
N_CTX: Final = 4096  # what a conversation gets that asks for nothing; each 4096 more take a byte


def answer(question: PlanModel, n_parallel: int = 1) -> PlanOutcome:
    """Return what the planner says to this question."""
    if question.model == BROKEN:
        return PlanProblem("it is broken")
    others = [one for one in question.neighbours if one.model != question.model]
    available: dict[str, int | None] = dict(_free(question, others))

    def plan_with(gone: frozenset[ModelId]) -> LoadPlan | DoesNotFit:
        left = [one for one in others if one.model not in gone]
        free = _free(question, left)
        busy = {device for one in left if one.loading for device in one.held_bytes}
        apart = _place(question, {device: 0 if device in busy else size for device, size in free.items()}, n_parallel)
        if isinstance(apart, LoadPlan) and apart.is_best_possible:
            return apart
        return _place(question, free, n_parallel)

    return eviction.choose(plan_with, others, available, question.surplus)


def _free(question: PlanModel, left: list[Neighbour]) -> dict[str, int]:
    held: Counter[str] = Counter()
    for one in left:
        held.update(one.held_bytes)
    free = {device: size - held[device] for device, size in CAPACITY.items()}
    for device, cap in question.caps.items():
        free[device] = min(free[device], cap - held[device])
    for device, margin in question.margins.items():
        free[device] -= margin
    return free


def _place(question: PlanModel, free: Mapping[str, int], n_parallel: int) -> LoadPlan | DoesNotFit:
    """Place a model on the emptier card, else on both, else what is left of it on the host."""
    n_ctx = question.options.n_ctx or N_CTX
    size = SIZES[question.model] + n_ctx // N_CTX - 1
    first, second = sorted(("CUDA0", "CUDA1"), key=lambda device: -free[device])
    on = {first: min(size, max(0, free[first]))}
    if on[first] < size:
        on[second] = min(size - on[first], max(0, free[second]))
    on = {device: part for device, part in on.items() if part}
    rest = size - sum(on.values())
    if rest > free["Host"]:
        return DoesNotFit(f"lacks {rest - free['Host']} bytes")
    quality = 3 if not rest else min(2, 3 * (size - rest) // size)
    serves = LoadOptions(n_ctx=n_ctx)
    return make_plan(on=on, host_bytes=rest, quality=quality, n_parallel=n_parallel, serves=serves)
