"""Hyper-connections that backends compute in one operation each (src/models/deepseek4.cpp, glm5-next.cpp).

Where a probe finds one of them away from its layer, llama.cpp builds it from plain operations instead
(src/llama-context.cpp, ``resolve_fused_ops``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from planner.graph import F32, HC_COMB, HC_POST, HC_PRE, Node
from planner.graphs.blocks import Blocks
from planner.graphs.decoder import Decoder

_UNIT: Final = F32.block_bytes


@dataclass(frozen=True, slots=True)
class Connection:
    """How a part's output goes back to the streams: its weight in each, and the streams' mixture."""

    post: Node
    comb: Node


def mixes(blocks: Blocks, streams: Node, name: str) -> Node:
    """Return the streams' weights before they are scaled."""
    flat = blocks.graph.reshape(streams, streams.ne[0] * streams.ne[1], streams.ne[2])
    return blocks.graph.mul_mat(blocks.needed(f"{name}_fn.weight"), blocks.graph.same("rms_norm", flat))


class FusedHyperDecoder(Decoder):
    """Several residual streams; a part reads a mixture of them and is written back to all."""

    def streams(self, x: Node) -> Node:
        """Return the first layer's streams: each the embedded tokens."""
        graph, (n_embd, n_tokens, _, _) = self.graph, x.ne
        shape = (n_embd, self.settings.count("hyper_connection.count"), n_tokens, 1)
        return graph.repeat(graph.reshape(x, n_embd, 1, n_tokens), shape)

    def picked_streams(self, streams: Node, rows: Node) -> Node:
        """Return the streams of the rows that yield outputs."""
        graph, (n_embd, n_streams, n_tokens, _) = self.graph, streams.ne
        flat = graph.get_rows(graph.reshape(streams, n_embd * n_streams, n_tokens), rows)
        return graph.reshape(flat, n_embd, n_streams, rows.ne[0])

    def read(self, streams: Node, name: str, il: int) -> tuple[Node, Connection]:
        """Return a part's input, and its way back (``build_hc_pre``)."""
        graph, blocks, (_, n_streams, n_tokens, _) = self.graph, self.blocks, streams.ne
        mixed = mixes(blocks, streams, name)
        scale, base = blocks.needed(f"{name}_scale.weight"), blocks.needed(f"{name}_base.weight")

        def part(width: int) -> Node:
            x = graph.view(mixed, (width, n_tokens), (mixed.nb[1],))
            x = graph.same("mul", x, graph.view(scale, (1,), ()))
            return graph.same("add", x, graph.view(base, (width,), ()))

        pre, post = (graph.same("scale", graph.same("unary", part(n_streams))) for _ in range(2))
        if HC_COMB in blocks.batch.unfused:
            comb = self._balanced(graph.reshape(part(n_streams * n_streams), n_streams, n_streams, n_tokens))
        else:
            comb = graph.new(HC_COMB, F32, (n_streams, n_streams, n_tokens, 1), mixed, scale, base)
            graph.fused.append((comb, il))
        return self._mixture(streams, pre, il), Connection(post, comb)

    def head(self, streams: Node) -> Node:
        """Return the streams' mixture behind the last layer (``build_hc_head``)."""
        graph, blocks = self.graph, self.blocks
        weights = graph.same("mul", mixes(blocks, streams, "output_hc"), blocks.needed("output_hc_scale.weight"))
        weights = graph.same("add", weights, blocks.needed("output_hc_base.weight"))
        return self._mixture(streams, graph.same("scale", graph.same("unary", weights)), -1)

    def mean(self, streams: Node) -> Node:
        """Return the streams' mean (``build_hc_mean``)."""
        graph, (n_embd, n_streams, n_tokens, _) = self.graph, streams.ne
        parts = [graph.view(streams, (n_embd, n_tokens), (streams.nb[2],)) for _ in range(n_streams)]
        total = parts[0]
        for part in parts[1:]:
            total = graph.same("add", total, part)
        return graph.same("scale", total)

    def written(self, x: Node, streams: Node, back: Connection, il: int) -> Node:
        """Return the streams mixed, a part's output added to each (``build_hc_post``)."""
        graph, (n_embd, n_streams, n_tokens, _), post, comb = self.graph, streams.ne, back.post, back.comb
        if HC_POST not in self.blocks.batch.unfused:
            result = graph.new(HC_POST, F32, (n_embd, n_streams, n_tokens, 1), x, streams, post, comb)
            graph.fused.append((result, il))
            return result
        joined: Node | None = None
        for _ in range(n_streams):
            stream = graph.same("mul", x, graph.view(post, (1, n_tokens), (post.nb[1],)))
            for _ in range(n_streams):
                old = graph.view(streams, (n_embd, n_tokens), (streams.nb[2],))
                weighed = graph.same("mul", old, graph.view(comb, (1, n_tokens), (comb.nb[2],)))
                stream = graph.same("add", stream, weighed)
            stream = graph.reshape(stream, n_embd, 1, n_tokens)
            joined = graph.concat(joined, stream, 1) if joined else stream
        if joined is None:
            raise KeyError("hyper_connection.count")
        return joined

    def _mixture(self, streams: Node, weights: Node, il: int) -> Node:
        graph, (n_embd, n_streams, n_tokens, _) = self.graph, streams.ne
        if il >= 0 and HC_PRE not in self.blocks.batch.unfused:
            result = graph.new(HC_PRE, F32, (n_embd, n_tokens, 1, 1), streams, weights)
            graph.fused.append((result, il))
            return result
        total: Node | None = None
        for _ in range(n_streams):
            stream = graph.view(streams, (n_embd, n_tokens), (streams.nb[2],))
            weighed = graph.same("mul", stream, graph.view(weights, (1, n_tokens), (weights.nb[1],)))
            total = graph.same("add", total, weighed) if total else weighed
        if total is None:
            raise KeyError("hyper_connection.count")
        return total

    def _balanced(self, comb: Node) -> Node:
        """Return the mixture's weights, rows and columns normalized in turn (``build_hc_sinkhorn``)."""
        graph = self.graph
        epsilon = graph.same("fill", graph.leaf(F32, (1,)))
        comb = graph.same("add", graph.same("soft_max", comb), epsilon)
        for step in range(max(1, self.settings.count("hyper_connection.sinkhorn_iterations"))):
            if step:
                comb = graph.same("div", comb, graph.same("add", graph.sum_rows(comb), epsilon))
            columns = graph.sum_rows(graph.cont(graph.permute(comb, 1, 0, 2, 3)))
            comb = graph.same("div", comb, graph.permute(graph.same("add", columns, epsilon), 1, 0, 2, 3))
        return comb
