"""Whole layers packed over devices, and mended where they do not fit: what there is where the solver does not apply.

Layers are packed by what the last candidate really took, the result is accounted for, and so on; nothing is called
fitting that ``accounting`` has not confirmed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from planner import budget
from planner.buffers import buffer_type
from planner.search import packing
from planner.search.candidates import Accountant, Candidate, named_buffers
from planner.search.problems import NO_LIMIT, slot_count
from planner.types.machine import Device
from planner.types.request import PlanRequest

MAX_ROUNDS: Final = 8  # of packing and accounting; two or three suffice, since only compute buffers move with the split

_BLOCK: Final = re.compile(r"(?:enc\.|dec\.)?blk\.(\d+)\.")


@dataclass(frozen=True)
class Packer:
    """The packing of one model over the devices of the ``accountant``."""

    accountant: Accountant

    @property
    def _n_slots(self) -> int:
        return slot_count(self.accountant.model)

    def complete(self, request: PlanRequest) -> Candidate:
        """Return a placement of everything that is to lie on devices; the nearest candidate where none fits.

        That is all layers, or as many as ``-ngl`` pins. The fewest devices are taken, those with the largest budgets,
        in llama-server's order; ``SCHED_SPREAD`` takes all of them at once.
        """
        n_slots, devices = self._pinned_slots(request), self.accountant.devices
        no_main_gpu = request.split_mode == "none" and (request.main_gpu or 0) < 0  # src/llama.cpp
        if not n_slots or not devices or no_main_gpu:
            return self.accountant.on_host(request)
        if request.tensor_split is not None:
            return self.accountant.candidate(request, devices, n_slots, request.tensor_split)
        first, *others = self._groups(request)
        candidate = self._pack(request, first, n_slots)
        for group in others:
            if candidate.fits or candidate.unknown:
                break
            if group is others[-1] or not self._is_too_small(group, candidate):
                candidate = self._pack(request, group, n_slots)
        return candidate

    def partial(self, request: PlanRequest, candidate: Candidate) -> Candidate:
        """Return the placement with the most of the last layers on devices, the host alone where none of them fits.

        ``candidate`` is the complete placement that did not fit. Where ``-ngl`` pins a number it is the answer.
        """
        if request.n_gpu_layers is not None or not candidate.placement.devices or request.split_mode == "tensor":
            return candidate
        if request.tensor_split is not None:
            return self._most_with_split(request, request.tensor_split)
        group = tuple(self.accountant.machine.device(name) for name in candidate.placement.devices)
        return self._grown(request, group, self._filled_from_the_end(request, group, candidate))

    def _filled_from_the_end(self, request: PlanRequest, group: Sequence[Device], candidate: Candidate) -> Candidate:
        """Return the best of a few rounds of packing, each by what the one before showed; the host alone at worst."""
        best = self.accountant.on_host(request)
        latest, seen = candidate, set[tuple[int, ...]]()
        for _ in range(MAX_ROUNDS):
            costs = self._costs(latest)
            counts = packing.most_from_the_end(costs, self._room(group, latest, costs))
            if counts in seen or sum(counts) == 0:
                break
            seen.add(counts)
            latest = self.accountant.candidate(request, group, sum(counts), counts)
            if latest.fits and sum(counts) > best.placement.n_gpu_layers:
                best = latest
        return best

    def _grown(self, request: PlanRequest, group: Sequence[Device], best: Candidate) -> Candidate:
        """Add layers while that fits, in growing steps and then in shrinking ones.

        The rounds before go by compute buffers of other splits; where those outweigh the layers, they stop too early.
        """
        step, limit = 1, self._n_slots  # of which it is known that it does not fit
        while (n_slots := best.placement.n_gpu_layers + step) < limit or step > 1:
            candidate = self._pack(request, group, n_slots) if n_slots < limit else None
            if candidate is not None and candidate.fits:
                best, step = candidate, step * 2
            else:
                limit, step = min(limit, n_slots), max(step // 2, 1)
        return best

    def _pinned_slots(self, request: PlanRequest) -> int:
        pinned = request.n_gpu_layers
        return min(pinned, self._n_slots) if isinstance(pinned, int) else self._n_slots

    def _groups(self, request: PlanRequest) -> Iterator[tuple[Device, ...]]:
        """Yield the sets of devices to try, fewest first."""
        devices = self.accountant.devices
        if request.split_mode == "none":
            yield (devices[request.main_gpu or 0],)
            return
        named = named_buffers(request)
        # A device that an override names is taken first: it holds what goes there, layers or not.
        by_budget = sorted(range(len(devices)), key=lambda i: (devices[i].name not in named, -self._budget(devices[i])))
        one_size = self.accountant.spread or request.split_mode != "layer"
        fewest = max(1, sum(device.name in named for device in devices))
        for size in (len(devices),) if one_size else range(fewest, len(devices) + 1):
            yield tuple(devices[i] for i in sorted(by_budget[:size]))

    def _is_too_small(self, group: Sequence[Device], candidate: Candidate) -> bool:
        """Say whether these devices, of which a candidate uses some, have no room for its layers however shared.

        That is told where all are of one kind: on others the same layers may take less.
        """
        layers_bytes = sum((each.model.bytes or 0) + (each.context.bytes or 0) for each in candidate.ledger.devices)
        room = sum(max(self._budget(device) - budget.overhead_bytes(device), 0) for device in group)
        return layers_bytes > room and len({(device.kind, buffer_type(device)) for device in group}) == 1

    def _budget(self, device: Device) -> int:
        limit = self.accountant.limits.of(device.name)
        return NO_LIMIT if limit is None else max(limit, 0)

    def _pack(self, request: PlanRequest, group: Sequence[Device], n_slots: int) -> Candidate:
        """Return the first confirmed split of the last ``n_slots`` layers over these devices, or the last candidate."""
        budgets = [self._budget(device) for device in group]
        if request.split_mode == "tensor":
            # Equal parts run as fast as the slowest device; unequal ones only if need be.
            equal = self.accountant.candidate(request, group, n_slots, (1,) * len(group))
            if equal.fits:
                return equal
            return self.accountant.candidate(request, group, n_slots, _proportional(n_slots, budgets))
        weights = self._weights[-n_slots:]
        counts = packing.balanced(weights, budgets) or _proportional(n_slots, budgets)
        candidate = self.accountant.candidate(request, group, n_slots, counts)
        for _ in range(MAX_ROUNDS if len(group) > 1 else 0):
            if candidate.fits or candidate.unknown:
                break
            costs = self._costs(candidate)
            again = packing.balanced(costs[-n_slots:], self._room(group, candidate, costs))
            if again is None or again == counts:
                break
            counts = again
            candidate = self.accountant.candidate(request, group, n_slots, counts)
        return candidate

    def _most_with_split(self, request: PlanRequest, shares: tuple[float, ...]) -> Candidate:
        """Return the most layers that fit under pinned shares, by bisection: more layers never need less."""
        low, best = 0, self.accountant.on_host(request)
        high = self._n_slots
        while high - low > 1:
            middle = (low + high) // 2
            candidate = self.accountant.candidate(request, self.accountant.devices, middle, shares)
            if candidate.fits:
                low, best = middle, candidate
            else:
                high = middle
        return best

    def _costs(self, candidate: Candidate) -> list[float]:
        """Return what each layer costs, the output last: its weights, and its part of the cache in this candidate."""
        caches = self._cache_share(candidate)
        return [weight + cache for weight, cache in zip(self._weights, caches, strict=True)]

    def _room(self, group: Sequence[Device], candidate: Candidate, costs: Sequence[float]) -> list[int]:
        """Return what each device has for layers: its budget less what it took beyond its layers' costs.

        That is compute buffers, alignment, overhead and a reserve for images. A device without layers is taken to need
        as much of it as any.
        """
        beyond = {}
        for row in candidate.usages:
            own = [*row.layers, *((self._n_slots - 1,) if row.output else ())]
            if own:
                taken = row.claimed_bytes if row.planned_bytes is not None else 0
                beyond[row.name] = max(taken - int(sum(costs[slot] for slot in own)), 0)
        most = max((beyond.get(device.name, 0) for device in group), default=0)
        return [self._budget(device) - beyond.get(device.name, most) for device in group]

    @staticmethod
    def _cache_share(candidate: Candidate) -> list[float]:
        """Return each layer's part of the cache of the device that it lies on; the output has none."""
        where = candidate.placement.layer_devices
        figures = (*candidate.ledger.devices, candidate.ledger.host)  # the host is index -1
        on = {index: where.count(index) for index in set(where)}
        return [*((figures[index].context.bytes or 0) / on[index] for index in where), 0.0]

    @cached_property
    def _weights(self) -> list[float]:
        """Return the bytes of each layer's tensors, the output's last, as far as names tell."""
        model, n_slots = self.accountant.model, self._n_slots
        weights = [0.0] * n_slots
        for tensor in model.tensors:
            block = _BLOCK.match(tensor.name)
            if block is not None:
                weights[min(int(block[1]), n_slots - 2)] += tensor.nbytes
            elif tensor.name.startswith("output"):
                weights[-1] += tensor.nbytes
        if not model.tensor("output.weight") and (embedding := model.tensor("token_embd.weight")):
            weights[-1] += embedding.nbytes
        return weights


def _proportional(n_slots: int, budgets: Sequence[int]) -> tuple[int, ...]:
    """Return whole shares in proportion to the budgets, to start from where no better split is known."""
    total = sum(budgets) or 1
    ends = [round(n_slots * sum(budgets[: i + 1]) / total) for i in range(len(budgets))]
    ends[-1] = n_slots
    return tuple(end - start for start, end in zip([0, *ends], ends, strict=False))
