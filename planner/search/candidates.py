"""Candidate placements: accounted for, and held against the budgets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from planner import budget, companions, layers
from planner.accounting import DeviceBytes, MemoryLedger, account
from planner.charges import Charge, charged
from planner.context import ContextParams, context_params
from planner.model import ModelFacts
from planner.types.machine import Device, DeviceKind, LlamaBuild, Machine
from planner.types.plan import Placement, Shortfall
from planner.types.request import PlanRequest
from planner.types.usage import DeviceUsage, Figure, Source

Oracle = Callable[[ModelFacts, ContextParams, Placement, Machine], MemoryLedger | None]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A placement with its bytes and with where it needs too much."""

    request: PlanRequest
    params: ContextParams
    placement: Placement
    ledger: MemoryLedger
    usages: tuple[DeviceUsage, ...]
    shortfalls: tuple[Shortfall, ...]
    beside: tuple[Charge, ...] = ()  # in the ledger already

    @property
    def unknown(self) -> bool:
        """Say whether some figure that matters is not known, so that nobody can tell whether it fits."""
        return self.ledger.unknown

    @property
    def fits(self) -> bool:
        """Say whether it is known to fit."""
        return not self.shortfalls and not self.unknown

    @property
    def host_is_too_small(self) -> bool:
        """Say whether the host lacks room for what any other split takes there too, whatever lies where."""
        detail, limit = self.ledger.host_detail, self.usages[-1].budget_bytes
        return limit is not None and (detail.output_buffer_bytes or 0) + detail.later_bytes > limit

    @property
    def fits_in_memory(self) -> bool:
        """Say whether also what is mapped from the file fits, beside the host's reserve: nothing is read twice."""
        return self.fits and (budget.beyond_reserve(self.usages[-1]) or 0) >= 0


@dataclass(frozen=True, slots=True)
class Accountant:
    """One model on one machine, whose placements it accounts for.

    ``devices`` are those that may be used, in the order given to llama-server; ``spread`` asks for all of them.
    """

    model: ModelFacts
    machine: Machine
    limits: budget.Budgets
    build: LlamaBuild
    oracle: Oracle | None
    devices: tuple[Device, ...]
    spread: bool

    def is_settled_by(self, request: PlanRequest) -> bool:
        """Say whether these flags say where every layer goes, so that no figures have to be compared."""
        if not self.devices or request.n_gpu_layers == 0:
            return True
        one_way = len(self.devices) == 1 or request.split_mode == "none" or request.tensor_split is not None
        return one_way and request.n_gpu_layers not in {None, "auto"}

    def confirmed(self, candidate: Candidate) -> Candidate:
        """Return a finalist with what is only estimated here replaced by what llama.cpp says, where it can say."""
        kinds = {self.machine.device(name).kind for name in candidate.placement.devices}
        imagined_cards = self.machine.what_if and kinds - {DeviceKind.RPC}  # a stand-in for one could only estimate too
        if self.oracle is None or imagined_cards:
            return candidate
        return self._accounted(candidate.request, candidate.placement, confirm=True)

    def worthwhile(self, found: Candidate) -> Candidate:
        """Return this placement, or the host's alone where the devices would hold nothing: an output without tensors.

        They would be slower by what is handed over, and taken from others: a worker serves one runner.
        """
        devices = found.placement.devices
        holds_something = any(row.planned_bytes != 0 for row in found.usages if row.name in devices)
        if not devices or holds_something or found.request.n_gpu_layers not in {None, "auto"}:
            return found
        on_host = self.on_host(found.request)
        return on_host if on_host.fits else found

    def on_host(self, request: PlanRequest) -> Candidate:
        """Return the placement of all layers on the host; a device holds what an override sends there, if anything."""
        named = tuple(device for device in self.devices if device.name in named_buffers(request))
        return self.candidate(request, named, 0, (1,) * len(named))

    def candidate(
        self, request: PlanRequest, group: Sequence[Device], n_slots: int, shares: Sequence[float]
    ) -> Candidate:
        """Return this split, accounted for. A device without layers is left out: an idle context costs memory too."""
        if request.tensor_split is None:
            kept = [
                (d, s)
                for d, s in zip(group, shares, strict=True)
                if s or (d.name in named_buffers(request) and any(shares))
            ]
            group, shares = tuple(device for device, _ in kept), tuple(float(share) for _, share in kept)
        else:
            shares = tuple(shares[i] if i < len(shares) else 0.0 for i in range(len(group)))
        where, output = layers.layer_devices(self.model.hparams.n_layer_all, n_slots, shares)
        names = tuple(device.name for device in group)
        return self._accounted(request, Placement(names, where, output, n_slots, tuple(shares)))

    def _accounted(self, request: PlanRequest, placement: Placement, *, confirm: bool = False) -> Candidate:
        """Account for this placement and for what is loaded beside the model."""
        params = context_params(self.model, request)
        ledger_of = partial(self._ledger, confirm=confirm)
        ledger = ledger_of(self.model, params, placement)
        beside = companions.charges(self.model, request, params, placement, self.machine, self.build, ledger_of)
        ledger = charged(ledger, placement, beside)
        rows = budget.usages(self.machine, placement, ledger, self.limits)
        short = budget.shortfalls(self.machine, rows, ledger, self.limits)
        return Candidate(request, params, placement, ledger, rows, short, beside)

    def _ledger(self, model: ModelFacts, params: ContextParams, placement: Placement, *, confirm: bool) -> MemoryLedger:
        """Account for one model; llama.cpp is asked for what is unknown, and to ``confirm`` what is estimated."""
        own = account(model, params, placement, self.machine, self.build)
        if self.oracle is None or not (own.unknown or (confirm and own.estimated)):
            return own
        answer = self.oracle(model, params, placement, self.machine)
        return own if answer is None else _completed(own, answer)


def named_buffers(request: PlanRequest) -> frozenset[str]:
    """Return the buffer types that ``--override-tensor`` sends tensors to; a device's bears its name."""
    return frozenset(buffer for _, buffer in request.override_tensor or ())


def _completed(own: MemoryLedger, answer: MemoryLedger) -> MemoryLedger:
    """Return our ledger with the oracle's figures where ours are unknown, or estimated and its own are not."""

    def better(mine: Figure, other: Figure) -> Figure:
        takes = mine.bytes is None or (mine.source is Source.ESTIMATED and other.source is Source.ORACLE)
        return other if takes else mine

    def fill(ours: DeviceBytes, theirs: DeviceBytes) -> DeviceBytes:
        return replace(
            ours,
            model=better(ours.model, theirs.model),
            context=better(ours.context, theirs.context),
            compute=better(ours.compute, theirs.compute),
        )

    devices = tuple(fill(mine, other) for mine, other in zip(own.devices, answer.devices, strict=True))
    return replace(own, devices=devices, host=fill(own.host, answer.host))


def effective(candidate: Candidate) -> PlanRequest:
    """Return the request with every knob as this candidate has it, ready to be launched.

    The main GPU is the only device then, and llama-server counts those that it is given. It refuses to slice over none.
    """
    params, placement = candidate.params, candidate.placement
    slices = candidate.request.split_mode == "tensor"
    return replace(
        candidate.request,
        n_ctx=params.n_ctx_unpadded,
        n_ctx_per_slot=None,
        devices=placement.devices,
        n_gpu_layers=placement.n_gpu_layers,
        tensor_split=placement.tensor_split or None,
        split_mode="layer" if slices and not placement.devices else candidate.request.split_mode,
        flash_attn=params.flash_attn,
        main_gpu=None if candidate.request.split_mode == "none" else candidate.request.main_gpu,
    )
