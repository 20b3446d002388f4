"""Decoders with latent attention (src/models/deepseek2.cpp): one compressed K per token, shared by all heads."""

from __future__ import annotations

from planner.graph import F32, Node
from planner.graphs.blocks import CacheInputs
from planner.graphs.decoder import Decoder


class LatentDecoder(Decoder):
    """The attention of DeepSeek-V2 and its kin, with the projections absorbed as converted files have them."""

    def caches(self) -> dict[bool, CacheInputs]:
        """Return the inputs of the cache and, where layers are windowed, of theirs."""
        blocks = self.blocks
        caches = {False: blocks.cache_inputs(blocks.params.n_ctx_seq, latent=True)}
        if any(self.hparams.swa_layers):
            caches[True] = blocks.cache_inputs(blocks.window_cells(), latent=True)
        return caches

    def attention(self, x: Node, il: int) -> Node:
        """Return a layer's attention, projected. Raises KeyError where the file has no absorbed projections."""
        graph, blocks = self.graph, self.blocks
        prefix, n_head, n_tokens = f"blk.{il}.attn_", self.hparams.n_head[il], x.ne[1]
        rope = int(self.settings.number("rope.dimension_count"))
        q = self.query(x, il)
        head = q.ne[0] // n_head
        q = graph.reshape(q, head, n_head, n_tokens)
        both = graph.mul_mat(blocks.needed(f"{prefix}kv_a_mqa.weight"), x)
        latent = both.ne[0] - rope
        k_rope = graph.view(both, (rope, 1, n_tokens), (both.nb[1], both.nb[1]))
        if blocks.has(f"{prefix}k_norm.weight"):
            k_rope = blocks.norm(k_rope, f"{prefix}k_norm", il)
        k_rope = self.turned_part(k_rope)
        compressed = blocks.norm(graph.view(both, (latent, n_tokens), (both.nb[1],)), f"{prefix}kv_a_norm", il)
        q_plain = graph.view(q, (head - rope, n_head, n_tokens), q.nb[1:3])
        q_rope = self.turned_part(graph.view(q, (rope, n_head, n_tokens), q.nb[1:3]))
        absorbed = graph.mul_mat(blocks.needed(f"{prefix}k_b.weight"), graph.permute_heads(q_plain))
        query = self.tempered(graph.concat(graph.permute_heads(absorbed), q_rope), il)
        value = graph.reshape(compressed, latent, 1, n_tokens)
        key = graph.concat(value, k_rope)
        return self.projected(self.attended(query, key, value, il), x, il)

    def turned_part(self, x: Node) -> Node:
        """Return the part of query or key that knows its position."""
        return self.blocks.rope(x, self.needed_positions())

    def projected(self, out: Node, x: Node, il: int) -> Node:
        """Return what the heads saw, projected; ``x`` is the layer's input."""
        del x
        return self.blocks.project(out, f"blk.{il}.attn_output")

    def attended(self, query: Node, key: Node, value: Node, il: int) -> Node:
        """Return what the heads see of the cache."""
        return self.blocks.latent_attention(self.cache(il), query, key, value, il)

    def query(self, x: Node, il: int) -> Node:
        """Return the query, by way of a low rank where the file has one."""
        blocks, prefix = self.blocks, f"blk.{il}.attn_"
        if blocks.weight(f"{prefix}q.weight"):
            return self.graph.mul_mat(blocks.needed(f"{prefix}q.weight"), x)
        return self.graph.mul_mat(blocks.needed(f"{prefix}q_b.weight"), self.low_rank_query(x, il))

    def low_rank_query(self, x: Node, il: int) -> Node:
        """Return the query's compressed form, normalized."""
        blocks, prefix = self.blocks, f"blk.{il}.attn_q_a"
        return blocks.norm(self.graph.mul_mat(blocks.needed(f"{prefix}.weight"), x), f"{prefix}_norm", il)


class ExpandedLatentDecoder(LatentDecoder):
    """Compressed keys and values that are expanded again before they are cached (src/models/plm.cpp)."""

    def caches(self) -> dict[bool, CacheInputs]:
        """Return the inputs of the one cache, of keys and values."""
        return {False: self.blocks.cache_inputs(self.blocks.params.n_ctx_seq)}

    def attention(self, x: Node, il: int) -> Node:
        """Return a layer's attention, projected."""
        graph, blocks, positions, hparams = self.graph, self.blocks, self.needed_positions(), self.hparams
        prefix, n_head, n_tokens = f"blk.{il}.attn_", hparams.n_head[il], x.ne[1]
        rope, factors = int(self.settings.number("rope.dimension_count")), blocks.rope_factors(il)
        latent = int(self.settings.number("attention.kv_lora_rank"))
        q = graph.reshape(self.query(x, il), hparams.head_k, n_head, n_tokens)
        both = graph.mul_mat(blocks.needed(f"{prefix}kv_a_mqa.weight"), x)
        compressed = blocks.norm(graph.view(both, (latent, n_tokens), (both.nb[1],)), f"{prefix}kv_a_norm", il)
        k_rope = graph.view(both, (rope, 1, n_tokens), (both.nb[1], both.nb[1]))
        kv = graph.mul_mat(blocks.needed(f"{prefix}kv_b.weight"), compressed)
        plain = hparams.head_k - rope
        heads = (F32.block_bytes * (plain + hparams.head_v), kv.nb[1])
        k_plain = graph.view(kv, (plain, n_head, n_tokens), heads)
        value = graph.cont(graph.view(kv, (hparams.head_v, n_head, n_tokens), heads))
        k_rope = graph.repeat(blocks.rope(k_rope, positions, factors), (rope, n_head, n_tokens, 1))
        key = graph.concat(k_plain, k_rope)
        out = blocks.attention(self.cache(il), blocks.rope(q, positions, factors), key, value, il)
        return blocks.project(out, f"{prefix}output")


class MiniCpm3Decoder(ExpandedLatentDecoder):
    """The same with scaled rows for the output (src/models/minicpm3.cpp)."""

    def logits(self, x: Node) -> Node:
        """Return the output rows' logits, the rows scaled first."""
        return super().logits(self.graph.same("scale", x))
