"""Candidate placements: made, accounted for, held against the budgets, and mended where they do not fit.

The mending is the inner part of the search. It packs whole layers by what the last candidate really took, has the
result accounted for, and repeats; nothing is called fitting that ``accounting`` has not confirmed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Final

from planner import budget, companions, layers
from planner.accounting import DeviceBytes, MemoryLedger, account
from planner.buffers import buffer_type
from planner.charges import Charge, charged
from planner.context import ContextParams, context_params
from planner.model import ModelFacts
from planner.search import packing
from planner.types.machine import Device, DeviceKind, LlamaBuild, Machine
from planner.types.plan import Placement, Shortfall
from planner.types.request import PlanRequest
from planner.types.usage import DeviceUsage, Figure, Source

Oracle = Callable[[ModelFacts, ContextParams, Placement, Machine], MemoryLedger | None]

MAX_ROUNDS: Final = 8  # of packing and accounting; two or three suffice, since only compute buffers move with the split
NO_LIMIT: Final = 1 << 62  # stands for the budget of a device whose free memory nobody knows

_BLOCK: Final = re.compile(r"(?:enc\.|dec\.)?blk\.(\d+)\.")


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
    def fits_in_memory(self) -> bool:
        """Say whether also what is mapped from the file fits, beside the host's reserve: nothing is read twice."""
        return self.fits and (budget.beyond_reserve(self.usages[-1]) or 0) >= 0


