"""Decoders that do one thing in a way of their own."""

from __future__ import annotations

from planner.graph import Node
from planner.graphs.decoder import Decoder


class GatedAttentionDecoder(Decoder):
    """Attention weighed by a gate before its projection (src/models/afmoe.cpp, laguna.cpp, spark2-5.cpp)."""

    def attention(self, x: Node, il: int) -> Node:
        """Return a layer's attention, gated per element or per head, projected."""
        graph, blocks, prefix = self.graph, self.blocks, f"blk.{il}.attn_"
        gate = graph.same("unary", blocks.project(x, f"{prefix}gate"))
        q, k, v = self.query_key_value(x, il)
        x = blocks.attention(self.cache(il), q, k, v, il)
        width, n_tokens, n_head = x.ne[0], x.ne[1], self.hparams.n_head[il]
        if gate.ne[0] == n_head:
            heads = graph.reshape(x, width // n_head, n_head, n_tokens)
            x = graph.same("mul", heads, graph.reshape(gate, 1, n_head, n_tokens))
            x = graph.reshape(x, width, n_tokens)
        else:
            x = graph.same("mul", x, gate)
        return blocks.project(x, f"{prefix}output")


class GrokDecoder(Decoder):
    """Experts and a dense part side by side (src/models/grok.cpp)."""

    def feed_forward(self, x: Node, il: int) -> Node:
        """Return the sum of both parts, scaled."""
        routed = super().feed_forward(x, il)
        if not self.blocks.weight(f"blk.{il}.ffn_up.weight"):
            return routed
        return self.graph.same("scale", self.graph.same("add", self.blocks.gated_ffn(x, il), routed))


class ArcticDecoder(Decoder):
    """A dense part after attention, and experts that read the layer's input (src/models/arctic.cpp)."""

    def layer(self, x: Node, il: int, picked: Node | None) -> Node:
        """Return a layer's output."""
        graph, blocks, prefix = self.graph, self.blocks, f"blk.{il}."
        residual = x
        x = self.attention(blocks.norm(x, f"{prefix}attn_norm", il), il)
        if picked:
            x, residual = graph.get_rows(x, picked), graph.get_rows(residual, picked)
        attended = graph.same("add", x, residual)
        dense = blocks.gated_ffn(blocks.norm(attended, f"{prefix}ffn_norm", il), il)
        dense = graph.same("add", dense, attended)
        routed = self.feed_forward(blocks.norm(residual, f"{prefix}ffn_norm_exps", il), il)
        return graph.same("add", routed, dense)


class OpenElmDecoder(Decoder):
    """Heads cut out of one fused product (src/models/openelm.cpp)."""

    def query_key_value(self, x: Node, il: int) -> tuple[Node, Node, Node]:
        """Return query, key and value."""
        graph, blocks, hparams, prefix = self.graph, self.blocks, self.hparams, f"blk.{il}.attn_"
        head, n_head, n_kv, n_tokens = hparams.head_k, hparams.n_head[il], hparams.n_head_kv[il], x.ne[1]
        fused = graph.reshape(blocks.project(x, f"{prefix}qkv"), head, n_head + 2 * n_kv, n_tokens)
        q, k, v = (graph.view(fused, (head, n, n_tokens), fused.nb[1:3]) for n in (n_head, n_kv, n_kv))
        return *self.turned(*self.normed_heads(q, k, prefix, il, skip=False), il), v


class RefactDecoder(Decoder):
    """A decoder that reads no experts, even where the file has some (src/models/refact.cpp)."""

    def feed_forward(self, x: Node, il: int) -> Node:
        """Return a dense part, or only its activation where the file has none."""
        if self.blocks.has(f"blk.{il}.ffn_up.weight"):
            return self.blocks.gated_ffn(x, il)
        return self.graph.same("unary", x)
