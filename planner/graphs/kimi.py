"""Decoders whose layers are mostly Kimi's delta attention, with latent attention in between."""

from __future__ import annotations

from planner.graph import F32, Node
from planner.graphs.blocks import Blocks
from planner.graphs.experts import mixed, route, router_scores
from planner.graphs.latent import LatentDecoder
from planner.graphs.recurrent import UNIT_BYTES, RecurrentDecoder
from planner.graphs.shape import HEADER_MOE, Settings, Shape

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
        return graph.same("mul", self.per_head(gate), self.rates(il))

    def output_gate(self, x: Node, il: int) -> Node:
        """Return what the result is weighed with."""
        graph, blocks, prefix = self.graph, self.blocks, f"blk.{il}.ssm_g_"
        by_sequence = graph.reshape(x, x.ne[0], self.n_seq_tokens, self.n_seqs)  # and back: a tensor to copy of its own
        low_rank = graph.mul_mat(blocks.needed(f"{prefix}a.weight"), graph.reshape(by_sequence, *x.ne[:2]))
        return graph.mul_mat(blocks.needed(f"{prefix}b.weight"), low_rank)

    def per_head(self, x: Node) -> Node:
        """Return channels cut into heads."""
        n_head = self.hparams.n_head[0]
        return self.graph.reshape(x, x.ne[0] // n_head, n_head, x.ne[1])

    def rates(self, il: int) -> Node:
        """Return each head's rate."""
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
        gate = self.per_head(graph.same("add", gate, blocks.needed(f"{prefix}dt.bias")))
        return graph.same("scale", graph.same("unary", graph.same("mul", gate, self.rates(il))))

    def output_gate(self, x: Node, il: int) -> Node:
        """Return what the result is weighed with."""
        return self.graph.mul_mat(self.blocks.needed(f"blk.{il}.ssm_g_a.weight"), x)

    def projected(self, out: Node, x: Node, il: int) -> Node:
        """Return what the heads saw, weighed per head and projected."""
        graph, blocks, n_head, (width, n_tokens, _, _) = self.graph, self.blocks, self.hparams.n_head[il], out.ne
        gate = graph.mul_mat(blocks.needed(f"blk.{il}.attn_gate.weight"), x)
        gate = graph.same("unary", graph.reshape(gate, 1, n_head, n_tokens))
        gated = graph.same("mul", graph.reshape(out, width // n_head, n_head, n_tokens), gate)
        return blocks.product(graph.cont(gated, width, n_tokens), f"blk.{il}.attn_output")


class BoundedDeltaAttentionDecoder(DeltaAttentionDecoder):
    """Decays within bounds, where the header has one (src/models/kimi-k3.cpp, glm5-next.cpp)."""

    def decay(self, x: Node, il: int) -> Node:
        """Return how much of a state is kept, per channel, within bounds."""
        graph, blocks, prefix = self.graph, self.blocks, f"blk.{il}.ssm_"
        if self.settings.number("kda.gate_lower_bound") == float("-inf"):
            return super().decay(x, il)
        low_rank = graph.mul_mat(blocks.needed(f"{prefix}f_a.weight"), x)
        gate = graph.mul_mat(blocks.needed(f"{prefix}f_b.weight"), low_rank)
        gate = self.per_head(graph.same("add", gate, blocks.needed(f"{prefix}dt.bias")))
        gate = graph.same("mul", gate, self.rates(il))
        for op in ("scale", "unary", "scale"):
            gate = graph.same(op, gate)
        return gate


class ResidualAttentionDecoder(BoundedDeltaAttentionDecoder):
    """Kimi K3 (src/models/kimi-k3.cpp): attention over banked layer inputs, and experts in a latent space."""

    def __init__(self, blocks: Blocks, settings: Settings, shape: Shape) -> None:
        super().__init__(blocks, settings, shape)
        self._banked: Node | None = None

    def layer(self, x: Node, il: int, picked: Node | None) -> Node:
        """Return a layer's output."""
        del picked
        graph, blocks, prefix = self.graph, self.blocks, f"blk.{il}."
        every = int(self.settings.number("attn_res.block_size"))
        banks = every > 0 and il % every == 0
        read = self._recalled(x, f"{prefix}attn_res_score") if every else x
        if banks:
            row = graph.reshape(x, x.ne[0], 1, x.ne[1])
            self._banked = graph.concat(self._banked, row, 1) if self._banked else row
        attended = self.attention(blocks.norm(read, f"{prefix}attn_norm", il), il)
        x = attended if banks else graph.same("add", x, attended)
        read = self._recalled(x, f"{prefix}ffn_res_score") if every else x
        return graph.same("add", x, self.feed_forward(blocks.norm(read, f"{prefix}ffn_norm", il), il))

    def output_rows(self, x: Node, rows: Node) -> Node:
        """Return the normalized rows that yield outputs."""
        x = self.graph.get_rows(self._recalled(x, "output_res_score"), rows)
        x = self.blocks.norm(x, "output_norm", -1)
        x.is_output = True
        return x

    def output_gate(self, x: Node, il: int) -> Node:
        """Return what the result is weighed with."""
        graph = self.graph
        by_sequence = graph.reshape(x, x.ne[0], self.n_seq_tokens, self.n_seqs)
        return graph.mul_mat(self.blocks.needed(f"blk.{il}.ssm_g.weight"), graph.reshape(by_sequence, *x.ne[:2]))

    def projected(self, out: Node, x: Node, il: int) -> Node:
        """Return what the heads saw, weighed per element and projected."""
        if gate := self.blocks.weight(f"blk.{il}.attn_gate.weight"):
            out = self.graph.same("mul", out, self.graph.same("unary", self.graph.mul_mat(gate, x)))
        return self.blocks.product(out, f"blk.{il}.attn_output")

    def feed_forward(self, x: Node, il: int) -> Node:
        """Return a dense part, or experts that read and write a latent space beside shared ones that do not."""
        blocks, prefix = self.blocks, f"blk.{il}.ffn_"
        if not blocks.has(f"{prefix}gate_inp.weight"):
            return self._dense(x, prefix, "")
        inner = blocks.product(x, f"{prefix}routed_down") if blocks.has(f"{prefix}routed_down.weight") else x
        chosen, weights = route(blocks, inner, il, HEADER_MOE, self.settings, router_scores(blocks, x, il))
        routed = mixed(blocks, inner, il, HEADER_MOE, chosen, weights, activate=self._situ)
        if blocks.has(f"{prefix}routed_norm.weight"):
            routed = blocks.norm(routed, f"{prefix}routed_norm", il)
        if blocks.has(f"{prefix}routed_up.weight"):
            routed = blocks.product(routed, f"{prefix}routed_up")
        if not blocks.has(f"{prefix}gate_shexp.weight"):
            return routed
        return self.graph.same("add", routed, self._dense(x, prefix, "_shexp"))

    def _dense(self, x: Node, prefix: str, suffix: str) -> Node:
        blocks = self.blocks
        gate, up = blocks.product(x, f"{prefix}gate{suffix}"), blocks.product(x, f"{prefix}up{suffix}")
        return blocks.product(self._situ(gate, up), f"{prefix}down{suffix}")

    def _situ(self, gate: Node | None, up: Node) -> Node:
        """Return a gated activation that levels off on both sides (``LLM_FFN_SITU``)."""
        graph = self.graph
        if gate is None:
            raise KeyError("ffn_gate_exps.weight")
        levelled = graph.same("mul", self._levelled(gate), graph.same("unary", gate))
        if self.settings.number("activation.situ_linear_beta") > 0:
            up = self._levelled(up)
        return graph.same("mul", levelled, up)

    def _levelled(self, x: Node) -> Node:
        for op in ("scale", "unary", "scale"):
            x = self.graph.same(op, x)
        return x

    def _recalled(self, x: Node, name: str) -> Node:
        """Return the stream mixed with what was banked, by their scores (``res_mix``)."""
        graph, banked = self.graph, self._banked
        if banked is None:
            return x
        weight, (_, n_banked, n_tokens, _) = self.blocks.needed(f"{name}.weight"), banked.ne
        old, new = (graph.sum_rows(graph.same("mul", graph.same("rms_norm", each), weight)) for each in (banked, x))
        shares = graph.same("soft_max", graph.concat(graph.reshape(old, n_banked, n_tokens), new))
        of_banked, of_stream = (graph.cont(graph.view(shares, (n, n_tokens), (shares.nb[1],))) for n in (n_banked, 1))
        mixture = graph.new("dsv4_hc_pre", F32, (x.ne[0], n_tokens, 1, 1), banked, of_banked)
        return graph.same("add", mixture, graph.same("mul", x, of_stream))
