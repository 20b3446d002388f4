"""Decoders whose layers are mostly gated delta nets, with full attention in between (src/models/delta-net-base.cpp)."""

from __future__ import annotations

from planner.graph import F32, I32, Node
from planner.graphs.blocks import Blocks
from planner.graphs.decoder import Decoder
from planner.graphs.shape import Settings, Shape

_UNIT = F32.block_bytes


class DeltaNetDecoder(Decoder):
    """The Qwen 3.5 family (src/models/qwen35.cpp, qwen35moe.cpp)."""

    def __init__(self, blocks: Blocks, settings: Settings, shape: Shape) -> None:
        super().__init__(blocks, settings, shape)
        n_seqs = blocks.params.n_seq_max
        self.n_seqs = n_seqs
        self.n_seq_tokens = blocks.batch.n_tokens // n_seqs
        self.d_state = int(settings.number("ssm.state_size"))
        self.d_inner = int(settings.number("ssm.inner_size"))
        self.n_k_heads = int(settings.number("ssm.group_count"))
        self.n_v_heads = int(settings.number("ssm.time_step_rank"))
        copied = self.graph.input(I32, n_seqs)
        self._read = self.graph.view(copied, (n_seqs,), ())
        self._extra = self.graph.view(copied, (0,), ())

    def attention(self, x: Node, il: int) -> Node:
        """Return a layer's attention, or its delta net, projected."""
        self.graph.expand(x)
        return self.delta_net(x, il) if self.hparams.recr_layers[il] else self.gated_attention(x, il)

    def gated_attention(self, x: Node, il: int) -> Node:
        """Return full attention, weighed by a gate that comes with the query."""
        graph, blocks, hparams, prefix = self.graph, self.blocks, self.hparams, f"blk.{il}.attn_"
        head, n_head, n_kv, n_tokens = hparams.head_k, hparams.n_head[il], hparams.n_head_kv[il], x.ne[1]
        both, k, v = (blocks.biased(blocks.project(x, prefix + part), prefix + part) for part in "qkv")
        stride = (_UNIT * head * 2, _UNIT * head * 2 * n_head)
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
        n_tokens, n_seqs, n_v, head_v = self.n_seq_tokens, self.n_seqs, self.n_v_heads, self.d_inner // self.n_v_heads
        mixed, z = self.mixed(x, il)
        beta, gate = self.rates(x, il)
        kernel = blocks.needed(f"{prefix}ssm_conv1d.weight")
        conv = self._conv_input(mixed, kernel, il)
        states = self._cache(self.hparams.n_embd_s, il)
        state = graph.reshape(self._states(states), head_v, head_v, n_v, n_seqs)
        conv = graph.same("unary", graph.new("ssm_conv", F32, (kernel.ne[1], n_tokens, n_seqs, 1), conv, kernel))
        q, k, v = self._cut(conv, head_v)
        q, k = self.spread(self._l2_normed(q), self._l2_normed(k))
        rows = n_tokens * n_seqs + head_v * n_seqs
        out = graph.new("delta_net", F32, (head_v * n_v, rows, 1, 1), q, k, v, gate, beta, state)
        row = _UNIT * head_v * n_v
        result = graph.view(out, (head_v, n_v, n_tokens, n_seqs), (_UNIT * head_v, row, row * n_tokens))
        plane = _UNIT * head_v * head_v
        new = graph.view(out, (head_v, head_v, n_v, n_seqs), (_UNIT * head_v, plane, plane * n_v))
        graph.expand(graph.copy(new, graph.view(states, (self.hparams.n_embd_s, n_seqs), (states.nb[1],))))
        normed = blocks.norm(result, f"{prefix}ssm_norm", il)
        normed = graph.same("mul", normed, graph.same("unary", graph.reshape(z, head_v, n_v, n_tokens, n_seqs)))
        flat = graph.reshape(normed, head_v * n_v, n_tokens, n_seqs)
        return graph.reshape(blocks.project(flat, f"{prefix}ssm_out"), self.hparams.n_embd, n_tokens * n_seqs)

    def mixed(self, x: Node, il: int) -> tuple[Node, Node]:
        """Return query, key and value in one tensor, and the output's gate. Raises KeyError for older files."""
        mixed = self.blocks.project(x, f"blk.{il}.attn_qkv")
        mixed = self.graph.reshape(mixed, mixed.ne[0], self.n_seq_tokens, self.n_seqs)
        return mixed, self.blocks.project(x, f"blk.{il}.attn_gate")

    def rates(self, x: Node, il: int) -> tuple[Node, Node]:
        """Return how much of a state is written and how much is kept, per head."""
        graph, heads = self.graph, (self.n_v_heads, self.n_seq_tokens, self.n_seqs)
        beta = graph.reshape(self.blocks.project(x, f"blk.{il}.ssm_beta"), 1, *heads)
        alpha = graph.reshape(self.blocks.project(x, f"blk.{il}.ssm_alpha"), *heads)
        return graph.same("unary", beta), self.kept(alpha, il)

    def kept(self, alpha: Node, il: int) -> Node:
        """Return the decay of each head."""
        graph, blocks = self.graph, self.blocks
        biased = graph.same("add", alpha, blocks.needed(f"blk.{il}.ssm_dt.bias"))
        gate = graph.same("mul", graph.same("unary", biased), blocks.needed(f"blk.{il}.ssm_a"))
        return graph.reshape(gate, 1, self.n_v_heads, self.n_seq_tokens, self.n_seqs)

    def spread(self, q: Node, k: Node) -> tuple[Node, Node]:
        """Return query and key with a head for each of the value's; the fused operation broadcasts them itself."""
        return q, k

    def _l2_normed(self, x: Node) -> Node:
        return self.graph.same("scale", self.graph.same("rms_norm", x))

    def _cut(self, conv: Node, head_v: int) -> tuple[Node, Node, Node]:
        """Return windows on query, key and value."""
        graph, tail = self.graph, (self.n_seq_tokens, self.n_seqs)
        row = _UNIT * (2 * self.d_state * self.n_k_heads + head_v * self.n_v_heads)
        heads = ((self.d_state, self.n_k_heads), (self.d_state, self.n_k_heads), (head_v, self.n_v_heads))
        q, k, v = (
            graph.view(conv, (head, n, *tail), (_UNIT * head, row, row * self.n_seq_tokens)) for head, n in heads
        )
        return q, k, v

    def _conv_input(self, mixed: Node, kernel: Node, il: int) -> Node:
        """Return the last inputs of each sequence before the new ones; what follows is kept (``build_conv_state``)."""
        graph, kept, channels = self.graph, kernel.ne[0] - 1, kernel.ne[1]
        cache = self._cache(self.hparams.n_embd_r, il)
        states = graph.reshape(self._states(cache), kept, channels, self.n_seqs)
        joined = graph.concat(states, graph.transpose(mixed))
        last = graph.view(joined, (kept, channels, self.n_seqs), joined.nb[1:3])
        graph.expand(graph.copy(last, graph.view(cache, (kept * channels, self.n_seqs), (cache.nb[1],))))
        return joined

    def _cache(self, width: int, il: int) -> Node:
        cache = self.graph.leaf(F32, (width, self.n_seqs))
        cache.home = self.blocks.places.caches[il]
        return cache

    def _states(self, cache: Node) -> Node:
        """Return the sequences' states, read out of their cache (``build_rs``)."""
        graph = self.graph
        states = graph.reshape(cache, *cache.ne[:2])
        graph.expand(graph.scale_inplace(graph.view(states, (cache.ne[0],), ())))
        read = graph.get_rows(states, self._read)
        graph.expand(read)
        unread = graph.get_rows(states, self._extra)
        graph.expand(graph.copy(unread, graph.view(cache, (cache.ne[0], 0), (cache.nb[1],))))
        return read


