"""The frozen values that cross every wall of the house.

Everything here is immutable, hashable where its parts are, and free of behaviour beyond derived figures. Sizes are
bytes and say so in their names; unknown is ``None``, never 0. Device names are llama.cpp's own (``CUDA0``, ``RPC1``),
and the host is a device called ``Host``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Final, Literal, NewType

DeviceName = NewType("DeviceName", str)
PoolId = NewType("PoolId", str)

HOST: Final = DeviceName("Host")
HOST_POOL: Final = PoolId("host")


class DeviceKind(StrEnum):
    """What a device is, as far as llama.cpp's placement rules differ by it."""

    CUDA = "cuda"
    ROCM = "rocm"
    VULKAN = "vulkan"
    SYCL = "sycl"
    METAL = "metal"
    RPC = "rpc"
    HOST = "host"
    OTHER = "other"


class Source(StrEnum):
    """Where a figure comes from, strongest claim first."""

    EXACT = "exact"  # a closed rule of llama.cpp's, equal to the byte
    SIMULATED = "simulated"  # llama.cpp's graph and allocator replayed
    ORACLE = "oracle"  # llama.cpp itself was asked, by a size-only load
    MEASURED = "measured"  # read from the log of a runner that really loaded
    ESTIMATED = "estimated"  # a closed form that errs upwards
    UNKNOWN = "unknown"


class Role(StrEnum):
    """What a model is served for; it decides llama-server's flags and so the plan."""

    CHAT = "chat"
    EMBEDDING = "embedding"
    RERANK = "rerank"


class PlacementKind(StrEnum):
    """Where the layers of a plan lie."""

    GPU = "gpu"
    GPU_AND_CPU = "gpu+cpu"
    CPU = "cpu"


# ---------------------------------------------------------------------------------------------------------------------
# The machine


@dataclass(frozen=True, slots=True)
class MemoryPool:
    """Memory that a budget belongs to. Two devices may share one (an APU and the host, two names for one card)."""

    id: PoolId
    total_bytes: int | None
    free_bytes: int | None


@dataclass(frozen=True, slots=True)
class ProcessUse:
    """What one process holds on a device, as the driver reports it."""

    pid: int
    name: str | None
    used_bytes: int | None


@dataclass(frozen=True, slots=True)
class Device:
    """One device as llama-server will see it, or the host.

    ``free_bytes`` leaves out what the driver reserves. ``endpoint`` is a worker's ``host:port`` (RPC kind only).
    ``alignment_bytes`` overrides the kind's rule where it is known (an RPC worker on CUDA aligns as CUDA does).
    """

    name: DeviceName
    kind: DeviceKind
    total_bytes: int | None
    free_bytes: int | None
    pool: PoolId
    description: str = ""
    uuid: str | None = None
    pci_bus_id: str | None = None
    bandwidth_bytes_per_s: int | None = None
    compute_capability: str | None = None
    endpoint: str | None = None
    alignment_bytes: int | None = None
    overhead_bytes: int | None = None  # what llama.cpp does not report; None: the kind's default
    overhead_because: str = ""  # where that figure comes from; empty: it is the built-in one
    usable: bool = True
    why_not: str | None = None
    processes: tuple[ProcessUse, ...] = ()
    exclusive: bool = False  # it takes one process at a time, as an RPC worker does


@dataclass(frozen=True, slots=True)
class Machine:
    """A snapshot of the devices, in the order llama-server will use, and of the host.

    ``what_if`` says that the devices were named by the user and need not exist here.
    """

    devices: tuple[Device, ...]
    host: Device
    pools: tuple[MemoryPool, ...] = ()
    warnings: tuple[str, ...] = ()
    looked_for: tuple[str, ...] = ()
    what_if: bool = False

    def device(self, name: str) -> Device:
        """Return the device of that name, the host included. Raises KeyError."""
        for device in (*self.devices, self.host):
            if device.name == name:
                return device
        raise KeyError(name)


@dataclass(frozen=True, slots=True)
class LlamaBuild:
    """The llama.cpp that will be launched. The formulas are exact for one commit (``planner.build.PINNED_COMMIT``).

    ``path`` is None where none is installed: plans are then made for the pinned build. ``repack_types`` are the tensor
    types that its CPU backend repacks on this processor (ggml-cpu/repack.cpp).
    """

    path: str | None
    version: str | None
    commit: str | None
    backends: frozenset[str] = frozenset()
    rpc_protocol: str | None = None
    cpu_features: frozenset[str] = frozenset()
    library_path: str | None = None


# ---------------------------------------------------------------------------------------------------------------------
# The question


@dataclass(frozen=True, slots=True)
class PerDevice:
    """A number of bytes for every device, with exceptions by name."""

    default: int | None = None
    by_name: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))

    def of(self, name: str) -> int | None:
        """Return the figure that holds for this device."""
        return self.by_name.get(name, self.default)


@dataclass(frozen=True, slots=True)
class LearnedOverhead:
    """What a runner turned out to take on a device beside llama.cpp's buffers, by running out of memory there.

    ``model`` is the public id of what ran out, ``day`` when, as an ISO date.
    """

    size_bytes: int
    model: str
    day: str


