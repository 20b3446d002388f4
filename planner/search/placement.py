"""The search: a model, a request and a machine in, a plan or the reasons why there is none out.

What is pinned is obeyed; what is not is chosen by the objective of docs/decisions/0006: everything on devices, the
longest context with which it stays there, the fastest decoding, the fewest devices.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final

from planner import budget, companions, ggml, refusals
from planner.companions import projector
from planner.context import CONTEXT_ALIGNMENT
from planner.model import ModelFacts
from planner.search import knobs, outcomes, reasons, slots
from planner.search.candidates import Accountant, Candidate, Oracle
from planner.search.devices import buffer_refusal, chosen_devices, device_named
from planner.search.ladder import beside_projector, relaxed, unburdened
from planner.search.longest import longest
from planner.search.nearest import nearest
from planner.search.optimizer import Optimizer
from planner.search.overflow import Overflow
from planner.search.packer import Packer
from planner.search.stretch import Stretch
from planner.types.machine import LlamaBuild, Machine
from planner.types.plan import Decision, NoFit, PlacementKind, Plan, PlanOutcome, Refused
from planner.types.request import PlanRequest, Policy

__all__ = ["MIN_CONTEXT", "Oracle", "search", "shortest_context"]

MIN_CONTEXT: Final = 4096  # tokens; below this no context is chosen, as with llama.cpp's own -fitc
MIN_CONTEXT_FOR_WORDS: Final = 2048  # of these beside an image: a question, its answer, and what was said before


def search(
    model: ModelFacts,
    request: PlanRequest,
    machine: Machine,
    policy: Policy,
    build: LlamaBuild,
    oracle: Oracle | None = None,
    *,
    advises: bool = True,
) -> PlanOutcome:
    """Return the best placement, or why there is none, or why llama.cpp would refuse these flags.

    ``oracle`` is asked for what the formulas do not cover; where it cannot say either, the plan is marked
    ``fit_by_llama``. With ``advises`` False a refusal does not say what would have to change: each change is tried,
    which takes longer than the search. Raises InvalidRequest for a request that makes no sense on this machine.
    """

    def answer(changed: PlanRequest, there: Machine = machine) -> PlanOutcome:
        with _without_collector():
            return beside_projector(changed, lambda asked: _Search(model, asked, there, policy, build, oracle).run())

    has_open_slots = slots.are_open(request, policy)
    request = slots.one_where_open(request, policy)
    outcome = answer(request)
    if isinstance(outcome, Plan):
        outcome = unburdened(request, outcome, answer)
    elif isinstance(outcome, NoFit):
        outcome = relaxed(request, outcome, answer) or outcome
    if isinstance(outcome, Plan) and has_open_slots:
        return slots.as_many_as_cost_nothing(request, outcome, answer)
    if not advises or not isinstance(outcome, NoFit):
        return outcome
    has_experts = bool(model.hparams.n_expert)
    return replace(outcome, nearest=nearest(request, machine, outcome, answer, has_experts=has_experts))


def shortest_context(model: ModelFacts, request: PlanRequest) -> int:
    """Return below how many tokens no context is chosen: a large image has room in it, and words about it."""
    image = 0 if model.projector is None else projector.image_tokens(model.projector, request.passthrough)
    return max(MIN_CONTEXT, ggml.pad(image + MIN_CONTEXT_FOR_WORDS, CONTEXT_ALIGNMENT))


@contextmanager
def _without_collector() -> Iterator[None]:
    """Keep Python from looking for cycles: graphs of thousands of nodes have none, and it takes a tenth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass(slots=True)
