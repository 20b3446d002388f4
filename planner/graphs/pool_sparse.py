"""Delta attention beside latent attention over pools of tokens that an indexer chose (src/models/glm5-next.cpp)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from planner.ggml import pad
from planner.graph import F16, F32, I32, I64, Node
from planner.graphs.blocks import CacheInputs
from planner.graphs.experts import moe
from planner.graphs.fused_hyper import FusedHyperDecoder
from planner.graphs.kimi import BoundedDeltaAttentionDecoder
from planner.graphs.latent import LatentDecoder
from planner.graphs.shape import HEADER_MOE

_POOL_MULTIPLE: Final = 64  # kpool_pad, src/llama-memory-hybrid-idx.cpp
_GATHERS_UP_TO: Final = 16  # tokens; build_inp_kpool: more of them attend to all cells under a mask


@dataclass(frozen=True, slots=True)
class _Pools:
    """What all layers with an indexer share (``llm_graph_input_kpool``)."""

    ids: CacheInputs
    size: int
    n_chosen: int
    cells: Node  # the cell that holds each pool's key
    members: Node
    mask: Node
    tail: Node | None  # cells of the last pool, which is not full yet
    live: Node  # which of the chosen cells are to be seen
    new_members: Node
    new_cells: Node
    gathers: bool


class PoolSparseDecoder(FusedHyperDecoder, BoundedDeltaAttentionDecoder):
    """GLM-5 Next, between hyper-connections; a layer without an indexer of its own takes the last one's choice."""

    _chosen: Node | None = None
    _pools: _Pools | None = None

    def caches(self) -> dict[bool, CacheInputs]:
        """Return the inputs of the latent cache; the indexer's keys have another."""
        caches = LatentDecoder.caches(self)
        self._pools = self._inputs(caches[False].n_cells)
        return caches

    def _inputs(self, n_cells: int) -> _Pools:
        graph, n_tokens, settings = self.graph, self.blocks.batch.n_tokens, self.settings
        size = int(settings.number("attention.indexer.kpool"))
        n_new = max(n_cells // size * self.blocks.params.n_seq_max, 1)
        n_pools = max(_POOL_MULTIPLE, pad(n_new + 1, _POOL_MULTIPLE))
        n_best = min(n_pools, int(settings.number("attention.indexer.top_k")) // size)
        n_tail = size - 1 if settings.get("attention.indexer.kpool_select_tail") else 0
        n_chosen = size * n_best + n_tail
        cells, members = graph.input(I32, n_pools), graph.input(I32, size, n_pools)
        mask, tail = graph.input(F16, n_pools, n_tokens), graph.input(I32, size - 1, n_tokens)
        live = graph.input(F32, n_chosen, 1, 1, n_tokens)
        for node in (cells, members, mask, tail, live):
            graph.expand(node)
        return _Pools(
            ids=CacheInputs(graph.input(I64, n_tokens), None, mask, None, None, n_cells),
            size=size,
            n_chosen=n_chosen,
            cells=cells,
            members=members,
            mask=mask,
            tail=tail if n_tail else None,
            live=live,
            new_members=graph.input(I32, size, n_new),
            new_cells=graph.input(I64, n_new),
            gathers=n_tokens <= _GATHERS_UP_TO and n_cells > n_chosen,
        )

    def layers(self, x: Node, rows: Node) -> Node:
        """Return the streams' mean after the last layer, of the rows that yield outputs."""
        return self.mean(self.picked_streams(super().layers(self.streams(x), rows), rows))

    def layer(self, x: Node, il: int, picked: Node | None) -> Node:
        """Return the streams after a layer."""
        del picked
        blocks, prefix = self.blocks, f"blk.{il}."
        mixture, back = self.read(x, f"{prefix}hc_attn", il)
        x = self.written(self.attention(blocks.norm(mixture, f"{prefix}attn_norm", il), il), x, back, il)
        mixture, back = self.read(x, f"{prefix}hc_ffn", il)
        return self.written(self.feed_forward(blocks.norm(mixture, f"{prefix}ffn_norm", il), il), x, back, il)

    def attention(self, x: Node, il: int) -> Node:
        """Return a layer's attention, latent or by a state per sequence, projected."""
        self.graph.expand(x)
        return self.delta_attention(x, il) if self.hparams.recr_layers[il] else self._sparse_attention(x, il)

    def output_gate(self, x: Node, il: int) -> Node:
        """Return what the result is weighed with."""
        graph, blocks, prefix = self.graph, self.blocks, f"blk.{il}.ssm_g_"
        return graph.mul_mat(blocks.needed(f"{prefix}b.weight"), graph.mul_mat(blocks.needed(f"{prefix}a.weight"), x))

    def feed_forward(self, x: Node, il: int) -> Node:
        """Return a feed-forward part, whose scales are not read."""
        blocks = self.blocks
        if il < self.settings.number("leading_dense_block_count"):
            return blocks.gated_ffn(x, il)
        routed = moe(blocks, x, il, HEADER_MOE, self.settings)
        return self.graph.same("add", routed, blocks.gated_ffn(x, il, "_shexp"))

    def _sparse_attention(self, x: Node, il: int) -> Node:
        """Return latent attention without positions over what the indexer chose (``build_dsa_layer``)."""
        graph, blocks, prefix, pools = self.graph, self.blocks, f"blk.{il}.attn_", self._pools
        n_head, n_tokens, cache = self.hparams.n_head[il], x.ne[1], self.cache(il)
        if pools is None:
            raise KeyError("attention.indexer.kpool")
        low_rank = self.low_rank_query(x, il)
        q = graph.mul_mat(blocks.needed(f"{prefix}q_b.weight"), low_rank)
        q = graph.reshape(q, q.ne[0] // n_head, n_head, n_tokens)
        compressed = blocks.norm(graph.mul_mat(blocks.needed(f"{prefix}kv_a_mqa.weight"), x), f"{prefix}kv_a_norm", il)
        compressed = graph.reshape(compressed, compressed.ne[0], 1, n_tokens)
        q = graph.permute_heads(graph.mul_mat(blocks.needed(f"{prefix}k_b.weight"), graph.permute_heads(q)))
        types = self.settings.get("attention.indexer.types")
        if not isinstance(types, tuple) or types[il]:
            self._chosen = self._choose(x, low_rank, cache, pools, il)
        if self._chosen is None:
            raise KeyError(f"blk.{il}.indexer.attn_k.weight")
        if pools.gathers:
            out = self._gathered(q, compressed, self._chosen, cache, pools, il)
        else:
            mask = graph.reshape(self._chosen, *cache.mask.ne)
            out = blocks.latent_attention(cache, q, compressed, compressed, il, mask=mask)
        return graph.mul_mat(blocks.needed(f"{prefix}output.weight"), out)

    def _gathered(self, q: Node, compressed: Node, chosen: Node, cache: CacheInputs, pools: _Pools, il: int) -> Node:
        """Return a few tokens' attention over copies of the chosen cells."""
        graph, (latent, n_head, n_tokens, _) = self.graph, q.ne
        for node in (q, compressed):
            graph.expand(node)
        stored = self.blocks.store_k(cache, compressed, il).view_of
        graph.expand(cache.mask)
        if stored is None:
            raise KeyError(f"blk.{il}.attn_kv_a_mqa.weight")
        rows = graph.view(stored, (latent, stored.ne[1] * stored.ne[2]), (stored.nb[1],))
        seen = graph.get_rows(rows, graph.reshape(chosen, pools.n_chosen * n_tokens))
        seen = graph.reshape(seen, latent, pools.n_chosen, 1, n_tokens)
        scores = graph.mul_mat(seen, graph.permute(q, 0, 2, 3, 1))
        scores = graph.same("soft_max", scores, pools.live)
        values = graph.mul_mat(graph.cont(graph.transpose(seen)), scores)
        values = graph.mul_mat(self.blocks.needed(f"blk.{il}.attn_v_b.weight"), values)
        out = graph.cont(graph.permute_heads(values))
        return graph.reshape(out, values.ne[0] * n_head, n_tokens)

    def _choose(self, x: Node, low_rank: Node, cache: CacheInputs, pools: _Pools, il: int) -> Node:
        """Return the chosen cells, or the mask that shows only them (``build_kpool_select``)."""
        graph, (n_pools, n_tokens), size = self.graph, pools.mask.ne[:2], pools.size
        scores = self._scores(x, low_rank, pools, il)
        n_best = min(n_pools, int(self.settings.number("attention.indexer.top_k")) // size)
        best = graph.new("top_k", I32, (n_best, n_tokens, 1, 1), scores)
        their_scores = graph.get_rows(graph.reshape(scores, 1, n_pools, n_tokens), best)
        their_scores = graph.reshape(their_scores, n_best, n_tokens)
        order = graph.new("argsort", I32, their_scores.ne, their_scores)
        best = graph.get_rows(graph.reshape(graph.cast(best, F32), 1, n_best, n_tokens), order)
        best = graph.cast(graph.cont(graph.reshape(best, n_best, n_tokens)), I32)
        chosen = graph.get_rows(pools.members, graph.reshape(best, n_best * n_tokens))
        chosen = graph.reshape(chosen, size * n_best, n_tokens)
        if pools.tail:
            chosen = graph.concat(chosen, pools.tail)
        return chosen if pools.gathers else self._shown(chosen, cache, pools)

    def _shown(self, chosen: Node, cache: CacheInputs, pools: _Pools) -> Node:
        """Return the cache's mask, which hides all but the chosen cells."""
        graph, (n_chosen, n_tokens, _, _), n_cells = self.graph, chosen.ne, cache.n_cells
        seed = graph.cast(graph.view(chosen, (1,), ()), F32)
        hidden = graph.same("fill", seed if cache.mask.type is F32 else graph.cast(seed, cache.mask.type))
        hidden = graph.repeat(hidden, (1, n_cells + n_chosen, n_tokens, 1))
        hidden = graph.reshape(hidden, 1, n_cells + n_chosen, n_tokens)
        zeros = graph.repeat(graph.same("fill", seed), (1, n_chosen, n_tokens, 1))
        zeros = graph.reshape(zeros, 1, n_chosen, n_tokens)
        live = graph.same("unary", graph.reshape(pools.live, n_chosen, n_tokens))
        unseen = graph.new("arange", F32, (n_chosen, 1, 1, 1))
        rows = graph.same("mul", graph.same("sub", graph.cast(chosen, F32), unseen), live)
        rows = graph.cast(graph.same("add", rows, unseen), I32)
        shown = graph.set_rows(hidden, zeros, graph.reshape(rows, n_chosen, n_tokens, 1))
        shown = graph.view(shown, (n_cells, n_tokens), (shown.nb[2],))
        return graph.same("add", shown, graph.reshape(cache.mask, n_cells, n_tokens))

    def _scores(self, x: Node, low_rank: Node, pools: _Pools, il: int) -> Node:
        """Return each token's score of every pool, the keys of new pools written first."""
        graph, blocks, prefix, n_tokens = self.graph, self.blocks, f"blk.{il}.indexer.", x.ne[1]
        head, (size, n_new) = int(self.settings.number("attention.indexer.key_length")), pools.new_members.ne[:2]
        q = graph.mul_mat(blocks.needed(f"{prefix}attn_q_b.weight"), low_rank)
        q = graph.reshape(q, head, q.ne[0] // head, n_tokens)
        k = blocks.norm(graph.mul_mat(blocks.needed(f"{prefix}attn_k.weight"), x), f"{prefix}k_norm", il, "norm")
        gate = graph.mul_mat(blocks.needed(f"blk.{il}.indexer_compressor_gate.weight"), x)
        nothing = graph.same("fill", graph.leaf(F32, (head, n_tokens)))
        packed = graph.concat(graph.concat(k, gate), nothing)
        stored = blocks.store_k(pools.ids, graph.reshape(packed, 3 * head, 1, n_tokens), il).view_of
        if stored is None:
            raise KeyError(f"{prefix}attn_k.weight")
        n_cells = stored.ne[1] * stored.ne[2]
        keys_and_gates = graph.view(stored, (2 * head, n_cells), (stored.nb[1],))
        pooled_keys = graph.view(stored, (head, n_cells), (stored.nb[1],))
        rows = graph.get_rows(keys_and_gates, graph.reshape(pools.new_members, size * n_new))
        rows = graph.reshape(rows, 2 * head, size, n_new)
        k, gate = (graph.view(rows, (head, size, n_new), rows.nb[1:3]) for _ in range(2))
        gate = graph.same("add", gate, blocks.needed(f"blk.{il}.indexer_compressor_ape.weight"))
        gate = graph.reshape(graph.cont(graph.permute(gate, 1, 0, 2, 3)), size, head * n_new)
        shares = graph.reshape(graph.same("soft_max", gate), size, head, n_new)
        weighed = graph.same("mul", shares, graph.cont(graph.permute(k, 1, 0, 2, 3)))
        pooled = graph.reshape(graph.sum_rows(weighed), head, n_new)
        graph.expand(graph.set_rows(pooled_keys, pooled, pools.new_cells))
        keys = graph.reshape(graph.get_rows(pooled_keys, pools.cells), head, 1, pools.cells.ne[0])
        weights = graph.same("scale", graph.mul_mat(blocks.needed(f"{prefix}proj.weight"), x))
        return graph.new("lightning_indexer", F32, (pools.cells.ne[0], n_tokens, 1, 1), q, keys, weights, pools.mask)
