"""What is asked: every knob of a load that moves memory, and what the operator allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Literal

SplitMode = Literal["none", "layer", "row", "tensor"]
FlashAttention = Literal["on", "off", "auto"]
LoadMode = Literal["auto", "none", "mmap", "mlock", "mmap+mlock", "dio"]


class Role(StrEnum):
    """What a model is served for; it decides llama-server's flags and so the plan."""

    CHAT = "chat"
    EMBEDDING = "embedding"
    RERANK = "rerank"


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
    n_parallel: int | Literal["auto"] = 1
    n_ctx_per_slot: int | None = None
    cache_type: str = "f16"
    flash_attn: FlashAttention = "auto"
    cache_ram_mib: int = 1024
    held: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    promised: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """Every knob that moves memory. ``None`` means: not pinned, the planner decides and says why.

    Field names are llama.cpp's (common/common.h, ``common_params``); ``planner.flags`` maps them to flags.
    ``n_ctx`` is llama-server's ``-c``, the sum over slots; ``n_ctx_per_slot`` is what one conversation gets. At most
    one of the two is set. ``n_ctx == 0`` is the trained length; ``"auto"`` the largest that fits. ``n_parallel`` is the
    number of slots, ``"auto"`` as many as cost nothing (``planner.search.slots``); in a plan it is a number.
    ``passthrough`` are llama-server flags that move no memory, to be handed on as they were written.
    """

    role: Role = Role.CHAT
    n_ctx: int | Literal["auto"] | None = None
    n_ctx_per_slot: int | None = None
    n_parallel: int | Literal["auto"] | None = None
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
    cpu_moe_draft: bool | None = None
    n_cpu_moe_draft: int | None = None
    spec_type: str | None = None
    spec_draft_n_max: int | None = None
    override_kv: tuple[str, ...] | None = None
    passthrough: tuple[str, ...] = ()

    @property
    def slots(self) -> int:
        """Return how many conversations there are at a time: one where that is still open."""
        return self.n_parallel if isinstance(self.n_parallel, int) else 1


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What a client asks of the load of a model that is served; None: as the settings have it.

    ``n_ctx`` is tokens for one conversation; a runner that has as many serves it. The others are llama-server's own.
    """

    n_ctx: int | None = None
    n_gpu_layers: int | None = None
    main_gpu: int | None = None
    n_batch: int | None = None
    use_mmap: bool | None = None
