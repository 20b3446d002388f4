"""Compute buffers by replay: build the graph, schedule it over the backends, run the allocator (``sched_reserve``)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from planner.allocator import AllocSize, GraphAllocator
from planner.buffers import HOST_BUFFER, buffer_type
from planner.context import ContextParams
from planner.estimate import (
    OFFLOAD_MIN_ROWS,
    OFFLOADING_KINDS,
    fuses_attention,
    offloads_everything,
    pipeline_copies,
    reserved_tokens,
)
from planner.ggml import pad
from planner.graph import Graph, Node
from planner.graphs import SHAPES, build_graph
from planner.graphs.blocks import PIN_BELOW_TOKENS, Batch, Blocks, Places
from planner.model import ModelFacts
from planner.scheduler import Offloads, Schedule, schedule
from planner.types import Device, DeviceKind, Machine, Placement

# The prompt's graph is never narrower than generation's where it has this many times its tokens: what grows with the
# tokens is that many times as large, and what does not (rotations, copied weights) is in both or in the prompt's only.
_TOKENS_RATIO: Final = 4

_F16_BYTES: Final = 2
_CUDA_KINDS: Final = frozenset({DeviceKind.CUDA, DeviceKind.ROCM})


@dataclass(frozen=True, slots=True)
class Backend:
    """How one device takes part: what it rounds to, whether it is of CUDA's making, whether it takes host weights."""

    alignment_bytes: int
    like_cuda: bool
    offloads: bool

    @classmethod
    def of(cls, device: Device) -> Backend:
        """Return a device's rules; a worker that aligns as CUDA does computes on CUDA."""
        rule = buffer_type(device)
        like_cuda = device.kind in _CUDA_KINDS or (device.kind is DeviceKind.RPC and rule.pads_rows)
        return cls(rule.alignment_bytes, like_cuda=like_cuda, offloads=device.kind in OFFLOADING_KINDS)


def replay(model: ModelFacts, params: ContextParams, placement: Placement, machine: Machine) -> tuple[int, ...]:
    """Return the bytes of every device's buffer in the placement's order, then the host's.

    Raises KeyError where the architecture's graph is not built here or the file lacks one of its tensors.
    """
    return _replay(model, params, placement, tuple(Backend.of(machine.device(name)) for name in placement.devices))


@lru_cache(maxsize=256)
def _replay(
    model: ModelFacts, params: ContextParams, placement: Placement, backends: tuple[Backend, ...]
) -> tuple[int, ...]:
    replay = _Replay(model, params, placement, backends)
    fused = replay.fuses_attention()
    sizes = [0] * (len(backends) + 1)
    for n_tokens, n_outputs in _passes(model, params):
        reserved = replay.reserve(n_tokens, n_outputs, fused=fused)
        sizes = [max(pair) for pair in zip(sizes, reserved, strict=True)]
    return tuple(sizes)


def _passes(model: ModelFacts, params: ContextParams) -> list[tuple[int, int]]:
    """Return tokens and outputs of the graphs that are reserved: the prompt's, and generation's where it may matter."""
    prompt = reserved_tokens(params)
    passes = [(prompt, min(params.n_ctx, params.n_ubatch, params.n_outputs_max))]
    if prompt < _TOKENS_RATIO * params.n_seq_max or any(model.hparams.recr_layers):  # states do not grow with tokens
        passes.append((params.n_seq_max, params.n_seq_max))
    return passes


