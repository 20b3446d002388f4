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

from planner import budget, companions, ggml, launch, refusals, speculation, speed, weights
from planner.build import is_pinned
from planner.companions import projector
from planner.context import CONTEXT_ALIGNMENT
from planner.errors import InvalidRequest
from planner.model import ModelFacts
from planner.search import knobs, reasons, slots
from planner.search.best import Best
from planner.search.candidates import Accountant, Candidate, Oracle, effective
from planner.search.ladder import beside_projector, relaxed, unburdened
from planner.search.longest import longest
from planner.search.nearest import nearest
from planner.search.overflow import Overflow
from planner.search.packer import Packer
from planner.search.stretch import Stretch
from planner.types.machine import Device, DeviceKind, LlamaBuild, Machine
from planner.types.plan import Decision, NoFit, Placement, PlacementKind, Plan, PlanOutcome, Refused
from planner.types.request import PlanRequest, Policy
from planner.types.usage import UNKNOWN_DETAIL, UNKNOWN_FIGURE

__all__ = ["MIN_CONTEXT", "Oracle", "search"]

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
        devices = _chosen_devices(self.request, self.machine)
        if self.request.devices_draft is not None:
            drafts = (_device("--device-draft", name, self.machine) for name in self.request.devices_draft)
            self.request = replace(self.request, devices_draft=tuple(device.name for device in drafts))
        if self.request.split_mode == "none" or not any((self.request.tensor_split or ())[: len(devices)]):
            self.request = replace(self.request, tensor_split=None)  # as llama.cpp does (src/llama-model.cpp)
        settled, knob_decisions = knobs.settle(self.model, self.request, self.policy, devices)
        self.warnings = self.machine.warnings + _build_warnings(self.build)
        kinds = [device.kind for device in devices]
        reason = refusals.refusal(self.model, settled, kinds) or companions.refusal(self.model, settled)
        reason = _buffer_refusal(settled, self.machine) or reason
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
            return self._left_to_llama(accountant, found)
        return self._no_fit(found) if found.shortfalls else self._plan(found)

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
        floor = min(self._shortest_context, trained)
        found = self._largest_context(accountant, settled, floor, trained)
        if MIN_CONTEXT < floor == self._per_slot(found) < trained:
            self._decide(
                "shortest context", f"{floor:,} tokens", "a large image and words about it have no room in less"
            )
        return found

    @property
    def _shortest_context(self) -> int:
        seen = self.model.projector
        image = 0 if seen is None else projector.image_tokens(seen, self.request.passthrough)
        return max(MIN_CONTEXT, ggml.pad(image + MIN_CONTEXT_FOR_WORDS, CONTEXT_ALIGNMENT))

    @property
    def _context_is_pinned(self) -> bool:
        if self.request.n_ctx is None:
            return (self.request.n_ctx_per_slot or self.policy.n_ctx_per_slot) is not None
        return self.request.n_ctx != "auto"

    def _best_of(self, accountant: Accountant, request: PlanRequest) -> Candidate:
        best = Best(accountant, order_is_settled=self.request.devices is not None)
        found = Overflow.after(best).at(request, best.at(request)) if best.applies(request) else None
        return accountant.worthwhile(self._packed(accountant, request) if found is None else found)

    def _packed(self, accountant: Accountant, request: PlanRequest) -> Candidate:
        """Return the placement by packing: where the solver does not apply or nothing fits, the nearest attempt."""
        packer = Packer(accountant)
        complete = packer.complete(request)
        complete = complete if complete.fits else accountant.confirmed(complete)
        if complete.fits or complete.unknown:
            return complete
        partial = packer.partial(request, complete)
        return partial if partial.fits else min(partial, complete, key=_shortfall_bytes)

    def _largest_context(self, accountant: Accountant, settled: PlanRequest, floor: int, trained: int) -> Candidate:
        """Return the candidate with the longest context that fits completely, on the host where no layer can leave."""
        best = Best(accountant, order_is_settled=self.request.devices is not None)
        if best.applies(knobs.with_context(settled, floor)):
            found = self._cached_on_host(accountant, settled, floor, trained) if settled.kv_offload is False else None
            if found is None:
                found = Stretch(best, settled, floor, trained).longest()
                found = Overflow.after(best).longest(settled, floor, trained, found)
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

    # -----------------------------------------------------------------------------------------------------------------
    # Outcomes

    def _decide(self, step: str, chosen: str, because: str) -> None:
        self.decisions = (*self.decisions, Decision(step, chosen, because))

    def _plan(self, found: Candidate) -> Plan:
        request = effective(found)
        used = [self.machine.device(name) for name in found.placement.devices]
        return Plan(
            model=self.model.summary,
            request=request,
            build=self.build,
            placement=found.placement,
            usages=found.usages,
            host=found.ledger.host_detail,
            n_ctx_per_slot=self._per_slot(found),
            launch=launch.spec(self.model.summary.path, request, self.machine, self.build),
            decode=speed.decode(self.model, found.params, found.placement, self.machine),
            decisions=self.decisions,
            warnings=self.warnings + self._unknown_figures(found) + _plan_warnings(self.model, found, used),
        )

    def _unknown_figures(self, found: Candidate) -> tuple[str, ...]:
        """Return a line that names the figures which are not known, and why; none where all are."""
        everyone = (*found.ledger.devices, found.ledger.host)
        parts = {
            "weights": any(row.model.bytes is None for row in everyone),
            "context": any(row.context.bytes is None for row in everyone),
            "compute": any(row.compute.bytes is None for row in everyone),
        }
        unknown = [part for part, is_unknown in parts.items() if is_unknown]
        if not unknown:
            return ()
        return (f"how much {' and '.join(unknown)} takes is unknown: {self._why_unknown(found)}; leave room for it",)

    def _why_unknown(self, found: Candidate) -> str:
        asked = "llama.cpp could not say" if self.oracle else "llama.cpp was not asked (--no-oracle, or none to ask)"
        return f"there is no rule here for {', '.join(found.ledger.not_built)}, and {asked}"

    def _no_fit(self, found: Candidate) -> NoFit:
        return NoFit(
            model=self.model.summary,
            request=effective(found),
            build=self.build,
            usages=found.usages,
            host=found.ledger.host_detail,
            n_ctx_per_slot=self._per_slot(found),
            causes=found.shortfalls,
            decisions=self.decisions,
            warnings=self.warnings + _cut_context(self.model, found),
        )

    def _per_slot(self, found: Candidate) -> int:
        """Return the tokens that one conversation is sure of (tools/server/server-context.cpp, ``n_ctx_slot``)."""
        params = found.params
        guaranteed = params.n_ctx_seq // params.n_seq_max if params.kv_unified else params.n_ctx_seq
        if knobs.needs_whole_text(self.model, found.request):
            guaranteed = min(guaranteed, params.n_ubatch)
        return min(guaranteed, self.model.hparams.n_ctx_train or guaranteed)

    def _left_to_llama(self, accountant: Accountant, found: Candidate) -> Plan:
        """Return a plan whose bytes nobody knows: llama.cpp's own fit places it within our budgets."""
        keeps_context = self._context_is_pinned
        devices = tuple(str(device.name) for device in accountant.devices)
        request = replace(
            found.request,
            devices=devices,
            n_ctx=found.params.n_ctx_unpadded if keeps_context else None,
            n_ctx_per_slot=None,
        )
        margins = [(device.free_bytes or 0) - (accountant.limits.of(device.name) or 0) for device in accountant.devices]
        unknown = tuple(
            replace(row, model=UNKNOWN_FIGURE, context=UNKNOWN_FIGURE, compute=UNKNOWN_FIGURE, layers=(), output=False)
            if row.name in devices or row.kind is DeviceKind.HOST
            else row
            for row in found.usages
        )
        return Plan(
            model=self.model.summary,
            request=request,
            build=self.build,
            placement=Placement(devices, (), -1, 0, ()),
            usages=unknown,
            host=UNKNOWN_DETAIL,
            n_ctx_per_slot=self._per_slot(found) if keeps_context else None,
            launch=launch.spec(self.model.summary.path, request, self.machine, self.build, fit_margins=margins),
            decisions=self.decisions,
            warnings=(*self.warnings, f"every figure is unknown: {self._why_unknown(found)}"),
            fit_by_llama=True,
        )


