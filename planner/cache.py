"""The caches of a context: every tensor that llama.cpp allocates to remember keys, values and recurrent states.

(src/llama-model.cpp, ``create_memory``; src/llama-kv-cache*.cpp; src/llama-memory-*.cpp.) Which rule a model follows
is its architecture's ``Cache``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from planner import ggml
from planner.architectures import ARCHITECTURES, Architecture, Cache, Recurrent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from planner.buffers import BufferType
    from planner.context import ContextParams
    from planner.model import HParams, ModelFacts

# What a checkpoint says of each tensor and each cell beside what is in them: types and widths, positions and sequences.
_TENSOR_HEADER_BYTES: Final = 64
_CELL_HEADER_BYTES: Final = 32
_CELL_MULTIPLE: Final = 256  # llama-kv-cache-iswa.cpp, llama-kv-cache-dsv4.cpp
_F32: Final = ggml.BY_NAME["f32"]
DENSE_COMPRESSION: Final = 4  # DSV4_CSA_RATIO (llama-kv-cache-dsv4.cpp)
COARSE_COMPRESSION: Final = 128  # DSV4_HCA_RATIO
_LONG_CONTEXT_TOKENS: Final = 1 << 20  # src/models/glm-dsa.cpp: from here on only some layers have an indexer


@dataclass(frozen=True, slots=True)
class CacheTensor:
    """One tensor of a layer's cache: ``rows`` rows of ``width`` elements.

    ``kept_rows`` of them a checkpoint of one sequence keeps at most: what there is no way back to else.
    """

    layer: int
    type: ggml.GgmlType
    width: int
    rows: int
    kept_rows: int = 0


def not_built(model: ModelFacts) -> str | None:
    """Return why the caches of this model cannot be computed, or None."""
    if model.hparams.architecture not in ARCHITECTURES:
        return f"the cache of the unknown architecture {model.hparams.architecture}"
    return None


@lru_cache(maxsize=256)
def layer_bytes(model: ModelFacts, params: ContextParams, buffer: BufferType) -> tuple[int, ...]:
    """Return each layer's cache on a device of that buffer type, NextN layers included. ``not_built`` must be None."""
    sizes = [0] * model.hparams.n_layer_all
    for tensor in cache_tensors(model, params):
        size = ggml.row_bytes(tensor.type, tensor.width) * tensor.rows
        sizes[tensor.layer] += buffer.allocation(tensor.type, tensor.width, size)
    return tuple(sizes)


def checkpoint_bytes(model: ModelFacts, params: ContextParams) -> int:
    """Return the most that a checkpoint of one sequence takes of the host, 0 where none is made.

    (tools/server/server-context.cpp, ``create_checkpoint``; ``state_write`` of llama-kv-cache-iswa.cpp,
    llama-memory-recurrent.cpp and llama-kv-cache-dsv4.cpp.) It has the cells within the windows, and recurrent states.
    ``not_built`` must be None.
    """
    kept = [tensor for tensor in cache_tensors(model, params) if tensor.kept_rows and tensor.width]
    size = sum(ggml.row_bytes(tensor.type, tensor.width) * tensor.kept_rows + _TENSOR_HEADER_BYTES for tensor in kept)
    return size + _CELL_HEADER_BYTES * max((tensor.kept_rows for tensor in kept), default=0)


def checkpoint_bytes_beside(model: ModelFacts, params: ContextParams) -> int:
    """Return the most that a draft's context adds to each checkpoint of the model that it drafts for.

    One with neither windows nor states adds all of its cells (``llama_kv_cache::state_write`` heeds no flags).
    """
    tensors = cache_tensors(model, params)
    if any(tensor.kept_rows for tensor in tensors):
        return checkpoint_bytes(model, params)
    return sum(ggml.row_bytes(each.type, each.width) * each.rows for each in tensors) // params.n_stream


def window_cells(hparams: HParams, params: ContextParams) -> int:
    """Return the cells of one stream of a windowed cache (llama-kv-cache-iswa.cpp)."""
    if params.swa_full:
        return params.n_ctx_seq
    sequences = params.n_seq_max if params.kv_unified else 1
    wanted = hparams.n_swa * sequences + params.n_ubatch
    return ggml.pad(min(params.n_ctx_seq, wanted), _CELL_MULTIPLE)


def raw_cells(hparams: HParams, params: ContextParams) -> int:
    """Return the cells of one sequence's latest keys beside compressed ones (llama-kv-cache-dsv4.cpp)."""
    window = hparams.n_swa + params.n_ubatch
    return params.n_ctx_seq if params.swa_full else ggml.pad(min(params.n_ctx_seq, window), _CELL_MULTIPLE)