class _Replay:
    """One question: a model's graphs over the backends of a placement."""

    def __init__(
        self, model: ModelFacts, params: ContextParams, placement: Placement, backends: tuple[Backend, ...]
    ) -> None:
        self._model = model
        self._params = params
        self._placement = placement
        self._backends = backends
        self._places = _places(model, params, placement)
        self._tensors = {tensor.name: tensor for tensor in model.tensors}
        self._n_copies = pipeline_copies(params, placement, model.hparams.n_layer_all)

    def fuses_attention(self) -> bool:
        """Say whether flash attention is used: "auto" tries a graph and gives up where a layer's runs elsewhere.

        (src/llama-context.cpp, ``resolve_fused_ops``.) It can only where the cache or a weight is away from its layer.
        """
        params, hparams = self._params, self._model.hparams
        like_cuda = [backend.like_cuda for backend in self._backends]
        if not fuses_attention(hparams, params, self._placement, like_cuda):
            return False
        if params.flash_attn == "on":
            return True
        graph = self._graph(params.n_seq_max, params.n_seq_max, fused=True)
        self._schedule(graph)
        return all(node.backend == self._places.layers[il] for node, il in graph.fused_attention)

    def reserve(self, n_tokens: int, n_outputs: int, *, fused: bool) -> tuple[int, ...]:
        """Return the bytes of each backend's buffer for one graph."""
        plan = self._schedule(self._graph(n_tokens, n_outputs, fused=fused))
        alignments = [*(backend.alignment_bytes for backend in self._backends), HOST_BUFFER.alignment_bytes]
        sizes: list[AllocSize] = [_cuda_alloc_size if backend.like_cuda else Node.nbytes for backend in self._backends]
        return GraphAllocator(alignments, [*sizes, Node.nbytes]).reserve(plan.nodes, plan.leafs)

    def _graph(self, n_tokens: int, n_outputs: int, *, fused: bool) -> Graph:
        everything = offloads_everything(self._placement, self._model.hparams.n_layer_all)
        pins = everything or n_tokens < PIN_BELOW_TOKENS
        batch = Batch(n_tokens, n_outputs, pins_norms=pins, fuses_attention=fused)
        blocks = Blocks(self._model.hparams, self._tensors, self._params, self._places, batch)
        return build_graph(blocks, self._model.metadata)

    def _schedule(self, graph: Graph) -> Schedule:
        offloads: list[Offloads | None] = [
            _takes_host_weights if backend.offloads and self._params.op_offload else None for backend in self._backends
        ]
        reduces = [*(backend.like_cuda for backend in self._backends), False]
        return schedule(graph, self._n_copies, [*offloads, None], reduces)


def _places(model: ModelFacts, params: ContextParams, placement: Placement) -> Places:
    cpu = len(placement.devices)
    layers = tuple(cpu if device < 0 else device for device in placement.layer_devices)
    output = cpu if placement.output_device < 0 else placement.output_device
    overrides = [(re.compile(pattern), _backend(buffer, placement)) for pattern, buffer in params.overrides]
    output_norm = SHAPES[model.hparams.architecture].output_norm
    weights = {}
    for tensor in model.tensors:
        home = next((backend for regex, backend in overrides if regex.search(tensor.name)), None)
        weights[tensor.name] = _home(tensor.name, output_norm, layers, output, cpu) if home is None else home
    caches = layers if params.kv_offload else (cpu,) * len(layers)
    return Places(weights, layers, caches, output, cpu)


def _home(name: str, output_norm: str, layers: Sequence[int], output: int, cpu: int) -> int:
    """Return the backend of a weight that no override places (src/llama-arch.cpp, ``LLM_TENSOR_INFOS``)."""
    if name.startswith("blk."):
        return layers[int(name[4 : name.index(".", 4)])]
    if name.startswith(output_norm):
        return output
    if name.startswith("token_embd_norm"):  # normalized on the first layer, not with the input
        return layers[0]
    return output if name.startswith("output") else cpu


def _backend(buffer_type_name: str, placement: Placement) -> int:
    """Return the backend that an override names: a device by its own name, a worker's followed by its address."""
    name = buffer_type_name.partition("[")[0]
    return placement.devices.index(name) if name in placement.devices else len(placement.devices)


def _takes_host_weights(node: Node) -> bool:
    """Say whether a graphics card computes with a weight in host memory (ggml-cuda.cu, ``get_op_batch_size``)."""
    if node.op == "get_rows":
        return False
    rows = {"mul_mat": node.ne[1], "mul_mat_id": node.ne[2], "rope": node.ne[2]}
    return rows.get(node.op, node.ne[1] * node.ne[2] * node.ne[3]) >= OFFLOAD_MIN_ROWS


def _cuda_alloc_size(node: Node) -> int:
    """Return nbytes, padded rows and attention's f16 copies (``ggml_backend_cuda_buffer_type_get_alloc_size``)."""
    size = node.nbytes()
    if node.op == "flash_attn":
        _, k, v = node.src[:3]
        for cache in (k,) if v.view_of is k.view_of else (k, v):
            if cache.type.name != "f16":
                size = pad(size, 128) + _F16_BYTES * cache.ne[0] * cache.ne[1] * cache.ne[2] * cache.ne[3]
    if node.type.quantized and (rest := node.ne[0] % 512):
        size += node.type.block_bytes * (512 - rest) // node.type.block
    return size
