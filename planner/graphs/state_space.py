"""Decoders with state-space layers, Mamba's and Mamba 2's (src/models/mamba-base.cpp)."""

from __future__ import annotations

from dataclasses import replace

from planner.graph import F32, Node
from planner.graphs.blocks import CacheInputs
from planner.graphs.recurrent import UNIT_BYTES, RecurrentDecoder


class Mamba2Decoder(RecurrentDecoder):
    """Mamba 2 layers beside attention layers, each with a feed-forward part (src/models/granite-hybrid.cpp)."""

    def attention(self, x: Node, il: int) -> Node:
        """Return a layer's mixing of tokens: a state space, or attention."""
        return self.state_space(x, il) if self.hparams.recr_layers[il] else super().attention(x, il)

    def state_space(self, x: Node, il: int) -> Node:
        """Return a Mamba 2 layer (``build_mamba2_layer``)."""
        graph, blocks, prefix = self.graph, self.blocks, f"blk.{il}.ssm_"
        n_head, tail = self.dt_rank, (self.n_seq_tokens, self.n_seqs)
        head, channels = self.d_inner // n_head, self.d_inner + 2 * self.n_group * self.d_state
        kernel = blocks.needed(f"{prefix}conv1d.weight")
        mixed = blocks.project(x, f"{prefix}in")
        mixed = graph.reshape(mixed, mixed.ne[0], *tail)
        z = graph.view(mixed, (head, n_head, *tail), (UNIT_BYTES * head, *mixed.nb[1:3]))
        conv = graph.view(mixed, (channels, *tail), mixed.nb[1:3])
        dt = graph.view(mixed, (n_head, *tail), mixed.nb[1:3])
        joined = self.looked_back(conv, kernel.ne[0] - 1, il)
        conv = blocks.biased(self.convolved(joined, kernel), f"{prefix}conv1d")
        conv = graph.same("unary", conv)
        x, b, c = (
            graph.view(conv, (width, n, *tail), (UNIT_BYTES * width, *conv.nb[1:3]))
            for width, n in ((head, n_head), (self.d_state, self.n_group), (self.d_state, self.n_group))
        )
        dt = blocks.biased(graph.cont(dt), f"{prefix}dt")
        scanned = self._scanned(x, dt, b, c, il)
        y = graph.view(
            scanned, (head, n_head, *tail), (x.nb[1], n_head * x.nb[1], self.n_seq_tokens * n_head * x.nb[1])
        )
        y = graph.same("add", y, graph.same("mul", x, blocks.needed(f"{prefix}d")))
        y = graph.glu(graph.cont(z), y)
        if blocks.weight(f"{prefix}norm.weight"):
            y = graph.reshape(y, self.d_inner // self.n_group, self.n_group, *tail)
            y = blocks.norm(y, f"{prefix}norm", il)
        y = graph.reshape(y, self.d_inner, self.n_seq_tokens * self.n_seqs)
        return blocks.project(y, f"{prefix}out")

    def decay(self, il: int) -> Node:
        """Return what a scan multiplies its states with."""
        return self.blocks.needed(f"blk.{il}.ssm_a")

    def _scanned(self, x: Node, dt: Node, b: Node, c: Node, il: int) -> Node:
        """Return the scan's outputs and, behind them, the new states, which are kept (``ggml_ssm_scan``)."""
        graph, a = self.graph, self.decay(il)
        head, n_head = x.ne[:2]
        cache = self.state_cache(self.hparams.n_embd_s, il)
        elements = x.ne[0] * x.ne[1] * x.ne[2] * x.ne[3] + self.d_state * self.d_inner * self.n_seqs

        def scan(states: Node, ids: Node) -> Node:
            states = graph.reshape(states, self.d_state, head, n_head, cache.ne[1])
            return graph.new("ssm_scan", F32, (elements, 1, 1, 1), states, x, dt, a, b, c, ids)

        scanned = self.states(cache, scan)
        width = self.d_state * self.d_inner
        self.keep(graph.view(scanned, (width, self.n_seqs), (UNIT_BYTES * width,)), cache)
        return scanned


class MambaDecoder(Mamba2Decoder):
    """Mamba layers beside attention layers, each with a feed-forward part (src/models/jamba.cpp)."""

    def state_space(self, x: Node, il: int) -> Node:
        """Return a Mamba layer (``build_mamba_layer``)."""
        graph, blocks, prefix = self.graph, self.blocks, f"blk.{il}.ssm_"
        tail, d_inner, d_state = (self.n_seq_tokens, self.n_seqs), self.d_inner, self.d_state
        kernel = blocks.needed(f"{prefix}conv1d.weight")
        both = blocks.project(graph.reshape(x, x.ne[0], *tail), f"{prefix}in")
        x, z = (graph.view(both, (d_inner, *tail), both.nb[1:3]) for _ in range(2))
        joined = self.looked_back(x, kernel.ne[0] - 1, il)
        x = graph.same("unary", blocks.biased(self.convolved(joined, kernel), f"{prefix}conv1d"))
        rates = blocks.project(x, f"{prefix}x")
        dt = graph.view(rates, (self.dt_rank, *tail), rates.nb[1:3])
        b, c = (graph.view(rates, (d_state, 1, *tail), (UNIT_BYTES * d_state, *rates.nb[1:3])) for _ in range(2))
        if self.settings.get("ssm.dt_b_c_rms") or blocks.weight(f"{prefix}dt_norm.weight"):
            dt, b, c = (
                blocks.norm(part, prefix + name, il) for part, name in ((dt, "dt_norm"), (b, "b_norm"), (c, "c_norm"))
            )
        else:
            dt = graph.cont(dt)
        dt = blocks.biased(blocks.project(dt, f"{prefix}dt"), f"{prefix}dt")
        heads = graph.reshape(x, 1, d_inner, *tail)
        scanned = self._scanned(heads, dt, b, c, il)
        y = graph.view(scanned, (d_inner, *tail), heads.nb[2:4])
        y = graph.same("add", y, graph.same("mul", x, blocks.needed(f"{prefix}d")))
        out = blocks.project(graph.glu(graph.cont(z), y), f"{prefix}out")
        return graph.reshape(out, out.ne[0], self.n_seq_tokens * self.n_seqs)


class Plamo2Decoder(Mamba2Decoder):
    """Mamba 2 layers whose rates are projected from the convolution's output (src/models/plamo2.cpp)."""

    def state_space(self, x: Node, il: int) -> Node:
        """Return a state-space layer (``build_plamo2_mamba_layer``)."""
        graph, blocks, prefix = self.graph, self.blocks, f"blk.{il}.ssm_"
        n_head, tail, d_state = self.dt_rank, (self.n_seq_tokens, self.n_seqs), self.d_state
        head, d_inner = self.d_inner // n_head, self.d_inner
        both = blocks.project(graph.reshape(x, x.ne[0], *tail), f"{prefix}in", scaled=False)
        both = graph.cont(graph.permute_heads(both), 2 * head, n_head, *tail)
        z, x = (graph.view(both, (head, n_head, *tail), both.nb[1:]) for _ in range(2))
        kernel = blocks.needed(f"{prefix}conv1d.weight")
        joined = self.looked_back(graph.cont(x, d_inner, *tail), kernel.ne[0] - 1, il)
        x = graph.same("unary", self.convolved(joined, kernel))
        rates = blocks.project(x, f"{prefix}x")
        widths = {"dt": rates.ne[0] - 2 * d_state, "b": d_state, "c": d_state}
        dt, b, c = (
            blocks.norm(graph.view(rates, (width, *tail), rates.nb[1:3]), f"{prefix}{name}_norm", il)
            for name, width in widths.items()
        )
        dt = blocks.biased(blocks.project(dt, f"{prefix}dt"), f"{prefix}dt")
        row = UNIT_BYTES * d_inner
        x = graph.view(x, (head, n_head, *tail), (UNIT_BYTES * head, row, row * self.n_seq_tokens))
        b, c = (graph.view(part, (d_state, 1, *tail), (UNIT_BYTES * d_state, *part.nb[1:3])) for part in (b, c))
        y = graph.view(self._scanned(x, dt, b, c, il), x.ne, x.nb[1:])
        direct = graph.same("mul", x, graph.reshape(blocks.needed(f"{prefix}d"), 1, n_head))
        y = graph.glu(graph.cont(z), graph.same("add", y, direct))
        out = blocks.project(graph.view(y, (d_inner, *tail), y.nb[2:4]), f"{prefix}out", scaled=False)
        return graph.reshape(out, out.ne[0], self.n_seq_tokens * self.n_seqs)

    def decay(self, il: int) -> Node:
        """Return what a scan multiplies its states with, per head."""
        return self.graph.reshape(super().decay(il), 1, self.dt_rank)


class PureMamba2Decoder(Mamba2Decoder):
    """State-space layers only, without feed-forward parts (src/models/mamba.cpp)."""

    def layer(self, x: Node, il: int, picked: Node | None) -> Node:
        """Return a layer's output."""
        graph, residual = self.graph, x
        x = self.state_space(self.blocks.norm(x, f"blk.{il}.attn_norm", il), il)
        if picked:
            x, residual = graph.get_rows(x, picked), graph.get_rows(residual, picked)
        return graph.same("add", x, residual)


class PureMambaDecoder(PureMamba2Decoder, MambaDecoder):
    """Mamba's first state-space layers only."""


class NemotronDecoder(Mamba2Decoder):
    """Layers of one part each: a state space, attention, or a feed-forward part (src/models/nemotron-h.cpp)."""

    def layer(self, x: Node, il: int, picked: Node | None) -> Node:
        """Return a layer's output."""
        del picked
        normed = self.blocks.norm(x, f"blk.{il}.attn_norm", il)
        mixes = self.hparams.recr_layers[il] or self.hparams.n_ff[il] == 0
        return self.graph.same("add", self.attention(normed, il) if mixes else self.feed_forward(normed, il), x)


class FalconH1Decoder(Mamba2Decoder):
    """Attention and a state space side by side (src/models/falcon-h1.cpp)."""

    def layer(self, x: Node, il: int, picked: Node | None) -> Node:
        """Return a layer's output."""
        graph, blocks, prefix = self.graph, self.blocks, f"blk.{il}."
        attended = super(RecurrentDecoder, self).attention(blocks.norm(x, f"{prefix}attn_norm", il), il)
        mixed = self.state_space(blocks.norm(x, f"{prefix}attn_norm", il), il)
        residual = graph.same("add", graph.same("add", attended, mixed), x)
        if picked:
            residual = graph.get_rows(residual, picked)
        x = self.feed_forward(blocks.norm(residual, f"{prefix}ffn_norm", il), il)
        return graph.same("add", x, residual)


class ShortConvolutionDecoder(RecurrentDecoder):
    """Gated short convolutions beside attention layers (src/models/lfm2.cpp)."""

    def caches(self) -> dict[bool, CacheInputs]:
        """Return the caches' inputs; windowed ones are not turned when quantized (``build_inp_mem_hybrid_iswa``)."""
        caches = super().caches()
        if not any(self.hparams.swa_layers):
            return caches
        return {windowed: replace(cache, k_rotation=None, v_rotation=None) for windowed, cache in caches.items()}

    def logits(self, x: Node) -> Node:
        """Return the logits; where embeddings are served there are none."""
        return x if self.blocks.params.embeddings else super().logits(x)

    def attention(self, x: Node, il: int) -> Node:
        """Return a layer's mixing of tokens: a short convolution, or attention."""
        if not self.hparams.recr_layers[il]:
            return super().attention(x, il)
        graph, blocks, prefix = self.graph, self.blocks, f"blk.{il}.shortconv."
        parts = blocks.project(graph.reshape(x, x.ne[0], self.n_seq_tokens, self.n_seqs), f"{prefix}in_proj")
        third = (parts.ne[0] // 3, *parts.ne[1:3])
        b, c, inputs = (graph.view(parts, third, parts.nb[1:3]) for _ in range(3))
        kernel = blocks.needed(f"{prefix}conv.weight")
        joined = self.looked_back(graph.same("mul", b, inputs), kernel.ne[0] - 1, il)
        out = blocks.project(graph.same("mul", c, self.convolved(joined, kernel)), f"{prefix}out_proj")
        return graph.reshape(out, out.ne[0], self.n_seq_tokens * self.n_seqs)
