"""Decoders with lightning attention, whose decays grow with the square of a batch (src/models/minimax-01.cpp)."""

from __future__ import annotations

from planner.graph import F32, Node
from planner.graphs.experts import moe
from planner.graphs.recurrent import RecurrentDecoder
from planner.graphs.shape import Moe

_MOE = Moe(scales=None)


class LightningDecoder(RecurrentDecoder):
    """Most layers keep the product of keys and values as their state; the residual is what the norm gave."""

    def layers(self, x: Node, rows: Node) -> Node:
        """Return the last layer's output."""
        graph, n_head, tail = self.graph, self.hparams.n_head[0], (self.n_seq_tokens, self.n_seqs)
        self._slopes = graph.input(F32, n_head)
        self._q_decay, self._k_decay = graph.input(F32, 1, n_head, *tail), graph.input(F32, 1, n_head, *tail)
        self._diagonal = graph.input(F32, self.n_seq_tokens, self.n_seq_tokens, n_head, self.n_seqs)
        return super().layers(x, rows)

    def layer(self, x: Node, il: int, picked: Node | None) -> Node:
        """Return a layer's output."""
        graph, blocks, prefix = self.graph, self.blocks, f"blk.{il}."
        residual = blocks.norm(x, f"{prefix}attn_norm", il)
        recurrent = self.hparams.recr_layers[il]
        x = self._lightning(residual, il) if recurrent else self.attention(residual, il)
        if picked:
            x, residual = graph.get_rows(x, picked), graph.get_rows(residual, picked)
        x = graph.same("add", x, graph.same("scale", residual))
        residual = blocks.norm(x, f"{prefix}ffn_norm", il)
        x = moe(blocks, residual, il, _MOE, self.settings)
        return graph.same("add", x, graph.same("scale", residual))

    def _lightning(self, x: Node, il: int) -> Node:
        """Return lightning attention over the sequences' states, normalized, gated and projected."""
        graph, blocks, prefix = self.graph, self.blocks, f"blk.{il}."
        n_head, head, tail = self.hparams.n_head[il], self.hparams.head_k, (self.n_seq_tokens, self.n_seqs)
        self.states(self.state_cache(self.hparams.n_embd_r, il))
        slope = graph.same("scale", self._slopes)
        x = graph.reshape(x, x.ne[0], self.n_seq_tokens, 1, self.n_seqs)
        fused = graph.same("unary", blocks.project(x, f"{prefix}attn_qkv", scaled=False))
        fused = graph.reshape(fused, 3 * head, n_head, *tail)
        q, k, v = (graph.view(fused, (head, n_head, *tail), fused.nb[1:]) for _ in range(3))
        cache = self.state_cache(self.hparams.n_embd_s, il)
        old = graph.reshape(self.states(cache), head, head, n_head, self.n_seqs)
        values = graph.cont(graph.permute(v, 1, 2, 0, 3))
        out = graph.same("add", self._of_states(q, old), self._of_batch(q, k, values))
        graph.expand(out)
        decay = graph.reshape(graph.same("unary", graph.same("scale", slope)), 1, 1, n_head)
        keys = graph.same("mul", k, self._exponential(self._k_decay))
        new = graph.mul_mat(graph.cont(graph.permute(keys, 1, 2, 0, 3)), values)
        self.keep(graph.same("add", graph.same("mul", old, decay), new), cache)
        out = graph.cont(graph.permute_heads(out))
        out = graph.reshape(out, out.ne[0] * out.ne[1], out.ne[2], 1, out.ne[3])
        gate = graph.same("unary", blocks.project(x, f"{prefix}attn_gate"))
        out = graph.same("mul", gate, blocks.norm(out, f"{prefix}attn_norm_2", il))
        out = blocks.project(out, f"{prefix}attn_output", scaled=False)
        return graph.reshape(out, out.ne[0], self.n_seq_tokens * self.n_seqs)

    def _of_states(self, q: Node, old: Node) -> Node:
        """Return what the queries find in the states of the tokens before."""
        decayed = self.graph.same("mul", q, self._exponential(self._q_decay))
        return self.graph.mul_mat(old, self.graph.permute_heads(decayed))

    def _of_batch(self, q: Node, k: Node, values: Node) -> Node:
        """Return what the queries find among the batch's own tokens."""
        graph = self.graph
        scores = graph.mul_mat(graph.permute_heads(k), graph.permute_heads(q))
        return graph.mul_mat(values, graph.same("mul", scores, self._exponential(self._diagonal)))

    def _exponential(self, exponents: Node) -> Node:
        return self.graph.same("unary", self.graph.same("scale", exponents))
