"""Attention over the caches of llama.cpp's graphs (src/llama-graph.cpp, ``build_attn``), as tensors without values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from planner.cache import window_cells
from planner.ggml import BY_NAME, GgmlType, row_bytes
from planner.graph import F16, F32, I64, Node
from planner.graphs.parts import Parts

_ROTATION: Final = 64  # the smallest Hadamard matrix that turns a quantized cache (src/llama-kv-cache.cpp)


@dataclass(frozen=True, slots=True)
class CacheInputs:
    """The inputs of one attention cache: where to write, what to see, how to turn a quantized cache."""

    k_ids: Node
    v_ids: Node | None
    mask: Node
    k_rotation: Node | None
    v_rotation: Node | None
    n_cells: int


class Blocks(Parts):
    """One graph under construction: its parts, and attention over its caches."""

    def cache_inputs(self, n_cells: int, *, latent: bool = False, windowed: bool | None = None) -> CacheInputs:
        """Return the inputs of a cache of that many cells per stream (``build_attn_inp_kv``, ``build_attn_inp_k``).

        ``windowed`` says which layers the cache is for where there are two, None for all.
        """
        graph, batch, params, hparams = self.graph, self.batch, self.params, self.hparams
        v_rows = 1 if not params.v_trans else max(self.v_width(il) for il in range(hparams.n_layer_all))
        streams = 1 if params.kv_unified else batch.n_seqs
        return CacheInputs(
            k_ids=graph.input(I64, batch.n_tokens),
            v_ids=None if latent else graph.input(I64, batch.n_tokens * v_rows),
            mask=graph.input(F16 if self.flash_attn else F32, n_cells, batch.n_tokens // streams, 1, streams),
            k_rotation=None
            if latent
            else self.cache_rotation(params.cache_type_k, hparams.head_k_of, windowed=windowed, grows=True),
            v_rotation=None
            if latent
            else self.cache_rotation(params.cache_type_v, hparams.head_v_of, windowed=windowed, grows=False),
            n_cells=n_cells,
        )

    def cache_rotation(
        self, type_name: str, head_of: Callable[[int], int], *, windowed: bool | None, grows: bool
    ) -> Node | None:
        """Return the matrix that turns a quantized cache whose heads are all of one size (src/llama-kv-cache.cpp)."""
        swa = self.hparams.swa_layers
        heads = {head_of(il) for il in range(self.hparams.n_layer_all) if windowed is None or swa[il] is windowed}
        if not BY_NAME[type_name].quantized or head_of(0) % _ROTATION or len(heads) != 1:
            return None
        head = heads.pop()
        return self.rotation(head if grows else _ROTATION) if head else None

    def rotation(self, head: int) -> Node:
        """Return a matrix that turns heads of that size: as large as divides it, 64 at least."""
        size = max(head & -head, _ROTATION)
        return self.graph.input(F32, size, size)

    def k_width(self, il: int) -> int:
        """Return the elements that one cell of a layer's K holds."""
        return self.hparams.n_embd_k_gqa(il)

    def v_width(self, il: int) -> int:
        """Return the elements that one cell of a layer's V holds."""
        return self.hparams.n_embd_v_gqa(il)

    def window_cells(self) -> int:
        """Return the cells per stream of the sliding window's cache."""
        return window_cells(self.hparams, self.params)

    def attention(  # noqa: PLR0913  # what build_attn takes
        self,
        cache: CacheInputs,
        q: Node,
        k: Node,
        v: Node,
        il: int,
        *,
        mask: Node | None = None,
        bias: Node | None = None,
        sinks: Node | None = None,
        capped: bool = False,
    ) -> Node:
        """Return a layer's attention before its output projection (``build_attn``), K and V stored on the way.

        ``mask`` is what hides cells, where it is not the cache's own; ``bias`` is added to the scores.
        """
        graph = self.graph
        if cache.k_rotation:
            q, k = self.rotated(q, cache.k_rotation), self.rotated(k, cache.k_rotation)
        if cache.v_rotation:
            v = self.rotated(v, cache.v_rotation)
        for node in (q, k, v) if any(self.hparams.swa_layers) else (q, v, k):
            graph.expand(node)
        stored_k = self.store_k(cache, k, il)
        stored_v = self.store_v(cache, v, il)
        out = self.heads_attention(mask or cache.mask, q, stored_k, stored_v, il, bias=bias, sinks=sinks, capped=capped)
        return self.rotated(out, cache.v_rotation) if cache.v_rotation else out

    def borrowed_attention(self, cache: CacheInputs, q: Node, il: int, owner: int) -> Node:
        """Return the attention of a layer that reads the cache of an earlier one (``build_attn`` without K and V)."""
        hparams, n_head = self.hparams, self.hparams.n_head_kv[owner]
        if cache.k_rotation:
            q = self.rotated(q, cache.k_rotation)
        self.graph.expand(q)
        stored_k = self._cache(self.params.cache_type_k, self.k_width(owner), cache.n_cells, owner)
        k = self._cells(stored_k, hparams.head_k_of(owner), n_head, cache.n_cells)
        v = self._stored_v(cache, hparams.head_v_of(owner), n_head, owner)[1]
        out = self.heads_attention(cache.mask, q, k, v, il)
        return self.rotated(out, cache.v_rotation) if cache.v_rotation else out

    def latent_attention(
        self,
        cache: CacheInputs,
        q: Node,
        k: Node,
        v: Node,
        il: int,
        *,
        mask: Node | None = None,
        sinks: Node | None = None,
    ) -> Node:
        """Return latent attention (``build_attn`` over ``llm_graph_input_attn_k``): V is a window into K.

        ``mask`` is what hides cells, where it is not the cache's own.
        """
        for node in (q, v, k):
            self.graph.expand(node)
        stored = self.store_k(cache, k, il)
        seen = self.graph.view(stored, (v.ne[0], *stored.ne[1:]), stored.nb[1:])
        v_up = self.needed(f"blk.{il}.attn_v_b.weight")
        return self.heads_attention(mask or cache.mask, q, stored, seen, il, sinks=sinks, v_up=v_up)

    def shown_only(self, mask: Node, chosen: Node, zero: GgmlType) -> Node:
        """Return a mask that hides all but the chosen cells, and of those what the other mask hides."""
        graph, (n_cells, n_rows, _, streams) = self.graph, mask.ne
        hidden = graph.same("fill", mask)
        cells = graph.view(hidden, (1, n_cells, n_rows, streams), hidden.nb[:3])
        ids = graph.view(chosen, (*chosen.ne[:2], chosen.ne[3], 1), (*chosen.nb[1:3], chosen.ne[3] * chosen.nb[3]))
        zeros = graph.same("fill", graph.leaf(zero, (1, *ids.ne[:3])))
        shown = graph.set_rows(cells, zeros, ids)
        shown = graph.view(shown, (n_cells, n_rows, 1, streams), (shown.nb[2], shown.nb[3], shown.nb[3]))
        return graph.same("add", shown, mask)

    def batch_mask(self) -> Node:
        """Return the mask over the batch's own tokens (``build_attn_inp_no_cache``)."""
        n_tokens = self.batch.n_tokens
        return self.graph.input(F16 if self.flash_attn else F32, n_tokens, n_tokens)

    def uncached_attention(self, mask: Node, q: Node, k: Node, v: Node, il: int, *, bias: Node | None = None) -> Node:
        """Return attention over the batch's own tokens (``build_attn`` over ``llm_graph_input_attn_no_cache``)."""
        for node in (q, k, v):
            self.graph.expand(node)
        return self.heads_attention(mask, q, k, v, il, bias=bias)

    def rotated(self, x: Node, rotation: Node) -> Node:
        """Return a tensor turned by a matrix, a piece of each head at a time (``llama_mul_mat_hadamard``)."""
        size = rotation.ne[0]
        rows = x.ne[0] * x.ne[1] * x.ne[2] * x.ne[3] // size
        flat = self.graph.reshape(x, size, rows) if x.is_contiguous else self.graph.cont(x, size, rows)
        return self.graph.reshape(self.graph.mul_mat(rotation, flat), *x.ne)

    def _cache(self, type_name: str, width: int, n_cells: int, il: int) -> Node:
        node = self.graph.leaf(BY_NAME[type_name], (width, n_cells, self.params.n_stream))
        node.home = self.places.caches[il]
        return node

    def store_k(self, cache: CacheInputs, k: Node, il: int) -> Node:
        """Write keys into a layer's cache, and return its cells as heads (``cpy_k``, ``get_k``)."""
        graph = self.graph
        head, n_head, n_tokens, _ = k.ne
        width = head * n_head
        stored = self._cache(self.params.cache_type_k, width, cache.n_cells, il)
        rows = graph.view(k, (width, n_tokens), (k.nb[2],))
        graph.expand(graph.set_rows(self._merged(stored), rows, cache.k_ids))
        return self._cells(stored, head, n_head, cache.n_cells)

    def store_v(self, cache: CacheInputs, v: Node, il: int) -> Node:
        """Write values into a layer's cache, and return its cells as heads (``cpy_v``, ``get_v``)."""
        graph = self.graph
        head, n_head, n_tokens, _ = v.ne
        width = head * n_head
        if cache.v_ids is None:
            raise ValueError("a latent cache stores no V")
        stored, cells = self._stored_v(cache, head, n_head, il)
        if not self.params.v_trans:
            rows = graph.view(v, (width, n_tokens), (v.nb[2],))
            graph.expand(graph.set_rows(self._merged(stored), rows, cache.v_ids))
            return cells
        widest = stored.ne[0]
        dense = v.nb[2] == F32.block_bytes * width
        rows = graph.reshape(v, width, n_tokens) if dense else graph.cont(v, width, n_tokens)
        if width < widest:
            rows = graph.new("pad", F32, (widest, n_tokens, 1, 1), rows)
        column = graph.reshape(stored, 1, widest * cache.n_cells * self.params.n_stream)
        graph.expand(graph.set_rows(column, graph.reshape(rows, 1, widest * n_tokens), cache.v_ids))
        return cells

    def _stored_v(self, cache: CacheInputs, head: int, n_head: int, il: int) -> tuple[Node, Node]:
        """Return a layer's V cache, and its cells as heads; with flash attention off it lies transposed."""
        type_ = BY_NAME[self.params.cache_type_v]
        if not self.params.v_trans:
            stored = self._cache(type_.name, head * n_head, cache.n_cells, il)
            return stored, self._cells(stored, head, n_head, cache.n_cells)
        widest = max(self.v_width(layer) for layer in range(self.hparams.n_layer_all))
        stored = self._cache(type_.name, widest, cache.n_cells, il)
        column = type_.block_bytes * cache.n_cells
        shape = (cache.n_cells, n_head, head, self.params.n_stream)
        return stored, self.graph.view(stored, shape, (column * head, column, column * widest))

    def _merged(self, stored: Node) -> Node:
        if self.params.n_stream == 1:
            return stored
        return self.graph.reshape(stored, stored.ne[0], stored.ne[1] * stored.ne[2])

    def _cells(self, stored: Node, head: int, n_head: int, n_cells: int) -> Node:
        row = row_bytes(stored.type, head)
        width = row_bytes(stored.type, stored.ne[0])
        return self.graph.view(stored, (head, n_head, n_cells, self.params.n_stream), (row, width, width * n_cells))

    def heads_attention(  # noqa: PLR0913  # what build_attn_mha takes
        self,
        mask: Node,
        q: Node,
        k: Node,
        v: Node,
        il: int,
        *,
        bias: Node | None = None,
        sinks: Node | None = None,
        v_up: Node | None = None,
        capped: bool = False,
    ) -> Node:
        """Return attention over the stored cells (``build_attn_mha``)."""
        graph, streams = self.graph, k.ne[3]
        v_trans = v.nb[1] > v.nb[2]
        per_stream = q.ne[2] // streams
        q = graph.view(q, (q.ne[0], q.ne[1], per_stream, streams), (q.nb[1], q.nb[2], q.nb[2] * per_stream))
        q, k, v = (graph.permute_heads(node) for node in (q, k, v))
        if self.flash_attn and bias is None:
            v = graph.transpose(v) if v_trans else v
            k, v = (graph.new("cpy", F16, node.ne, node) if node.type is F32 else node for node in (k, v))
            out = graph.flash_attn(q, k, v, mask, sinks)
            graph.fused.append((out, il))
            if v_up:
                out = graph.mul_mat(v_up, graph.permute_heads(out))
                out = graph.cont(graph.permute_heads(out))
            out = graph.reshape(out, out.ne[0] * out.ne[1], out.ne[2] * out.ne[3])
        else:
            scores = graph.mul_mat(k, q)
            for op in ("scale", "unary", "scale") if capped else ():
                scores = graph.same(op, scores)
            scores = graph.same("add", scores, bias) if bias else scores
            scores = graph.same("soft_max", scores, mask, *([sinks] if sinks else []))
            values = graph.mul_mat(v if v_trans else graph.cont(graph.transpose(v)), scores)
            if v_up:
                values = graph.mul_mat(v_up, values)
            merged = graph.permute_heads(values)
            out = graph.cont(merged, merged.ne[0] * merged.ne[1], merged.ne[2] * merged.ne[3])
            if not self.params.kv_offload:
                out.backend = self.places.cpu
        graph.expand(out)
        return out
