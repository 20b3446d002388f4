"""Compute buffers by replay: build the graph, schedule it over the backends, run the allocator (``sched_reserve``)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Final

from planner.allocator import AllocSize, GraphAllocator
from planner.context import ContextParams
from planner.estimate import OFFLOAD_MIN_ROWS, OFFLOADING_KINDS, pipeline_copies, reserved_tokens
from planner.ggml import pad, row_bytes
from planner.graph import Node
from planner.graphs import build_graph
from planner.graphs.blocks import PIN_BELOW_TOKENS, Batch, Blocks, Places
from planner.model import ModelFacts
from planner.scheduler import Offloads, schedule
from planner.types import Device, DeviceKind, Machine, Placement

CPU_ALIGNMENT: Final = 32  # TENSOR_ALIGNMENT, ggml/src/ggml-impl.h; pinned host buffers have the CPU's
CUDA_ALIGNMENT: Final = 128  # ggml_backend_cuda_buffer_type_get_alignment
CUDA_ROW_PADDING: Final = 512  # MATRIX_ROW_PADDING: quantized rows are padded to this many elements

# The prompt's graph is never narrower than generation's where it has this many times its tokens: what grows with the
# tokens is that many times as large, and what does not (rotations, copied weights) is in both or in the prompt's only.
TOKENS_RATIO: Final = 4

_BLOCK: Final = re.compile(r"blk\.(\d+)\.")


def replay(model: ModelFacts, params: ContextParams, placement: Placement, machine: Machine) -> tuple[int, ...]:
    """Return the bytes of every device's buffer in the placement's order, then the host's.

    Raises KeyError where the family's graph is not built here or the file lacks one of its tensors.
    """
    places = _places(model, params, placement)
    tensors = {tensor.name: tensor for tensor in model.tensors}
    devices = [machine.device(name) for name in placement.devices]
    n_copies = pipeline_copies(params, placement, model.hparams.n_layer_all)
    sizes = [0] * (len(devices) + 1)
    for n_tokens, n_outputs in _passes(params):
        pins = placement.n_gpu_layers > model.hparams.n_layer_all or n_tokens < PIN_BELOW_TOKENS
        blocks = Blocks(model.hparams, tensors, params, places, Batch(n_tokens, n_outputs, pins))
        graph = build_graph(blocks, model.metadata)
        plan = schedule(graph, len(sizes), n_copies, _offloads(devices, params))
        allocator = GraphAllocator([_alignment(device) for device in devices] + [CPU_ALIGNMENT], _alloc_sizes(devices))
        sizes = [max(pair) for pair in zip(sizes, allocator.reserve(plan.nodes, plan.leafs), strict=True)]
    return tuple(sizes)


def _passes(params: ContextParams) -> list[tuple[int, int]]:
    """Return tokens and outputs of the graphs that are reserved: the prompt's, and generation's where it may matter."""
    prompt = reserved_tokens(params)
    passes = [(prompt, min(min(params.n_ctx, params.n_ubatch), params.n_outputs_max))]
    if prompt < TOKENS_RATIO * params.n_seq_max:
        passes.append((params.n_seq_max, params.n_seq_max))
    return passes


def _places(model: ModelFacts, params: ContextParams, placement: Placement) -> Places:
    cpu = len(placement.devices)
    layers = tuple(cpu if device < 0 else device for device in placement.layer_devices)
    output = cpu if placement.output_device < 0 else placement.output_device
    overrides = [(re.compile(pattern), _backend(buffer, placement)) for pattern, buffer in params.overrides]
    weights = {}
    for tensor in model.tensors:
        name = tensor.name
        home = next((backend for regex, backend in overrides if regex.search(name)), None)
        if home is None:
            if name.startswith("blk."):
                home = layers[int(name[4 : name.index(".", 4)])]
            else:
                home = output if name.startswith("output") else cpu
                if name.startswith("token_embd_norm"):  # normalized on the first layer (src/llama-arch.cpp)
                    home = layers[0]
        weights[name] = home
    caches = layers if params.kv_offload else (cpu,) * len(layers)
    return Places(weights, layers, caches, output, cpu)


def _backend(buffer_type: str, placement: Placement) -> int:
    """Return the backend of a buffer type's name: a device's own is the device's name, a worker's adds its address."""
    name = buffer_type.partition("[")[0]
    return placement.devices.index(name) if name in placement.devices else len(placement.devices)


def _alignment(device: Device) -> int:
    if device.alignment_bytes is not None:
        return device.alignment_bytes
    return CUDA_ALIGNMENT if device.kind in {DeviceKind.CUDA, DeviceKind.ROCM} else CPU_ALIGNMENT


def _offloads(devices: Sequence[Device], params: ContextParams) -> list[Offloads | None]:
    takes = [_big_batch if params.op_offload and device.kind in OFFLOADING_KINDS else None for device in devices]
    return [*takes, None]


def _big_batch(node: Node) -> bool:
    """Say whether a graphics card takes an operation over from the CPU (ggml-cuda.cu, get_op_batch_size)."""
    if node.op == "get_rows":
        return False
    rows = {"mul_mat": node.ne[1], "mul_mat_id": node.ne[2], "rope": node.ne[2]}
    return rows.get(node.op, node.ne[1] * node.ne[2] * node.ne[3]) >= OFFLOAD_MIN_ROWS


def _alloc_sizes(devices: Sequence[Device]) -> list[AllocSize]:
    cuda = {DeviceKind.CUDA, DeviceKind.ROCM}
    return [*(_cuda_alloc_size if device.kind in cuda else Node.nbytes for device in devices), Node.nbytes]


def _cuda_alloc_size(node: Node) -> int:
    """Return nbytes, rows padded and attention's f16 copies added (ggml_backend_cuda_buffer_type_get_alloc_size)."""
    size = node.nbytes()
    if node.op == "flash_attn":
        _, k, v = node.src[:3]
        for cache in (k, v) if v.view_of is not k.view_of else (k,):
            if cache.type.name != "f16":
                size = pad(size, CUDA_ALIGNMENT) + 2 * cache.ne[0] * cache.ne[1] * cache.ne[2] * cache.ne[3]
    if node.type.quantized and node.ne[0] % CUDA_ROW_PADDING:
        size += row_bytes(node.type, CUDA_ROW_PADDING - node.ne[0] % CUDA_ROW_PADDING)
    return size
