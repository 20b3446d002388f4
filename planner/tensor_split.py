"""Tensors split over devices (``--split-mode tensor``): every device holds a slice of every layer.

(src/llama-model.cpp, ``llama_meta_device_get_split_state``; ggml-backend-meta.cpp.) A weight is cut along one of its
dimensions, in whole groups of heads or blocks, in proportion to ``--tensor-split``; what is not cut lies on every
device in full. Layers take turns in who gets the rest of a division.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import lcm, prod
from typing import TYPE_CHECKING, Final

from planner import cache, ggml, weights
from planner.architectures import ARCHITECTURES, Cache
from planner.layers import float32

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from planner.buffers import BufferType
    from planner.context import ContextParams
    from planner.model import HParams, ModelFacts, Tensor
    from planner.types.machine import Machine
    from planner.types.plan import Placement

_BLOCK: Final = re.compile(r"blk\.(\d+)\.(.+)")
_BY_ROWS: Final = re.compile(
    r"attn_(q|k|v|qkv|gate)\.weight|ffn_(up|gate)(_exps)?\.weight|ffn_gate_up(_exps)?\.weight|output\.weight"
)
_BY_COLUMNS: Final = re.compile(
    r"attn_(q|k|v|qkv)\.bias|attn_sinks\.weight|attn_output\.weight|ffn_(up|gate)(_exps)?\.bias"
    r"|ffn_down(_exps)?\.weight|output\.bias"
)
_HEAD_NORMS: Final = re.compile(r"attn_[qk]_norm\.weight")
_FAST_BLOCK: Final = 128  # slices are whole multiples of it where the model is large enough
_OTHERWISE_CUT: Final = frozenset({"deepseek4", "dflash", "hrm_text"})
_EMBEDDING: Final = "token_embd.weight"


def not_built(model: ModelFacts, params: ContextParams) -> str | None:
    """Return why the slices of this model cannot be computed, or None."""
    architecture = model.hparams.architecture
    rules = ARCHITECTURES.get(architecture)
    if rules is None or rules.cache is not Cache.ATTENTION or architecture in _OTHERWISE_CUT or model.adapters:
        return f"splitting the tensors of {architecture} (--split-mode tensor)"
    if any(place != "CPU" for _, place in params.overrides):
        return "overrides to devices beside --split-mode tensor"
    return None


def weight_bytes(
    model: ModelFacts,
    params: ContextParams,
    placement: Placement,
    machine: Machine,
    shares: Sequence[float],
    buffers: Sequence[BufferType],
) -> list[int]:
    """Return the weights on each device; ``placement`` says which layers are on devices at all, as its device 0."""
    cut = _Cut(model, tuple(shares))
    homes = weights.tensor_homes(model, params, placement, machine)
    whole = [tensor for tensor in model.tensors if homes.get(tensor.name, -1) == 0]
    if placement.output_device == 0 and (tied := weights.tied_output(model)):
        whole.append(tied)
    whole += [tensor for tensor in weights.rotation_factors(model, placement, 0) if tensor not in whole]
    return cut.total(((tensor, cut.dimension(tensor)) for tensor in whole), buffers)


def cache_bytes(
    model: ModelFacts,
    params: ContextParams,
    placement: Placement,
    shares: Sequence[float],
    buffers: Sequence[BufferType],
) -> list[int]:
    """Return the caches on each device: whole heads of every layer that is on devices."""
    cut = _Cut(model, tuple(shares))
    sums = [0] * len(buffers)
    seen: set[int] = set()
    for tensor in cache.cache_tensors(model, params):
        letter = "v" if tensor.layer in seen else "k"  # keys come first
        seen.add(tensor.layer)
        if placement.layer_devices[tensor.layer] < 0 or not params.kv_offload:
            continue
        widths = cut.lengths(f"blk.{tensor.layer}.attn_{letter}.bias", tensor.width)
        for device, (width, buffer) in enumerate(zip(widths, buffers, strict=True)):
            sums[device] += buffer.allocation(tensor.type, width, ggml.row_bytes(tensor.type, width) * tensor.rows)
    return sums


@dataclass(frozen=True)
class _Cut:
    """How one model is cut into these shares."""

    model: ModelFacts
    shares: tuple[float, ...]

    @property
    def _hparams(self) -> HParams:
        return self.model.hparams

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        return {tensor.name: tensor for tensor in self.model.tensors}

    def dimension(self, tensor: Tensor) -> int | None:
        """Return the dimension that a weight is cut along, None where it lies everywhere in full."""
        stem = tensor.name.partition(".")[2].partition(".")[2] if _BLOCK.match(tensor.name) else tensor.name
        if _BY_ROWS.fullmatch(stem):
            return 1
        if _HEAD_NORMS.fullmatch(stem):
            return 1 if len(tensor.shape) > 1 else None
        return 0 if _BY_COLUMNS.fullmatch(stem) else None

    def total(self, tensors: Iterable[tuple[Tensor, int | None]], buffers: Sequence[BufferType]) -> list[int]:
        """Return the bytes of these weights on each device."""
        sums = [0] * len(buffers)
        for tensor, dimension in tensors:
            type_ = ggml.TYPES[tensor.type_id]
            lengths = None if dimension is None else self.lengths(tensor.name, tensor.shape[dimension])
            for device, buffer in enumerate(buffers):
                shape = list(tensor.shape)
                if lengths is not None and dimension is not None:
                    shape[dimension] = lengths[device]
                size = ggml.row_bytes(type_, shape[0]) * prod(shape[1:])
                sums[device] += buffer.allocation(type_, shape[0], size)
        return sums

    def lengths(self, name: str, length: int) -> list[int]:
        """Return how much of a dimension of that length each device gets."""
        block = _BLOCK.match(name)
        il, stem = (int(block[1]), block[2]) if block else (0, name)
        rotation = self._turn(il) if block else self._hparams.n_layer
        sums = [0] * len(self.shares)
        for part, count, step in self._segments(il, stem, length):
            for device, piece in enumerate(self._divided(part, step, rotation % len(self.shares))):
                sums[device] += piece * count
        return sums

    def _turn(self, il: int) -> int:
        """Return how many earlier layers are of the same kind."""
        windows = self._hparams.swa_layers
        return sum(windows[before] == windows[il] for before in range(il))

    def _divided(self, length: int, step: int, rotation: int) -> list[int]:
        """Return each device's part, in whole steps; the last in turn takes the rest."""
        n = len(self.shares)
        turns = [(turn + rotation) % n for turn in range(n)]
        scan = list(accumulate((float32(self.shares[device]) for device in turns), lambda a, b: float32(a + b)))
        parts, low = [0] * n, 0
        for turn, device in enumerate(turns):
            high = length
            if turn < n - 1:
                exact = (
                    float32(float32(float32(length) * scan[turn]) / scan[-1])
                    if scan[-1]
                    else float32(length * (turn + 1) // n)
                )
                high = int(exact)
                high -= high % step
            parts[device], low = high - low, high
        return parts

    def _segments(self, il: int, stem: str, length: int) -> list[tuple[int, int, int]]:
        """Return what is cut by itself: its length, how often it comes, and the step that it is cut in."""
        hparams, name = self._hparams, stem.removesuffix(".weight").removesuffix(".bias")
        if name.startswith("ffn_"):
            step = lcm(self._block_of(il, "ffn_down.weight", "ffn_down_exps.weight"), _FAST_BLOCK)
            fused = {"ffn_up": hparams.n_ff[il], "ffn_gate_up": hparams.n_ff_exp}.get(name.removesuffix("_exps"))
            return [(fused, 2, step)] if fused and length == 2 * fused else [(length, 1, step)]
        if not name.startswith("attn_") or name.endswith("_norm"):
            return [(length, 1, 1)]
        head_k, head_v = hparams.head_k_of(il), hparams.head_v_of(il)
        n_gqa = hparams.n_head[il] // hparams.n_head_kv[il]
        step_q = self._step_of_queries(il, n_gqa * head_k)
        heads = step_q // head_k
        step_k = step_q // n_gqa
        step_v = step_k // head_k * head_v
        if name == "attn_qkv":
            k, v = hparams.n_embd_k_gqa(il), hparams.n_embd_v_gqa(il)
            q = (hparams.n_head[il] * head_k, 1, step_q)
            return [q, (k, 2, step_k)] if k == v else [q, (k, 1, step_k), (v, 1, step_v)]
        per_head = name == "attn_sinks" or (name == "attn_gate" and length == hparams.n_head[il])
        steps = {"attn_k": step_k, "attn_v": step_v, "attn_output": heads * head_v}
        return [(length, 1, heads if per_head else steps.get(name, step_q))]

    def _step_of_queries(self, il: int, group: int) -> int:
        """Return the fewest elements of the query that belong together: whole groups of heads, in whole blocks."""
        block = self._block_of(il, "attn_output.weight")
        while block < _FAST_BLOCK and block * len(self.shares) < group:
            block *= 2
        return lcm(group, block)

    def _block_of(self, il: int, *names: str) -> int:
        """Return the block size of the first of these tensors that the layer has."""
        found = next(tensor for name in names if (tensor := self._tensors.get(f"blk.{il}.{name}")))
        return ggml.TYPES[found.type_id].block
