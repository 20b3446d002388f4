"""Decoders that route to their experts in a way of their own."""

from __future__ import annotations

from planner.graph import F32, I32, Node
from planner.graphs.decoder import NO_ROPE_STEP, Decoder
from planner.graphs.experts import mixed, moe, normalized, router_scores
from planner.graphs.shape import Moe

_MOE = Moe()


class SmallThinkerDecoder(Decoder):
    """A router that reads a layer's input, before attention (src/models/smallthinker.cpp)."""

    def layer(self, x: Node, il: int, picked: Node | None) -> Node:
        """Return a layer's output."""
        graph, blocks, prefix, residual = self.graph, self.blocks, f"blk.{il}.", x
        scores = blocks.project(x, f"{prefix}ffn_gate_inp")
        x = self.attention(blocks.norm(x, f"{prefix}attn_norm", il), il)
        if picked:
            x, residual, scores = (graph.get_rows(node, picked) for node in (x, residual, scores))
        residual = graph.same("add", x, residual)
        x = blocks.norm(residual, f"{prefix}ffn_norm", il)
        return graph.same("add", moe(blocks, x, il, self.shape.moe or _MOE, self.settings, scores), residual)

    def uses_rope(self, il: int) -> bool:
        """Say whether a layer turns positions in: all but every fourth from the first on."""
        return not any(self.hparams.swa_layers) or il % NO_ROPE_STEP != 0


class GroveMoeDecoder(Decoder):
    """Experts in groups, each with a small expert that reads what the large ones gave (src/models/grovemoe.cpp)."""

    def feed_forward(self, x: Node, il: int) -> Node:
        """Return the sum of both kinds of experts."""
        graph, blocks, used = self.graph, self.blocks, self.hparams.n_expert_used
        scores = router_scores(blocks, x, il)
        n_expert = scores.ne[0]
        n_groups = n_expert // int(self.settings.number("experts_per_group"))
        large = mixed(blocks, x, il, _MOE, *self._routed(scores, used))
        weighed = self._routed(scores, min(used, n_groups), groups=n_groups != n_expert)
        small = mixed(blocks, large, il, _MOE, *weighed, "chexps")
        return graph.same("add", large, graph.same("scale", small))

    def _routed(self, scores: Node, used: int, *, groups: bool = False) -> tuple[Node, Node]:
        """Return the chosen experts, or their groups, and their weights."""
        graph = self.graph
        probabilities = graph.same("soft_max", scores)
        chosen = graph.top_k(graph.same("unary", scores), used)
        if groups:
            as_numbers = graph.same("scale", graph.new("cpy", F32, chosen.ne, chosen))
            chosen = graph.new("cpy", I32, chosen.ne, as_numbers)
        flat = graph.reshape(probabilities, 1, *scores.ne[:2])
        return chosen, normalized(graph, graph.get_rows(flat, chosen))


class Cohere2MoeDecoder(Decoder):
    """Attention and experts side by side, with shared experts averaged in (src/models/cohere2moe.cpp)."""

    def feed_forward(self, x: Node, il: int) -> Node:
        """Return a feed-forward part."""
        out = super().feed_forward(x, il)
        routed = self.blocks.has(f"blk.{il}.ffn_gate_inp.weight") and self.blocks.has(f"blk.{il}.ffn_up_shexp.weight")
        return self.graph.same("scale", out) if routed else out

    def uses_rope(self, il: int) -> bool:
        """Say whether a layer turns positions in: windowed ones, and the dense ones in front."""
        return self.hparams.swa_layers[il] or il < self.settings.number("leading_dense_block_count")
