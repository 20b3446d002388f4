"""Decoders whose layers are mostly Kimi's delta attention, with latent attention in between."""

from __future__ import annotations

from planner.graph import F32, Node
from planner.graphs.latent import LatentDecoder
from planner.graphs.recurrent import UNIT_BYTES, RecurrentDecoder

_PARTS = ("q", "k", "v")


class DeltaAttentionDecoder(LatentDecoder, RecurrentDecoder):
    """Kimi Linear (src/models/kimi-linear.cpp)."""

    computes_input_first = True  # before a layer's state is read

    def attention(self, x: Node, il: int) -> Node:
        """Return a layer's attention, latent or by a state per sequence, projected."""
        if self.computes_input_first:
            self.graph.expand(x)
        return self.delta_attention(x, il) if self.hparams.recr_layers[il] else super().attention(x, il)

    def turned_part(self, x: Node) -> Node:
        """Return the part of query or key that would know its position: it does not."""
        return x

    def delta_attention(self, x: Node, il: int) -> Node:
        """Return a delta net with a decay per channel over the sequences' states, fused as backends compute it."""
        graph, blocks, prefix = self.graph, self.blocks, f"blk.{il}."
        head, n_head = int(self.settings.number("kda.head_dim")), self.hparams.n_head[0]
        heads, tail = (head, n_head), (self.n_seq_tokens, self.n_seqs)
        kept = self.state_cache(self.hparams.n_embd_r, il)
        past = self.states(kept)
        q, k, v = (graph.reshape(self._mixed(x, past, kept, part, il), *heads, *tail) for part in _PARTS)
        gate = graph.reshape(self.decay(x, il), *heads, *tail)
        beta = graph.reshape(graph.mul_mat(blocks.needed(f"{prefix}ssm_beta.weight"), x), 1, n_head, *tail)
        beta = graph.same("unary", beta)
        cache = self.state_cache(self.hparams.n_embd_s, il)
        state = graph.reshape(self.states(cache), head, head, n_head, self.n_seqs)
        q, k = (graph.same("scale", graph.same("rms_norm", part)) for part in (q, k))
        rows = self.n_seq_tokens * self.n_seqs + head * self.n_seqs
        out = graph.new("delta_net", F32, (head * n_head, rows, 1, 1), q, k, v, gate, beta, state)
        row = UNIT_BYTES * head * n_head
        result = graph.cont(graph.view(out, (*heads, *tail), (UNIT_BYTES * head, row, row * self.n_seq_tokens)))
        plane = UNIT_BYTES * head * head
        self.keep(graph.view(out, (head, head, n_head, self.n_seqs), (UNIT_BYTES * head, plane, plane * n_head)), cache)
        normed = blocks.norm(graph.reshape(result, *heads, x.ne[1]), f"{prefix}ssm_norm", il)
        gated = graph.same("mul", normed, graph.same("unary", graph.reshape(self.output_gate(x, il), *heads, x.ne[1])))
        return graph.mul_mat(blocks.needed(f"{prefix}attn_output.weight"), graph.cont(gated, head * n_head, x.ne[1]))

    def decay(self, x: Node, il: int) -> Node:
        """Return how much of a state is kept, per channel."""
        graph, blocks, prefix = self.graph, self.blocks, f"blk.{il}.ssm_"
        low_rank = graph.mul_mat(blocks.needed(f"{prefix}f_a.weight"), x)
        gate = graph.mul_mat(blocks.needed(f"{prefix}f_b.weight"), low_rank)
        gate = graph.same("unary", graph.same("add", gate, blocks.needed(f"{prefix}dt.bias")))
        return graph.same("mul", self._per_head(gate), self._rates(il))

    def output_gate(self, x: Node, il: int) -> Node:
        """Return what the result is weighed with."""
        graph, blocks, prefix = self.graph, self.blocks, f"blk.{il}.ssm_g_"
        by_sequence = graph.reshape(x, x.ne[0], self.n_seq_tokens, self.n_seqs)  # and back: a tensor to copy of its own
        low_rank = graph.mul_mat(blocks.needed(f"{prefix}a.weight"), graph.reshape(by_sequence, *x.ne[:2]))
        return graph.mul_mat(blocks.needed(f"{prefix}b.weight"), low_rank)

    def _per_head(self, x: Node) -> Node:
        n_head = self.hparams.n_head[0]
        return self.graph.reshape(x, x.ne[0] // n_head, n_head, x.ne[1])

    def _rates(self, il: int) -> Node:
        return self.graph.reshape(self.blocks.needed(f"blk.{il}.ssm_a"), 1, self.hparams.n_head[0])

    def _mixed(self, x: Node, past: Node, kept: Node, part: str, il: int) -> Node:
        """Return query, key or value after a convolution over each sequence's inputs (``causal_conv1d``)."""
        graph, blocks, tail = self.graph, self.blocks, (self.n_seq_tokens, self.n_seqs)
        kernel = blocks.needed(f"blk.{il}.ssm_conv1d_{part}.weight")
        d_conv, d_inner = kernel.ne[0], past.ne[0] // len(_PARTS) // (kernel.ne[0] - 1)
        window = (d_conv - 1, d_inner, self.n_seqs)
        before = graph.view(past, window, (UNIT_BYTES * (d_conv - 1), past.nb[1]))
        projected = graph.mul_mat(blocks.needed(f"blk.{il}.attn_{part}.weight"), x)
        joined = graph.concat(before, graph.transpose(graph.reshape(projected, d_inner, *tail)))
        self.keep(graph.view(joined, window, joined.nb[1:3]), kept)
        mixed = self.convolved(joined, graph.reshape(kernel, d_conv, d_inner))
        return graph.same("unary", graph.reshape(mixed, d_inner, x.ne[1]))


class SafeDeltaAttentionDecoder(DeltaAttentionDecoder):
    """Ling 3 (src/models/bailingmoe3.cpp): bounded decays, and latent attention that is gated per head."""

    computes_input_first = False

    def turned_part(self, x: Node) -> Node:
        """Return the part of query or key that knows its position."""
        return LatentDecoder.turned_part(self, x)

    def decay(self, x: Node, il: int) -> Node:
        """Return how much of a state is kept, per channel, within bounds."""
        graph, blocks, prefix = self.graph, self.blocks, f"blk.{il}.ssm_"
        gate = graph.mul_mat(blocks.needed(f"{prefix}f_a.weight"), x)
        gate = self._per_head(graph.same("add", gate, blocks.needed(f"{prefix}dt.bias")))
        return graph.same("scale", graph.same("unary", graph.same("mul", gate, self._rates(il))))

    def output_gate(self, x: Node, il: int) -> Node:
        """Return what the result is weighed with."""
        return self.graph.mul_mat(self.blocks.needed(f"blk.{il}.ssm_g_a.weight"), x)

    def projected(self, out: Node, x: Node, il: int) -> Node:
        """Return what the heads saw, weighed per head and projected."""
        graph, blocks, n_head, (width, n_tokens, _, _) = self.graph, self.blocks, self.hparams.n_head[il], out.ne
        gate = graph.mul_mat(blocks.needed(f"blk.{il}.attn_gate.weight"), x)
        gate = graph.same("unary", graph.reshape(gate, 1, n_head, n_tokens))
        gated = graph.same("mul", graph.reshape(out, width // n_head, n_head, n_tokens), gate)
        return blocks.project(graph.cont(gated, width, n_tokens), f"blk.{il}.attn_output")
