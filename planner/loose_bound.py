"""Compute buffers of graphs that are neither replayed nor bounded by their family's form: what cannot be too little.

Every product of a block is taken to be kept until the block's end, beside what attention, indexers and states need,
while the allocator gives room back after the last reader (ggml/src/ggml-alloc.c). What no tensor tells of, such as
decays that grow with the square of a batch, is not in it: the families that have it are replayed.
"""

from __future__ import annotations

from math import prod
from typing import Final

from planner.buffers import OFFLOADING_KINDS
from planner.cache import window_cells
from planner.context import ContextParams
from planner.estimate import (
    F16_BYTES,
    F32_BYTES,
    OFFLOAD_MIN_ROWS,
    SMALL_TENSORS_BYTES,
    BufferBytes,
    block_tensors,
    host_weights,
    pipeline_copies,
    reserved_tokens,
)
from planner.model import ModelFacts, Tensor
from planner.types.machine import Machine
from planner.types.plan import Placement

_ROWS_KEPT: Final = 8  # residual, norms, sums, and what an encoder or several streams carry along
_SPREAD: Final = 2  # a product, and what an activation, a norm or a copy makes of it
_STATE_COPIES: Final = 4  # as read, as reordered, as computed, as written
_MATRIX_DIMENSIONS: Final = 2
_INDEX_BYTES: Final = 64  # positions, cells and states of a token


def loose_buffers(model: ModelFacts, params: ContextParams, placement: Placement, machine: Machine) -> BufferBytes:
    """Return a bound of what the devices and the host reserve for any graph over this model's tensors."""
    n_tokens = reserved_tokens(params)
    row = F32_BYTES * model.hparams.n_embd * _streams(model) * n_tokens
    blocks = _block_bytes(model, params, row, n_tokens)
    moved = host_weights(model, params, placement)
    mixed = bool(moved) or not params.kv_offload
    copies = pipeline_copies(params, placement, model.hparams.n_layer_all)
    rows = 2 * copies * row + SMALL_TENSORS_BYTES
    inputs = copies * _input_bytes(model, params, n_tokens)
    output = _output_bytes(model, params, n_tokens) + _ROWS_KEPT * row
    devices = []
    for index, name in enumerate(placement.devices):
        widest = max((blocks[il] for il, device in enumerate(placement.layer_devices) if device == index), default=0)
        takes = machine.device(name).kind in OFFLOADING_KINDS and params.op_offload and n_tokens >= OFFLOAD_MIN_ROWS
        if moved and takes and index == 0:
            widest = max(blocks) + 2 * max(tensor.nbytes for tensor in moved)
        ends = output if placement.output_device == index else 0
        devices.append((inputs if widest else 0) + rows + max(widest, ends) if widest or ends else 0)
    on_host = max(blocks, default=0) if mixed else 0
    ends = output if placement.output_device < 0 else 0
    return BufferBytes(tuple(devices), inputs + rows + 2 * row + max(on_host, ends))


def _block_bytes(model: ModelFacts, params: ContextParams, row: int, n_tokens: int) -> list[int]:
    """Return each block's bound: products, attention's scores, an indexer's, and states."""
    hparams, per_element = model.hparams, F32_BYTES * n_tokens
    seen = per_element * params.n_ctx_seq
    state = _STATE_COPIES * F32_BYTES * (hparams.n_embd_r + hparams.n_embd_s) * params.n_seq_max
    attends = params.flash_attn == "off" or model.tensor("blk.0.attn_rel_b.weight") is not None
    blocks = [_ROWS_KEPT * row + (seen * hparams.n_head[il] if attends else 0) for il in range(hparams.n_layer_all)]
    for il, name, tensor in block_tensors(model):
        if len(tensor.shape) >= _MATRIX_DIMENSIONS:
            blocks[il] += _SPREAD * per_element * _products(tensor, name, hparams.n_expert_used)
        if name == "indexer.proj.weight":
            blocks[il] += 2 * seen * prod(tensor.shape[1:])
    return [block + (state if recurrent else 0) for block, recurrent in zip(blocks, hparams.recr_layers, strict=True)]


def _products(tensor: Tensor, name: str, n_expert_used: int) -> int:
    """Return the elements per token of a product with this matrix: of the chosen experts where it holds experts."""
    if name.endswith(("_exps.weight", "_chexps.weight")):
        return tensor.shape[1] * n_expert_used
    return prod(tensor.shape[1:])


def _streams(model: ModelFacts) -> int:
    """Return the residual streams: one, or the hyper-connections' number."""
    count = model.metadata.get(f"{model.hparams.architecture}.hyper_connection.count", 1)
    return max(1, count) if isinstance(count, int) else 1


def _input_bytes(model: ModelFacts, params: ContextParams, n_tokens: int) -> int:
    """Return masks, and where to write: with flash attention off one index per element of V."""
    hparams = model.hparams
    if all(hparams.recr_layers) and not any(hparams.n_head_kv):
        return _INDEX_BYTES * n_tokens
    widest_v = max(map(hparams.n_embd_v_gqa, range(hparams.n_layer_all)), default=0)
    indices = 8 * (widest_v if params.v_trans else 1) + _INDEX_BYTES
    fused = params.flash_attn == "on" or (params.flash_attn == "auto" and params.kv_offload)
    cells = max(params.n_ctx_seq, n_tokens) + (window_cells(hparams, params) if any(hparams.swa_layers) else 0)
    if any(name.startswith("indexer") for _, name, _ in block_tensors(model)):
        cells += params.n_ctx_seq
    return n_tokens * ((F16_BYTES if fused else F32_BYTES) * cells + 2 * indices)


def _output_bytes(model: ModelFacts, params: ContextParams, n_tokens: int) -> int:
    output = model.tensor("output.weight") or model.tensor("token_embd.weight")
    n_rows = output.shape[1] if output and len(output.shape) > 1 else model.hparams.n_vocab
    return 2 * F32_BYTES * n_rows * min(n_tokens, params.n_outputs_max)
