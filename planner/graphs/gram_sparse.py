"""Qwen 4's preview: delta nets, attention over chosen blocks, hashed n-grams (src/models/qwen4exp.cpp)."""

from __future__ import annotations

from dataclasses import dataclass

from planner.graph import F32, HC_POST, HC_PRE, I32, I64, Node
from planner.graphs.blocks import Blocks, CacheInputs
from planner.graphs.delta_net import DeltaNetDecoder
from planner.graphs.recurrent import UNIT_BYTES
from planner.graphs.shape import MOST_REPEATED, Settings, Shape

_POSITIONS = 4  # of a token, for rope in several dimensions


@dataclass(frozen=True, slots=True)
class _Choice:
    """What layers of one compression share (``llm_graph_input_qsa``)."""

    ids: CacheInputs
    block_of: Node  # a cell's block
    members: Node
    block_positions: Node
    bias: Node


class GramSparseDecoder(DeltaNetDecoder):
    """Between gated hyper-connections; one layer adds what its tokens' n-grams hash to."""

    def __init__(self, blocks: Blocks, settings: Settings, shape: Shape) -> None:
        super().__init__(blocks, settings, shape)
        self._choices: dict[int, _Choice] = {}
        self._n_streams = settings.count("hyper_connection.count")

    def layers(self, x: Node, rows: Node) -> Node:
        """Return the streams' mixture after the last layer, which stands for the output norm."""
        graph, (n_embd, n_tokens, _, _) = self.graph, x.ne
        n_heads = (int(self.settings.number("ple.ngram_size")) - 1) * int(self.settings.number("ple.heads_per_ngram"))
        self._grams: Node | None = None
        if n_heads > 0:
            table = self.blocks.needed("per_layer_token_embd.weight")
            grams = graph.get_rows(table, graph.input(I32, n_heads * n_tokens))
            self._grams = graph.reshape(grams, table.ne[0] * n_heads, n_tokens)
            graph.expand(self._grams)
        streams = graph.repeat(graph.reshape(x, n_embd, 1, n_tokens), (n_embd, self._n_streams, n_tokens, 1))
        return self._mixed(super().layers(streams, rows), "output_hc", -1)[0]

    def output_rows(self, x: Node, rows: Node) -> Node:
        """Return the rows that yield outputs, which the last layer has picked."""
        del rows
        x.is_output = True
        return x

    def layer(self, x: Node, il: int, picked: Node | None) -> Node:
        """Return the streams after a layer."""
        graph, prefix = self.graph, f"blk.{il}."
        if self._grams and self.blocks.has(f"{prefix}ple_key.weight"):
            x = self._with_grams(x, self._grams, il)
        mixture, normed = self._mixed(x, f"{prefix}hc_attn", il)
        weights = self.blocks.project(normed, f"{prefix}hc_attn_inject")
        attended = self.attention(mixture, il)
        if picked:
            attended, weights = graph.get_rows(attended, picked), graph.get_rows(weights, picked)
            flat = graph.get_rows(graph.reshape(x, x.ne[0] * self._n_streams, x.ne[2]), picked)
            x = graph.reshape(flat, x.ne[0], self._n_streams, picked.ne[0])
        x = self._combined(x, attended, weights, il)
        mixture, normed = self._mixed(x, f"{prefix}hc_ffn", il)
        weights = self.blocks.project(normed, f"{prefix}hc_ffn_inject")
        return self.blocks.pin(self._combined(x, self.feed_forward(mixture, il), weights, il), il)

    # -----------------------------------------------------------------------------------------------------------------
    # Hyper-connections

    def _mixed(self, streams: Node, name: str, il: int) -> tuple[Node, Node]:
        """Return the streams' gated mean, and the streams normalized (``build_hc_mix``)."""
        graph, blocks, (n_embd, n_streams, n_tokens, _) = self.graph, self.blocks, streams.ne
        normed = graph.reshape(self._normed(streams, f"{name}_norm"), n_embd * n_streams, n_tokens)
        low_rank = graph.same("unary", graph.same("scale", blocks.project(normed, f"{name}_down")))
        gate = blocks.project(low_rank, f"{name}_up")
        if il >= 0 and HC_PRE not in blocks.batch.unfused:
            by_stream = (graph.reshape(part, n_embd, n_streams, n_tokens) for part in (normed, gate))
            mixture = graph.new(HC_PRE, F32, (n_embd, n_tokens, 1, 1), *by_stream)
            graph.fused.append((mixture, il))
            return mixture, normed
        gated = graph.same("mul", normed, graph.same("unary", gate))
        gated = graph.reshape(gated, n_embd, n_streams, n_tokens)
        parts = [graph.view(gated, (n_embd, n_tokens), (gated.nb[2],)) for _ in range(n_streams)]
        mixture = graph.cont(parts[0])
        for part in parts[1:]:
            mixture = graph.same("add", mixture, part)
        return graph.same("scale", mixture), normed

    def _combined(self, streams: Node, x: Node, weights: Node, il: int) -> Node:
        """Return the streams with a part's output added to each, weighed (``build_hc_combine``)."""
        graph, (n_embd, n_streams, n_tokens, _) = self.graph, streams.ne
        for op in ("scale", "unary", "scale"):
            weights = graph.same(op, weights)
        if HC_POST not in self.blocks.batch.unfused:
            result = graph.new(HC_POST, F32, streams.ne, x, streams, weights)
            graph.fused.append((result, il))
            return result
        spread = graph.repeat(graph.reshape(x, n_embd, 1, n_tokens), (n_embd, n_streams, n_tokens, 1))
        weights = graph.reshape(weights, 1, n_streams, n_tokens)
        return graph.same("add", streams, graph.same("mul", spread, weights))

    def _normed(self, streams: Node, name: str) -> Node:
        """Return each stream normalized."""
        return self.graph.same("mul", self.graph.same("rms_norm", streams), self.blocks.needed(f"{name}.weight"))

    # -----------------------------------------------------------------------------------------------------------------
    # Delta nets and n-grams

    def looked_back(self, x: Node, kept: int, il: int) -> Node:
        """Return each sequence's new inputs behind the last ones before, which move on."""
        return self._behind(x, kept, self.state_cache(self.hparams.n_embd_r, il))

    def _behind(self, x: Node, kept: int, cache: Node) -> Node:
        """Return inputs behind the last ones before, of which a copy is kept (``build_conv_state_at``)."""
        graph, channels = self.graph, x.ne[0]
        states = graph.reshape(self.states(cache), kept, channels, self.n_seqs)
        joined = graph.concat(states, graph.transpose(x))
        self.keep(graph.cont(graph.view(joined, (kept, channels, self.n_seqs), joined.nb[1:3])), cache)
        return joined

    def _with_grams(self, streams: Node, grams: Node, il: int) -> Node:
        """Return the streams with what the n-grams hash to added, gated by the streams (``build_ple``)."""
        graph, blocks, prefix, (n_embd, n_streams, n_tokens, _) = self.graph, self.blocks, f"blk.{il}.ple_", streams.ne
        key, value = blocks.project(grams, f"{prefix}key"), blocks.project(grams, f"{prefix}value")
        key = self._normed(graph.reshape(key, n_embd, n_streams, n_tokens), f"{prefix}norm_key")
        query = self._normed(graph.reshape(streams, n_embd, n_streams, n_tokens), f"{prefix}norm_query")
        score = graph.same("scale", graph.sum_rows(graph.same("mul", key, query)))
        size = graph.same("sqrt", graph.same("clamp", graph.same("unary", score)))
        gate = graph.same("unary", graph.same("mul", graph.same("unary", score), size))
        value = graph.repeat(graph.reshape(value, n_embd, 1, n_tokens), (n_embd, n_streams, n_tokens, 1))
        gated = graph.same("mul", value, gate)
        width = n_embd * n_streams
        flat = graph.reshape(gated, width, n_tokens)
        normed = self._normed(graph.reshape(flat, n_embd, n_streams, n_tokens), f"{prefix}norm_conv")
        normed = graph.reshape(normed, width, n_tokens)
        kernel = blocks.needed(f"{prefix}conv1d.weight")
        kept = (kernel.ne[0] - 1) * int(self.settings.number("ple.ngram_size"))
        inputs = graph.reshape(normed, width, self.n_seq_tokens, self.n_seqs)
        joined = self._behind(inputs, kept, self.state_cache(kept * width, il))
        mixed = graph.cont(graph.same("unary", self._convolved_apart(joined, kernel)))
        return graph.same("add", streams, graph.same("add", gated, graph.reshape(mixed, n_embd, n_streams, n_tokens)))

    def _convolved_apart(self, joined: Node, kernel: Node) -> Node:
        """Return a convolution over inputs that lie apart, a product per tap."""
        graph, width = self.graph, joined.ne[1]
        total: Node | None = None
        for _ in range(kernel.ne[0]):
            shifted = graph.view(joined, (self.n_seq_tokens, width, self.n_seqs), joined.nb[1:3])
            shifted = graph.cont(graph.transpose(shifted))
            weights = graph.reshape(graph.cont(graph.view(kernel, (1, width), (kernel.nb[1],))), width)
            weights = weights if weights.type is F32 else graph.cast(weights, F32)
            term = graph.same("mul", shifted, weights)
            total = graph.same("add", total, term) if total else term
        if total is None:
            raise KeyError("ple.conv_kernel")
        return total

    # -----------------------------------------------------------------------------------------------------------------
    # Attention over chosen blocks

    def gated_attention(self, x: Node, il: int) -> Node:
        """Return attention over the blocks that an indexer chose, weighed by a gate that comes with the query."""
        graph, blocks, hparams, prefix = self.graph, self.blocks, self.hparams, f"blk.{il}.attn_"
        head, n_head, n_kv, n_tokens = hparams.head_k, hparams.n_head[il], hparams.n_head_kv[il], x.ne[1]
        ratio = int(self.settings.of_layer("attention.compress_ratios", il))
        if ratio > MOST_REPEATED:
            raise KeyError("attention.compress_ratios")
        indexed = ratio > 0 and blocks.has(f"blk.{il}.indexer.k_proj.weight")
        chosen = self._choose(x, ratio, il) if indexed else None
        both, k, v = (blocks.project(x, prefix + part) for part in "qkv")
        stride = (UNIT_BYTES * head * 2, UNIT_BYTES * head * 2 * n_head)
        q = blocks.norm(graph.view(both, (head, n_head, n_tokens), stride), f"{prefix}q_norm", il)
        k = blocks.norm(graph.reshape(k, head, n_kv, n_tokens), f"{prefix}k_norm", il)
        q, k = self.turned(q, k, il)
        v = graph.reshape(v, head, n_kv, n_tokens)
        gate = graph.cont(graph.view(both, (head, n_head, n_tokens), stride), head * n_head, n_tokens)
        cache = self.cache(il)
        mask = blocks.shown_only(cache.mask, chosen, F32) if chosen else None
        out = blocks.attention(cache, q, k, v, il, mask=mask)
        return blocks.project(graph.same("mul", out, graph.same("unary", gate)), f"{prefix}output")

    def _choose(self, x: Node, ratio: int, il: int) -> Node:
        """Return each token's best cells, whole blocks of them (``build_qsa_top_k``)."""
        graph, cache = self.graph, self.cache(il)
        choice = self._choices.get(ratio) or self._choices.setdefault(ratio, self._inputs(cache, ratio))
        n_cells, n_per_stream, _, streams = cache.mask.ne
        keys = self._block_keys(x, choice, ratio, il)
        scores = graph.same("add", self._block_scores(x, keys, n_per_stream, il), choice.bias)
        by_cell = graph.get_rows(graph.cont(graph.permute(scores, 1, 0, 2, 3)), choice.block_of)
        by_cell = graph.cont(graph.permute(by_cell, 1, 0, 2, 3))
        mask = cache.mask if cache.mask.type is F32 else graph.cast(cache.mask, F32)
        by_cell = graph.same("add", by_cell, graph.reshape(mask, n_cells, n_per_stream, streams))
        n_best = min(n_cells, int(self.settings.number("attention.indexer.top_k")) + ratio - 1)
        best = graph.cont(graph.new("top_k", I32, (n_best, n_per_stream, streams, 1), by_cell))
        return graph.reshape(best, n_best, n_per_stream, 1, streams)

    def _inputs(self, cache: CacheInputs, ratio: int) -> _Choice:
        graph, (n_cells, n_per_stream, _, streams) = self.graph, cache.mask.ne
        n_blocks = -(-n_cells // ratio)
        return _Choice(
            ids=CacheInputs(graph.input(I64, n_per_stream * streams), None, cache.mask, None, None, n_cells),
            block_of=graph.input(I32, n_cells, streams),
            members=graph.input(I32, ratio * n_blocks, streams),
            block_positions=graph.input(I32, _POSITIONS * n_blocks * streams),
            bias=graph.input(F32, n_blocks, n_per_stream, streams),
        )

    def _block_keys(self, x: Node, choice: _Choice, ratio: int, il: int) -> Node:
        """Return the mean key of each block's members, normalized and with positions turned in."""
        graph, blocks, prefix = self.graph, self.blocks, f"blk.{il}.indexer."
        width = int(self.settings.number("attention.indexer.key_length"))
        k = graph.reshape(blocks.project(x, f"{prefix}k_proj"), width, 1, x.ne[1])
        cells = blocks.store_k(choice.ids, k, il)
        cells = graph.view(cells, (width, *cells.ne[2:]), cells.nb[2:])
        n_blocks, streams = choice.members.ne[0] // ratio, choice.members.ne[1]
        members = graph.reshape(graph.get_rows(cells, choice.members), width, ratio, n_blocks, streams)
        total: Node | None = None
        for _ in range(ratio):
            each = graph.cont(graph.view(members, (width, n_blocks, streams), members.nb[2:]))
            total = graph.same("add", total, each) if total else each
        if total is None:
            raise KeyError("attention.compress_ratios")
        mean = graph.reshape(graph.same("scale", total), width, n_blocks * streams, 1)
        mean = graph.reshape(blocks.norm(mean, f"{prefix}k_norm", il), width, 1, n_blocks * streams)
        return graph.reshape(blocks.rope(mean, choice.block_positions), width, n_blocks, streams)

    def _block_scores(self, x: Node, keys: Node, n_per_stream: int, il: int) -> Node:
        """Return each token's score of every block, the sum over the indexer's heads."""
        graph, blocks, prefix, (width, n_blocks, streams, _) = self.graph, self.blocks, f"blk.{il}.indexer.", keys.ne
        q = blocks.project(x, f"{prefix}q_proj")
        q = graph.reshape(q, width, q.ne[0] // width, x.ne[1])
        q = blocks.rope(blocks.norm(q, f"{prefix}q_norm", il), self.needed_positions())
        n_heads = q.ne[1]
        if n_heads > MOST_REPEATED:
            raise KeyError(f"{prefix}q_proj.weight")
        scores = graph.mul_mat(keys, graph.reshape(q, width, n_heads * n_per_stream, streams))
        scores = graph.same("unary", graph.reshape(scores, n_blocks, n_heads, n_per_stream, streams))
        slices = [graph.view(scores, (n_blocks, n_per_stream, streams), scores.nb[2:]) for _ in range(n_heads)]
        total = graph.cont(slices[0])
        for each in slices[1:]:
            total = graph.same("add", total, each)
        return total