def _shortfall_bytes(attempt: Candidate) -> int:
    return sum(cause.shortfall_bytes for cause in attempt.shortfalls)


def _chosen_devices(request: PlanRequest, machine: Machine) -> tuple[Device, ...]:
    """Return the devices that may be used, in llama-server's order. Raises InvalidRequest for a name that is none."""
    if request.devices is None:
        chosen = tuple(device for device in machine.devices if device.usable)
    else:
        chosen = tuple(_device("--device", name, machine) for name in request.devices)
    # No other mode looks at it (src/llama.cpp, llama_prepare_model_devices).
    if request.split_mode == "none" and chosen and (request.main_gpu or 0) >= len(chosen):
        raise InvalidRequest(f"--main-gpu {request.main_gpu}: there are {len(chosen)} devices, counted from 0")
    return chosen


def _device(flag: str, name: str, machine: Machine) -> Device:
    """Return the device that this flag names, in any case, as in llama-server. Raises InvalidRequest."""
    device = next((device for device in machine.devices if device.name.lower() == name.lower()), None)
    if device is None:
        names = ", ".join(device.name for device in machine.devices) or "none at all"
        raise InvalidRequest(f"{flag} {name}: no such device; there is {names}")
    if not device.usable:
        raise InvalidRequest(f"{flag} {name}: it cannot be used: {device.why_not}")
    return device