@dataclass(frozen=True)
class Finder:
    """One model on one machine. ``devices`` are those that may be used, in the order given to llama-server."""

    model: ModelFacts
    machine: Machine
    limits: budget.Budgets
    build: LlamaBuild
    oracle: Oracle | None
    devices: tuple[Device, ...]
    spread: bool

    @property
    def n_slots(self) -> int:
        """Return how many layers llama.cpp counts: all blocks and the output."""
        return self.model.hparams.n_layer_all + 1

    def is_settled_by(self, request: PlanRequest) -> bool:
        """Say whether these flags say where every layer goes, so that no figures have to be compared."""
        if not self.devices or request.n_gpu_layers == 0:
            return True
        one_way = len(self.devices) == 1 or request.split_mode == "none" or request.tensor_split is not None
        return one_way and request.n_gpu_layers not in {None, "auto"}

    def complete(self, request: PlanRequest) -> Candidate:
        """Return a placement of everything that is to lie on devices; the nearest attempt where none fits.

        That is all layers, or as many as ``-ngl`` pins. The fewest devices are taken, those with the largest budgets,
        in llama-server's order; ``SCHED_SPREAD`` takes all of them at once.
        """
        n_slots = self._pinned_slots(request)
        no_main_gpu = request.split_mode == "none" and (request.main_gpu or 0) < 0  # src/llama.cpp
        if not n_slots or not self.devices or no_main_gpu:
            return self.on_host(request)
        if request.tensor_split is not None:
            return self.attempt(request, self.devices, n_slots, request.tensor_split)
        first, *others = self._groups(request)
        attempt = self._pack(request, first, n_slots)
        for group in others:
            if attempt.fits or attempt.unknown:
                break
            if group is others[-1] or not self._is_too_small(group, attempt):
                attempt = self._pack(request, group, n_slots)
        return attempt

    def partial(self, request: PlanRequest, attempt: Candidate) -> Candidate:
        """Return the placement with the most of the last layers on devices, the host alone where none of them fits.

        ``attempt`` is the complete placement that did not fit. Where ``-ngl`` pins a number it is the answer.
        """
        if request.n_gpu_layers is not None or not attempt.placement.devices or request.split_mode == "tensor":
            return attempt
        if request.tensor_split is not None:
            return self._most_with_split(request, request.tensor_split)
        group = tuple(self.machine.device(name) for name in attempt.placement.devices)
        return self._grown(request, group, self._filled_from_the_end(request, group, attempt))

    def _filled_from_the_end(self, request: PlanRequest, group: Sequence[Device], attempt: Candidate) -> Candidate:
        """Return the best of a few rounds of packing, each by what the one before showed; the host alone at worst."""
        best = self.on_host(request)
        latest, seen = attempt, set[tuple[int, ...]]()
        for _ in range(MAX_ROUNDS):
            costs = self._costs(latest)
            counts = packing.most_from_the_end(costs, self._room(group, latest, costs))
            if counts in seen or sum(counts) == 0:
                break
            seen.add(counts)
            latest = self.attempt(request, group, sum(counts), counts)
            if latest.fits and sum(counts) > best.placement.n_gpu_layers:
                best = latest
        return best

    def _grown(self, request: PlanRequest, group: Sequence[Device], best: Candidate) -> Candidate:
        """Add layers while that fits, in growing steps and then in shrinking ones.

        The rounds before go by compute buffers of other splits; where those outweigh the layers, they stop too early.
        """
        step, limit = 1, self.n_slots  # of which it is known that it does not fit
        while (n_slots := best.placement.n_gpu_layers + step) < limit or step > 1:
            attempt = self._pack(request, group, n_slots) if n_slots < limit else None
            if attempt is not None and attempt.fits:
                best, step = attempt, step * 2
            else:
                limit, step = min(limit, n_slots), max(step // 2, 1)
        return best

    def confirmed(self, attempt: Candidate) -> Candidate:
        """Return a finalist with what is only estimated here replaced by what llama.cpp says, where it can say."""
        kinds = {self.machine.device(name).kind for name in attempt.placement.devices}
        imagined_cards = self.machine.what_if and kinds - {DeviceKind.RPC}  # a stand-in for one could only estimate too
        if self.oracle is None or imagined_cards:
            return attempt
        return self._evaluated(attempt.request, attempt.placement, confirm=True)

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
        named = tuple(device for device in self.devices if device.name in _named(request))
        return self.attempt(request, named, 0, (1,) * len(named))

    def _pinned_slots(self, request: PlanRequest) -> int:
        pinned = request.n_gpu_layers
        return self.n_slots if pinned is None or isinstance(pinned, str) else min(pinned, self.n_slots)

    def _groups(self, request: PlanRequest) -> Iterator[tuple[Device, ...]]:
        """Yield the sets of devices to try, fewest first."""
        if request.split_mode == "none":
            yield (self.devices[request.main_gpu or 0],)
            return
        named = _named(request)
        everyone = range(len(self.devices))
        # A device that an override names is taken first: it holds what goes there, layers or not.
        by_budget = sorted(everyone, key=lambda i: (self.devices[i].name not in named, -self._budget(self.devices[i])))
        one_size = self.spread or request.split_mode != "layer"
        fewest = max(1, sum(device.name in named for device in self.devices))
        for size in (len(self.devices),) if one_size else range(fewest, len(self.devices) + 1):
            yield tuple(self.devices[i] for i in sorted(by_budget[:size]))

    def _is_too_small(self, group: Sequence[Device], attempt: Candidate) -> bool:
        """Say whether these devices have no room for the layers of an attempt on some of them, however they share them.

        That is told where all are of one kind: on others the same layers may take less.
        """
        layers_bytes = sum((each.model.bytes or 0) + (each.context.bytes or 0) for each in attempt.ledger.devices)
        room = sum(max(self._budget(device) - budget.overhead_bytes(device), 0) for device in group)
        return layers_bytes > room and len({(device.kind, buffer_type(device)) for device in group}) == 1

    def _budget(self, device: Device) -> int:
        limit = self.limits.of(device.name)
        return NO_LIMIT if limit is None else max(limit, 0)

    def _pack(self, request: PlanRequest, group: Sequence[Device], n_slots: int) -> Candidate:
        """Return the first confirmed split of the last ``n_slots`` layers over these devices, or the last attempt."""
        budgets = [self._budget(device) for device in group]
        if request.split_mode == "tensor":
            # Equal parts run as fast as the slowest device; unequal ones only if need be.
            equal = self.attempt(request, group, n_slots, (1,) * len(group))
            return equal if equal.fits else self.attempt(request, group, n_slots, _proportional(n_slots, budgets))
        weights = self._weights[-n_slots:]
        counts = packing.balanced(weights, budgets) or _proportional(n_slots, budgets)
        attempt = self.attempt(request, group, n_slots, counts)
        for _ in range(MAX_ROUNDS if len(group) > 1 else 0):
            if attempt.fits or attempt.unknown:
                break
            costs = self._costs(attempt)
            again = packing.balanced(costs[-n_slots:], self._room(group, attempt, costs))
            if again is None or again == counts:
                break
            counts = again
            attempt = self.attempt(request, group, n_slots, counts)
        return attempt

    def _most_with_split(self, request: PlanRequest, shares: tuple[float, ...]) -> Candidate:
        """Return the most layers that fit under pinned shares, by bisection: more layers never need less."""
        low, best = 0, self.on_host(request)
        high = self.n_slots
        while high - low > 1:
            middle = (low + high) // 2
            attempt = self.attempt(request, self.devices, middle, shares)
            if attempt.fits:
                low, best = middle, attempt
            else:
                high = middle
        return best

    def attempt(
        self, request: PlanRequest, group: Sequence[Device], n_slots: int, shares: Sequence[float]
    ) -> Candidate:
        """Return this split, accounted for. A device without layers is left out: an idle context costs memory too."""
        if request.tensor_split is None:
            kept = [
                (d, s) for d, s in zip(group, shares, strict=True) if s or (d.name in _named(request) and any(shares))
            ]
            group, shares = tuple(device for device, _ in kept), tuple(float(share) for _, share in kept)
        else:
            shares = tuple(shares[i] if i < len(shares) else 0.0 for i in range(len(group)))
        where, output = layers.layer_devices(self.n_slots - 1, n_slots, shares)
        names = tuple(device.name for device in group)
        return self._evaluated(request, Placement(names, where, output, n_slots, tuple(shares)))

    def _evaluated(self, request: PlanRequest, placement: Placement, *, confirm: bool = False) -> Candidate:
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
        return own if answer is None else _filled(own, answer)

    def _costs(self, attempt: Candidate) -> list[float]:
        """Return what each layer costs, the output last: its weights, and its part of the cache in this attempt."""
        caches = self._cache_share(attempt)
        return [weight + cache for weight, cache in zip(self._weights, caches, strict=True)]

    def _room(self, group: Sequence[Device], attempt: Candidate, costs: Sequence[float]) -> list[int]:
        """Return what each device has for layers: its budget less what it took beyond its layers' costs.

        That is compute buffers, alignment, overhead and a reserve for images. A device without layers is taken to need
        as much of it as any.
        """
        beyond = {}
        for row in attempt.usages:
            own = [*row.layers, *((self.n_slots - 1,) if row.output else ())]
            if own:
                taken = row.claimed_bytes if row.planned_bytes is not None else 0
                beyond[row.name] = max(taken - int(sum(costs[slot] for slot in own)), 0)
        most = max((beyond.get(device.name, 0) for device in group), default=0)
        return [self._budget(device) - beyond.get(device.name, most) for device in group]

    @staticmethod
    def _cache_share(attempt: Candidate) -> list[float]:
        """Return each layer's part of the cache of the device that it lies on; the output has none."""
        where = attempt.placement.layer_devices
        figures = (*attempt.ledger.devices, attempt.ledger.host)  # the host is index -1
        on = {index: where.count(index) for index in set(where)}
        return [*((figures[index].context.bytes or 0) / on[index] for index in where), 0.0]

    @cached_property
    def _weights(self) -> list[float]:
        """Return the bytes of each layer's tensors, the output's last, as far as names tell."""
        weights = [0.0] * self.n_slots
        for tensor in self.model.tensors:
            block = _BLOCK.match(tensor.name)
            if block is not None:
                weights[min(int(block[1]), self.n_slots - 2)] += tensor.nbytes
            elif tensor.name.startswith("output"):
                weights[-1] += tensor.nbytes
        if not self.model.tensor("output.weight") and (embedding := self.model.tensor("token_embd.weight")):
            weights[-1] += embedding.nbytes
        return weights


def _named(request: PlanRequest) -> frozenset[str]:
    """Return the buffer types that ``--override-tensor`` sends tensors to; a device's bears its name."""
    return frozenset(buffer for _, buffer in request.override_tensor or ())


def _filled(own: MemoryLedger, answer: MemoryLedger) -> MemoryLedger:
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


def _proportional(n_slots: int, budgets: Sequence[int]) -> tuple[int, ...]:
    """Return whole shares in proportion to the budgets, to start from where no better split is known."""
    total = sum(budgets) or 1
    ends = [round(n_slots * sum(budgets[: i + 1]) / total) for i in range(len(budgets))]
    ends[-1] = n_slots
    return tuple(end - start for start, end in zip([0, *ends], ends, strict=False))


def effective(attempt: Candidate) -> PlanRequest:
    """Return the request with every knob as this candidate has it, ready to be launched.

    The main GPU is the only device then, and llama-server counts those that it is given. It refuses to slice over none.
    """
    params, placement = attempt.params, attempt.placement
    slices = attempt.request.split_mode == "tensor"
    return replace(
        attempt.request,
        n_ctx=params.n_ctx_unpadded,
        n_ctx_per_slot=None,
        devices=placement.devices,
        n_gpu_layers=placement.n_gpu_layers,
        tensor_split=placement.tensor_split or None,
        split_mode="layer" if slices and not placement.devices else attempt.request.split_mode,
        flash_attn=params.flash_attn,
        main_gpu=None if attempt.request.split_mode == "none" else attempt.request.main_gpu,
    )
