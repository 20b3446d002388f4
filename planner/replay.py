"""Compute buffers by replay: build the graph, schedule it over the backends, run the allocator (``sched_reserve``)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final, NamedTuple

from planner.adapters import pairs
from planner.allocator import AllocSize, GraphAllocator, Repeat
from planner.buffers import CUDA_KINDS, HOST_BUFFER, OFFLOADING_KINDS, buffer_type
from planner.context import ContextParams
from planner.estimate import (
    OFFLOAD_MIN_ROWS,
    fuses_attention,
    offloads_everything,
    pipeline_copies,
    reserved_tokens,
)
from planner.ggml import pad
from planner.graph import FLASH_ATTN, HC_COMB, HC_POST, HC_PRE, Graph, Node
from planner.graphs import build_graph, repeats_layers
from planner.graphs.blocks import Blocks
from planner.graphs.parts import PIN_BELOW_TOKENS, Batch, Places
from planner.model import ModelFacts
from planner.operations import CUDA_NO_MUL_MAT
from planner.repeats import Gap, gaps, layer_kinds
from planner.scheduler import Offloads, Schedule, schedule
from planner.types.machine import Device, DeviceKind, Machine
from planner.types.plan import Placement
from planner.weights import overridden_names, tensor_homes

# The prompt's graph is never narrower than generation's where it has this many times its tokens: what grows with the
# tokens is that many times as large, and what does not (rotations, copied weights, logits that are put out) is in both
# or in the prompt's only. With fewer, what does not grow decides, and may lie worse in the smaller graph.
_TOKENS_RATIO: Final = 32

# Their last prompt graph is of one sequence: it grows with the square of a sequence's tokens (``sched_reserve``).
_ONE_SEQUENCE_LAST: Final = frozenset({"kimi-linear", "minimax-01"})

# Their generation graph is no smaller prompt graph: it gathers what the prompt's masks.
_GATHERS_TO_GENERATE: Final = frozenset({"minimax-m3"})

_BLOCK: Final = re.compile(r"blk\.(\d+)\.(?!ffn_)")  # of a block's weights, those of attention and norms
_STEPS: Final = (1, 2)  # in some graphs what comes in lies in two places by turns: their memory repeats with two layers
_F16_BYTES: Final = 2


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
        like_cuda = device.kind in CUDA_KINDS or (device.kind is DeviceKind.RPC and rule.pads_rows)
        return cls(rule.alignment_bytes, like_cuda=like_cuda, offloads=device.kind in OFFLOADING_KINDS)


def replay(model: ModelFacts, params: ContextParams, placement: Placement, machine: Machine) -> tuple[int, ...]:
    """Return the bytes of every device's buffer in the placement's order, then the host's.

    Raises KeyError where the architecture's graph is not built here or the file lacks one of its tensors.
    """
    backends = tuple(Backend.of(machine.device(name)) for name in placement.devices)
    homes = tensor_homes(model, params, placement, machine)
    where = tuple(homes.get(tensor.name, -1) for tensor in model.tensors)
    in_graphs = replace(params, cache_ram_mib=0, n_ctx_checkpoints=0)  # those are beside the context
    return _replay(model, in_graphs, placement, backends, where)


@lru_cache(maxsize=256)
def _replay(
    model: ModelFacts,
    params: ContextParams,
    placement: Placement,
    backends: tuple[Backend, ...],
    homes: tuple[int, ...],
) -> tuple[int, ...]:
    replay = _Replay(model, params, placement, backends, homes)
    unfused = replay.unfused()
    sizes = [0] * (len(backends) + 1)
    for each in _passes(model, params):
        reserved = replay.reserve(each, unfused)
        sizes = [max(pair) for pair in zip(sizes, reserved, strict=True)]
    return tuple(sizes)


class _Pass(NamedTuple):
    """One graph that is reserved."""

    n_tokens: int
    n_outputs: int
    n_seqs: int


def _passes(model: ModelFacts, params: ContextParams) -> list[_Pass]:
    """Return the graphs that are reserved: the prompt's, and others where they may need more."""
    hparams, n_seqs, prompt = model.hparams, params.n_seq_max, reserved_tokens(params)
    n_tokens = min(params.n_ctx, params.n_ubatch)
    n_outputs = min(n_tokens, params.n_outputs_max)
    passes = [_Pass(prompt, n_outputs, n_seqs)]
    fixed = any(hparams.recr_layers) or not params.kv_offload  # states, copied caches: they do not grow with tokens
    if fixed or prompt < _TOKENS_RATIO * n_seqs or hparams.architecture in _GATHERS_TO_GENERATE:
        passes.append(_Pass(n_seqs, n_seqs, n_seqs))
    if hparams.architecture in _ONE_SEQUENCE_LAST and n_seqs > 1:
        passes.append(_Pass(n_tokens, n_outputs, 1))
    return passes