class _Search:
    """One question on its way to an answer; ``decisions`` and ``warnings`` grow as it goes."""

    model: ModelFacts
    request: PlanRequest
    machine: Machine
    policy: Policy
    build: LlamaBuild
    oracle: Oracle | None
    decisions: tuple[Decision, ...] = ()
    warnings: tuple[str, ...] = ()

    def run(self) -> PlanOutcome:
        devices = chosen_devices(self.request, self.machine)
        if self.request.devices_draft is not None:
            drafts = (device_named("--device-draft", name, self.machine) for name in self.request.devices_draft)
            self.request = replace(self.request, devices_draft=tuple(device.name for device in drafts))
        if self.request.split_mode == "none" or not any((self.request.tensor_split or ())[: len(devices)]):
            self.request = replace(self.request, tensor_split=None)  # as llama.cpp does (src/llama-model.cpp)
        settled, knob_decisions = knobs.settle(self.model, self.request, self.policy, devices)
        self.warnings = self.machine.warnings + outcomes.build_warnings(self.build)
        kinds = [device.kind for device in devices]
        reason = refusals.refusal(self.model, settled, kinds) or companions.refusal(self.model, settled)
        reason = buffer_refusal(settled, self.machine) or reason
        if settled.split_mode == "tensor" and not devices:
            reason = "--split-mode tensor needs a device"
        if reason is not None:
            return Refused(self.model.summary, settled, self.build, reason, knob_decisions, self.warnings)
        limits = budget.budgets(self.machine, self.policy)
        spread = self.policy.spread
        accountant = Accountant(self.model, self.machine, limits, self.build, self.oracle, devices, spread)
        found = accountant.confirmed(self._with_context(accountant, settled))
        if not found.unknown or accountant.is_settled_by(settled):
            self.decisions += reasons.of_placement(found, self.request, self.model, self.machine, self.policy)
            self.decisions += reasons.of_beside(found)
        self.decisions += knob_decisions
        if found.unknown and not accountant.is_settled_by(settled):
            keeps_context = self._context_is_pinned
            return outcomes.left_to_llama(accountant, found, self.decisions, self.warnings, keeps_context=keeps_context)
        outcome = outcomes.no_fit if found.shortfalls else outcomes.plan
        return outcome(accountant, found, self.decisions, self.warnings)

    # -----------------------------------------------------------------------------------------------------------------
    # Context

    def _with_context(self, accountant: Accountant, settled: PlanRequest) -> Candidate:
        """Return the candidate with the context that is pinned, promised by the settings, or the best that fits."""
        trained = self.model.hparams.n_ctx_train or MIN_CONTEXT
        if isinstance(settled.n_ctx, int) and settled.n_ctx > 0:
            return self._best_of(accountant, _pinned_context(settled))
        if settled.n_ctx_per_slot is not None:
            return self._best_of(accountant, knobs.with_context(settled, settled.n_ctx_per_slot))
        if settled.n_ctx == 0:
            total = trained if settled.kv_unified else trained * settled.slots  # common/fit.cpp
            return self._best_of(accountant, _pinned_context(replace(settled, n_ctx=total)))
        if settled.n_ctx is None and self.policy.n_ctx_per_slot is not None:
            chosen = self.policy.n_ctx_per_slot
            why = "it is the setting PLANNER_CONTEXT_LENGTH"
            self._decide("context", f"{chosen:,} tokens for each of {settled.slots} slots", why)
            return self._best_of(accountant, knobs.with_context(settled, chosen))
        floor = min(shortest_context(self.model, self.request), trained)
        found = self._largest_context(accountant, settled, floor, trained)
        if MIN_CONTEXT < floor == outcomes.per_slot(self.model, found) < trained:
            self._decide(
                "shortest context", f"{floor:,} tokens", "a large image and words about it have no room in less"
            )
        return found

    @property
    def _context_is_pinned(self) -> bool:
        if self.request.n_ctx is None:
            return (self.request.n_ctx_per_slot or self.policy.n_ctx_per_slot) is not None
        return self.request.n_ctx != "auto"

    def _best_of(self, accountant: Accountant, request: PlanRequest) -> Candidate:
        optimizer = self._optimizer(accountant)
        found = None
        if optimizer.applies(request):
            incumbent = optimizer.incumbent(request)
            found = Overflow(optimizer).at(request, incumbent and incumbent.candidate)
        return accountant.worthwhile(found or self._packed(accountant, request))

    def _optimizer(self, accountant: Accountant) -> Optimizer:
        return Optimizer(accountant, accountant.devices, order_is_pinned=self.request.devices is not None)

    def _packed(self, accountant: Accountant, request: PlanRequest) -> Candidate:
        """Return the placement by packing: where the solver does not apply or nothing fits, the nearest candidate."""
        packer = Packer(accountant)
        complete = packer.complete(request)
        complete = complete if complete.fits else accountant.confirmed(complete)
        if complete.fits or complete.unknown:
            return complete
        partial = packer.partial(request, complete)
        return partial if partial.fits else min(partial, complete, key=_shortfall_bytes)

    def _largest_context(self, accountant: Accountant, settled: PlanRequest, floor: int, trained: int) -> Candidate:
        """Return the candidate with the longest context that fits completely, on the host where no layer can leave."""
        optimizer = self._optimizer(accountant)
        if optimizer.applies(knobs.with_context(settled, floor)):
            found = self._cached_on_host(accountant, settled, floor, trained) if settled.kv_offload is False else None
            if found is None:
                found = Stretch(optimizer, settled, floor, trained).longest()
                found = Overflow(optimizer).longest(settled, floor, trained, found)
            if found is not None and accountant.worthwhile(found).placement.devices:
                self._decide_context(found, trained)
                return found
        packer = Packer(accountant)
        complete = longest(lambda n_ctx: packer.complete(knobs.with_context(settled, n_ctx)), floor, trained)
        if complete is not None and complete.unknown and accountant.is_settled_by(settled):
            self._decide("context", f"{floor:,} tokens", "what a longer one would take is not known")
            return packer.complete(knobs.with_context(settled, floor))
        if complete is not None:
            self._decide_context(complete, trained)
            return complete
        partial = self._best_of(accountant, knobs.with_context(settled, floor))
        if partial.placement.devices:
            why = "not all layers fit on devices, and a longer one leaves less for them"
            self._decide("context", f"{floor:,} tokens", why)
            return partial
        on_host = longest(lambda n_ctx: accountant.on_host(knobs.with_context(settled, n_ctx)), floor, trained)
        if on_host is None:
            self._decide("context", f"{floor:,} tokens", "a longer one would leave the host too little memory")
            return partial
        self._decide_context(on_host, trained)
        return on_host

    def _cached_on_host(
        self, accountant: Accountant, settled: PlanRequest, floor: int, trained: int
    ) -> Candidate | None:
        """Return the fastest placement on devices with the longest context that the host can hold, if there is one."""
        packer = Packer(accountant)
        found = longest(lambda n_ctx: packer.complete(knobs.with_context(settled, n_ctx)), floor, trained)
        if found is None or found.unknown:
            return None
        fastest = self._best_of(accountant, found.request)
        return fastest if fastest.fits_in_memory else found

    def _decide_context(self, found: Candidate, trained: int) -> None:
        n_ctx = min(found.params.n_ctx_seq, trained)
        if n_ctx == trained:
            why = "it is the trained length, and it fits"
        elif found.placement.kind is PlacementKind.GPU_AND_CPU or reasons.leaves_parts(found, self.request):
            why = "a longer one would push more of the model to the host"
        else:
            why = f"of the trained {trained:,} no more fit"
        self._decide("context", f"{n_ctx:,} tokens", why)

    def _decide(self, step: str, chosen: str, because: str) -> None:
        self.decisions = (*self.decisions, Decision(step, chosen, because))


def _shortfall_bytes(candidate: Candidate) -> int:
    return sum(cause.shortfall_bytes for cause in candidate.shortfalls)


def _pinned_context(settled: PlanRequest) -> PlanRequest:
    """Return the request with ``-c`` as it was pinned, and with the micro-batch that belongs to it."""
    total = settled.n_ctx
    if not isinstance(total, int):
        return settled
    per_slot = max(1, total // (1 if settled.kv_unified else settled.slots))
    return replace(knobs.with_context(settled, per_slot), n_ctx=total, n_ctx_per_slot=None)
