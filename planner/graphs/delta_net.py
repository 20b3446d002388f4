"""Decoders whose layers are mostly gated delta nets, with full attention in between (src/models/delta-net-base.cpp)."""

from __future__ import annotations

from planner.graph import F32, Node
from planner.graphs.recurrent import UNIT_BYTES, RecurrentDecoder


class DeltaNetDecoder(RecurrentDecoder):
    """The Qwen 3.5 family (src/models/qwen35.cpp, qwen35moe.cpp)."""

    _reads_scales = True  # in recurrent layers, in files that have them

    def attention(self, x: Node, il: int) -> Node:
        """Return a layer's attention, or its delta net, projected."""
        self.graph.expand(x)
        return self.delta_net(x, il) if self.hparams.recr_layers[il] else self.gated_attention(x, il)

    def gated_attention(self, x: Node, il: int) -> Node:
        """Return full attention, weighed by a gate that comes with the query."""
        graph, blocks, hparams, prefix = self.graph, self.blocks, self.hparams, f"blk.{il}.attn_"
        head, n_head, n_kv, n_tokens = hparams.head_k, hparams.n_head[il], hparams.n_head_kv[il], x.ne[1]
        both, k, v = (blocks.biased(blocks.project(x, prefix + part), prefix + part) for part in "qkv")
        stride = (UNIT_BYTES * head * 2, UNIT_BYTES * head * 2 * n_head)
        q = graph.view(both, (head, n_head, n_tokens), stride)
        k = graph.reshape(k, head, n_kv, n_tokens)
        q, k = self.turned(*self.normed_heads(q, k, prefix, il, skip=False), il)
        gate = graph.cont(graph.view(both, (head, n_head, n_tokens), stride), head * n_head, n_tokens)
        x = blocks.attention(self.cache(il), q, k, graph.reshape(v, head, n_kv, n_tokens), il)
        x = graph.same("mul", x, graph.same("unary", gate))
        return blocks.project(x, f"{prefix}output")

    def delta_net(self, x: Node, il: int) -> Node:
        """Return a gated delta net over the sequences' states, fused as backends compute it."""
        graph, blocks, prefix = self.graph, self.blocks, f"blk.{il}."
        n_tokens, n_seqs, n_v, head_v = self.n_seq_tokens, self.n_seqs, self.dt_rank, self.d_inner // self.dt_rank
        mixed, z = self.mixed(x, il)
        beta, gate = self.rates(x, il)
        kernel = blocks.needed(f"{prefix}ssm_conv1d.weight")
        conv = self.looked_back(mixed, kernel.ne[0] - 1, il)
        states = self.state_cache(self.hparams.n_embd_s, il)
        state = graph.reshape(self.states(states), head_v, head_v, n_v, n_seqs)
        conv = graph.same("unary", self.convolved(conv, kernel))
        q, k, v = self._cut(conv, head_v)
        q, k = self.spread(self._l2_normed(q), self._l2_normed(k))
        rows = n_tokens * n_seqs + head_v * n_seqs
        out = graph.new("delta_net", F32, (head_v * n_v, rows, 1, 1), q, k, v, gate, beta, state)
        row = UNIT_BYTES * head_v * n_v
        result = graph.view(out, (head_v, n_v, n_tokens, n_seqs), (UNIT_BYTES * head_v, row, row * n_tokens))
        plane = UNIT_BYTES * head_v * head_v
        new = graph.view(out, (head_v, head_v, n_v, n_seqs), (UNIT_BYTES * head_v, plane, plane * n_v))
        self.keep(new, states)
        normed = blocks.norm(result, f"{prefix}ssm_norm", il)
        normed = graph.same("mul", normed, graph.same("unary", graph.reshape(z, head_v, n_v, n_tokens, n_seqs)))
        flat = graph.reshape(normed, head_v * n_v, n_tokens, n_seqs)
        out = blocks.project(flat, f"{prefix}ssm_out", scaled=self._reads_scales)
        return graph.reshape(out, self.hparams.n_embd, n_tokens * n_seqs)

    def mixed(self, x: Node, il: int) -> tuple[Node, Node]:
        """Return query, key and value in one tensor, and the output's gate. Raises KeyError for older files."""
        mixed = self.blocks.project(x, f"blk.{il}.attn_qkv", scaled=self._reads_scales)
        mixed = self.graph.reshape(mixed, mixed.ne[0], self.n_seq_tokens, self.n_seqs)
        return mixed, self.blocks.project(x, f"blk.{il}.attn_gate", scaled=self._reads_scales)

    def rates(self, x: Node, il: int) -> tuple[Node, Node]:
        """Return how much of a state is written and how much is kept, per head."""
        graph, heads = self.graph, (self.dt_rank, self.n_seq_tokens, self.n_seqs)
        beta = graph.reshape(self.blocks.project(x, f"blk.{il}.ssm_beta"), 1, *heads)
        alpha = graph.reshape(self.blocks.project(x, f"blk.{il}.ssm_alpha"), *heads)
        return graph.same("unary", beta), self.kept(alpha, il)

    def kept(self, alpha: Node, il: int) -> Node:
        """Return the decay of each head."""
        graph, blocks = self.graph, self.blocks
        biased = graph.same("add", alpha, blocks.needed(f"blk.{il}.ssm_dt.bias"))
        gate = graph.same("mul", graph.same("unary", biased), blocks.needed(f"blk.{il}.ssm_a"))
        return graph.reshape(gate, 1, self.dt_rank, self.n_seq_tokens, self.n_seqs)

    def spread(self, q: Node, k: Node) -> tuple[Node, Node]:
        """Return query and key with a head for each of the value's; the fused operation does it itself."""
        return q, k

    def _l2_normed(self, x: Node) -> Node:
        return self.graph.same("scale", self.graph.same("rms_norm", x))

    def _cut(self, conv: Node, head_v: int) -> tuple[Node, Node, Node]:
        """Return windows on query, key and value."""
        graph, tail = self.graph, (self.n_seq_tokens, self.n_seqs)
        row = UNIT_BYTES * (2 * self.d_state * self.n_group + head_v * self.dt_rank)
        heads = ((self.d_state, self.n_group), (self.d_state, self.n_group), (head_v, self.dt_rank))
        q, k, v = (
            graph.view(conv, (head, n, *tail), (UNIT_BYTES * head, row, row * self.n_seq_tokens)) for head, n in heads
        )
        return q, k, v


