"""Granite with adapters that a router within the graph chooses per token (src/models/granite-switch.cpp)."""

from __future__ import annotations

from planner.graph import F32, I32, Node
from planner.graphs.decoder import Decoder


class SwitchedDecoder(Decoder):
    """Every projection has a low-rank delta of each adapter; one more layer's attention chooses among them."""

    def embedding(self) -> Node:
        """Return the rows of the tokens, some of which stand for others."""
        graph, blocks = self.graph, self.blocks
        x = graph.get_rows(blocks.needed("token_embd.weight"), graph.input(I32, blocks.batch.n_tokens))
        return graph.same("scale", x) if self.settings.number("embedding_scale") else x

    def layers(self, x: Node, rows: Node) -> Node:
        """Return the last layer's output."""
        self._adapter = self._routed(x.ne[1])
        return super().layers(x, rows)

    def layer(self, x: Node, il: int, picked: Node | None) -> Node:
        """Return a layer's output."""
        graph, blocks, prefix, residual = self.graph, self.blocks, f"blk.{il}.", x
        x = self.attention(blocks.norm(x, f"{prefix}attn_norm", il), il)
        if picked:
            x, residual = graph.get_rows(x, picked), graph.get_rows(residual, picked)
            by_row = graph.reshape(self._adapter, 1, self._adapter.ne[0])
            self._adapter = graph.reshape(graph.get_rows(by_row, picked), picked.ne[0])
        residual = graph.same("add", self.scaled(x), residual)
        x = self.feed_forward(blocks.norm(residual, f"{prefix}ffn_norm", il), il)
        return graph.same("add", self.scaled(x), residual)

    def attention(self, x: Node, il: int) -> Node:
        """Return a layer's attention, projected."""
        graph, blocks, hparams, prefix, n_tokens = self.graph, self.blocks, self.hparams, f"blk.{il}.attn_", x.ne[1]
        head = hparams.head_k
        fused = graph.mul_mat(blocks.needed(f"{prefix}qkv.weight"), x)
        heads = {"q": hparams.n_head[il], "k": hparams.n_head_kv[il], "v": hparams.n_head_kv[il]}
        parts = {part: graph.cont(graph.view(fused, (head * n, n_tokens), (fused.nb[1],))) for part, n in heads.items()}
        q, k, v = (
            graph.reshape(graph.same("add", parts[part], self._delta(x, prefix + part)), head, n, n_tokens)
            for part, n in heads.items()
        )
        q, k = self.turned(q, k, il)
        return self._switched(blocks.attention(self.cache(il), q, k, v, il), f"{prefix}output")

    def feed_forward(self, x: Node, il: int) -> Node:
        """Return a feed-forward part."""
        prefix = f"blk.{il}.ffn_"
        gate, up = self._switched(x, f"{prefix}gate"), self._switched(x, f"{prefix}up")
        return self._switched(self.graph.same("mul", self.graph.same("unary", gate), up), f"{prefix}down")

    def _routed(self, n_tokens: int) -> Node:
        """Return each token's adapter: what the router's one head finds behind it."""
        graph, router, head = self.graph, self.hparams.n_layer, self.hparams.head_k
        q, k, v = (
            graph.new("pad", F32, (head, 1, n_tokens, 1), graph.reshape(graph.input(F32, n_tokens), 1, 1, n_tokens))
            for _ in range(3)
        )
        out = self.blocks.attention(self.cache(router), q, k, v, router)
        slot = graph.reshape(graph.cont(graph.view(out, (1, n_tokens), (out.nb[1],))), n_tokens)
        return graph.cast(graph.same("unary", graph.same("clamp", slot)), I32)

    def _switched(self, x: Node, name: str) -> Node:
        """Return a product with a weight and the delta of each token's adapter."""
        product = self.graph.mul_mat(self.blocks.needed(f"{name}.weight"), x)
        return self.graph.same("add", product, self._delta(x, name))

    def _delta(self, x: Node, name: str) -> Node:
        graph, blocks, (width, n_tokens, _, _) = self.graph, self.blocks, x.ne
        ids = graph.reshape(self._adapter, 1, n_tokens)
        low_rank = graph.mul_mat_id(blocks.needed(f"{name}.lora_a"), graph.reshape(x, width, 1, n_tokens), ids)
        delta = graph.mul_mat_id(blocks.needed(f"{name}.lora_b"), low_rank, ids)
        return graph.reshape(delta, delta.ne[0], n_tokens)
