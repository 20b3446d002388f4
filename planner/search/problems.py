"""A model on a machine as a problem for the solver: slots with their bytes and reads, devices with their room."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import add
from typing import Final, NamedTuple

from planner import budget, cache, ggml, weights
from planner.buffers import HOST_BUFFER, BufferType, buffer_type
from planner.context import ContextParams
from planner.model import ModelFacts, Tensor
from planner.overrides import EXPERTS, FFN, Override
from planner.search.learned import Learned, Mode, Part
from planner.search.splits import Bin, Problem
from planner.speed import cache_reads, pace, tensor_read
from planner.types.machine import Device, Machine

NO_LIMIT: Final = 1 << 62  # stands for the budget of a device whose free memory nobody knows
# Of dense layers, whole ones on the host are nearly as good as their larger parts; where there are many layers on many
# devices, only the last room of each device takes part of one.
MAX_DENSE_SPILLS: Final = 1
MANY_SLOTS: Final = 128  # slots times devices


@dataclass(frozen=True, slots=True)
class Question:
    """One model with these parameters over these devices, in the order of preference; what is known of their charges.

    Tensors that overrides leave on the host count there; what else may be left there are ``parts``.
    """

    model: ModelFacts
    params: ContextParams
    machine: Machine
    devices: tuple[Device, ...]
    limits: budget.Budgets
    learned: Learned

    @property
    def n_slots(self) -> int:
        """Return the number of blocks and the output."""
        return slot_count(self.model)

    def sizes(self, device: Device) -> tuple[int, ...]:
        """Return the bytes of each slot on this device: its weights, and its cache where that follows the layer."""
        return _sizes(self.model, self.params, buffer_type(device))

    @property
    def parts(self) -> tuple[SpillPart, ...]:
        """Return the tensors that may be left to the host while their layers are on devices, in layer order."""
        return spill_parts(self.model) if not self.params.overrides else ()

    def spill_sizes(self, device: Device) -> tuple[int, ...]:
        """Return the bytes of each such tensor on this device."""
        return _part_sizes(self.model, buffer_type(device)) if self.parts else ()

    @property
    def kinds(self) -> tuple[int, ...]:
        """Return the kind of each slot, as a number: slots of a kind have the same tensors and as large a cache."""
        return _kinds(self.model, self.params)

    def part(self, mode: Mode, index: int, *, first: bool, output: bool) -> Part:
        """Return the part that the device of that index plays."""
        return Part(mode, self.devices[index].kind, self.devices[index].name, first, output)

    def problem(self, mode: Mode, *, on_host: int | None = 0, spills: bool = False) -> Problem:
        """Return the problem with all room that budgets leave in this mode, the devices in order."""
        reads, fixed = _reads(self.model, self.params)
        host_bytes_per_s = pace(self.machine.host).bytes_per_s
        problem = Problem(
            bins=tuple(self.bin(mode, index) for index in range(len(self.devices))),
            reads=reads,
            host_bytes_per_s=host_bytes_per_s,
            on_host=on_host,
            fixed_s=fixed / host_bytes_per_s,
            ordered=True,
        )
        if not spills:
            return replace(problem, bins=tuple(replace(each, spill_sizes=()) for each in problem.bins))
        many = self.n_slots * len(self.devices) > MANY_SLOTS
        return replace(
            problem,
            spill_slots=tuple(part.slot for part in self.parts),
            spill_reads=tuple(part.read for part in self.parts),
            max_spilled=MAX_DENSE_SPILLS if many and not self.model.hparams.n_expert else self.n_slots,
        )

    def bin(self, mode: Mode, index: int, share: float = 1.0) -> Bin:
        """Return a device with this share of its budget as room."""
        device = self.devices[index]
        limit = self.limits.of(device.name)
        room = share * (NO_LIMIT if limit is None else limit)
        rooms = [
            room - self._charge(self.part(mode, index, first=first, output=output), device)
            for first in (False, True)
            for output in (False, True)
        ]
        speed = pace(device)
        return Bin(
            rooms=(rooms[0], rooms[1], rooms[2], rooms[3]),
            sizes=self.sizes(device),
            spill_sizes=self.spill_sizes(device),
            bytes_per_s=speed.bytes_per_s,
            crossing_s=speed.crossing_s,
        )

    def _charge(self, part: Part, device: Device) -> float:
        return budget.overhead_bytes(device) + self.expected(part)

    def expected(self, part: Part) -> float:
        """Return what the device that plays this part is expected to take beyond its layers."""
        return self.learned.expected(part, self.params.n_ctx_seq, self.params.n_ubatch)


def slot_count(model: ModelFacts) -> int:
    """Return how many layers llama.cpp counts: all blocks and the output."""
    return model.hparams.n_layer_all + 1


class SpillPart(NamedTuple):
    """A tensor of a layer that may be left to the host while the layer is on a device."""

    slot: int
    tensor: Tensor
    read: float


def spill_pattern(model: ModelFacts) -> str:
    """Return the pattern of these tensors: experts, or in a dense model the feed-forward matrices."""
    return EXPERTS if model.hparams.n_expert else FFN


@lru_cache(maxsize=32)
def spill_parts(model: ModelFacts) -> tuple[SpillPart, ...]:
    """Return the tensors of that pattern, in layer order."""
    found = re.compile(spill_pattern(model)).search
    return tuple(
        SpillPart(slot, tensor, tensor_read(model, tensor))
        for slot, tensors in enumerate(weights.slot_tensors(model, loads_draft_head=False))
        for tensor in tensors
        if found(tensor.name)
    )


def _allocation(tensor: Tensor, rule: BufferType) -> int:
    return rule.allocation(ggml.TYPES[tensor.type_id], tensor.shape[0], tensor.nbytes)


@lru_cache(maxsize=64)
def _part_sizes(model: ModelFacts, rule: BufferType) -> tuple[int, ...]:
    return tuple(_allocation(part.tensor, rule) for part in spill_parts(model))


def _is_overridden(name: str, patterns: Sequence[re.Pattern[str]]) -> bool:
    return any(pattern.search(name) for pattern in patterns)


@lru_cache(maxsize=64)
def _weights(
    model: ModelFacts, overrides: tuple[Override, ...], rule: BufferType, *, loads_draft_head: bool
) -> tuple[int, ...]:
    """Return each slot's weights on a device of that rule, without what is overridden."""
    patterns = [re.compile(pattern) for pattern, _ in overrides]
    return tuple(
        sum(_allocation(tensor, rule) for tensor in tensors if not _is_overridden(tensor.name, patterns))
        for tensors in weights.slot_tensors(model, loads_draft_head=loads_draft_head)
    )


