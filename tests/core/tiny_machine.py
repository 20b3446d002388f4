"""Two cards, a host, and a planner that any reader can follow: what the search is to the real one.

Sizes are in bytes, a layer is one byte. Model a takes 10, b 14, c 20, d 30, s 5, f too much; g is broken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from making_plans import LIMITS, Bench, make_plan

from planner.types import LoadOptions
from supervisor.core import eviction
from supervisor.core.commands import Command, PlanModel
from supervisor.core.events import Event, Planned
from supervisor.core.runner import RunnerState
from supervisor.core.types import NO_OPTIONS, DoesNotFit, LoadPlan, ModelId, Neighbour, PlanOutcome, PlanProblem

CAPACITY: Final[Mapping[str, int]] = {"CUDA0": 24, "CUDA1": 24, "Host": 64}
SIZES: Final[Mapping[str, int]] = {"a": 10, "b": 14, "c": 20, "d": 30, "e": 70, "f": 1000, "s": 5}
BROKEN: Final = ModelId("g")
ANY: Final = replace(LIMITS, max_loaded_models=None, max_queue=100)
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
    for cap in question.caps:
        room = cap.most_bytes - sum(held[device] for device in cap.devices)
        free |= {device: min(free[device], room) for device in cap.devices}
    for device, margin in question.margins.items():
        free[device] -= margin
    return free


def _place(question: PlanModel, free: Mapping[str, int], n_parallel: int) -> LoadPlan | DoesNotFit:
    """Place a model, or as much of it as is asked for, on the emptier card, else on both, the rest on the host."""
    n_ctx, n_gpu_layers = question.options.n_ctx or N_CTX, question.options.n_gpu_layers
    size = SIZES[question.model] + n_ctx // N_CTX - 1
    wanted = size if n_gpu_layers is None else min(size, n_gpu_layers)
    first, second = sorted(("CUDA0", "CUDA1"), key=lambda device: -free[device])
    on = {first: min(wanted, max(0, free[first]))}
    if on[first] < wanted:
        on[second] = min(wanted - on[first], max(0, free[second]))
    on = {device: part for device, part in on.items() if part}
    rest = size - sum(on.values())
    if rest > free["Host"]:
        return DoesNotFit(f"lacks {rest - free['Host']} bytes")
    quality = 3 if not rest else min(2, 3 * (size - rest) // size)
    serves = LoadOptions(n_ctx=n_ctx, n_gpu_layers=n_gpu_layers)
    return make_plan(on=on, host_bytes=rest, quality=quality, n_parallel=n_parallel, serves=serves)


class Shop(Bench):
    """A bench whose planner answers by itself."""

    def __init__(self, n_parallel: int = 1) -> None:
        super().__init__(ANY)
        self.n_parallel = n_parallel
        self.questions: list[PlanModel] = []

    def post(self, event: Event) -> tuple[Command, ...]:
        commands = super().post(event)
        self.questions += self.all(PlanModel)
        return commands

    def plan(self) -> None:
        """Answer every question there is."""
        while self.questions:
            question = self.questions.pop(0)
            self.post(Planned(question.model, question.revision, answer(question, self.n_parallel)))

    def load(self, model: ModelId, *, busy: bool = False, options: LoadOptions = NO_OPTIONS) -> None:
        self.arrive(model, options=options)
        self.plan()
        self.finish_load(model)
        if not busy:
            self.finish(model)

    def loaded(self) -> set[ModelId]:
        return {one.model for one in self.pool.runners.values() if one.state is RunnerState.READY}
