"""Compute buffers: the scratch memory that llama.cpp reserves on every device and the host for a context's graphs."""

from __future__ import annotations

from dataclasses import dataclass

from planner.context import ContextParams
from planner.estimate import estimate_buffers
from planner.model import ModelFacts
from planner.types import UNKNOWN_FIGURE, Figure, LlamaBuild, Machine, Placement, Source


@dataclass(frozen=True, slots=True)
class ComputeBuffers:
    """The buffers of a placement's devices, in its order, and of the host.

    ``not_built`` says why figures are unknown; it is empty where none is.
    """

    devices: tuple[Figure, ...]
    host: Figure
    not_built: tuple[str, ...] = ()


def compute_buffers(
    model: ModelFacts, params: ContextParams, placement: Placement, machine: Machine, build: LlamaBuild
) -> ComputeBuffers:
    """Return what llama.cpp reserves for its graphs (src/llama-context.cpp, ``sched_reserve``)."""
    del build
    estimate = estimate_buffers(model, params, placement, machine)
    if estimate is None:
        reason = f"the compute graph of {model.hparams.architecture} is not built here"
        return ComputeBuffers((UNKNOWN_FIGURE,) * len(placement.devices), UNKNOWN_FIGURE, (reason,))
    return ComputeBuffers(
        devices=tuple(Figure(size_bytes, Source.ESTIMATED) for size_bytes in estimate.devices),
        host=Figure(estimate.host, Source.ESTIMATED),
    )
