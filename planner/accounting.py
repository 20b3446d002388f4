"""The forward model: placement and parameters in, bytes per device out. One entry, for explain and serve alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from planner.types import Figure, HostDetail

if TYPE_CHECKING:
    from planner.context import ContextParams
    from planner.model import ModelFacts
    from planner.types import LlamaBuild, Machine, Placement


@dataclass(frozen=True, slots=True)
class DeviceBytes:
    """What llama.cpp reserves on one device."""

    model: Figure
    context: Figure
    compute: Figure


@dataclass(frozen=True, slots=True)
class MemoryLedger:
    """Bytes per device of the placement (same order as ``Placement.devices``), and the host's account.

    ``not_built`` names each rule that is missing for this model or these flags; the figures it touches are unknown,
    and an oracle may fill them in. Empty where every figure is ours.
    """

    devices: tuple[DeviceBytes, ...]
    host: DeviceBytes
    host_detail: HostDetail
    not_built: tuple[str, ...] = ()


def account(
    model: ModelFacts, params: ContextParams, placement: Placement, machine: Machine, build: LlamaBuild
) -> MemoryLedger:
    """Return the bytes that llama-server will reserve on each device of the placement and on the host.

    Weights and caches are exact for the pinned build, compute simulated where the family's graph is built, estimated
    (never below llama.cpp's) where only a closed form is known, unknown otherwise.
    """
    raise NotImplementedError
