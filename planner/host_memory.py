"""How the host keeps the weights that are left to it: mapped from their file, allocated, repacked or pinned.

(src/llama-model.cpp, ``make_cpu_buft_list`` and the buffers of ``load_tensors``.)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Final

from planner import ggml
from planner.buffers import HOST_BUFFER, OFFLOADING_KINDS
from planner.operations import Operation, Weight

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from planner.context import ContextParams
    from planner.types.machine import Device, LlamaBuild, Machine

_LAZY_FROM_BYTES: Final = 4 << 30  # src/llama-model-loader.cpp, lazy mode auto
# ggml-cpu/repack.cpp, ggml_repack_get_optimal_repack_type: what each processor feature has repacked, in rows by eight.
_REPACKED_BY: Final[Mapping[str, frozenset[str]]] = {
    "avx2": frozenset({"q4_0", "q4_K", "iq4_nl", "mxfp4"}),
    "avx512f": frozenset({"q2_K"}),
}
_REPACK_ROWS: Final = 8
_OTHER_PACKERS: Final = frozenset({"amx_int8", "asimd", "v", "vxe"})  # processors whose packing has no rule here
_REPACK_DIMS: Final[Mapping[Operation, int]] = {Operation.MUL_MAT: 2, Operation.MUL_MAT_ID: 3}


class Keeping(Enum):
    """How the host keeps a weight."""

    LAZY = auto()  # mapped on demand, apart from the others
    MAPPED = auto()
    PINNED = auto()
    REPACKED = auto()
    ALLOCATED = auto()


@dataclass(frozen=True, slots=True)
class HostRule:
    """How the host keeps weights: mapped from the file or not, pinned or not, which types repacked."""

    mapped: bool
    pinned: bool
    repacked: frozenset[str]
    repack_known: bool
    lazy_mode: str


@dataclass(slots=True)
class HostShare:
    """Weights on the host. ``spans`` are the mapped ranges, first and end offset by (lazy, shard).

    A mapped range includes whatever lies between two weights of the host (src/llama-model.cpp, ``get_mapping_range``).
    ``mapped_tensor_bytes`` are the weights alone, without those of which single rows are read on demand.
    """

    spans: dict[tuple[bool, int], tuple[int, int]] = field(default_factory=dict)
    mapped_tensor_bytes: int = 0
    allocated_bytes: int = 0
    pinned_bytes: int = 0
    certain: bool = True

    @property
    def mapped_bytes(self) -> int:
        """Return the length of all mapped ranges: page cache, not allocations."""
        return sum(end - first for first, end in self.spans.values())

    def add(self, other: HostShare) -> None:
        """Take in another share: ranges of one file become one."""
        self.mapped_tensor_bytes += other.mapped_tensor_bytes
        self.allocated_bytes += other.allocated_bytes
        self.pinned_bytes += other.pinned_bytes
        self.certain = self.certain and other.certain
        for key, (first, end) in other.spans.items():
            self.span(key, first, end)

    def span(self, key: tuple[bool, int], first: int, end: int) -> None:
        """Widen a mapped range so that it holds these bytes of the file."""
        known = self.spans.get(key, (first, end))
        self.spans[key] = (min(first, known[0]), max(end, known[1]))

    def keep(self, weight: Weight, kept: Keeping, rule: HostRule) -> None:
        """Put a weight into this share."""
        tensor, type_ = weight.tensor, ggml.TYPES[weight.tensor.type_id]
        size = HOST_BUFFER.allocation(type_, tensor.shape[0], tensor.nbytes)
        if kept in {Keeping.LAZY, Keeping.MAPPED}:
            self.span((kept is Keeping.LAZY, tensor.shard), tensor.offset, tensor.offset + tensor.nbytes)
            if kept is Keeping.MAPPED and not weight.tied:  # a tied one is the input's, counted there
                self.mapped_tensor_bytes += tensor.nbytes
        elif kept is Keeping.PINNED:
            self.pinned_bytes += size
        else:
            self.allocated_bytes += size
        if type_.quantized and weight.reads in _REPACK_DIMS and not (rule.pinned or rule.repack_known):
            self.certain = False


def host_rule(params: ContextParams, devices: Sequence[Device], machine: Machine, build: LlamaBuild) -> HostRule:
    """Return how the host keeps what is left to it (src/llama-model.cpp, ``make_cpu_buft_list``)."""
    shares_memory = any(device.pool == machine.host.pool and device.kind in OFFLOADING_KINDS for device in devices)
    maps = {"mmap": True, "mmap+mlock": True, "auto": not shares_memory}
    repacked = frozenset[str]().union(*(_REPACKED_BY.get(feature, ()) for feature in build.cpu_features))
    known = bool(build.cpu_features) and not build.cpu_features & _OTHER_PACKERS
    return HostRule(
        mapped=maps.get(params.load_mode, False),
        pinned=params.use_host_buffer and any(device.kind in OFFLOADING_KINDS for device in devices),
        repacked=repacked if params.repack else frozenset(),
        repack_known=known or not params.repack,
        lazy_mode="off" if shares_memory and params.lazy_mode == "auto" else params.lazy_mode,
    )


def keeping(weight: Weight, rule: HostRule) -> Keeping:
    """Return how the host keeps a weight: the first buffer type of its list that takes it."""
    if weight.lazy and (
        rule.lazy_mode == "on" or (rule.lazy_mode == "auto" and weight.tensor.nbytes > _LAZY_FROM_BYTES)
    ):
        return Keeping.LAZY
    if rule.pinned:
        return Keeping.MAPPED if rule.mapped else Keeping.PINNED
    shape = weight.tensor.shape
    if (
        ggml.TYPES[weight.tensor.type_id].name in rule.repacked
        and _REPACK_DIMS.get(weight.reads) == len(shape)
        and shape[1] % _REPACK_ROWS == 0
    ):
        return Keeping.REPACKED
    return Keeping.MAPPED if rule.mapped else Keeping.ALLOCATED
