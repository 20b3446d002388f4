"""Buffer types: how tensors are padded and aligned on each kind of device (``get_alloc_size``, ``get_alignment``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from planner import ggml
from planner.types.machine import DeviceKind

if TYPE_CHECKING:
    from planner.types.machine import Device

_ROW_MULTIPLE: Final = 512  # MATRIX_ROW_PADDING (ggml-cuda/common.cuh)
_CUDA_ALIGNMENT: Final = 128
_HOST_ALIGNMENT: Final = 32  # TENSOR_ALIGNMENT (ggml-backend.cpp)
_VULKAN_LARGEST_ALIGNMENT: Final = 256  # the specification's bound on minStorageBufferOffsetAlignment

# Kinds of one backend (ggml-cuda), whose flash attention makes f16 copies of a cache of another type.
CUDA_KINDS: Final = frozenset({DeviceKind.CUDA, DeviceKind.ROCM})
# Kinds whose drivers offer pinned host memory to llama.cpp (get_host_buffer_type), and whose backends take big products
# of weights that lie in host memory (offload_op).
OFFLOADING_KINDS: Final = CUDA_KINDS | {DeviceKind.VULKAN, DeviceKind.SYCL}


@dataclass(frozen=True, slots=True)
class BufferType:
    """The rule by which one device lays out tensors. ``certain`` says that it is that device's, not an upper bound."""

    alignment_bytes: int
    pads_rows: bool
    certain: bool = True

    def allocation(self, type_: ggml.GgmlType, row_elements: int, size_bytes: int) -> int:
        """Return what a tensor takes: rows of quantized types end in a pad, and every tensor is aligned."""
        if self.pads_rows and type_.quantized and (rest := row_elements % _ROW_MULTIPLE):
            size_bytes += ggml.row_bytes(type_, _ROW_MULTIPLE - rest)
        return ggml.pad(size_bytes, self.alignment_bytes)


HOST_BUFFER: Final = BufferType(_HOST_ALIGNMENT, pads_rows=False)

_BY_KIND: Final = {
    DeviceKind.CUDA: BufferType(_CUDA_ALIGNMENT, pads_rows=True),  # ggml-cuda.cu
    DeviceKind.ROCM: BufferType(_CUDA_ALIGNMENT, pads_rows=True),
    DeviceKind.SYCL: BufferType(_CUDA_ALIGNMENT, pads_rows=True),  # ggml-sycl.cpp
    DeviceKind.VULKAN: BufferType(_VULKAN_LARGEST_ALIGNMENT, pads_rows=False, certain=False),  # the device decides
    DeviceKind.METAL: BufferType(_HOST_ALIGNMENT, pads_rows=False),
    DeviceKind.RPC: HOST_BUFFER,  # the worker's own rule, a CPU's unless its alignment says otherwise
    DeviceKind.HOST: HOST_BUFFER,
    DeviceKind.OTHER: BufferType(_VULKAN_LARGEST_ALIGNMENT, pads_rows=True, certain=False),
}


def buffer_type(device: Device) -> BufferType:
    """Return the default buffer type of a device; an alignment that is known for it overrides its kind's."""
    rule = _BY_KIND[device.kind]
    alignment = device.alignment_bytes
    if alignment is None or alignment == rule.alignment_bytes:
        return rule
    if device.kind is DeviceKind.RPC:  # ggml-rpc.cpp asks the worker for the size: one that aligns as CUDA pads as CUDA
        return BufferType(alignment, pads_rows=alignment == _CUDA_ALIGNMENT)
    return BufferType(alignment, pads_rows=rule.pads_rows)
