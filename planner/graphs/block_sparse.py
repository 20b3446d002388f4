"""Decoders whose attention sees only the blocks of positions that an indexer chose (src/models/minimax-m3.cpp)."""

from __future__ import annotations

from dataclasses import dataclass

from planner.ggml import pad
from planner.graph import F16, F32, I32, I64, Node
from planner.graphs.blocks import CacheInputs
from planner.graphs.decoder import Decoder
from planner.graphs.experts import moe
from planner.graphs.shape import HEADER_MOE

# The positions of an empty cache (llama-kv-cache-msa.cpp, ``get_n_pos``): what a server reserves before any prompt. The
# buffer grows with the longest position later, which llama.cpp does not report beforehand.
_POSITIONS = 256


@dataclass(frozen=True, slots=True)
class _Choice:
    """What all sparse layers share (``llm_graph_input_msa``)."""

    ids: CacheInputs
    bias: Node
    position_mask: Node
    cell_of: Node  # a position's cell
    cell_of_as_float: Node | None  # the same, where one token per sequence is computed
    block_of: Node | None  # a cell's block, where there are more
    mask: Node | None  # the cache's mask in f32


class BlockSparseDecoder(Decoder):
    """MiniMax-M3: dense layers in front, then layers with an indexer; without flash attention all attend densely."""

    _choice: _Choice | None = None

    def caches(self) -> dict[bool, CacheInputs]:
        """Return the inputs of the one cache; the indexer's keys have another."""
        caches, params = super().caches(), self.blocks.params
        if self.blocks.flash_attn and (params.n_seq_max == 1 or not params.kv_unified):
            self._choice = self._inputs(caches[False])
        return caches

    def _inputs(self, cache: CacheInputs) -> _Choice:
        graph, n_tokens, n_streams = self.graph, self.blocks.batch.n_tokens, cache.mask.ne[3]
        size = int(self.settings.number("attention.indexer.block_size"))
        n_positions = pad(_POSITIONS, size)
        by_token = cache.mask.ne[1] == 1
        ids = CacheInputs(graph.input(I64, n_tokens), None, cache.mask, None, None, cache.n_cells)
        return _Choice(
            ids=ids,
            bias=graph.input(F32, n_positions // size, n_tokens),
            position_mask=graph.input(F32, n_positions, n_tokens),
            cell_of=graph.input(I32, n_positions, n_streams),
            cell_of_as_float=graph.input(F32, n_positions, n_streams) if by_token else None,
            block_of=None if by_token else graph.input(I32, cache.n_cells, n_streams),
            mask=None if by_token else graph.cast(cache.mask, F32),
        )

    def attention(self, x: Node, il: int) -> Node:
        """Return a layer's attention, projected."""
        choice = self._choice
        if choice is None or il < self.settings.number("leading_dense_block_count"):
            return super().attention(x, il)
        graph, blocks, cache = self.graph, self.blocks, self.cache(il)
        q, k, v = self.query_key_value(x, il)
        index_q, index_k = (self._indexed(x, part, il) for part in "qk")
        index_cells = blocks.store_k(choice.ids, index_k, il)
        if cache.k_rotation:
            q, k = blocks.rotated(q, cache.k_rotation), blocks.rotated(k, cache.k_rotation)
        if cache.v_rotation:
            v = blocks.rotated(v, cache.v_rotation)
        for node in (q, k, v):
            graph.expand(node)
        k, v = blocks.store_k(cache, k, il), blocks.store_v(cache, v, il)
        if choice.mask is None or choice.block_of is None:
            out = self._gathered(choice, q, k, v, index_q, index_cells)
        else:
            parts = [self._masked(choice, q, k, v, index_q, index_cells) for _ in range(k.ne[3])]
            out = parts[0]
            for part in parts[1:]:
                out = graph.concat(out, part, 1)
        out = blocks.rotated(out, cache.v_rotation) if cache.v_rotation else out
        return blocks.project(out, f"blk.{il}.attn_output")

    def _indexed(self, x: Node, part: str, il: int) -> Node:
        """Return the indexer's query or key, normalized and with positions turned in."""
        graph, blocks, name = self.graph, self.blocks, f"blk.{il}.indexer.{part}"
        x = blocks.project(x, f"{name}_proj", scaled=False)
        head = int(self.settings.number("attention.indexer.key_length"))
        x = blocks.norm(graph.reshape(x, head, x.ne[0] // head, x.ne[1]), f"{name}_norm", il)
        return blocks.rope(x, self.needed_positions())

    def _n_blocks(self, choice: _Choice) -> tuple[int, int, int]:
        """Return a block's positions, how many blocks there are, and how many are chosen."""
        size, n_blocks = int(self.settings.number("attention.indexer.block_size")), choice.bias.ne[0]
        return size, n_blocks, min(n_blocks, int(self.settings.number("attention.indexer.top_k")))

    def _masked(self, choice: _Choice, q: Node, k: Node, v: Node, index_q: Node, index_cells: Node) -> Node:
        """Return one sequence's attention over all its cells, those outside the chosen blocks masked."""
        graph, (_, n_blocks, n_chosen) = self.graph, self._n_blocks(choice)
        if choice.mask is None or choice.block_of is None:
            raise KeyError("attention.indexer")
        n_cells, n_tokens = choice.mask.ne[:2]
        n_positions, (width, n_heads) = choice.cell_of.ne[0], index_q.ne[:2]
        index_q = graph.view(index_q, (width, n_heads, n_tokens), index_q.nb[1:3])
        keys = graph.view(index_cells, (width, n_cells), (index_cells.nb[2],))
        cell_of = graph.view(choice.cell_of, (n_positions,), ())
        row = choice.position_mask.nb[1]
        position_mask = graph.view(choice.position_mask, (n_positions, 1, n_tokens), (row, row))
        block_of = graph.view(choice.block_of, (n_cells,), ())
        mask = graph.view(choice.mask, (n_cells, n_tokens, 1), (choice.mask.nb[1], choice.mask.nb[3]))
        bias = graph.view(choice.bias, (n_blocks, 1, n_tokens), (choice.bias.nb[1],) * 2)
        q = graph.view(q, (*q.ne[:2], n_tokens), q.nb[1:3])
        k, v = (graph.view(part, part.ne[:3], part.nb[1:4]) for part in (k, v))
        scores = graph.mul_mat(graph.get_rows(keys, cell_of), graph.reshape(index_q, width, n_heads * n_tokens))
        scores = graph.inplace("add", graph.reshape(scores, n_positions, n_heads, n_tokens), position_mask)
        best = graph.same("add", graph.new("pool_2d", F32, (n_blocks, n_heads, n_tokens, 1), scores), bias)
        chosen = graph.new("top_k", I32, (n_chosen, n_heads, n_tokens, 1), best)
        hidden = graph.repeat(graph.cast(graph.same("scale", bias), F16), (n_blocks, n_heads, n_tokens, 1))
        shown = graph.same("scale", graph.cast(chosen, F32))
        rows = n_heads * n_tokens
        by_block = graph.set_rows(
            graph.reshape(hidden, 1, n_blocks, rows),
            graph.reshape(shown, 1, n_chosen, rows),
            graph.reshape(chosen, n_chosen, rows),
        )
        by_block = graph.cont(graph.permute_heads(graph.reshape(by_block, n_blocks, n_heads, n_tokens)))
        by_row = graph.cont(graph.transpose(graph.reshape(by_block, n_blocks, rows)))
        by_cell = graph.cont(graph.transpose(graph.get_rows(by_row, block_of)))
        by_cell = graph.inplace("add", graph.reshape(by_cell, n_cells, n_tokens, n_heads), mask)
        group_mask = graph.cast(graph.reshape(by_cell, n_cells, n_tokens, 1, n_heads), F16)
        return self._attended(
            q, graph.permute(k, 0, 3, 1, 2), graph.permute(v, 0, 3, 1, 2), group_mask, q.ne[1] // n_heads
        )

    def _gathered(self, choice: _Choice, q: Node, k: Node, v: Node, index_q: Node, index_cells: Node) -> Node:
        """Return the attention of one token per sequence over the cells of the chosen blocks."""
        graph, (size, n_blocks, n_chosen) = self.graph, self._n_blocks(choice)
        if choice.cell_of_as_float is None:
            raise KeyError("attention.indexer")
        n_positions, streams = choice.cell_of.ne[:2]
        n_cells, (width, n_heads) = k.ne[2], index_q.ne[:2]
        keys = graph.view(index_cells, (width, n_cells, streams), index_cells.nb[2:4])
        keys = graph.reshape(graph.get_rows(keys, choice.cell_of), width, n_positions, 1, streams)
        scores = graph.mul_mat(keys, graph.reshape(index_q, width, n_heads, 1, streams))
        scores = graph.inplace("add", scores, graph.reshape(choice.position_mask, n_positions, 1, 1, streams))
        best = graph.new("pool_2d", F32, (n_blocks, n_heads, 1, streams), scores)
        best = graph.same("add", best, graph.reshape(choice.bias, n_blocks, 1, 1, streams))
        chosen = graph.new("top_k", I32, (n_chosen, n_heads, 1, streams), best)
        firsts = graph.reshape(graph.same("scale", graph.cast(chosen, F32)), 1, n_chosen, n_heads, streams)
        shape, n_rows = (size, n_chosen, n_heads, streams), size * n_chosen
        steps = graph.reshape(graph.new("arange", F32, (size, 1, 1, 1)), size, 1, 1)
        positions = graph.same("add", graph.repeat(firsts, shape), steps)
        positions = graph.cast(graph.reshape(positions, n_rows * n_heads, streams), I32)
        cells = graph.get_rows(graph.reshape(choice.cell_of_as_float, 1, n_positions, streams), positions)
        heads = graph.reshape(graph.new("arange", F32, (n_heads, 1, 1, 1)), 1, 1, n_heads)
        rows = graph.same("add", graph.same("scale", graph.reshape(cells, *shape)), heads)
        rows = graph.cast(graph.reshape(rows, n_rows * n_heads, streams), I32)
        seen = []
        for part in (k, v):
            flat = graph.view(part, (part.ne[0], n_heads * n_cells, streams), (part.nb[1], part.nb[3]))
            gathered = graph.reshape(graph.get_rows(flat, rows), part.ne[0], n_rows, 1, n_heads * streams)
            type_ = F16 if part.type.quantized else part.type
            seen.append(gathered if gathered.type is type_ else graph.cast(gathered, type_))
        shown = graph.get_rows(graph.reshape(choice.position_mask, 1, n_positions, streams), positions)
        mask = graph.cast(graph.reshape(shown, n_rows, 1, 1, n_heads * streams), F16)
        return self._attended(q, seen[0], seen[1], mask, q.ne[1] // n_heads)

    def _attended(self, q: Node, k: Node, v: Node, mask: Node, per_group: int) -> Node:
        """Return attention of each group of heads over its own cells (``build_attn_msa_fa``)."""
        graph, (head, n_head, n_tokens, _), groups = self.graph, q.ne, k.ne[3]
        rows = n_head * n_tokens // (per_group * groups)
        q = graph.permute(graph.reshape(q, head, per_group, groups, rows), 0, 2, 3, 1)
        out = graph.permute(graph.flash_attn(q, k, v, mask, None), 0, 1, 3, 2)
        out = out if out.is_contiguous else graph.cont(out)
        return graph.reshape(out, head * n_head, n_tokens)

    def feed_forward(self, x: Node, il: int) -> Node:
        """Return a feed-forward part, whose scales are not read."""
        blocks = self.blocks
        if il < self.settings.number("leading_dense_block_count"):
            return blocks.gated_ffn(x, il)
        return self.graph.same("add", moe(blocks, x, il, HEADER_MOE, self.settings), blocks.gated_ffn(x, il, "_shexp"))
