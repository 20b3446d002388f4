"""Decoders of RWKV 6's kind: a state per head, and a look at the token before (src/models/rwkv6-base.cpp)."""

from __future__ import annotations

from planner.graph import F32, Node
from planner.graph import Shape as Shape4
from planner.graphs.blocks import CacheInputs
from planner.graphs.recurrent import RecurrentDecoder

_PARTS = "wkvrg"  # decay, key, value, receptance, gate


class Rwkv6Decoder(RecurrentDecoder):
    """RWKV 6 (src/models/rwkv6.cpp)."""

    norm_op = "norm"

    def caches(self) -> dict[bool, CacheInputs]:
        """Return no cache: there are states only."""
        return {}

    def positioned(self, x: Node, positions: Node) -> Node:
        """Return the tokens' rows, normalized."""
        del positions
        return self.blocks.norm(x, "token_embd_norm", 0, self.norm_op)

    def layer(self, x: Node, il: int, picked: Node | None) -> Node:
        """Return a layer's output."""
        graph, blocks, prefix = self.graph, self.blocks, f"blk.{il}."
        x = self.by_sequence(x)
        kept = self.state_cache(self.hparams.n_embd_r, il)
        before = graph.reshape(self.states(kept), x.ne[0], 2, self.n_seqs)
        of_attention, of_channels = (graph.view(before, (x.ne[0], 1, self.n_seqs), before.nb[1:3]) for _ in range(2))
        normed = blocks.norm(x, f"{prefix}attn_norm", il, self.norm_op)
        mixed = self.time_mix(normed, self.shifted(normed, of_attention), il)
        residual = graph.same("add", mixed, x)
        inner = blocks.norm(residual, f"{prefix}attn_norm_2", il, self.norm_op)
        previous = self.shifted(inner, of_channels)
        self.keep_last(graph.concat(self.last(normed), self.last(inner), 1), kept)
        n_tokens = self.n_seq_tokens * self.n_seqs
        residual, inner, previous = (graph.reshape(node, node.ne[0], n_tokens) for node in (residual, inner, previous))
        if picked:
            residual, inner, previous = (graph.get_rows(node, picked) for node in (residual, inner, previous))
        return self.rescaled(graph.same("add", self.channel_mix(inner, previous, il), residual), il)

    def by_sequence(self, x: Node) -> Node:
        """Return rows cut into sequences."""
        return self.graph.reshape(x, x.ne[0], self.n_seq_tokens, self.n_seqs)

    def shifted(self, x: Node, before: Node) -> Node:
        """Return each token's predecessor, the first one's out of the state."""
        tail = self.graph.view(x, (x.ne[0], self.n_seq_tokens - 1, self.n_seqs), x.nb[1:3])
        return self.graph.concat(before, tail, 1)

    def last(self, x: Node) -> Node:
        """Return each sequence's last row."""
        return self.graph.view(x, (x.ne[0], 1, self.n_seqs), x.nb[1:3])

    def keep_last(self, rows: Node, cache: Node) -> None:
        """Write the last rows into their cache (``build_rwkv_token_shift_store``)."""
        graph, size = self.graph, cache.ne[0] * self.n_seqs
        graph.expand(graph.copy(graph.view(rows, (size,), ()), graph.view(cache, (size,), ())))

    def rescaled(self, x: Node, il: int) -> Node:
        """Return a layer's output, halved every few layers where the header says so."""
        every = int(self.settings.number("rescale_every_n_layers"))
        return self.graph.same("scale", x) if every > 0 and (il + 1) % every == 0 else x

    def channel_mix(self, x: Node, previous: Node, il: int) -> Node:
        """Return a feed-forward part that also reads the token before (``build_rwkv6_channel_mix``)."""
        graph, blocks, prefix = self.graph, self.blocks, f"blk.{il}.channel_mix_"
        change = graph.same("sub", previous, x)
        of_key, of_receptance = (
            graph.same("add", graph.same("mul", change, blocks.needed(f"{prefix}lerp_{part}.weight")), x)
            for part in "kr"
        )
        receptance = graph.same("unary", blocks.project(of_receptance, f"{prefix}receptance"))
        key = graph.same("sqr", graph.same("unary", blocks.project(of_key, f"{prefix}key")))
        return graph.same("mul", receptance, blocks.project(key, f"{prefix}value"))

    # -----------------------------------------------------------------------------------------------------------------
    # Time mix

    def time_mix(self, x: Node, previous: Node, il: int) -> Node:
        """Return what a layer's states yield, gated and projected (``build_rwkv6_time_mix``)."""
        graph, blocks, prefix, n_embd = self.graph, self.blocks, f"blk.{il}.time_mix_", x.ne[0]
        n_tokens, head = self.n_seq_tokens * self.n_seqs, int(self.settings.number("wkv.head_size"))
        change = graph.reshape(graph.same("sub", previous, x), n_embd, n_tokens)
        inputs = self._interpolated(graph.reshape(x, n_embd, n_tokens), change, il)
        names = {"r": "receptance", "k": "key", "v": "value"}
        r, k, v = (
            blocks.biased(blocks.project(inputs[part], prefix + name), prefix + name) for part, name in names.items()
        )
        gate = graph.same("unary", blocks.project(inputs["g"], f"{prefix}gate"))
        k, v = (self._spread(part, head, il) for part in (k, v))
        k, v, r = (graph.reshape(part, head, n_embd // head, n_tokens) for part in (k, v, r))
        decay = graph.same("unary", graph.mul_mat(blocks.needed(f"{prefix}decay_w1.weight"), inputs["w"]))
        decay = graph.mul_mat(blocks.needed(f"{prefix}decay_w2.weight"), decay)
        decay = graph.same("add", decay, blocks.needed(f"{prefix}decay.weight"))
        for _ in range(3):
            decay = graph.same("unary", decay)
        decay = graph.reshape(decay, head, n_embd // head, n_tokens)
        out = graph.same("mul", self._of_states(k, v, r, decay, il), gate)
        return self.by_sequence(blocks.project(out, f"{prefix}output"))

    def _interpolated(self, x: Node, change: Node, il: int) -> dict[str, Node]:
        """Return each part's mixture of a token and the one before."""
        graph, blocks, prefix, (n_embd, n_tokens, _, _) = self.graph, self.blocks, f"blk.{il}.time_mix_", x.ne
        mixed = graph.same("add", graph.same("mul", change, blocks.needed(f"{prefix}lerp_x.weight")), x)
        first, second = blocks.needed(f"{prefix}w1.weight"), blocks.needed(f"{prefix}w2.weight")
        low_rank = graph.same("unary", graph.mul_mat(first, mixed))
        low_rank = graph.reshape(low_rank, first.ne[1] // len(_PARTS), 1, len(_PARTS), n_tokens)
        low_rank = graph.cont(graph.permute(low_rank, 0, 1, 3, 2))
        second = graph.reshape(second, second.ne[0], second.ne[1], 1, len(_PARTS))
        weights = graph.mul_mat(second, low_rank)
        fused = blocks.weight(f"{prefix}lerp_fused.weight")
        if fused:
            change, x = (graph.reshape(part, n_embd, 1, n_tokens) for part in (change, x))
            weights = self._moved(weights, fused, change, x)
        parts = {part: graph.view(weights, (n_embd, n_tokens), (weights.nb[1],)) for part in _PARTS}
        if fused:
            return parts
        return {
            part: self._moved(each, blocks.needed(f"{prefix}lerp_{part}.weight"), change, x)
            for part, each in parts.items()
        }

    def _moved(self, weights: Node, base: Node, change: Node, x: Node) -> Node:
        graph = self.graph
        return graph.same("add", graph.same("mul", graph.same("add", weights, base), change), x)

    def _spread(self, x: Node, head: int, il: int) -> Node:
        """Return a key or value with a head for each of the states, where there are fewer."""
        graph, n_kv, n_head = self.graph, self.hparams.n_head_kv[il], self.hparams.n_embd // head
        if n_kv in {0, n_head}:
            return x
        heads = graph.reshape(x, head, 1, n_kv, x.ne[1])
        return graph.repeat(heads, (head, n_head // n_kv, n_kv, x.ne[1]))

    def _of_states(self, k: Node, v: Node, r: Node, decay: Node, il: int) -> Node:
        """Return what the states yield, which are kept (``ggml_rwkv_wkv6``, ``ggml_gated_linear_attn``)."""
        graph, blocks, prefix, (head, n_head, n_tokens, _) = self.graph, self.blocks, f"blk.{il}.time_mix_", k.ne
        n_embd, first = head * n_head, blocks.weight(f"{prefix}first.weight")
        if first is None:
            k = graph.same("sub", k, graph.same("mul", k, decay))
        cache = self.state_cache(self.hparams.n_embd_s, il)
        state, ne = self.states(cache), (n_embd, n_tokens + head * self.n_seqs, 1, 1)
        if first:
            out = graph.new("rwkv_wkv6", F32, ne, k, v, r, first, decay, state)
        else:
            out = graph.new("gated_linear_attn", F32, ne, k, v, r, decay, state)
        self.keep_last(graph.view(out, (n_embd * head * self.n_seqs,), ()), cache)
        x = graph.view(out, (n_embd * n_tokens,), ())
        return self.normed_states(x, k.ne, il)

    def normed_states(self, x: Node, heads: Shape4, il: int) -> Node:
        """Return what the states yield as rows, normalized per head where the file has weights for it."""
        graph, blocks, prefix, (head, n_head, n_tokens, _) = self.graph, self.blocks, f"blk.{il}.time_mix_ln", heads
        if not (blocks.has(f"{prefix}.weight") and blocks.has(f"{prefix}.bias")):
            return graph.reshape(x, head * n_head, n_tokens)
        x = graph.same("norm", graph.reshape(x, head, n_head, n_tokens))
        x = graph.same("mul", graph.reshape(x, head * n_head, n_tokens), blocks.needed(f"{prefix}.weight"))
        return graph.same("add", x, blocks.needed(f"{prefix}.bias"))


class Rwkv6QwenDecoder(Rwkv6Decoder):
    """RWKV 6 between Qwen 2's feed-forward parts (src/models/rwkv6qwen2.cpp)."""

    norm_op = "rms_norm"

    def positioned(self, x: Node, positions: Node) -> Node:
        """Return the tokens' rows as they are."""
        del positions
        return x

    def layer(self, x: Node, il: int, picked: Node | None) -> Node:
        """Return a layer's output."""
        graph, blocks, prefix = self.graph, self.blocks, f"blk.{il}."
        x = self.by_sequence(x)
        kept = self.state_cache(self.hparams.n_embd_r, il)
        before = graph.reshape(self.states(kept), x.ne[0], 1, self.n_seqs)
        normed = blocks.norm(x, f"{prefix}attn_norm", il)
        mixed = self.time_mix(normed, self.shifted(normed, before), il)
        self.keep_last(self.last(normed), kept)
        residual = graph.same("add", mixed, x)
        residual = graph.reshape(residual, residual.ne[0], self.n_seq_tokens * self.n_seqs)
        if picked:
            residual = graph.get_rows(residual, picked)
        return graph.same("add", self.feed_forward(blocks.norm(residual, f"{prefix}ffn_norm", il), il), residual)
