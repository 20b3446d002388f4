"""DeepSeek-V4: a window of raw keys beside compressed ones of all tokens before (src/models/deepseek4.cpp)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from planner.cache import COARSE_COMPRESSION, DENSE_COMPRESSION, compressed_cells, raw_cells
from planner.graph import F16, F32, FLASH_ATTN, I32, I64, Node
from planner.graphs.blocks import Blocks, CacheInputs
from planner.graphs.experts import mixed, route
from planner.graphs.fused_hyper import FusedHyperDecoder
from planner.graphs.shape import HEADER_MOE, Settings, Shape


@dataclass(frozen=True, slots=True)
class _Compressor:
    """One compressor: its cache, and how a batch goes through its state (``llm_graph_input_dsv4::comp_input``)."""

    cache: CacheInputs
    ratio: int
    overlaps: bool  # a block reads the one before it too
    positions: Node
    kept: Node
    kept_rows: Node
    read: Node
    block_positions: Node


class CompressedDecoder(FusedHyperDecoder):
    """DeepSeek-V4. Every sequence has streams of its own, unified or not (src/llama-kv-cache-dsv4.cpp)."""

    def __init__(self, blocks: Blocks, settings: Settings, shape: Shape) -> None:
        params = blocks.params
        if params.n_rs_seq:
            raise KeyError("older states of the compressors")
        blocks.params = replace(params, kv_unified=False, n_stream=params.n_seq_max)
        super().__init__(blocks, settings, shape)
        self._fine: _Compressor | None = None
        self._coarse: _Compressor | None = None
        self._indexer: _Compressor | None = None

    def caches(self) -> dict[bool, CacheInputs]:
        """Return the inputs of the raw keys' cache; the compressors have theirs."""
        blocks, hparams = self.blocks, self.hparams
        raw = self._keys(raw_cells(hparams, blocks.params), rotation=self._rotation(), ids=blocks.batch.n_tokens)
        self.graph.expand(raw.mask)
        self._fine = self._compressor(DENSE_COMPRESSION, self._rotation())
        self._coarse = self._compressor(COARSE_COMPRESSION, self._rotation())
        mixing = blocks.rotation(int(self.settings.number("attention.indexer.key_length")))
        self._indexer = self._compressor(DENSE_COMPRESSION, mixing, fused=True)
        return {True: raw, False: raw}

    def _rotation(self) -> Node | None:
        params = self.blocks.params
        return self.blocks.cache_rotation(params.cache_type_k, self.hparams.head_k_of, windowed=None, grows=True)

    def _keys(self, n_cells: int, *, rotation: Node | None, ids: int, fused: bool = False) -> CacheInputs:
        graph, batch = self.graph, self.blocks.batch
        as_f16 = fused or FLASH_ATTN not in batch.unfused
        mask = graph.input(F16 if as_f16 else F32, n_cells, batch.n_tokens // batch.n_seqs, 1, batch.n_seqs)
        return CacheInputs(graph.input(I64, ids), None, mask, rotation, None, n_cells)

    def _compressor(self, ratio: int, rotation: Node | None, *, fused: bool = False) -> _Compressor:
        """Return a compressor's inputs for the batch that needs most (``dsv4_build_reserve_comp_plan``)."""
        graph, batch, params = self.graph, self.blocks.batch, self.blocks.params
        overlaps = ratio == DENSE_COMPRESSION
        n_blocks = batch.n_tokens // ratio + batch.n_seqs
        reads = 2 * ratio if overlaps else ratio
        n_kept = min(batch.n_tokens, reads * params.n_stream)
        return _Compressor(
            cache=self._keys(compressed_cells(ratio, params), rotation=rotation, ids=n_blocks, fused=fused),
            ratio=ratio,
            overlaps=overlaps,
            positions=graph.input(I32, batch.n_tokens),
            kept=graph.input(I32, n_kept),
            kept_rows=graph.input(I32, n_kept),
            read=graph.input(I32, reads * n_blocks),
            block_positions=graph.input(I32, n_blocks),
        )

    def layers(self, x: Node, rows: Node) -> Node:
        """Return the streams' mixture after the last layer, of the rows that yield outputs."""
        return self.head(self.picked_streams(super().layers(self.streams(x), rows), rows))

    def layer(self, x: Node, il: int, picked: Node | None) -> Node:
        """Return the streams after a layer."""
        del picked
        graph, blocks, prefix = self.graph, self.blocks, f"blk.{il}."
        mixture, back = self.read(x, f"{prefix}hc_attn", il)
        x = self.written(self.attention(blocks.norm(mixture, f"{prefix}attn_norm", il), il), x, back, il)
        mixture, back = self.read(x, f"{prefix}hc_ffn", il)
        for node in (x, back.post, back.comb):
            graph.expand(node)
        x = self.written(self.feed_forward(blocks.norm(mixture, f"{prefix}ffn_norm", il), il), x, back, il)
        return blocks.pin(x, il)

    def feed_forward(self, x: Node, il: int) -> Node:
        """Return the experts' and the shared expert's sum; the first layers choose by the token alone."""
        graph, blocks = self.graph, self.blocks
        chosen: Node | None = None
        if blocks.tokens and il < self.settings.number("hash_layer_count"):
            chosen = graph.get_rows(blocks.needed(f"blk.{il}.ffn_gate_tid2eid.weight"), blocks.tokens)
        chosen, weights = route(blocks, x, il, HEADER_MOE, self.settings, None, chosen)
        routed = mixed(blocks, x, il, HEADER_MOE, chosen, weights)
        return graph.same("add", routed, blocks.gated_ffn(x, il, "_shexp"))

    def attention(self, x: Node, il: int) -> Node:
        """Return a layer's attention, projected by groups of heads (``build_attention_impl``)."""
        graph, blocks, prefix, positions = self.graph, self.blocks, f"blk.{il}.attn_", self.needed_positions()
        n_head, head, n_tokens = self.hparams.n_head[il], self.hparams.head_k, x.ne[1]
        low_rank = blocks.norm(blocks.project(x, f"{prefix}q_a"), f"{prefix}q_a_norm", il)
        q = graph.reshape(blocks.project(low_rank, f"{prefix}q_b"), head, n_head, n_tokens)
        q = blocks.rope(graph.same("rms_norm", q), positions)
        kv = blocks.norm(blocks.project(x, f"{prefix}kv"), f"{prefix}kv_a_norm", il)
        kv = blocks.rope(graph.reshape(kv, head, 1, n_tokens), positions)
        out = self._seen(x, low_rank, q, kv, il)
        out = blocks.rope(graph.reshape(out, head, n_head, n_tokens), positions)
        n_groups = int(self.settings.number("attention.output_group_count"))
        out = graph.permute_heads(graph.reshape(out, n_head // n_groups * head, n_groups, n_tokens))
        out = graph.permute_heads(graph.mul_mat(blocks.needed(f"{prefix}output_a.weight"), out))
        return blocks.project(graph.cont(out, out.ne[0] * n_groups, n_tokens), f"{prefix}output_b")

    def _seen(self, x: Node, low_rank: Node, q: Node, kv: Node, il: int) -> Node:
        """Return what the heads see: the window, and what the layer's compressor kept."""
        graph, blocks, fine, coarse, indexer = self.graph, self.blocks, self._fine, self._coarse, self._indexer
        if fine is None or coarse is None or indexer is None:
            raise KeyError("attention.compress_ratios")
        ratio = self.settings.of_layer("attention.compress_ratios", il)
        head, key = self.hparams.head_k, int(self.settings.number("attention.indexer.key_length"))
        raw, compressed, mask = self.cache(il), None, None
        if ratio == DENSE_COMPRESSION:
            compressed = self._compressed(fine, x, f"blk.{il}.attn_compressor", head, il)
            index_keys = self._compressed(indexer, x, f"blk.{il}.indexer_compressor", key, il)
            best = self._best(indexer, index_keys, x, low_rank, il)
            mask = blocks.shown_only(fine.cache.mask, best, fine.cache.mask.type)
        elif ratio == COARSE_COMPRESSION:
            compressed, mask = self._compressed(coarse, x, f"blk.{il}.attn_compressor", head, il), coarse.cache.mask
        if raw.k_rotation:
            q, kv = blocks.rotated(q, raw.k_rotation), blocks.rotated(kv, raw.k_rotation)
        graph.expand(q)
        graph.expand(kv)
        keys, shown = blocks.store_k(raw, kv, il), raw.mask
        if compressed and mask:
            keys, shown = graph.concat(keys, compressed, 2), graph.concat(shown, mask)
        sinks = blocks.weight(f"blk.{il}.attn_sinks.weight")
        out = blocks.heads_attention(shown, q, keys, keys, il, sinks=sinks)
        return blocks.rotated(out, raw.k_rotation) if raw.k_rotation else out

    def _compressed(self, how: _Compressor, x: Node, name: str, width: int, il: int) -> Node:
        """Return the compressed keys, those of the batch's blocks written first, and its last tokens kept."""
        graph, blocks = self.graph, self.blocks
        kv, scores = blocks.project(x, f"{name}_kv"), blocks.project(x, f"{name}_gate")
        by_position = graph.get_rows(blocks.needed(f"{name}_ape.weight"), how.positions)
        scores = graph.same("add", scores, by_position)
        n_rows = how.ratio * (2 if how.overlaps else 1)
        states = [self._state(kv.ne[0], n_rows, il) for _ in range(2)]
        joined = [
            graph.concat(graph.view(state, state.ne[:2], (state.nb[1],)), new, 1)
            for state, new in zip(states, (kv, scores), strict=True)
        ]
        keys = (self._overlapping if how.overlaps else self._separate)(how, joined[0], joined[1], width)
        keys = blocks.rope(blocks.norm(keys, f"{name}_norm", il), how.block_positions)
        if how.cache.k_rotation:
            keys = blocks.rotated(keys, how.cache.k_rotation)
        stored = blocks.store_k(how.cache, keys, il)
        kept = [graph.get_rows(new, how.kept) for new in (kv, scores)]
        for rows, state in zip(kept, states, strict=True):
            graph.expand(graph.set_rows(state, rows, how.kept_rows))
        return graph.view(stored, stored.ne, stored.nb[1:])

    def _state(self, width: int, n_rows: int, il: int) -> Node:
        """Return all sequences' states of a compressor's keys, or of their scores (``get_kv_all``)."""
        n_streams = self.blocks.params.n_stream
        state = self.graph.leaf(F32, (width, n_rows, n_streams))
        state.home = self.blocks.places.caches[il]
        return self.graph.view(state, (width, n_rows * n_streams), (state.nb[1],))

    def _separate(self, how: _Compressor, kv: Node, scores: Node, width: int) -> Node:
        """Return the keys of blocks that do not overlap (``build_hca_compressed_kv_from_state``)."""
        graph, n_blocks = self.graph, how.block_positions.ne[0]
        parts = [graph.reshape(graph.get_rows(part, how.read), width, how.ratio, n_blocks) for part in (kv, scores)]
        return self._weighed(parts[0], parts[1])

    def _overlapping(self, how: _Compressor, kv: Node, scores: Node, width: int) -> Node:
        """Return the keys of blocks that read the one before too (``build_overlap_compressed_kv_from_state``)."""
        graph, n_blocks = self.graph, how.block_positions.ne[0]
        rows = [graph.get_rows(self._with_zero_row(part), how.read) for part in (kv, scores)]
        n_read = how.ratio * n_blocks

        def part(x: Node) -> Node:
            half = graph.cont(graph.view(x, (width, n_read), (x.nb[1],)))
            return graph.reshape(half, width, how.ratio, n_blocks)

        halves = [graph.concat(part(each), part(each), 1) for each in rows]
        return self._weighed(halves[0], halves[1])

    def _with_zero_row(self, x: Node) -> Node:
        """Return rows with one behind them that weighs nothing (``dsv4_append_zero_row``)."""
        graph = self.graph
        row = graph.same("scale", graph.view(x, (x.ne[0],), ()))
        return graph.concat(x, graph.reshape(row, x.ne[0], 1), 1)

    def _weighed(self, kv: Node, scores: Node) -> Node:
        """Return each block's mean by its scores."""
        graph = self.graph
        values, weights = (graph.cont(graph.permute(part, 1, 0, 2, 3)) for part in (kv, scores))
        mean = graph.sum_rows(graph.same("mul", values, graph.same("soft_max", weights)))
        return graph.cont(graph.permute(mean, 1, 0, 2, 3))

    def _best(self, indexer: _Compressor, keys: Node, x: Node, low_rank: Node, il: int) -> Node:
        """Return each token's best compressed cells by the indexer's scores (``build_lid_top_k``)."""
        graph, blocks, prefix, (width, _, n_cells, streams) = self.graph, self.blocks, f"blk.{il}.indexer.", keys.ne
        if indexer.cache.k_rotation is None:
            raise KeyError("attention.indexer.key_length")
        q = blocks.project(low_rank, f"{prefix}attn_q_b")
        q = graph.reshape(q, width, q.ne[0] // width, x.ne[1])
        q = blocks.rotated(blocks.rope(q, self.needed_positions()), indexer.cache.k_rotation)
        weights = graph.same("scale", blocks.project(x, f"{prefix}proj"))
        per_stream = x.ne[1] // streams
        q = graph.view(q, (*q.ne[:2], per_stream, streams), (*q.nb[1:3], q.nb[3] // streams))
        by_stream = (weights.nb[1], weights.nb[2] // streams, weights.nb[3] // streams)
        weights = graph.view(weights, (weights.ne[0], per_stream, 1, streams), by_stream)
        scores = graph.new(
            "lightning_indexer", F32, (n_cells, per_stream, 1, streams), q, keys, weights, indexer.cache.mask
        )
        n_best = min(n_cells, int(self.settings.number("attention.indexer.top_k")))
        return graph.cont(graph.new("top_k", I32, (n_best, *scores.ne[1:]), scores))
