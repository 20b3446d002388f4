"""Where whole layers do not fit on the devices: some of the experts at each boundary go on to the next device.

The devices are filled in order. Of the layer that a device has no room for, attention and cache may stay there while
expert matrices go on: each device's last room is used, which is hardly a layer's on each of them. What results is
confirmed by accounting, as everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from planner import budget
from planner.context import CONTEXT_ALIGNMENT
from planner.overrides import UNPIPELINED
from planner.search import knobs
from planner.search.candidates import Candidate
from planner.search.filling import Filling, bytes_of, fillings
from planner.search.learned import Mode
from planner.search.optimizer import Optimizer
from planner.search.problems import slot_count
from planner.types.plan import PlacementKind
from planner.types.request import PlanRequest

# Of one question by what is known; three are usual: buffers hardly depend on where a layer is divided.
MAX_ACCOUNTINGS: Final = 8

_CHOSEN: Final = re.compile(r"^blk\\\.(\d+)\\\.ffn_\(([a-z_|]+)\)")


def is_whole(found: Candidate) -> bool:
    """Say whether everything is on devices in an answer whose overrides the search itself has chosen."""
    return found.placement.kind is PlacementKind.GPU and all(
        override in UNPIPELINED or override[1] in found.placement.devices for override in found.params.overrides
    )


def sent_on(request: PlanRequest) -> tuple[str, ...]:
    """Return in words which matrices these flags send to the next device, where the search has chosen so."""
    pairs = ((_CHOSEN.match(pattern), device) for pattern, device in request.override_tensor or ())
    return tuple(
        f"{', '.join(f'ffn_{name}' for name in found[2].split('|'))} of layer {found[1]} on {device}"
        for found, device in pairs
        if found and device != "CPU"
    )


@dataclass(frozen=True, slots=True)
class Overflow:
    """One model over devices in llama-server's order, by what the ``optimizer`` has learned of their buffers."""

    optimizer: Optimizer

    def at(self, request: PlanRequest, found: Candidate | None) -> Candidate | None:
        """Return what was ``found``, or a placement with everything on devices where that has not."""
        if (found is not None and is_whole(found)) or not self._applies(request):
            return found
        return self.fitting(request) or self._without_others().fitting(request) or found

    def _without_others(self) -> Overflow:
        """Return the same by what devices took without pipelining alone: mostly they take more otherwise."""
        return Overflow(replace(self.optimizer, learned=self.optimizer.learned.only(Mode.UNPIPELINED)))

    def fitting(self, request: PlanRequest) -> Candidate | None:
        """Return the first placement that really fits of those that are expected to."""
        tried = set[Filling]()
        while len(tried) < MAX_ACCOUNTINGS and (filling := self._expected(request, tried)):
            tried.add(filling)
            candidate = self._accounted(request, filling)
            if candidate.fits:
                return candidate
        return None

    def longest(self, settled: PlanRequest, floor: int, trained: int, found: Candidate | None) -> Candidate | None:
        """Return what was ``found``, or a placement with everything on devices and a longer context.

        Where not everything is on devices in what was found, any context from the floor on is better. Multiples of 256
        are tried by what is expected to fit.
        """
        if not self._applies(knobs.with_context(settled, floor)):
            return found
        found = self.longer(settled, floor, trained, found)
        return self._without_others().longer(settled, floor, trained, found)

    def longer(self, settled: PlanRequest, floor: int, trained: int, found: Candidate | None) -> Candidate | None:
        """Return what was ``found``, or what really fits of what is expected to with a longer context."""
        if found is not None and is_whole(found):
            floor = found.params.n_ctx_seq + 1
        low, high = -(-floor // CONTEXT_ALIGNMENT), -(-trained // CONTEXT_ALIGNMENT) + 1
        for _ in range(MAX_ACCOUNTINGS):
            steps = self._most_expected(settled, low, high, trained)
            if steps is None:
                break
            request = _with_steps(settled, steps, trained)
            filling = self._expected(request)
            candidate = self._accounted(request, filling) if filling else None
            if candidate is not None and candidate.fits:
                found, low = candidate, steps + 1
            elif self._expected(request) == filling:  # nothing was learned that would change it
                high = steps
        return found

    def _applies(self, request: PlanRequest) -> bool:
        """Say whether experts may go on: those of a model over several devices, where no flag places any of them."""
        optimizer, pinned = self.optimizer, request.n_gpu_layers
        everything = not isinstance(pinned, int) or not 0 <= pinned < slot_count(optimizer.accountant.model)
        has_experts = bool(optimizer.accountant.model.hparams.n_expert)
        return has_experts and len(optimizer.devices) > 1 and everything and bool(optimizer.question(request).parts)

    def _most_expected(self, settled: PlanRequest, low: int, high: int, trained: int) -> int | None:
        """Return the most steps of context, below ``high``, that are expected to fit; None where ``low`` do not."""
        if low >= high or self._expected(_with_steps(settled, low, trained)) is None:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            if self._expected(_with_steps(settled, middle, trained)) is None:
                high = middle
            else:
                low = middle
        return low

    def _expected(self, request: PlanRequest, tried: Container[Filling] = ()) -> Filling | None:
        """Return the first filling that is expected to fit and was not tried; None where none is."""
        return next((each for each in fillings(self.optimizer.question(request)) if each not in tried), None)

    def _accounted(self, request: PlanRequest, filling: Filling) -> Candidate:
        """Return this placement, accounted for, having learned from it."""
        optimizer = self.optimizer
        overrides = tuple(each.override for each in filling.sent) or UNPIPELINED
        flagged = replace(request, override_tensor=overrides)
        candidate = optimizer.accountant.candidate(flagged, optimizer.devices, sum(filling.counts), filling.counts)
        taken = {row.name: row.claimed_bytes for row in candidate.usages}
        question = optimizer.question(request)
        for index, start, end in _segments(filling.counts):
            device = optimizer.devices[index]
            own = sum(question.sizes(device)[start:end])
            for slot, matrices, target in filling.sent:
                moved = bytes_of(question, index, slot, matrices)
                own += (target == device.name) * moved - (start <= slot < end) * moved
            part = question.part(Mode.UNPIPELINED, index, first=start == 0, output=end == question.n_slots)
            beyond = taken[device.name] - own - budget.overhead_bytes(device)
            optimizer.learned.learn(part, question.params.n_ctx_seq, beyond)
        return candidate


def _with_steps(settled: PlanRequest, steps: int, trained: int) -> PlanRequest:
    return knobs.with_context(settled, min(steps * CONTEXT_ALIGNMENT, trained))


def _segments(counts: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield each device that has slots, with where they begin and end."""
    start = 0
    for index, count in enumerate(counts):
        if count:
            yield index, start, start + count
        start += count
