"""T5: biases by distance instead of positions, and a decoder that reads an encoder's output (src/models/t5.cpp)."""

from __future__ import annotations

from planner.graph import F16, F32, I32, Node
from planner.graphs.decoder import Decoder
from planner.graphs.uncached import Encoder


class T5Decoder(Decoder):
    """The decoder, whose graph is the one that is reserved; the encoder's output has the trained length."""

    side = "dec"

    def layers(self, x: Node, rows: Node) -> Node:
        """Return the last layer's output."""
        graph, blocks, hparams, n_tokens = self.graph, self.blocks, self.hparams, x.ne[1]
        n_encoded = hparams.n_ctx_train or 0
        self._encoded = graph.input(F32, hparams.n_embd, n_encoded)
        self._cross_mask = graph.input(F16 if blocks.flash_attn else F32, n_encoded, n_tokens)
        self._buckets = graph.input(I32, blocks.params.n_ctx_seq, n_tokens)
        n_layer = int(self.settings.number("decoder_block_count")) or hparams.n_layer
        for il in range(min(n_layer, len(blocks.places.layers))):
            x = self.layer(x, il, rows if il == n_layer - 1 else None)
        return x

    def layer(self, x: Node, il: int, picked: Node | None) -> Node:
        """Return a layer's output."""
        graph, blocks, prefix = self.graph, self.blocks, f"dec.blk.{il}."
        normed = blocks.norm(x, f"{prefix}attn_norm", il)
        q, k, v = self.heads(normed, normed, f"{prefix}attn_", il)
        attended = blocks.attention(self.cache(il), q, k, v, il, bias=self.distance_bias(self._buckets, il))
        x = graph.same("add", blocks.project(attended, f"{prefix}attn_o"), x)
        normed = blocks.norm(x, f"{prefix}cross_attn_norm", il)
        q, k, v = self.heads(normed, self._encoded, f"{prefix}cross_attn_", il)
        crossed = blocks.uncached_attention(self._cross_mask, q, k, v, il)
        crossed = blocks.project(crossed, f"{prefix}cross_attn_o")
        if picked:
            crossed, x = graph.get_rows(crossed, picked), graph.get_rows(x, picked)
        x = graph.same("add", crossed, x)
        return graph.same("add", self.feed_forward(blocks.norm(x, f"{prefix}ffn_norm", il), il), x)

    def heads(self, x: Node, seen: Node, prefix: str, il: int) -> tuple[Node, Node, Node]:
        """Return query, key and value as heads, the latter two of what is seen."""
        graph, blocks, hparams = self.graph, self.blocks, self.hparams
        q = graph.reshape(blocks.project(x, f"{prefix}q"), hparams.head_k, hparams.n_head[il], x.ne[1])
        k, v = (
            graph.reshape(blocks.project(seen, prefix + part), head, hparams.n_head_kv[il], seen.ne[1])
            for part, head in (("k", hparams.head_k), ("v", hparams.head_v))
        )
        return q, k, v

    def distance_bias(self, buckets: Node, il: int) -> Node:
        """Return what is added to each head's scores (``build_pos_bias``)."""
        graph, blocks, (n_cells, n_tokens, _, _) = self.graph, self.blocks, buckets.ne
        own = blocks.weight(f"{self.side}.blk.{il}.attn_rel_b.weight")
        table = own or blocks.needed(f"{self.side}.blk.0.attn_rel_b.weight")
        bias = graph.get_rows(table, graph.reshape(buckets, n_cells * n_tokens))
        return graph.cont(graph.permute(graph.reshape(bias, bias.ne[0], n_cells, n_tokens), 2, 0, 1, 3))

    def feed_forward(self, x: Node, il: int) -> Node:
        """Return a feed-forward part, gated where the file has a gate."""
        blocks, prefix = self.blocks, f"{self.side}.blk.{il}.ffn_"
        up = blocks.project(x, f"{prefix}up")
        gate = blocks.project(x, f"{prefix}gate") if blocks.has(f"{prefix}gate.weight") else None
        return blocks.project(blocks.activated(gate, up), f"{prefix}down")


class T5Encoder(Encoder, T5Decoder):
    """The encoder alone (src/models/t5encoder.cpp)."""

    side = "enc"

    def layers(self, x: Node, rows: Node) -> Node:
        """Return the last layer's output, of the rows that yield outputs."""
        self._buckets = self.graph.input(I32, x.ne[1], x.ne[1])
        return Decoder.layers(self, x, rows)

    def layer(self, x: Node, il: int, picked: Node | None) -> Node:
        """Return a layer's output."""
        graph, blocks, prefix = self.graph, self.blocks, f"enc.blk.{il}."
        normed = blocks.norm(x, f"{prefix}attn_norm", il)
        q, k, v = self.heads(normed, normed, f"{prefix}attn_", il)
        bias = self.distance_bias(self._buckets, il)
        attended = blocks.uncached_attention(self._masks[False], q, k, v, il, bias=bias)
        attended = blocks.project(attended, f"{prefix}attn_o")
        if picked:
            attended, x = graph.get_rows(attended, picked), graph.get_rows(x, picked)
        x = graph.same("add", attended, x)
        return graph.same("add", self.feed_forward(blocks.norm(x, f"{prefix}ffn_norm", il), il), x)
