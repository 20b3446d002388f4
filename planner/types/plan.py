"""What is answered: a placement with its bytes, its launch and its reasons, or why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

from planner.types.machine import LlamaBuild
from planner.types.request import PlanRequest
from planner.types.usage import DeviceUsage, HostDetail


class PlacementKind(StrEnum):
    """Where the layers of a plan lie."""

    GPU = "gpu"
    GPU_AND_CPU = "gpu+cpu"
    CPU = "cpu"


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """What a reader wants to know of the model file."""

    path: str
    name: str | None
    architecture: str
    quantization: str | None
    file_bytes: int
    tensor_bytes: int
    n_params: int
    n_layers: int
    n_ctx_train: int | None


@dataclass(frozen=True, slots=True)
class Placement:
    """A candidate answer: which layer lies where, and the flags that say so to llama-server.

    ``devices`` are names in the order handed to ``--device``. ``layer_devices[il]`` is an index into it or -1 for the
    host, for all blocks, NextN included; ``output_device`` likewise. Counts in ``tensor_split`` are whole layers, the
    output layer counted with its device, so that llama.cpp's float32 boundaries are hit exactly.
    """

    devices: tuple[str, ...]
    layer_devices: tuple[int, ...]
    output_device: int
    n_gpu_layers: int
    tensor_split: tuple[float, ...]

    @property
    def kind(self) -> PlacementKind:
        """Say where the repeating layers lie."""
        on_device = sum(index >= 0 for index in self.layer_devices)
        if on_device == 0:
            return PlacementKind.CPU
        return PlacementKind.GPU if on_device == len(self.layer_devices) else PlacementKind.GPU_AND_CPU


@dataclass(frozen=True, slots=True)
class Decision:
    """One choice of the search: what was decided, what was chosen, and why, each a short phrase."""

    step: str
    chosen: str
    because: str


@dataclass(frozen=True, slots=True)
class DecodePart:
    """What one token has read in one place, the bandwidth there, whether that is known, and how long it takes."""

    place: str
    read_bytes: int
    bytes_per_second: int
    is_known: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class DecodeEstimate:
    """A predicted decode speed, the words that say what it was computed from, and the parts of a token's time.

    ``crossings_s`` is spent on the ways between devices.
    """

    tokens_per_second: float
    basis: str
    parts: tuple[DecodePart, ...] = ()
    crossings_s: float = 0.0


@dataclass(frozen=True, slots=True)
class LaunchSpec:
    """A llama-server command line without port, alias and key, and the environment that belongs to it.

    ``argv[0]`` is the binary, or plain ``llama-server`` where none was found. ``env`` is added to a scrubbed
    environment.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class Plan:
    """A placement that fits, with its bytes, its launch and its reasons.

    ``usages`` lists every device of the machine in order, unused ones with zeros, and the host last.
    ``fit_by_llama`` marks a plan whose bytes could not be known beforehand: llama-server is launched with its own fit
    under our margins, and what its log reports is reserved.
    """

    model: ModelSummary
    request: PlanRequest
    build: LlamaBuild
    placement: Placement
    usages: tuple[DeviceUsage, ...]
    host: HostDetail
    n_ctx_per_slot: int | None
    launch: LaunchSpec
    decode: DecodeEstimate | None = None
    decisions: tuple[Decision, ...] = ()
    warnings: tuple[str, ...] = ()
    fit_by_llama: bool = False

    @property
    def is_known(self) -> bool:
        """Say whether every figure is known, so that other models can be planned beside this one."""
        return not self.fit_by_llama and all(usage.planned_bytes is not None for usage in self.usages)


@dataclass(frozen=True, slots=True)
class Shortfall:
    """One device that cannot hold what the nearest attempt needs there."""

    device: str
    needed_bytes: int
    available_bytes: int

    @property
    def shortfall_bytes(self) -> int:
        """Return how many bytes are missing."""
        return self.needed_bytes - self.available_bytes


@dataclass(frozen=True, slots=True)
class NearestChange:
    """A single change that was tried, and whether the plan would fit with it."""

    change: str
    fits: bool


@dataclass(frozen=True, slots=True)
class NoFit:
    """No placement that the flags allow fits. ``usages`` shows the nearest attempt.

    ``because`` says what else than memory is missing: a condition that was asked for.
    """

    model: ModelSummary
    request: PlanRequest
    build: LlamaBuild
    usages: tuple[DeviceUsage, ...]
    host: HostDetail
    n_ctx_per_slot: int | None
    causes: tuple[Shortfall, ...]
    nearest: tuple[NearestChange, ...] = ()
    decisions: tuple[Decision, ...] = ()
    warnings: tuple[str, ...] = ()
    because: str = ""


@dataclass(frozen=True, slots=True)
class Refused:
    """llama.cpp would reject these flags for this model, and this is why."""

    model: ModelSummary
    request: PlanRequest
    build: LlamaBuild
    reason: str
    decisions: tuple[Decision, ...] = ()
    warnings: tuple[str, ...] = ()


PlanOutcome = Plan | NoFit | Refused
