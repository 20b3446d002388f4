"""Decoders that do one thing in a way of their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from planner.graph import F32, Node
from planner.graphs.decoder import Decoder

_PICTURE_TOKENS: Final = 8192  # src/models/chameleon.cpp

_SCALES_OF_A_PASS: Final = frozenset(f"attn_{part}.scale" for part in ("q", "k", "v", "output"))


class GatedAttentionDecoder(Decoder):
    """Attention weighed by a gate before its projection (src/models/afmoe.cpp, laguna.cpp, spark2-5.cpp)."""

    def attention(self, x: Node, il: int) -> Node:
        """Return a layer's attention, gated per element or per head, projected."""
        graph, blocks, prefix = self.graph, self.blocks, f"blk.{il}.attn_"
        gate = graph.same("unary", blocks.project(x, f"{prefix}gate", scaled=False))
        q, k, v = self.query_key_value(x, il)
        x = blocks.attention(self.cache(il), q, k, v, il)
        width, n_tokens, n_head = x.ne[0], x.ne[1], self.hparams.n_head[il]
        if gate.ne[0] == n_head:
            heads = graph.reshape(x, width // n_head, n_head, n_tokens)
            x = graph.same("mul", heads, graph.reshape(gate, 1, n_head, n_tokens))
            x = graph.reshape(x, width, n_tokens)
        else:
            x = graph.same("mul", x, gate)
        return blocks.project(x, f"{prefix}output")


class MuseGlimmerDecoder(GatedAttentionDecoder):
    """Norms without weights of their own, or without a layer of their own (src/models/muse-glimmer.cpp)."""

    def embedding(self) -> Node:
        """Return the tokens' rows, normalized."""
        return self.graph.same("rms_norm", super().embedding())

    def layer(self, x: Node, il: int, picked: Node | None) -> Node:
        """Return a layer's output."""
        graph, blocks, prefix, residual = self.graph, self.blocks, f"blk.{il}.", x
        x = self.attention(blocks.norm(x, f"{prefix}attn_norm", il), il)
        x = blocks.norm(x, f"{prefix}post_attention_norm", -1)
        if picked:
            x, residual = graph.get_rows(x, picked), graph.get_rows(residual, picked)
        residual = graph.same("add", x, residual)
        x = self.feed_forward(blocks.norm(residual, f"{prefix}ffn_norm", il), il)
        return graph.same("add", blocks.norm(x, f"{prefix}post_ffw_norm", -1), residual)


class TalkieDecoder(Decoder):
    """Norms without weights, and the embedding added to every layer's output (src/models/talkie.cpp)."""

    def embedding(self) -> Node:
        """Return the tokens' rows, normalized."""
        self._embedded = self.graph.same("rms_norm", super().embedding())
        return self._embedded

    def layer(self, x: Node, il: int, picked: Node | None) -> Node:
        """Return a layer's output."""
        graph, residual, skipped = self.graph, x, self._embedded
        x = self.attention(graph.same("rms_norm", x), il)
        if picked:
            x, residual, skipped = (graph.get_rows(node, picked) for node in (x, residual, skipped))
        residual = graph.same("add", x, residual)
        x = graph.same("add", self.feed_forward(graph.same("rms_norm", residual), il), residual)
        return graph.same(
            "add", x, graph.same("mul", skipped, self.blocks.needed(f"blk.{il}.layer_output_scale.weight"))
        )

    def feed_forward(self, x: Node, il: int) -> Node:
        """Return a feed-forward part, its result scaled where the file says so."""
        x, scale = super().feed_forward(x, il), self.blocks.weight(f"blk.{il}.ffn_down.scale")
        return self.graph.same("mul", x, scale) if scale else x

    def normed_heads(self, q: Node, k: Node, prefix: str, il: int, *, skip: bool) -> tuple[Node, Node]:
        """Return query and key with each head normalized, the key without weights."""
        del skip
        return self.blocks.norm(q, f"{prefix}q_norm", il), self.graph.same("rms_norm", k)


class HrmTextDecoder(GatedAttentionDecoder):
    """Two stacks of blocks in turn, over a fast and a slow state (src/models/hrm-text.cpp).

    A layer is one pass over a block: it has a cache of its own, and weights that it shares with the other passes.
    """

    def layers(self, x: Node, rows: Node) -> Node:
        """Return the slow state after all cycles."""
        del rows
        n_slow, n_fast, depth = (
            int(self.settings.number(f"hrm.{name}")) for name in ("h_cycles", "l_cycles", "layers_per_stack")
        )
        n_layer = self.hparams.n_layer
        if depth < 1 or n_slow * (n_fast + 1) * depth != n_layer:
            raise KeyError("hrm.layers_per_stack")
        passes = [range(first, first + depth) for first in range(0, n_layer, depth)]
        for block in range(2 * depth):
            ends_cycle = block >= depth
            stacks = [stack for index, stack in enumerate(passes) if (index % (n_fast + 1) == n_fast) is ends_cycle]
            self.blocks.share(block, [stack[block % depth] for stack in stacks], _SCALES_OF_A_PASS)
        slow, fast = x, self.blocks.needed("hrm.z_l_init")
        for index, stack in enumerate(passes):
            state = self._stack(self.graph.same("add", slow, fast), stack)
            slow, fast = (state, fast) if index % (n_fast + 1) == n_fast else (slow, state)
        return slow

    def output_rows(self, x: Node, rows: Node) -> Node:
        """Return the rows that yield outputs, which the last stack has normalized."""
        x = self.graph.get_rows(x, rows)
        x.is_output = True
        return x

    def _stack(self, x: Node, stack: Iterable[int]) -> Node:
        graph = self.graph
        for il in stack:
            x = graph.same("add", self.attention(graph.same("rms_norm", x), il), x)
            x = graph.same("add", self.feed_forward(graph.same("rms_norm", x), il), x)
        return graph.same("rms_norm", x)


class GrokDecoder(Decoder):
    """Experts and a dense part side by side (src/models/grok.cpp)."""

    def feed_forward(self, x: Node, il: int) -> Node:
        """Return the sum of both parts, scaled."""
        routed = super().feed_forward(x, il)
        if not self.blocks.weight(f"blk.{il}.ffn_up.weight"):
            return routed
        return self.graph.same("scale", self.graph.same("add", self.blocks.gated_ffn(x, il), routed))


class ArcticDecoder(Decoder):
    """A dense part after attention, and experts that read the layer's input (src/models/arctic.cpp)."""

    def layer(self, x: Node, il: int, picked: Node | None) -> Node:
        """Return a layer's output."""
        graph, blocks, prefix = self.graph, self.blocks, f"blk.{il}."
        residual = x
        x = self.attention(blocks.norm(x, f"{prefix}attn_norm", il), il)
        if picked:
            x, residual = graph.get_rows(x, picked), graph.get_rows(residual, picked)
        attended = graph.same("add", x, residual)
        dense = blocks.gated_ffn(blocks.norm(attended, f"{prefix}ffn_norm", il), il)
        dense = graph.same("add", dense, attended)
        routed = self.feed_forward(blocks.norm(residual, f"{prefix}ffn_norm_exps", il), il)
        return graph.same("add", routed, dense)


class OpenElmDecoder(Decoder):
    """Heads cut out of one fused product (src/models/openelm.cpp)."""

    def query_key_value(self, x: Node, il: int) -> tuple[Node, Node, Node]:
        """Return query, key and value."""
        graph, blocks, hparams, prefix = self.graph, self.blocks, self.hparams, f"blk.{il}.attn_"
        head, n_head, n_kv, n_tokens = hparams.head_k, hparams.n_head[il], hparams.n_head_kv[il], x.ne[1]
        fused = blocks.project(x, f"{prefix}qkv", scaled=False)
        fused = graph.reshape(fused, head, n_head + 2 * n_kv, n_tokens)
        q, k, v = (graph.view(fused, (head, n, n_tokens), fused.nb[1:3]) for n in (n_head, n_kv, n_kv))
        return *self.turned(*self.normed_heads(q, k, prefix, il, skip=False), il), v


class RefactDecoder(Decoder):
    """A decoder that reads no experts, even where the file has some (src/models/refact.cpp)."""

    def feed_forward(self, x: Node, il: int) -> Node:
        """Return a dense part, or only its activation where the file has none."""
        if self.blocks.has(f"blk.{il}.ffn_up.weight"):
            return self.blocks.gated_ffn(x, il)
        return self.graph.same("unary", x)


class Step35Decoder(GatedAttentionDecoder):
    """Frequency factors in layers that see everything only (src/models/step35.cpp)."""

    def turned(self, q: Node, k: Node, il: int) -> tuple[Node, Node]:
        """Return query and key with positions turned in."""
        blocks, positions = self.blocks, self.needed_positions()
        factors = None if self.hparams.swa_layers[il] else blocks.rope_factors(il)
        return blocks.rope(q, positions, factors), blocks.rope(k, positions, factors)


class BitnetDecoder(Decoder):
    """Norms before the last product of each part (src/models/bitnet.cpp)."""

    def attention(self, x: Node, il: int) -> Node:
        """Return a layer's attention, normalized and projected."""
        blocks, prefix = self.blocks, f"blk.{il}.attn_"
        q, k, v = self.query_key_value(x, il)
        x = blocks.norm(blocks.attention(self.cache(il), q, k, v, il), f"{prefix}sub_norm", il)
        return blocks.biased(blocks.project(x, f"{prefix}output"), f"{prefix}output")

    def feed_forward(self, x: Node, il: int) -> Node:
        """Return a feed-forward part."""
        blocks, prefix = self.blocks, f"blk.{il}.ffn_"
        up, gate = blocks.project(x, f"{prefix}up"), blocks.project(x, f"{prefix}gate")
        return blocks.project(blocks.norm(blocks.activated(gate, up), f"{prefix}sub_norm", il), f"{prefix}down")

    def logits(self, x: Node) -> Node:
        """Return the output rows' logits, by the embedding where it lies."""
        x = self.blocks.project(x, "token_embd")
        x.is_output = True
        return x


class ChameleonDecoder(Decoder):
    """Norms of query and key with a weight per head; pictures' logits are put out (src/models/chameleon.cpp)."""

    def layer(self, x: Node, il: int, picked: Node | None) -> Node:
        """Return a layer's output."""
        graph, blocks, prefix, residual = self.graph, self.blocks, f"blk.{il}.", x
        norms_after = bool(self.settings.get("swin_norm"))
        x = self.attention(x if norms_after else blocks.norm(x, f"{prefix}attn_norm", il), il)
        if picked:
            x, residual = graph.get_rows(x, picked), graph.get_rows(residual, picked)
        x = blocks.norm(x, f"{prefix}attn_norm", il) if norms_after else x
        residual = graph.same("add", x, residual)
        x = self.feed_forward(x if norms_after else blocks.norm(residual, f"{prefix}ffn_norm", il), il)
        x = blocks.norm(x, f"{prefix}ffn_norm", il) if norms_after else x
        return graph.same("add", x, residual)

    def normed_heads(self, q: Node, k: Node, prefix: str, il: int, *, skip: bool) -> tuple[Node, Node]:
        """Return query and key with each head normalized, where the file has weights for it."""
        del skip
        q, k = (
            self.blocks.norm(x, f"{prefix}{part}_norm", il, "norm")
            if self.blocks.has(f"{prefix}{part}_norm.weight")
            else x
            for x, part in ((q, "q"), (k, "k"))
        )
        return q, k

    def logits(self, x: Node) -> Node:
        """Return the output rows' logits, those of pictures' tokens overwritten."""
        graph = self.graph
        x = self.blocks.biased(self.blocks.output(x), "output")
        x = graph.same("set", x, graph.same("clamp", graph.leaf(F32, (_PICTURE_TOKENS,))))
        x.is_output = True
        return x
