"""Compute buffers by closed forms: what the graph needs at its widest point, with room for what the forms leave out.

A closed form never says less than llama.cpp reserves for the architectures named here; where a family's graph is not
bounded by its tensors' shapes (scans over chunks, hyper-connections, indexers) there is none, and ``None`` is returned.
The terms follow the widest moments of the graphs of src/models/*.cpp under the allocator of ggml/src/ggml-alloc.c.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from planner.buffers import CUDA_KINDS, OFFLOADING_KINDS
from planner.cache import window_cells
from planner.context import ContextParams
from planner.ggml import BY_NAME, pad, row_bytes
from planner.graphs import SHAPES
from planner.graphs.shape import Rows
from planner.model import HParams, ModelFacts, Tensor
from planner.types.machine import DeviceKind, Machine
from planner.types.plan import Placement

F16_BYTES: Final = 2
F32_BYTES: Final = 4
PIPELINE_COPIES: Final = 4  # GGML_SCHED_MAX_COPIES, ggml/src/ggml-backend.cpp
OFFLOAD_MIN_ROWS: Final = 32  # GGML_OP_OFFLOAD_MIN_BATCH, ggml/src/ggml-cuda/ggml-cuda.cu
SMALL_TENSORS_BYTES: Final = 384 * 1024  # index inputs, router outputs, rotations: many, each a few KiB

CUDA_HEADS: Final = frozenset({40, 64, 72, 80, 96, 112, 128, 256})
_CUDA_SHARED_QUERIES: Final = {192: (128, 8), 320: (256, 32), 512: (512, 1), 576: (512, 1)}  # V's, multiple of heads

_BLOCK: Final = re.compile(r"blk\.(\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class Width:
    """The widest rows of one block's activations, in elements per token."""

    ffn: int  # one of gate and up
    expert: int  # one of gate and up, all used experts together
    shared_expert: int
    q: int
    kv: int
    mla: int  # all of a latent attention's query, key and value forms together
    biased_experts: bool


@dataclass(frozen=True, slots=True)
class BufferBytes:
    """Estimated bytes of the devices of a placement, in its order, and of the host."""

    devices: tuple[int, ...]
    host: int


def offloads_everything(placement: Placement, n_layer_all: int) -> bool:
    """Say whether ``-ngl`` covers every block and the output; a negative one means all (src/llama-model.cpp)."""
    return placement.n_gpu_layers < 0 or placement.n_gpu_layers > n_layer_all


def pipeline_copies(params: ContextParams, placement: Placement, n_layer_all: int) -> int:
    """Return how many copies of its inputs the scheduler keeps (src/llama-context.cpp, ``pipeline_parallel``)."""
    pipelined = (
        len(placement.devices) > 1
        and offloads_everything(placement, n_layer_all)
        and params.split_mode == "layer"
        and params.kv_offload
        and not params.overrides
    )
    return PIPELINE_COPIES if pipelined else 1


def reserved_tokens(params: ContextParams) -> int:
    """Return the tokens of the prompt graph, a multiple of the sequences (src/llama-context.cpp, ``graph_reserve``)."""
    return pad(min(params.n_ctx, params.n_ubatch), params.n_seq_max)


