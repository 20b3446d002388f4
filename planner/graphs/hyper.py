"""Decoders with hyper-connections: several residual streams, of which each part reads a mixture."""

from __future__ import annotations

from planner.graph import F32, Node
from planner.graphs.fused_hyper import mixes
from planner.graphs.sparse import SparseDecoder


class HyperSparseDecoder(SparseDecoder):
    """Sparse latent attention, gated per element, between hyper-connections (src/models/hy-v4.cpp)."""

    def layers(self, x: Node, rows: Node) -> Node:
        """Return the streams' mixture after the last layer, of the rows that yield outputs."""
        graph, (n_embd, n_tokens, _, _) = self.graph, x.ne
        n_streams = self.settings.count("hyper_connection.count")
        streams = graph.reshape(x, n_embd, 1, n_tokens)
        streams = super().layers(graph.repeat(streams, (n_embd, n_streams, n_tokens, 1)), rows)
        picked = graph.get_rows(graph.reshape(streams, n_embd * n_streams, n_tokens), rows)
        streams = graph.reshape(picked, n_embd, n_streams, rows.ne[0])
        blocks = self.blocks
        weights = graph.same("mul", mixes(blocks, streams, "output_hc"), blocks.needed("output_hc_scale.weight"))
        weights = graph.same("add", weights, blocks.needed("output_hc_base.weight"))
        return self._mixture(streams, graph.same("scale", graph.same("unary", weights)))

    def layer(self, x: Node, il: int, picked: Node | None) -> Node:
        """Return the streams after a layer."""
        del picked
        blocks, prefix = self.blocks, f"blk.{il}."
        mixture, weights = self._read(x, f"{prefix}hc_attn")
        x = self._written(self.attention(blocks.norm(mixture, f"{prefix}attn_norm", il), il), x, weights)
        mixture, weights = self._read(x, f"{prefix}hc_ffn")
        return self._written(self.feed_forward(blocks.norm(mixture, f"{prefix}ffn_norm", il), il), x, weights)

    def turned_and_mixed(self, x: Node, rotation: Node) -> Node:
        """Return the indexer's query or key with positions turned in."""
        del rotation
        return self.blocks.rope(x, self.needed_positions())

    def projected(self, out: Node, x: Node, il: int) -> Node:
        """Return what the heads saw, weighed per element and projected."""
        gate = self.graph.mul_mat(self.blocks.needed(f"blk.{il}.attn_gate.weight"), x)
        gated = self.graph.same("mul", out, self.graph.same("unary", gate))
        return self.blocks.project(gated, f"blk.{il}.attn_output", scaled=False)

    def _read(self, streams: Node, name: str) -> tuple[Node, Node]:
        """Return a part's input, and how much of its output each stream takes (``build_hc_pre``)."""
        graph, blocks, (_, n_streams, n_tokens, _) = self.graph, self.blocks, streams.ne
        mixed = mixes(blocks, streams, name)
        scales, bases = blocks.needed(f"{name}_scale.weight"), blocks.needed(f"{name}_base.weight")

        def weights() -> Node:
            part = graph.view(mixed, (n_streams, n_tokens), (mixed.nb[1],))
            part = graph.same("mul", part, graph.view(scales, (1,), ()))
            part = graph.same("unary", graph.same("add", part, graph.view(bases, (n_streams,), ())))
            return graph.same("scale", part)

        before = weights()
        return self._mixture(streams, before), graph.same("scale", weights())

    def _mixture(self, streams: Node, weights: Node) -> Node:
        """Return the streams' weighted sum (``hy_v4_hc_reduce``)."""
        graph, (n_embd, n_streams, n_tokens, _) = self.graph, streams.ne
        copied = self._copied(streams)
        parts = [
            graph.same(
                "mul",
                graph.view(copied, (n_embd, n_tokens), (copied.nb[2],)),
                graph.view(weights, (1, n_tokens), (weights.nb[1],)),
            )
            for _ in range(n_streams)
        ]
        total = parts[0]
        for part in parts[1:]:
            total = graph.same("add", total, part)
        return self._copied(total)

    def _written(self, x: Node, streams: Node, weights: Node) -> Node:
        """Return the streams with a part's output added to each, weighed (``build_hc_post``)."""
        graph, (n_embd, n_streams, n_tokens, _) = self.graph, streams.ne
        x, weights, old = self._copied(x), self._copied(weights), self._copied(streams)
        joined: Node | None = None
        for _ in range(n_streams):
            stream = graph.view(old, (n_embd, n_tokens), (old.nb[2],))
            added = graph.same("mul", x, graph.view(weights, (1, n_tokens), (weights.nb[1],)))
            stream = graph.reshape(graph.same("add", stream, added), n_embd, 1, n_tokens)
            joined = graph.concat(joined, stream, 1) if joined else stream
        if joined is None:
            raise KeyError("hyper_connection.count")
        return self._copied(joined)

    def _copied(self, x: Node) -> Node:
        """Return a cast, which copies even where the type is the same (``ggml_cast``)."""
        return self.graph.new("cpy", F32, x.ne, x)