class SpreadDeltaNetDecoder(DeltaNetDecoder):
    """Qwen3-Next (src/models/qwen3next.cpp): both rates in one product, heads repeated beforehand."""

    _reads_scales = False

    def rates(self, x: Node, il: int) -> tuple[Node, Node]:
        """Return how much of a state is written and how much is kept, per head."""
        graph, n_tokens, n_seqs = self.graph, self.n_seq_tokens, self.n_seqs
        each = self.dt_rank // self.n_group
        both = graph.reshape(self.blocks.project(x, f"blk.{il}.ssm_ba"), 2 * each, self.n_group, n_tokens, n_seqs)
        half = (each, self.n_group, n_tokens, n_seqs)
        beta = graph.same("unary", graph.cont(graph.view(both, half, both.nb[1:])))
        alpha = graph.cont(graph.view(both, half, both.nb[1:]), self.dt_rank, n_tokens, n_seqs)
        return graph.reshape(beta, 1, self.dt_rank, n_tokens, n_seqs), self.kept(alpha, il)

    def spread(self, q: Node, k: Node) -> tuple[Node, Node]:
        """Return query and key repeated to a head for each of the value's."""
        if self.n_group == self.dt_rank:
            return q, k
        q, k = (self._repeated(x) for x in (q, k))
        return q, k

    def _repeated(self, x: Node) -> Node:
        graph, n_rows, each = self.graph, self.n_seq_tokens * self.n_seqs, self.dt_rank // self.n_group
        heads = graph.reshape(x, self.d_state, 1, self.n_group, n_rows)
        repeated = graph.repeat(heads, (self.d_state, each, self.n_group, n_rows))
        return graph.reshape(repeated, self.d_state, self.dt_rank, self.n_seq_tokens, self.n_seqs)