class _Replay:
    """One question: a model's graphs over the backends of a placement."""

    def __init__(
        self,
        model: ModelFacts,
        params: ContextParams,
        placement: Placement,
        backends: tuple[Backend, ...],
        homes: tuple[int, ...],
    ) -> None:
        self._model = model
        self._params = params
        self._placement = placement
        self._backends = backends
        self._places = _places(model, params, placement, homes)
        # Latest first: llama.cpp keeps them in a hash map, and libstdc++'s yields them so (src/llama-adapter.h).
        self._adapters = tuple(map(pairs, reversed(model.adapters))) if params.applies_adapters else ()
        self._tensors = {tensor.name: tensor for tensor in model.tensors}
        self._n_copies = pipeline_copies(params, placement, model.hparams.n_layer_all)
        self._left_out = [*_tries(model, self._places), ()]

    def _fuses_attention(self) -> bool:
        """Say whether flash attention is used: "auto" tries a graph and gives up where a layer's runs elsewhere.

        (src/llama-context.cpp, ``resolve_fused_ops``.) Where it is known to stay, no graph is tried here.
        """
        params, hparams = self._params, self._model.hparams
        like_cuda = [backend.like_cuda for backend in self._backends]
        if not fuses_attention(hparams, params, self._placement, like_cuda):
            return False
        if params.flash_attn == "on" or self._attention_stays():
            return True
        return FLASH_ATTN not in self._astray(frozenset())

    def _attention_stays(self) -> bool:
        """Say whether attention is known to be computed where its layer lies, whatever lies elsewhere of its experts.

        It comes right after the layer's keys are stored, which happens where the cache is, and before the projection
        of its output. On the host these stay as long as a card takes no rows of so short a batch over. Where layers
        read an earlier one's keys nothing is stored, and between recurrent layers there are other ways away.
        """
        places, hparams = self._places, self._model.hparams
        on_host = places.cpu in places.layers
        if places.caches != places.layers or (on_host and not self._stays_on_host()):
            return False
        if not on_host and not self._params.overrides:
            return all(home != places.cpu for name, home in places.weights.items() if name.startswith("blk."))
        blocks = ((_BLOCK.match(name), home) for name, home in places.weights.items())
        plain = hparams.n_layer_kv_from_start is None and not any(hparams.recr_layers)
        return plain and all(home == places.layers[int(block[1])] for block, home in blocks if block)

    def _stays_on_host(self) -> bool:
        takes = self._params.op_offload and any(backend.offloads for backend in self._backends)
        return not takes or self._params.n_seq_max < OFFLOAD_MIN_ROWS

    def unfused(self) -> frozenset[str]:
        """Return the operations that are built from plainer ones: attention, then each of hyper-connections in turn."""
        unfused = frozenset[str]() if self._fuses_attention() else frozenset({FLASH_ATTN})
        if not any(f"blk.0.hc_attn_{part}.weight" in self._tensors for part in ("fn", "norm")):
            return unfused
        astray = self._astray(unfused)
        for op in (HC_PRE, HC_COMB, HC_POST):
            if op in astray:
                unfused |= {op}
                astray = self._astray(unfused)
        return unfused

    def _astray(self, unfused: frozenset[str]) -> set[str]:
        """Return the fused operations of which one would run elsewhere than on its layer's device."""
        n_seqs = self._params.n_seq_max
        graph = self._graph(_Pass(n_seqs, n_seqs, n_seqs), unfused)
        self._schedule(graph)
        return {node.op for node, il in graph.fused if node.backend != self._places.layers[il]}

    def reserve(self, each: _Pass, unfused: frozenset[str]) -> tuple[int, ...]:
        """Return the bytes of each backend's buffer for one graph.

        It is replayed without layers that only repeat what others do, as a whole where they turn out not to.
        """
        tries = (self._reserved(each, unfused, left_out) for left_out in self._left_out)
        return next(sizes for sizes in tries if sizes is not None)

    def _reserved(self, each: _Pass, unfused: frozenset[str], left_out: Sequence[Gap]) -> tuple[int, ...] | None:
        """Return the same where these layers repeat others; None where they do not."""
        graph = self._graph(each, unfused, left_out)
        plan = self._schedule(graph)
        alignments = [*(backend.alignment_bytes for backend in self._backends), HOST_BUFFER.alignment_bytes]
        sizes: list[AllocSize] = [_cuda_alloc_size if backend.like_cuda else Node.nbytes for backend in self._backends]
        repeats = _repeats(graph, plan, left_out)
        return GraphAllocator(alignments, [*sizes, Node.nbytes]).reserve(plan.nodes, plan.leafs, repeats)

    def _graph(self, each: _Pass, unfused: frozenset[str], left_out: Sequence[Gap] = ()) -> Graph:
        everything = offloads_everything(self._placement, self._model.hparams.n_layer_all)
        pins = everything or each.n_tokens < PIN_BELOW_TOKENS
        batch = Batch(each.n_tokens, each.n_outputs, each.n_seqs, pins_norms=pins, unfused=unfused)
        blocks = Blocks(self._model.hparams, self._tensors, self._params, self._places, batch, self._adapters, left_out)
        return build_graph(blocks, self._model.metadata)

    def _schedule(self, graph: Graph) -> Schedule:
        offloads: list[Offloads | None] = [
            _takes_host_weights if backend.offloads and self._params.op_offload else None for backend in self._backends
        ]
        reduces = [*(backend.like_cuda for backend in self._backends), False]
        return schedule(graph, self._n_copies, [*offloads, None], reduces)