def compressed_cells(ratio: int, params: ContextParams) -> int:
    """Return the cells of one sequence's keys that are compressed by this ratio (llama-kv-cache-dsv4.cpp)."""
    return ggml.pad(max(1, -(-params.n_ctx_seq // ratio)), _CELL_MULTIPLE)


def cache_tensors(model: ModelFacts, params: ContextParams) -> tuple[CacheTensor, ...]:
    """Return every cache tensor of a context of this model, in no particular order."""
    rules = ARCHITECTURES[model.hparams.architecture]
    context = _Context(model, params, rules)
    if params.of_draft_head:  # plain attention, whatever the trunk has
        return tuple(_keys_and_values(context, range(model.hparams.n_layer, model.hparams.n_layer_all)))
    return tuple(_RULES[rules.cache](context))


@dataclass(frozen=True, slots=True)
class _Context:
    """A model and the parameters of its context, as the rules below ask for them."""

    model: ModelFacts
    params: ContextParams
    rules: Architecture

    @property
    def hparams(self) -> HParams:
        return self.model.hparams

    @property
    def type_k(self) -> ggml.GgmlType:
        return ggml.BY_NAME[self.params.cache_type_k]

    @property
    def type_v(self) -> ggml.GgmlType:
        return ggml.BY_NAME[self.params.cache_type_v]

    @property
    def window_cells(self) -> int:
        return window_cells(self.hparams, self.params)

    @property
    def kept_cells(self) -> int:
        """Return the cells of one sequence that are within the window; none where each layer keeps all of them."""
        return 0 if self.params.swa_full else min(self.hparams.n_swa, self.params.n_ctx_seq)

    def integer(self, key: str) -> int:
        """Return a number of the file's metadata, 0 where it is absent."""
        value = self.model.metadata.get(f"{self.hparams.architecture}.{key}", 0)
        return int(value) if isinstance(value, int) else 0

    def indexers(self) -> Sequence[bool]:
        """Say which layers have an indexer: all, or as the file or the architecture has it (src/models/glm-dsa.cpp)."""
        hparams, n_layer = self.hparams, self.hparams.n_layer_all
        types = self.model.metadata.get(f"{hparams.architecture}.attention.indexer.types")
        if self.rules.indexer_types and types is not None:
            values = types[:n_layer] if isinstance(types, tuple) else (types,) * n_layer
            return [*map(bool, values), *[False] * (n_layer - len(values))]
        everywhere = hparams.architecture != "glm-dsa" or (hparams.n_ctx_train or 0) < _LONG_CONTEXT_TOKENS
        return [everywhere or layer < 2 or layer % 4 == 2 for layer in range(n_layer)]  # noqa: PLR2004  # as there

    def keys(self, layers: Sequence[int], width: int, cells: int) -> Iterator[CacheTensor]:
        """Yield a cache of keys only, one head of ``width`` per layer."""
        for layer in layers:
            yield CacheTensor(layer, self.type_k, width, cells * self.params.n_stream)


def _nothing(_: _Context) -> Iterator[CacheTensor]:
    return iter(())


def _attention(context: _Context) -> Iterator[CacheTensor]:
    """Keys and values of every trunk layer; a draft head is served by a context of its own."""
    hparams = context.hparams
    trunk = hparams.n_layer or hparams.n_layer_all
    if hparams.architecture == "graniteswitch":  # its extra layer routes, and the trunk attends to it
        trunk = hparams.n_layer_all
    return _keys_and_values(context, range(trunk))


def _keys_and_values(context: _Context, layers: Sequence[int]) -> Iterator[CacheTensor]:
    """Keys and values of these layers, those with a window in shorter caches (llama-kv-cache.cpp, constructor)."""
    hparams, params = context.hparams, context.params
    owners = hparams.n_layer_all if hparams.n_layer_kv_from_start is None else hparams.n_layer_kv_from_start
    widest_v = max(map(hparams.n_embd_v_gqa, range(hparams.n_layer_all)), default=0)
    for layer in layers:
        if layer >= owners:  # reads an earlier layer's cache
            continue
        windowed = hparams.swa_layers[layer]
        rows = (context.window_cells if windowed else params.n_ctx_seq) * params.n_stream
        kept = context.kept_cells if windowed else 0
        yield CacheTensor(layer, context.type_k, hparams.n_embd_k_gqa(layer), rows, kept)
        if not hparams.is_mla:
            width = widest_v if params.v_trans else hparams.n_embd_v_gqa(layer)
            yield CacheTensor(layer, context.type_v, width, rows, kept)


def _recurrent(context: _Context) -> Iterator[CacheTensor]:
    return _states(context, range(context.hparams.n_layer))


def _states(context: _Context, layers: Sequence[int]) -> Iterator[CacheTensor]:
    """Both states of recurrent layers, a row per sequence and older state of it (llama-memory-recurrent.cpp)."""
    hparams, own = context.hparams, 1 + context.params.n_rs_seq
    rows = context.params.n_seq_max * own
    ple_layers = context.model.metadata.get(f"{hparams.architecture}.ple.layers", ())
    for layer in layers:
        yield CacheTensor(layer, _F32, hparams.n_embd_r, rows, own)
        yield CacheTensor(layer, _F32, hparams.n_embd_s, rows, own)
        if isinstance(ple_layers, tuple) and layer in ple_layers:
            history = max(context.integer("ple.conv_kernel") - 1, 0) * context.integer("ple.ngram_size")
            yield CacheTensor(layer, _F32, history * hparams.n_embd_out, rows, own)


def _hybrid_layers(context: _Context) -> tuple[list[int], list[int]]:
    """Return the attention layers and the recurrent layers of a hybrid (``create_memory``: its layer filters)."""
    hparams, rules = context.hparams, context.rules
    if rules.recurrent is Recurrent.ALL:
        return list(range(hparams.n_layer_all)), list(range(hparams.n_layer))
    candidates = range(hparams.n_layer if rules.trunk_only else hparams.n_layer_all)
    attention = [layer for layer in candidates if not hparams.recr_layers[layer]]
    if rules.recurrent is Recurrent.NO_KV_HEADS_NO_FF:  # feed-forward layers are neither
        attention = [layer for layer in attention if not hparams.n_ff[layer]]
    return attention, [layer for layer in range(hparams.n_layer) if hparams.recr_layers[layer]]


def _hybrid(context: _Context) -> Iterator[CacheTensor]:
    attention, recurrent = _hybrid_layers(context)
    yield from _keys_and_values(context, attention)
    yield from _states(context, recurrent)


def _hybrid_indexed(context: _Context) -> Iterator[CacheTensor]:
    """A hybrid whose attention layers keep an indexer's keys too (llama-memory-hybrid-idx.cpp)."""
    attention, recurrent = _hybrid_layers(context)
    yield from _keys_and_values(context, attention)
    yield from _states(context, recurrent)
    with_indexer = context.indexers()
    pooled = 3 if context.integer("attention.indexer.kpool") else 1  # key, gate and pooled value
    yield from context.keys(
        [layer for layer in attention if with_indexer[layer]],
        context.integer("attention.indexer.key_length") * pooled,
        context.params.n_ctx_seq,
    )


def _sparse(context: _Context) -> Iterator[CacheTensor]:
    """Latent keys of the trunk, windowed layers in shorter caches, and an indexer's keys (llama-kv-cache-dsa*.cpp)."""
    hparams = context.hparams
    layers = range(hparams.n_layer if context.rules.trunk_only else hparams.n_layer_all)
    yield from _keys_and_values(context, layers)
    if not context.integer("attention.indexer.top_k"):
        return
    with_indexer = context.indexers()
    yield from context.keys(
        [layer for layer in layers if with_indexer[layer]],
        context.integer("attention.indexer.key_length"),
        context.params.n_ctx_seq,
    )


def _sparse_blocks(context: _Context) -> Iterator[CacheTensor]:
    """Keys and values of all layers; those behind the dense ones also keep an indexer's (llama-kv-cache-msa.cpp)."""
    hparams = context.hparams
    every = range(hparams.n_layer_all)
    yield from _keys_and_values(context, every)
    indexed = every[context.integer("leading_dense_block_count") :]
    cells = context.params.n_ctx_seq
    yield from context.keys(indexed, context.integer("attention.indexer.key_length"), cells)
    for layer in indexed:
        yield CacheTensor(layer, context.type_v, hparams.head_v_of(layer), cells * context.params.n_stream)


def _compressed(context: _Context) -> Iterator[CacheTensor]:
    """Raw, twice compressed and indexer keys, and the compressors' states (llama-kv-cache-dsv4.cpp).

    Streams are always one per sequence, unified or not.
    """
    hparams, params = context.hparams, context.params
    for layer in range(hparams.n_layer_all):
        rows = raw_cells(hparams, params) * params.n_seq_max
        yield CacheTensor(
            layer, context.type_k, hparams.n_embd_k_gqa(layer), rows, min(hparams.n_swa, params.n_ctx_seq)
        )
    ratios = context.model.metadata.get(f"{hparams.architecture}.attention.compress_ratios", ())
    indexer = context.integer("attention.indexer.key_length")
    for layer, ratio in enumerate(ratios[: hparams.n_layer_all] if isinstance(ratios, tuple) else ()):
        if ratio not in {DENSE_COMPRESSION, COARSE_COMPRESSION}:
            continue
        dense = ratio == DENSE_COMPRESSION
        cells = compressed_cells(int(ratio), params) * params.n_seq_max
        yield CacheTensor(layer, context.type_k, hparams.n_embd_k_gqa(layer), cells)
        if dense:
            yield CacheTensor(layer, context.type_k, indexer, cells)
        if layer < hparams.n_layer:
            own = int(ratio) * (2 if dense else 1)
            state_rows = own * params.n_seq_max
            widths = (2 * hparams.head_k, 2 * indexer) if dense else (hparams.head_k,)
            for width in widths:  # a state of the keys and one of their scores
                yield CacheTensor(layer, _F32, width, state_rows, own)
                yield CacheTensor(layer, _F32, width, state_rows, own)


_RULES: Final[dict[Cache, Callable[[_Context], Iterator[CacheTensor]]]] = {
    Cache.NONE: _nothing,
    Cache.BORROWED: _nothing,
    Cache.ATTENTION: _attention,
    Cache.RECURRENT: _recurrent,
    Cache.HYBRID: _hybrid,
    Cache.HYBRID_INDEXED: _hybrid_indexed,
    Cache.SPARSE: _sparse,
    Cache.SPARSE_BLOCKS: _sparse_blocks,
    Cache.COMPRESSED: _compressed,
}