class SpreadDeltaNetDecoder(DeltaNetDecoder):
    """Qwen3-Next (src/models/qwen3next.cpp): both rates in one product, heads repeated beforehand."""

    def rates(self, x: Node, il: int) -> tuple[Node, Node]:
        """Return how much of a state is written and how much is kept, per head."""
        graph, n_tokens, n_seqs = self.graph, self.n_seq_tokens, self.n_seqs
        each = self.n_v_heads // self.n_k_heads
        both = graph.reshape(self.blocks.project(x, f"blk.{il}.ssm_ba"), 2 * each, self.n_k_heads, n_tokens, n_seqs)
        half = (each, self.n_k_heads, n_tokens, n_seqs)
        beta = graph.same("unary", graph.cont(graph.view(both, half, both.nb[1:])))
        alpha = graph.cont(graph.view(both, half, both.nb[1:]), self.n_v_heads, n_tokens, n_seqs)
        return graph.reshape(beta, 1, self.n_v_heads, n_tokens, n_seqs), self.kept(alpha, il)

    def spread(self, q: Node, k: Node) -> tuple[Node, Node]:
        """Return query and key repeated to a head for each of the value's."""
        if self.n_k_heads == self.n_v_heads:
            return q, k
        q, k = (self._repeated(x) for x in (q, k))
        return q, k

    def _repeated(self, x: Node) -> Node:
        graph, n_rows, each = self.graph, self.n_seq_tokens * self.n_seqs, self.n_v_heads // self.n_k_heads
        heads = graph.reshape(x, self.d_state, 1, self.n_k_heads, n_rows)
        repeated = graph.repeat(heads, (self.d_state, each, self.n_k_heads, n_rows))
        return graph.reshape(repeated, self.d_state, self.n_v_heads, self.n_seq_tokens, self.n_seqs)