def _buffer_refusal(request: PlanRequest, machine: Machine) -> str | None:
    """Return why llama-server would not take an override's buffer type, or None; it looks at those first of all."""
    unknown = weights.unknown_buffer(
        (*(request.override_tensor or ()), *(request.override_tensor_draft or ())), machine.devices
    )
    if unknown is None:
        return None
    known = ", ".join(["CPU", *(device.name for device in machine.devices)])
    return f"--override-tensor: there is no buffer type {unknown}, but {known}"


def _pinned_context(settled: PlanRequest) -> PlanRequest:
    """Return the request with ``-c`` as it was pinned, and with the micro-batch that belongs to it."""
    total = settled.n_ctx
    if not isinstance(total, int):
        return settled
    per_slot = max(1, total // (1 if settled.kv_unified else settled.slots))
    return replace(knobs.with_context(settled, per_slot), n_ctx=total, n_ctx_per_slot=None)


def _build_warnings(build: LlamaBuild) -> tuple[str, ...]:
    if build.path is None:
        return ("no llama-server was found: the plan is made for the pinned llama.cpp",)
    if not is_pinned(build):
        return (
            f"{build.path} is another llama.cpp ({build.commit}) than the formulas are exact for: they are estimates",
        )
    return ()


def _plan_warnings(model: ModelFacts, found: Candidate, used: list[Device]) -> tuple[str, ...]:
    """Return what a reader of the plan should know beside its figures."""
    warnings = []
    if reason := refusals.aborts(model, found.params):
        warnings.append(reason)
    if missing := launch.unaddressed(used):
        warnings.append(
            f"{', '.join(missing)}: no address is known, so the command line has no --rpc; give NAME@HOST:PORT=SIZE"
        )
    if blind := [row.name for row in found.usages if row.planned_bytes and row.free_bytes is None]:
        warnings.append(f"{', '.join(blind)}: how much is free is not known, so nothing was held against it")
    if reason := budget.host_warning(found.usages[-1], found.ledger.host_detail):
        warnings.append(reason)
    if found.request.model_draft and not speculation.types(found.request):
        warnings.append("no --spec-type uses the draft model: llama-server loads it and frees it again")
    return (*warnings, *_cut_context(model, found))


def _cut_context(model: ModelFacts, found: Candidate) -> tuple[str, ...]:
    """Return a line for each bound that leaves a slot less than its share of the context."""
    has, trained, whole = found.params.n_ctx_seq, model.hparams.n_ctx_train, found.params.n_ubatch
    lines = []
    if trained is not None and has > trained:
        lines.append(f"a slot uses {trained:,} tokens of its {has:,}: the model was trained for no more")
    if knobs.needs_whole_text(model, found.request) and whole < min(has, trained or has):
        lines.append(f"a text has {whole:,} tokens at most, not {has:,}: it has to pass in one micro-batch")
    return tuple(lines)
