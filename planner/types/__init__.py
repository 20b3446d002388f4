"""The frozen values that cross every wall of the house.

Everything here is immutable, hashable where its parts are, and free of behaviour beyond derived figures. Sizes are
bytes and say so in their names; unknown is ``None``, never 0. Device names are llama.cpp's own (``CUDA0``, ``RPC1``),
and the host is a device called ``Host``.

This is the planner's side of its walls: other parts import these names from here, and need not know how the planner
parts them. The planner's own modules name the one that holds the thing, and so say what they depend on.
"""

from __future__ import annotations

from planner.types.machine import (
    HOST,
    HOST_POOL,
    Device,
    DeviceKind,
    DeviceName,
    LlamaBuild,
    Machine,
    MemoryPool,
    PoolId,
    ProcessUse,
)
from planner.types.plan import (
    Decision,
    DecodeEstimate,
    DecodePart,
    LaunchSpec,
    ModelSummary,
    NearestChange,
    NoFit,
    Placement,
    PlacementKind,
    Plan,
    PlanOutcome,
    Refused,
    Shortfall,
)
from planner.types.request import (
    FlashAttention,
    LearnedOverhead,
    LoadMode,
    LoadOptions,
    PerDevice,
    PlanRequest,
    Policy,
    Role,
    SplitMode,
)
from planner.types.usage import NOTHING, UNKNOWN_DETAIL, UNKNOWN_FIGURE, DeviceUsage, Figure, HostDetail, Source

__all__ = [
    "HOST",
    "HOST_POOL",
    "NOTHING",
    "UNKNOWN_DETAIL",
    "UNKNOWN_FIGURE",
    "Decision",
    "DecodeEstimate",
    "DecodePart",
    "Device",
    "DeviceKind",
    "DeviceName",
    "DeviceUsage",
    "Figure",
    "FlashAttention",
    "HostDetail",
    "LaunchSpec",
    "LearnedOverhead",
    "LlamaBuild",
    "LoadMode",
    "LoadOptions",
    "Machine",
    "MemoryPool",
    "ModelSummary",
    "NearestChange",
    "NoFit",
    "PerDevice",
    "Placement",
    "PlacementKind",
    "Plan",
    "PlanOutcome",
    "PlanRequest",
    "Policy",
    "PoolId",
    "ProcessUse",
    "Refused",
    "Role",
    "Shortfall",
    "Source",
    "SplitMode",
]