@dataclass(frozen=True, slots=True)
class Policy:
    """What the operator allows beside the flags: margins, caps, what is promised already, what holds unless pinned.

    ``device_overhead`` is the operator's figure of what a runner takes beside llama.cpp's buffers, ``learned_overhead``
    the service's own by device name: ``planner.budget.with_overheads`` has the order. ``held`` is what our own runners
    hold on each device (it counts against MAX_VRAM); ``promised`` what was granted to loads that the driver does not
    show yet (it is taken off what is free). ``n_ctx_per_slot`` None: the planner's choice.
    """

    gpu_overhead: PerDevice = PerDevice(default=0)
    max_vram: PerDevice = PerDevice()
    device_overhead: PerDevice = PerDevice()
    learned_overhead: Mapping[str, LearnedOverhead] = field(default_factory=lambda: MappingProxyType({}))
    spread: bool = False
    n_parallel: int = 1
    n_ctx_per_slot: int | None = None
    cache_type: str = "f16"
    flash_attn: FlashAttention = "auto"
    cache_ram_mib: int = 1024
    held: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    promised: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))


SplitMode = Literal["none", "layer", "row", "tensor"]
FlashAttention = Literal["on", "off", "auto"]
LoadMode = Literal["auto", "none", "mmap", "mlock", "mmap+mlock", "dio"]


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """Every knob that moves memory. ``None`` means: not pinned, the planner decides and says why.

    Field names are llama.cpp's (common/common.h, ``common_params``); ``planner.flags`` maps them to flags.
    ``n_ctx`` is llama-server's ``-c``, the sum over slots; ``n_ctx_per_slot`` is what one conversation gets. At most
    one of the two is set. ``n_ctx == 0`` is the trained length; ``"auto"`` the largest that fits.
    ``passthrough`` are llama-server flags that move no memory, to be handed on as they were written.
    """

    role: Role = Role.CHAT
    n_ctx: int | Literal["auto"] | None = None
    n_ctx_per_slot: int | None = None
    n_parallel: int | None = None
    kv_unified: bool | None = None
    n_batch: int | None = None
    n_ubatch: int | None = None
    devices: tuple[str, ...] | None = None
    n_gpu_layers: int | Literal["auto", "all"] | None = None
    tensor_split: tuple[float, ...] | None = None
    split_mode: SplitMode | None = None
    main_gpu: int | None = None
    flash_attn: FlashAttention | None = None
    cache_type_k: str | None = None
    cache_type_v: str | None = None
    kv_offload: bool | None = None
    n_cpu_moe: int | None = None
    cpu_moe: bool | None = None
    n_cpu_ffn: int | None = None
    override_tensor: tuple[tuple[str, str], ...] | None = None
    swa_full: bool | None = None
    load_mode: LoadMode | None = None
    lazy_mode: Literal["on", "auto", "off"] | None = None
    use_host_buffer: bool | None = None  # False: --no-host
    repack: bool | None = None
    op_offload: bool | None = None
    rpc: tuple[str, ...] | None = None
    embeddings: bool | None = None
    reranking: bool | None = None
    pooling: str | None = None
    cache_ram_mib: int | None = None
    ctx_checkpoints: int | None = None
    mmproj: str | None = None
    mmproj_offload: bool | None = None
    lora: tuple[str, ...] | None = None
    model_draft: str | None = None
    n_gpu_layers_draft: int | Literal["auto", "all"] | None = None
    cache_type_k_draft: str | None = None
    cache_type_v_draft: str | None = None
    devices_draft: tuple[str, ...] | None = None
    override_tensor_draft: tuple[tuple[str, str], ...] | None = None
    spec_type: str | None = None
    spec_draft_n_max: int | None = None
    override_kv: tuple[str, ...] | None = None
    passthrough: tuple[str, ...] = ()


# ---------------------------------------------------------------------------------------------------------------------
# The answer


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
class Figure:
    """A number of bytes and where it comes from. ``bytes is None`` exactly where the source is unknown."""

    bytes: int | None
    source: Source

    def __post_init__(self) -> None:
        """Hold the two halves together: an unknown source has no number, every other one has."""
        if (self.bytes is None) != (self.source is Source.UNKNOWN):
            msg = f"a figure from {self.source} cannot be {self.bytes}"
            raise ValueError(msg)


UNKNOWN_FIGURE: Final = Figure(None, Source.UNKNOWN)
NOTHING: Final = Figure(0, Source.EXACT)


@dataclass(frozen=True, slots=True)
class DeviceUsage:
    """What a plan takes on one device. model, context and compute mean what llama.cpp's memory breakdown means."""

    name: str
    kind: DeviceKind
    total_bytes: int | None
    free_bytes: int | None
    budget_bytes: int | None
    layers: tuple[int, ...] = ()
    output: bool = False
    model: Figure = NOTHING
    context: Figure = NOTHING
    compute: Figure = NOTHING
    overhead_bytes: int = 0
    overhead_because: str = ""

    @property
    def planned_bytes(self) -> int | None:
        """Return model + context + compute + overhead, or None where one of them is unknown."""
        unknown = None in {self.model.bytes, self.context.bytes, self.compute.bytes}
        return None if unknown else self.known_bytes

    @property
    def known_bytes(self) -> int:
        """Return the sum of what is known: it takes at least that much."""
        parts = (self.model.bytes, self.context.bytes, self.compute.bytes)
        return sum(part or 0 for part in parts) + self.overhead_bytes

    @property
    def headroom_bytes(self) -> int | None:
        """Return what the budget leaves, negative where it is overrun, None where either side is unknown."""
        planned = self.planned_bytes
        return None if planned is None or self.budget_bytes is None else self.budget_bytes - planned


@dataclass(frozen=True, slots=True)
class HostDetail:
    """What the host's account holds beyond a device's. Mapped bytes are page cache, not allocations."""

    mapped_bytes: int | None = 0
    allocated_bytes: int | None = 0
    pinned_bytes: int | None = 0
    output_buffer_bytes: int | None = 0
    prompt_cache_bytes: int | None = 0


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