def _places(model: ModelFacts, params: ContextParams, placement: Placement, homes: Sequence[int]) -> Places:
    cpu = len(placement.devices)
    layers = tuple(cpu if device < 0 else device for device in placement.layer_devices)
    output = cpu if placement.output_device < 0 else placement.output_device
    weights = {tensor.name: cpu if device < 0 else device for tensor, device in zip(model.tensors, homes, strict=True)}
    caches = layers if params.kv_offload else (cpu,) * len(layers)
    return Places(weights, overridden_names(model, params), layers, caches, output, cpu)


def _tries(model: ModelFacts, places: Places) -> Iterator[tuple[Gap, ...]]:
    """Yield what may be left out of a model's graphs: the most first, then less that more likely repeats itself."""
    if not model.adapters and repeats_layers(model.hparams.architecture):
        kinds = layer_kinds(model, places)
        yield from filter(None, (gaps(kinds, step) for step in _STEPS))


def _repeats(graph: Graph, plan: Schedule, left_out: Sequence[Gap]) -> list[Repeat]:
    """Return, for each gap, where the two periods before it lie among the scheduled nodes."""
    begins = [
        [graph.begins[il] for il in (gap.start - 2 * gap.period, gap.start - gap.period, gap.end)] for gap in left_out
    ]
    wanted = {id(graph.nodes[begin]) for each in begins for begin in each}
    at = {id(node): position for position, (node, _) in enumerate(plan.nodes) if id(node) in wanted}
    return [Repeat(*(at[id(graph.nodes[begin])] for begin in each)) for each in begins]


def _takes_host_weights(node: Node) -> bool:
    """Say whether a graphics card computes with a weight in host memory (ggml-cuda.cu, ``get_op_batch_size``)."""
    if node.op == "get_rows" or node.src[0].type.name in CUDA_NO_MUL_MAT:
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
