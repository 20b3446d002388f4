"""Models without a cache: every token of a batch sees all of them, or those within a window."""

from __future__ import annotations

from planner.graph import Node
from planner.graphs.blocks import CacheInputs
from planner.graphs.decoder import Decoder


class UncachedDecoder(Decoder):
    """Diffusion models: the layers of a decoder over the batch alone (src/models/dream.cpp, llada.cpp, rnd1.cpp)."""

    def caches(self) -> dict[bool, CacheInputs]:
        """Return no cache's inputs; the masks are over the batch."""
        windowed = any(self.hparams.swa_layers)
        self._masks = {of_window: self.blocks.batch_mask() for of_window in ((False, True) if windowed else (False,))}
        return {}

    def attention(self, x: Node, il: int) -> Node:
        """Return a layer's attention, projected."""
        blocks, prefix, mask = self.blocks, f"blk.{il}.attn_output", self._masks[self.hparams.swa_layers[il]]
        q, k, v = self.query_key_value(x, il)
        if self.shape.scaled_query:
            q = self.graph.same("scale", q)
        return blocks.biased(blocks.project(blocks.uncached_attention(mask, q, k, v, il), prefix), prefix)


class Encoder(UncachedDecoder):
    """Models that yield embeddings only (src/models/eurobert.cpp, neo-bert.cpp, gemma-embedding.cpp)."""

    def logits(self, x: Node) -> Node:
        """Return the output rows: there is no vocabulary behind them."""
        return x


class ModernBertEncoder(Encoder):
    """The first layer's attention reads the embedding's norm (src/models/modern-bert.cpp)."""

    def layer(self, x: Node, il: int, picked: Node | None) -> Node:
        """Return a layer's output."""
        graph, blocks, prefix, residual = self.graph, self.blocks, f"blk.{il}.", x
        if blocks.has(f"{prefix}attn_norm.weight"):
            x = blocks.norm(x, f"{prefix}attn_norm", il, "norm")
        x = self.attention(x, il)
        if picked:
            x, residual = graph.get_rows(x, picked), graph.get_rows(residual, picked)
        residual = graph.same("add", x, residual)
        return graph.same(
            "add", self.feed_forward(blocks.norm(residual, f"{prefix}ffn_norm", il, "norm"), il), residual
        )


class BertEncoder(Encoder):
    """Norms behind each part, and token types added to the embedding (src/models/bert.cpp)."""

    def positioned(self, x: Node, positions: Node) -> Node:
        """Return the tokens' rows with their type and, in the first BERT, learned positions, normalized."""
        graph, blocks = self.graph, self.blocks
        if types := blocks.weight("token_types.weight"):
            x = graph.same("add", x, graph.view(types, (x.ne[0],), ()))
        if self.shape.learned_positions:
            x = graph.same("add", graph.get_rows(blocks.needed("position_embd.weight"), positions), x)
        return blocks.norm(x, "token_embd_norm", 0, "norm")

    def layer(self, x: Node, il: int, picked: Node | None) -> Node:
        """Return a layer's output."""
        graph, blocks, prefix, residual = self.graph, self.blocks, f"blk.{il}.", x
        x = self.attention(x, il)
        if picked:
            x, residual = graph.get_rows(x, picked), graph.get_rows(residual, picked)
        x = blocks.norm(graph.same("add", x, residual), f"{prefix}attn_output_norm", il, "norm")
        if blocks.has(f"{prefix}attn_norm_2.weight"):
            x = blocks.norm(graph.same("add", x, residual), f"{prefix}attn_norm_2", il, "norm")
        x = graph.same("add", self.feed_forward(x, il), x)
        return blocks.norm(x, f"{prefix}layer_output_norm", il, "norm")

    def output_rows(self, x: Node, rows: Node) -> Node:
        """Return the rows that yield outputs, which the last layer has picked and normalized."""
        del rows
        x.is_output = True
        return x

    def normed_heads(self, q: Node, k: Node, prefix: str, il: int, *, skip: bool) -> tuple[Node, Node]:
        """Return query and key normalized as whole rows, where the file has weights for it."""
        del skip
        return self._normed_rows(q, f"{prefix}q_norm", il), self._normed_rows(k, f"{prefix}k_norm", il)

    def _normed_rows(self, x: Node, name: str, il: int) -> Node:
        if not self.blocks.has(f"{name}.weight"):
            return x
        rows = self.graph.reshape(x, x.ne[0] * x.ne[1], x.ne[2])
        return self.graph.reshape(self.blocks.norm(rows, name, il, "norm"), *x.ne)


class GatedBertEncoder(BertEncoder):
    """A gate beside, within, or without (src/models/bert.cpp, for nomic-bert and jina-bert-v2)."""

    def feed_forward(self, x: Node, il: int) -> Node:
        """Return a feed-forward part."""
        blocks = self.blocks
        if blocks.has(f"blk.{il}.ffn_gate.weight"):
            return blocks.gated_ffn(x, il)
        holds_gate = blocks.needed(f"blk.{il}.ffn_up.weight").ne[1] != self.hparams.n_ff[il]
        return blocks.sequential_ffn(x, il, ("glu",) if holds_gate else ("unary",))