@lru_cache(maxsize=64)
def _sizes(model: ModelFacts, params: ContextParams, rule: BufferType) -> tuple[int, ...]:
    """Return each slot's weights on a device of that rule, with its cache where that follows the layer."""
    own = _weights(model, params.overrides, rule, loads_draft_head=params.loads_draft_head)
    if not params.kv_offload:
        return own
    return tuple(map(sum, zip(own, (*cache.layer_bytes(model, params, rule), 0), strict=True)))


@lru_cache(maxsize=16)
def _kinds(model: ModelFacts, params: ContextParams) -> tuple[int, ...]:
    caches = (*cache.layer_bytes(model, params, HOST_BUFFER), 0)
    known: dict[object, int] = {}
    numbers = []
    for slot, tensors in enumerate(weights.slot_tensors(model, loads_draft_head=params.loads_draft_head)):
        named = ((each.name.removeprefix(f"blk.{slot}."), each.type_id, each.shape) for each in tensors)
        numbers.append(known.setdefault((frozenset(named), caches[slot]), slot))
    return tuple(numbers)


@lru_cache(maxsize=64)
def _reads(model: ModelFacts, params: ContextParams) -> tuple[tuple[float, ...], float]:
    """Return what a token has read of each slot, and what it has read on the host whatever lies where."""
    own, on_host = _weight_reads(model, params.overrides, loads_draft_head=params.loads_draft_head)
    caches = (*cache_reads(model, params), 0.0)
    if not params.kv_offload:
        return own, on_host + sum(caches)
    return tuple(map(add, own, caches)), on_host


@lru_cache(maxsize=16)
def _weight_reads(
    model: ModelFacts, overrides: tuple[Override, ...], *, loads_draft_head: bool
) -> tuple[tuple[float, ...], float]:
    """Return what a token has read of each slot's weights, and of those that are overridden, on the host."""
    patterns = [re.compile(pattern) for pattern, _ in overrides]
    draft_head = range(model.hparams.n_layer, model.hparams.n_layer_all)
    reads, on_host = [], 0.0
    for slot, tensors in enumerate(weights.slot_tensors(model, loads_draft_head=loads_draft_head)):
        own = 0.0
        for tensor in tensors if slot not in draft_head else ():
            read = tensor_read(model, tensor)
            if _is_overridden(tensor.name, patterns):
                on_host += read
            else:
                own += read
        reads.append(own)
    return tuple(reads), on_host
