"""Compute buffers: the scratch memory that llama.cpp reserves on every device and the host for a context's graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from planner.build import is_pinned
from planner.context import ContextParams
from planner.estimate import F32_BYTES, estimate_buffers, reserved_tokens
from planner.graphs import SHAPES
from planner.loose_bound import loose_buffers
from planner.model import ModelFacts
from planner.replay import Backend, replay
from planner.types.machine import DeviceKind, LlamaBuild, Machine
from planner.types.plan import Placement
from planner.types.usage import Figure, Source

# Kinds whose allocation rules the replay follows. Others reorder the graph or cut buffers into blocks of their own.
_REPLAYED_KINDS: Final = frozenset({DeviceKind.RPC, DeviceKind.CUDA, DeviceKind.ROCM})


# A margin where operations may be computed in another order than the replayed one, and no closed form bounds it.
_OTHER_ORDER: Final = 1.25

# What computes as CUDA does chooses experts in one step and keeps small operands until then; which, is not replayed.
_ROUTER_TENSORS: Final = 8  # logits, probabilities, their order, weights, sums: at most this many rows of all experts


@dataclass(frozen=True, slots=True)
class ComputeBuffers:
    """The buffers of a placement's devices, in its order, and of the host."""

    devices: tuple[Figure, ...]
    host: Figure


def compute_buffers(
    model: ModelFacts, params: ContextParams, placement: Placement, machine: Machine, build: LlamaBuild
) -> ComputeBuffers:
    """Return what llama.cpp reserves for its graphs (src/llama-context.cpp, ``sched_reserve``).

    Simulated where the architecture's graph is replayed for the build that it mirrors; estimated upwards for another
    build, or where only a closed form bounds the graph: that of its family, or the loose one of any graph.
    """
    replayed = _replayed(model, params, placement, machine)
    as_replayed = {machine.device(name).kind for name in placement.devices} <= _REPLAYED_KINDS
    if replayed is not None and as_replayed and is_pinned(build):
        fuses = any(Backend.of(machine.device(name)).like_cuda for name in placement.devices)
        if fuses and model.hparams.n_expert:
            return _buffers(_with_fused_routers(replayed, model, params), Source.ESTIMATED)
        return _buffers(replayed, Source.SIMULATED)
    bound = estimate_buffers(model, params, placement, machine)
    if bound is not None:
        sizes_bytes = (*bound.devices, bound.host)
        if replayed is not None:
            sizes_bytes = tuple(max(pair) for pair in zip(sizes_bytes, replayed, strict=True))
        return _buffers(sizes_bytes, Source.ESTIMATED)
    if replayed is not None and (as_replayed or not any(model.hparams.recr_layers)):  # scans may be cut up elsewhere
        return _buffers(tuple(int(size * _OTHER_ORDER) for size in replayed), Source.ESTIMATED)
    loose = loose_buffers(model, params, placement, machine)
    return _buffers((*loose.devices, loose.host), Source.ESTIMATED)


def _replayed(
    model: ModelFacts, params: ContextParams, placement: Placement, machine: Machine
) -> tuple[int, ...] | None:
    sliced = bool(placement.devices) and params.split_mode not in {"layer", "none"}
    if model.hparams.architecture not in SHAPES or sliced:
        return None
    try:
        return replay(model, params, placement, machine)
    except (LookupError, ArithmeticError, RecursionError):
        # The file lacks a tensor or a figure of this family, or has thousands of heads: a variant not built here.
        return None


def _with_fused_routers(sizes_bytes: tuple[int, ...], model: ModelFacts, params: ContextParams) -> tuple[int, ...]:
    """Return the buffers with room for what cards keep while they choose experts (ggml-cuda.cu, ``add_alloc_deps``)."""
    kept = _ROUTER_TENSORS * F32_BYTES * model.hparams.n_expert * reserved_tokens(params)
    return (*(size + kept for size in sizes_bytes[:-1]), sizes_bytes[-1])


def _buffers(sizes_bytes: tuple[int, ...], source: Source) -> ComputeBuffers:
    figures = tuple(Figure(size_bytes, source) for size_bytes in sizes_bytes)
    return ComputeBuffers(figures[:-1], figures[-1])
