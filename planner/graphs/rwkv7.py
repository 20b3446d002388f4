"""RWKV 7: states that learn in place, and a first layer's value carried along (src/models/rwkv7-base.cpp)."""

from __future__ import annotations

from planner.graph import F32, Node
from planner.graphs.rwkv import Rwkv6Decoder, Rwkv6QwenDecoder

_PARTS = "rwkvag"  # receptance, decay, key, value, in-context learning rate, gate


class Rwkv7Decoder(Rwkv6Decoder):
    """RWKV 7 (src/models/rwkv7.cpp)."""

    _first_value: Node | None = None

    def rescaled(self, x: Node, il: int) -> Node:
        """Return a layer's output as it is."""
        del il
        return x

    def channel_mix(self, x: Node, previous: Node, il: int) -> Node:
        """Return a feed-forward part that also reads the token before (``build_rwkv7_channel_mix``)."""
        graph, blocks, prefix = self.graph, self.blocks, f"blk.{il}.channel_mix_"
        change = graph.same("mul", graph.same("sub", previous, x), blocks.needed(f"{prefix}lerp_k.weight"))
        key = blocks.project(graph.same("add", change, x), f"{prefix}key")
        return blocks.project(graph.same("sqr", graph.same("unary", key)), f"{prefix}value")

    def time_mix(self, x: Node, previous: Node, il: int) -> Node:
        """Return what a layer's states yield, gated where the file has a gate, projected."""
        graph, blocks, prefix, n_embd = self.graph, self.blocks, f"blk.{il}.time_mix_", x.ne[0]
        n_tokens, head = self.n_seq_tokens * self.n_seqs, int(self.settings.number("wkv.head_size"))
        gated = blocks.has(f"{prefix}g1.weight") and blocks.has(f"{prefix}g2.weight")
        parts = _PARTS if gated else _PARTS[:-1]
        change = graph.repeat(graph.same("sub", previous, x), (*x.ne[:3], len(parts)))
        mixed = graph.same("mul", change, blocks.needed(f"{prefix}lerp_fused.weight"))
        mixed = graph.same("add", mixed, x)
        inputs = {part: graph.view(mixed, (n_embd, n_tokens), (mixed.nb[1],)) for part in parts}
        r = blocks.project(inputs["r"], f"{prefix}receptance")
        decay = self._low_rank(inputs["w"], f"{prefix}w", between=True)
        for op in ("unary", "scale", "unary"):
            decay = graph.same(op, decay)
        k, v = blocks.project(inputs["k"], f"{prefix}key"), self._value(inputs["v"], il)
        rate = graph.same("unary", self._low_rank(inputs["a"], f"{prefix}a"))
        kk = graph.same("mul", k, blocks.needed(f"{prefix}k_k.weight"))
        kk = graph.same("l2_norm", graph.reshape(kk, head, n_embd // head, n_tokens))
        ka = graph.same("mul", k, blocks.needed(f"{prefix}k_a.weight"))
        k = graph.same("add", k, graph.same("sub", graph.same("mul", rate, ka), ka))
        r, decay, k, v, rate = (graph.reshape(part, *kk.ne[:3]) for part in (r, decay, k, v, rate))
        cache = self.state_cache(self.hparams.n_embd_s, il)
        state, ne = self.states(cache), (n_embd, n_tokens + head * self.n_seqs, 1, 1)
        removed, added = graph.same("unary", kk), graph.same("mul", kk, rate)
        out = graph.new("rwkv_wkv7", F32, ne, r, decay, k, v, removed, added, state)
        self.keep_last(graph.view(out, (n_embd * head * self.n_seqs,), ()), cache)
        x = self.normed_states(graph.view(out, (n_embd * n_tokens,), ()), kk.ne, il)
        score = graph.same("mul", k, r)
        bonus = graph.reshape(blocks.needed(f"{prefix}r_k.weight"), head, n_embd // head)
        score = graph.sum_rows(graph.same("mul", score, bonus))
        x = graph.same("add", x, graph.reshape(graph.same("mul", v, score), n_embd, n_tokens))
        if gated:
            gate = graph.same("unary", graph.mul_mat(blocks.needed(f"{prefix}g1.weight"), inputs["g"]))
            x = graph.same("mul", x, graph.mul_mat(blocks.needed(f"{prefix}g2.weight"), gate))
        return self.by_sequence(blocks.project(x, f"{prefix}output"))

    def _low_rank(self, x: Node, name: str, *, between: bool = False) -> Node:
        """Return a low-rank product with a base added; ``between`` says whether an activation lies within."""
        graph, blocks = self.graph, self.blocks
        x = graph.mul_mat(blocks.needed(f"{name}1.weight"), x)
        x = graph.mul_mat(blocks.needed(f"{name}2.weight"), graph.same("unary", x) if between else x)
        return graph.same("add", x, blocks.needed(f"{name}0.weight"))

    def _value(self, x: Node, il: int) -> Node:
        """Return a layer's value, mixed with the first layer's."""
        graph = self.graph
        value = self.blocks.project(x, f"blk.{il}.time_mix_value")
        if self._first_value is None:
            self._first_value = value
            return value
        share = graph.same("unary", self._low_rank(x, f"blk.{il}.time_mix_v"))
        change = graph.same("mul", graph.same("sub", self._first_value, value), share)
        return graph.same("add", value, change)


class Rwkv7QwenDecoder(Rwkv6QwenDecoder, Rwkv7Decoder):
    """RWKV 7 between Qwen 2's feed-forward parts (src/models/arwkv7.cpp)."""