def fuses_attention(hparams: HParams, params: ContextParams, placement: Placement, like_cuda: Sequence[bool]) -> bool:
    """Say whether flash attention is used: "auto" turns it off where one layer's device lacks the kernel.

    (src/llama-context.cpp, ``resolve_fused_ops``; ggml-cuda/fattn.cu, ``ggml_cuda_get_best_fattn_kernel``.)
    """
    if params.flash_attn != "auto":
        return params.flash_attn == "on"
    return all(
        device < 0
        or not like_cuda[device]
        or hparams.n_head_kv[il] == 0
        or _cuda_attends(hparams.head_k_of(il), hparams.head_v_of(il), hparams.n_head[il] // hparams.n_head_kv[il])
        for il, device in enumerate(placement.layer_devices)
    )


def _cuda_attends(head_k: int, head_v: int, heads_per_kv: int) -> bool:
    """Say whether CUDA has a kernel for these head sizes and that many query heads for one of the cache."""
    if head_k in _CUDA_SHARED_QUERIES:
        wanted_v, multiple = _CUDA_SHARED_QUERIES[head_k]
        return head_v == wanted_v and heads_per_kv > 1 and heads_per_kv % multiple == 0
    return head_k == head_v and head_k in CUDA_HEADS


def estimate_buffers(
    model: ModelFacts, params: ContextParams, placement: Placement, machine: Machine
) -> BufferBytes | None:
    """Return compute buffers that err upwards, or None where the model's graph has no closed form here."""
    hparams = model.hparams
    shape = SHAPES.get(hparams.architecture)
    if shape is None or shape.carries_more or any(hparams.recr_layers) or not hparams.causal:
        return None
    like_cuda = [machine.device(name).kind in CUDA_KINDS for name in placement.devices]
    settings = {params.flash_attn if fuses_attention(hparams, params, placement, like_cuda) else "off"}
    if params.flash_attn == "auto" and not params.kv_offload:
        # Whether attention stays with its layer is not known here.
        settings |= {"on", "off"}
    forms = [_Form.of(model, replace(params, flash_attn=setting), placement) for setting in settings]
    return BufferBytes(
        devices=tuple(
            max(form.device_bytes(index, machine) for form in forms) for index in range(len(placement.devices))
        ),
        host=max(form.host_bytes(machine) for form in forms),
    )


@dataclass(frozen=True, slots=True)
class _Parts:
    """Which halves of one block ("attn", "ffn") have matrices on its device, and which in host memory."""

    on_device: frozenset[str]
    on_host: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Form:
    """One question's terms, each in bytes."""

    hparams: HParams
    params: ContextParams
    placement: Placement
    widths: tuple[Width, ...]
    parts: tuple[_Parts, ...]
    largest_host_weight: int
    n_tokens: int
    copies: int
    n_vocab_rows: int
    rows_late: bool  # whole activations reach the output's device, not only the rows that yield outputs
    learned_positions: bool

    @classmethod
    def of(cls, model: ModelFacts, params: ContextParams, placement: Placement) -> _Form:
        """Return the terms of a question."""
        output = model.tensor("output.weight") or model.tensor("token_embd.weight")
        from_host = host_weights(model, params, placement)
        return cls(
            hparams=model.hparams,
            params=params,
            placement=placement,
            widths=tuple(_widths(model)),
            parts=_parts(model, frozenset(tensor.name for tensor in from_host)),
            largest_host_weight=max((tensor.nbytes for tensor in from_host), default=0),
            n_tokens=reserved_tokens(params),
            copies=pipeline_copies(params, placement, model.hparams.n_layer_all),
            n_vocab_rows=output.shape[1] if output and len(output.shape) > 1 else model.hparams.n_vocab,
            rows_late=SHAPES[model.hparams.architecture].rows is not Rows.IN_LAST_LAYER,
            learned_positions=model.tensor("position_embd.weight") is not None,
        )

    def device_bytes(self, index: int, machine: Machine) -> int:
        """Return the buffer of one device: inputs and their copies beside the widest moment of its blocks."""
        kind = machine.device(self.placement.devices[index]).kind
        offloaded = self._offloaded_weights(kind) if index == 0 else 0
        blocks = {
            il: self.parts[il].on_device | (self.parts[il].on_host if offloaded else frozenset())
            for il, device in enumerate(self.placement.layer_devices)
            if device == index or offloaded
        }
        output = self._output() if self.placement.output_device == index else 0
        mixed = any(parts.on_host for parts in self.parts)
        if not blocks:
            whole_rows = (self.copies + 4) * self._row(self.n_tokens) if self.rows_late or mixed else 0
            rows = 4 * self.copies * self._row(self._n_outputs()) + whole_rows
            return rows + output + SMALL_TENSORS_BYTES if output else 0
        widest = max(self._block(il, kind, parts) for il, parts in blocks.items())
        crossings = 1 if self.copies > 1 else 2 * mixed
        boundary = crossings * self._row(self.n_tokens)
        return self.copies * (self._inputs() + boundary) + max(widest, output) + offloaded + SMALL_TENSORS_BYTES

    def host_bytes(self, machine: Machine) -> int:
        """Return the host's buffer: every input, and what its blocks compute."""
        row = self._row(self.n_tokens)
        inputs = self.copies * (self._inputs() + row + self._row(self._n_outputs())) + row
        moved = frozenset[str]() if self.params.kv_offload else frozenset({"attn"})
        blocks = {il: parts.on_host | moved for il, parts in enumerate(self.parts) if parts.on_host | moved}
        widest = max((self._block(il, machine.host.kind, parts) for il, parts in blocks.items()), default=0)
        output = self._output() if self.placement.output_device < 0 else 0
        return inputs - (row if blocks else 0) + max(widest, output) + SMALL_TENSORS_BYTES

    def _row(self, n_tokens: int) -> int:
        return F32_BYTES * self.hparams.n_embd * n_tokens

    def _n_outputs(self) -> int:
        return min(self.n_tokens, self.params.n_outputs_max)

    def _output(self) -> int:
        return F32_BYTES * self.n_vocab_rows * self._n_outputs() + 9 * self._row(self._n_outputs())

    def _inputs(self) -> int:
        """Masks, and cache indices: with flash attention off one index per element of V (``build_input_v_idxs``)."""
        hparams, params = self.hparams, self.params
        mask = F16_BYTES if params.flash_attn != "off" else F32_BYTES
        caches = [params.n_ctx_seq] if not all(hparams.swa_layers) else []
        if any(hparams.swa_layers):
            caches = [params.n_ctx_seq, window_cells(hparams, params)]
        v_rows = max(width.kv for width in self.widths) if params.flash_attn == "off" else 1
        turned = sum(BY_NAME[name].quantized for name in (params.cache_type_k, params.cache_type_v))
        rotations = turned * len(caches) * F32_BYTES * hparams.head_k**2  # a matrix for each quantized half of a cache
        positions = self._row(self.n_tokens) if self.learned_positions else 0
        return positions + rotations + sum(self.n_tokens * (mask * cells + 8 * v_rows + 24) for cells in caches)

    def _block(self, il: int, kind: DeviceKind, parts: frozenset[str]) -> int:
        attention = self._attention(il, self.widths[il], kind) if "attn" in parts else 0
        return max(attention, self._ffn(self.widths[il]) if "ffn" in parts else 0)

    def _ffn(self, width: Width) -> int:
        row, per_element = self._row(self.n_tokens), F32_BYTES * self.n_tokens
        rotated = row if BY_NAME[self.params.cache_type_k].quantized else 0
        dense = 3 * row + 3 * width.ffn * per_element + rotated
        if not width.expert:
            return dense
        gate, down = width.expert * per_element, self.hparams.n_expert_used * row
        extra = max(down if down > 2 * gate else 0, 3 * width.shared_expert * per_element)
        return max(dense, (6 if width.biased_experts else 5) * row + 3 * gate + extra)

    def _attention(self, il: int, width: Width, kind: DeviceKind) -> int:
        row, per_element = self._row(self.n_tokens), F32_BYTES * self.n_tokens
        cells = self.params.n_ctx_seq
        if self.hparams.swa_layers[il]:
            cells = window_cells(self.hparams, self.params)
        scores = per_element * cells * self.hparams.n_head[il] if self.params.flash_attn == "off" else 0
        if width.mla:
            return 9 * row + width.mla * per_element + scores + self._copied_cache(il, cells, kind)
        rows = (4 if width.q > self.hparams.n_embd else 3) * row + (0 if self.params.kv_offload else 2 * row)
        if scores:
            return rows + scores + (2 * width.q + 2 * width.kv) * per_element + self._copied_cache(il, cells, kind)
        rotated = 3 * width.q + width.kv if BY_NAME[self.params.cache_type_k].quantized else 0
        return rows + (3 * width.q + rotated + 2 * width.kv) * per_element + self._copied_cache(il, cells, kind)

    def _copied_cache(self, il: int, cells: int, kind: DeviceKind) -> int:
        """Copies of a layer's cache: in f16 for a card's attention, and as it is where it stays on the host."""
        copied = 0
        if not self.params.kv_offload and kind is not DeviceKind.HOST:
            for name, width in (
                (self.params.cache_type_k, self.hparams.n_embd_k_gqa(il)),
                (self.params.cache_type_v, self.hparams.n_embd_v_gqa(il)),
            ):
                copied += row_bytes(BY_NAME[name], width) * cells * self.params.n_stream
        return copied + self._f16_cache(il, cells, kind)

    def _f16_cache(self, il: int, cells: int, kind: DeviceKind) -> int:
        """Copies for flash attention of a cache that is not f16: of f32 in the graph, of others by cards.

        (src/llama-graph.cpp, ``build_attn_mha``; ggml-cuda/fattn.cu, fattn-common.cuh.)
        """
        if self.params.flash_attn == "off":
            return 0
        copied = {"f32"} if kind not in CUDA_KINDS else BY_NAME.keys() - {"f16"}
        heads = self.hparams.n_head_kv[il]
        k = self.hparams.head_k * heads if self.params.cache_type_k in copied else 0
        of_k = self.hparams.is_mla and self.params.cache_type_k != "f32"  # V is a part of K, and its copy one of K's
        v = self.hparams.head_v * heads if self.params.cache_type_v in copied and not of_k else 0
        return F16_BYTES * cells * self.params.n_stream * (k + v)

    def _offloaded_weights(self, kind: DeviceKind) -> int:
        """Copies of host weights whose products the first device computes: two where several devices fragment it."""
        if kind not in OFFLOADING_KINDS or not self.params.op_offload or self.n_tokens < OFFLOAD_MIN_ROWS:
            return 0
        return self.largest_host_weight * (2 if len(self.placement.devices) > 1 else 1)


def block_tensors(model: ModelFacts) -> Iterator[tuple[int, str, Tensor]]:
    """Yield each tensor of a block with the block's number and its name there; none of blocks that do not count."""
    for tensor in model.tensors:
        found = _BLOCK.match(tensor.name)
        if found and int(found[1]) < model.hparams.n_layer_all:
            yield int(found[1]), found[2], tensor


def host_weights(model: ModelFacts, params: ContextParams, placement: Placement) -> list[Tensor]:
    """Return the matrices of blocks that lie in host memory: by layer, or by a tensor override."""
    overrides = [(re.compile(pattern), buffer_type) for pattern, buffer_type in params.overrides]
    weights = []
    for il, _, tensor in block_tensors(model):
        if len(tensor.shape) < 2:  # noqa: PLR2004  # vectors are too small to matter
            continue
        target = next((buffer_type for regex, buffer_type in overrides if regex.search(tensor.name)), None)
        if target == "CPU" or (target is None and placement.layer_devices[il] < 0):
            weights.append(tensor)
    return weights


def _parts(model: ModelFacts, host_names: frozenset[str]) -> tuple[_Parts, ...]:
    sides: list[tuple[set[str], set[str]]] = [(set(), set()) for _ in range(model.hparams.n_layer_all)]
    for il, name, tensor in block_tensors(model):
        if len(tensor.shape) > 1 and not name.startswith("ffn_gate_inp"):
            sides[il][tensor.name in host_names].add("ffn" if name.startswith("ffn") else "attn")
    return tuple(_Parts(frozenset(on_device), frozenset(on_host)) for on_device, on_host in sides)


def _widths(model: ModelFacts) -> Iterator[Width]:
    blocks: list[dict[str, Tensor]] = [{} for _ in range(model.hparams.n_layer_all)]
    for il, name, tensor in block_tensors(model):
        blocks[il][name] = tensor
    for il, block in enumerate(blocks):
        yield _width(model.hparams, il, block)


def _rows(block: dict[str, Tensor], *names: str) -> int:
    shapes = (block[name].shape for name in names if name in block)
    return max((shape[1] for shape in shapes if len(shape) > 1), default=0)


def _width(hparams: HParams, il: int, block: dict[str, Tensor]) -> Width:
    q = max(hparams.n_head[il] * max(hparams.head_k, hparams.head_v), _rows(block, "attn_q.weight"))
    kv = max(hparams.n_head_kv[il] * max(hparams.head_k, hparams.head_v), _rows(block, "attn_k.weight"))
    if "attn_qkv.weight" in block:
        q = max(q, _rows(block, "attn_qkv.weight") - 2 * kv)
        kv = max(kv, (_rows(block, "attn_qkv.weight") - q + 1) // 2)
    expert = _rows(block, "ffn_up_exps.weight", "ffn_gate_exps.weight", "ffn_gate_up_exps.weight")
    return Width(
        ffn=_rows(block, "ffn_up.weight", "ffn_gate.weight"),
        expert=expert * hparams.n_expert_used,
        shared_expert=_rows(block, "ffn_up_shexp.weight", "ffn_gate_shexp.weight"),
        q=q,
        kv=kv,
        mla=_latent_width(hparams, il, block) if hparams.is_mla else 0,
        biased_experts="ffn_up_exps.bias" in block,
    )


def _latent_width(hparams: HParams, il: int, block: dict[str, Tensor]) -> int:
    """Return the elements per token of latent attention (src/models/deepseek2.cpp): nope, rope and latent forms."""
    latent = block["attn_kv_a_norm.weight"].shape[0] if "attn_kv_a_norm.weight" in block else hparams.head_v
    rope = hparams.head_k - latent
    nope = block["attn_k_b.weight"].shape[0] if "attn_k_b.weight" in block else latent
    return hparams.n_head[il] * (nope + 3 * rope + 2 * latent)
