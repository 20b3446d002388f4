"""Predicted decode speed: what one token has read, over the bandwidth of where it lies, and the ways between devices.

A token's matrices are each read once and its arithmetic is little, so that memory bandwidth is what limits it. The
speed is that of one conversation at a fixed depth, so that it does not depend on how long a context was chosen.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from planner import cache, ggml, weights
from planner.overrides import EXPERTS
from planner.types.machine import HOST, DeviceKind
from planner.types.plan import DecodeEstimate, DecodePart
from planner.units import format_size

if TYPE_CHECKING:
    from planner.context import ContextParams
    from planner.model import ModelFacts, Tensor
    from planner.types.machine import Device, Machine
    from planner.types.plan import Placement

EQUAL_SPEED: Final = 1.01  # speeds this close count as equal: the figures they are computed from are no better
DEPTH_TOKENS: Final = 4096  # of the conversation, or the context where that is shorter
# Where nobody knows a bandwidth: that of a middling card, the same for all, so that none is preferred by a guess.
DEVICE_BYTES_PER_S: Final = 400 * 10**9
HOST_BYTES_PER_S: Final = 50 * 10**9  # two channels of DDR4-3200
# To hand a token's activations over to another device or to take them: a copy and its synchronization, or a message.
CROSSING_S: Final = 10e-6
REMOTE_CROSSING_S: Final = 25e-6

_EXPERTS: Final = re.compile(EXPERTS)


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a device reads, whether that is known, and what entering or leaving it takes."""

    bytes_per_s: float
    known: bool
    crossing_s: float


def pace(device: Device) -> Pace:
    """Return a device's pace; one that nobody measured or listed gets its kind's constant."""
    assumed = HOST_BYTES_PER_S if device.kind is DeviceKind.HOST else DEVICE_BYTES_PER_S
    crossing_s = REMOTE_CROSSING_S if device.kind is DeviceKind.RPC else CROSSING_S
    known = bool(device.bandwidth_bytes_per_s)
    return Pace(float(device.bandwidth_bytes_per_s or assumed), known, crossing_s)


def tensor_read(model: ModelFacts, tensor: Tensor) -> float:
    """Return the bytes that one token has read of a tensor: of experts, only the share that it uses."""
    if model.hparams.n_expert and _EXPERTS.search(tensor.name):
        return tensor.nbytes * model.hparams.n_expert_used / model.hparams.n_expert
    return float(tensor.nbytes)


@lru_cache(maxsize=64)
def cache_reads(model: ModelFacts, params: ContextParams) -> tuple[float, ...]:
    """Return the bytes of cache that one token has read at each layer, NextN layers included."""
    depth = min(DEPTH_TOKENS, params.n_ctx_seq)
    reads = [0.0] * model.hparams.n_layer_all
    for tensor in cache.cache_tensors(model, params):
        cells = min(tensor.rows // params.n_stream, depth)
        reads[tensor.layer] += ggml.row_bytes(tensor.type, tensor.width) * cells
    return tuple(reads)


def decode(model: ModelFacts, params: ContextParams, placement: Placement, machine: Machine) -> DecodeEstimate | None:
    """Return the predicted speed of one conversation with this placement; None where weights or caches have no rule."""
    if weights.not_built(model, params, placement, machine) or cache.not_built(model):
        return None
    reads, crossings_s = _reads(model, params, placement, machine)
    parts = []
    for name, read in reads.items():
        speed = pace(machine.device(name))
        parts.append(DecodePart(name, round(read), round(speed.bytes_per_s), speed.known, read / speed.bytes_per_s))
    seconds = sum(part.seconds for part in parts) + crossings_s
    if not seconds:
        return None
    return DecodeEstimate(1 / seconds, _basis(parts, params, crossings_s), tuple(parts), crossings_s)


def _reads(
    model: ModelFacts, params: ContextParams, placement: Placement, machine: Machine
) -> tuple[dict[str, float], float]:
    """Return what a token has read on each device, and the seconds of its way through them.

    Devices are entered and left once for each run of layers, and once more for each layer some of whose matrices or
    whose cache lie elsewhere.
    """
    names = (*placement.devices, HOST)
    homes = weights.tensor_homes(model, params, placement, machine)
    owners = (*placement.layer_devices, placement.output_device)
    caches = cache_reads(model, params)
    reads = dict.fromkeys(names, 0.0)
    crossings_s, before = 0.0, -1
    slots = weights.slot_tensors(model, loads_draft_head=params.loads_draft_head)
    for slot, (owner, tensors) in enumerate(zip(owners, slots, strict=True)):
        if model.hparams.n_layer <= slot < model.hparams.n_layer_all:  # a draft head's layers: not used here
            continue
        away = set()
        for tensor in tensors:
            tied = slot == len(owners) - 1 and not tensor.name.startswith("output")
            home = owner if tied else homes[tensor.name]
            reads[names[home]] += tensor_read(model, tensor)
            if len(tensor.shape) > 1 and home != owner:
                away.add(home)
        if slot < len(caches) and caches[slot]:
            home = owner if params.kv_offload else -1
            reads[names[home]] += caches[slot]
            away |= {home} - {owner}
        for home in away:
            crossings_s += 2 * _crossing_s(machine, names, owner, home)
        if owner != before:
            crossings_s += _crossing_s(machine, names, owner, before)
        before = owner
    crossings_s += _crossing_s(machine, names, before, -1) if before != -1 else 0.0
    return {name: read for name, read in reads.items() if read}, crossings_s


def _crossing_s(machine: Machine, names: tuple[str, ...], one: int, other: int) -> float:
    """Return the seconds from one place to another; the host's own part in it is nothing."""
    return sum(pace(machine.device(names[place])).crossing_s for place in (one, other) if place != -1)


def _basis(parts: list[DecodePart], params: ContextParams, crossings_s: float) -> str:
    """Return the words that say what the speed was computed from."""
    depth = min(DEPTH_TOKENS, params.n_ctx_seq)
    each = ", ".join(
        f"{format_size(part.read_bytes)} on {part.place} at {part.bytes_per_second / 1e9:,.0f} GB/s"
        f"{'' if part.is_known else ' (assumed)'}"
        for part in parts
    )
    return f"one token at a depth of {depth:,} reads {each}; {crossings_s * 1e6:,.0f} µs between devices"
