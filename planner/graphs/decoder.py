"""Decoders in the shape of llama: norm, attention, norm, feed-forward, each added to what came in."""

from __future__ import annotations

from planner.graph import F32, I32, Graph, Node
from planner.graphs.blocks import Blocks, CacheInputs
from planner.graphs.experts import NO_LIMIT, moe
from planner.graphs.pooling import pooled
from planner.graphs.shape import QueryNorm, Residual, Rope, Rows, Settings, Shape, SharedGate, When

_MROPE_POSITIONS = 4  # GGML_MROPE_SECTIONS
_MEDIUM_LAYERS = 32  # what src/models/baichuan.cpp takes for the smaller model
_PLAIN_NORM_NOT_WITH = 128  # experts, src/models/llama4.cpp
NO_ROPE_STEP = 4  # n_no_rope_layer_step, src/llama-hparams.h, src/models/smollm3.cpp


class Decoder:
    """One graph of one batch. A family with layers of its own overrides the method that differs."""

    def __init__(self, blocks: Blocks, settings: Settings, shape: Shape) -> None:
        self.blocks = blocks
        self.graph = blocks.graph
        self.hparams = blocks.hparams
        self.settings = settings
        self.shape = shape
        self._caches: dict[bool, CacheInputs] = {}
        self._positions: Node | None = None
        self._temperature: Node | None = None

    def build(self) -> Graph:
        """Return the graph, from the batch's tokens to its logits."""
        graph, blocks, shape = self.graph, self.blocks, self.shape
        x = self.embedding()
        positions = graph.input(I32, blocks.batch.n_tokens * self._n_positions())
        self._positions = positions
        if shape.temperature and self.settings.number("attention.temperature_scale"):
            self._temperature = graph.input(F32, 1, 1, blocks.batch.n_tokens)
        self._caches = self.caches()
        rows = graph.input(I32, blocks.batch.n_outputs)
        x = self.output_rows(self.layers(self.positioned(x, positions), rows), rows)
        graph.expand(self.logits(x))
        if blocks.params.embeddings:
            graph.expand(pooled(blocks, x))
        return graph

    def positioned(self, x: Node, positions: Node) -> Node:
        """Return the tokens' rows as the first layer reads them: with learned positions, normalized."""
        shape, learned = self.shape, self.blocks.weight("position_embd.weight")
        if shape.learned_positions and learned:
            x = self.graph.same("add", x, self.graph.get_rows(learned, positions))
        return self.blocks.norm(x, "token_embd_norm", 0, shape.norm) if shape.embedding_norm else x

    def layers(self, x: Node, rows: Node) -> Node:
        """Return the last layer's output, of which it keeps only the given rows where the family does."""
        last = self.hparams.n_layer - 1
        for il in self.blocks.layers:
            self.graph.begins[il] = len(self.graph.nodes)
            x = self.layer(x, il, rows if il == last and self.shape.rows is Rows.IN_LAST_LAYER else None)
        return x

    def output_rows(self, x: Node, rows: Node) -> Node:
        """Return the normalized rows that yield outputs; what a draft model could read is an output too."""
        if self.shape.rows is Rows.BEFORE_NORM:
            x.is_output = True
            x = self.graph.get_rows(x, rows)
        x = self.blocks.norm(x, self.shape.output_norm, -1, self.shape.norm)
        x.is_output = True
        if self.shape.rows is Rows.AFTER_NORM:
            x = self.graph.get_rows(x, rows)
            x.is_output = True
        return x

    def embedding(self) -> Node:
        """Return the tokens' rows, scaled where the family does."""
        x = self.blocks.embedded_tokens()
        if not self.settings.has(self.shape.embedding_scale, "embedding_scale"):
            return x
        return self.graph.same("scale", x)

    def caches(self) -> dict[bool, CacheInputs]:
        """Return the inputs of the full cache and, where layers are windowed, of theirs."""
        blocks = self.blocks
        if not any(self.hparams.swa_layers):
            return {False: blocks.cache_inputs(blocks.params.n_ctx_seq)}
        return {
            False: blocks.cache_inputs(blocks.params.n_ctx_seq, windowed=False),
            True: blocks.cache_inputs(blocks.window_cells(), windowed=True),
        }

    def logits(self, x: Node) -> Node:
        """Return the output rows' logits."""
        x = self.blocks.biased(self.blocks.output(x), "output")
        if self.settings.has(self.shape.logit_scale, "logit_scale"):
            x = self.graph.same("scale", x)
        if self.settings.has(self.shape.capped_logits, "final_logit_softcapping"):
            for op in ("scale", "unary", "scale"):
                x = self.graph.same(op, x)
        x.is_output = True
        return x

    # -----------------------------------------------------------------------------------------------------------------
    # Layers

    def layer(self, x: Node, il: int, picked: Node | None) -> Node:
        """Return a layer's output; ``picked`` are the rows to keep after the last one's attention."""
        graph, blocks, shape, prefix = self.graph, self.blocks, self.shape, f"blk.{il}."
        if shape.residual is not Residual.SEQUENTIAL:
            return self.parallel_layer(x, il, picked)
        residual = x
        if shape.attention_norm:
            x = blocks.norm(x, f"{prefix}attn_norm", il, shape.norm)
        x = self.attention(x, il)
        if shape.post_norms and shape.picks_after_norm:
            x = blocks.norm(x, prefix + shape.post_norms[0], il)
        if picked:
            x, residual = graph.get_rows(x, picked), graph.get_rows(residual, picked)
        if shape.post_norms and not shape.picks_after_norm:
            x = blocks.norm(x, prefix + shape.post_norms[0], il)
        residual = x = self.added(self.scaled(x), residual, onto_residual=shape.onto_residual[0])
        if shape.ffn_norm:
            x = blocks.norm(x, prefix + shape.ffn_norm, il, shape.norm)
        x = self.feed_forward(x, il)
        if shape.post_norms:
            x = blocks.norm(x, prefix + shape.post_norms[1], il if shape.pins_last_norm else -1)
        return self.added(self.scaled(x), residual, onto_residual=shape.onto_residual[1])

    def added(self, x: Node, residual: Node, *, onto_residual: bool) -> Node:
        """Return the sum; which operand comes first decides whose memory it may take."""
        return self.graph.same("add", residual, x) if onto_residual else self.graph.same("add", x, residual)

    def parallel_layer(self, x: Node, il: int, picked: Node | None) -> Node:
        """Return the output of a layer whose attention and feed-forward part read the same input."""
        graph, blocks, shape = self.graph, self.blocks, self.shape
        normed = blocks.norm(x, f"blk.{il}.attn_norm", il, shape.norm)
        second = blocks.weight(f"blk.{il}.attn_norm_2.weight")
        attention_input = blocks.norm(x, f"blk.{il}.attn_norm_2", il, shape.norm) if second else normed
        attended = self.attention(attention_input, il)
        if picked:
            attended, x = graph.get_rows(attended, picked), graph.get_rows(x, picked)
            normed = graph.get_rows(normed, picked) if shape.ffn_norm is None else normed
        if shape.ffn_norm:
            normed = blocks.norm(x, f"blk.{il}.{shape.ffn_norm}", il, shape.norm)
        hidden = self.feed_forward(normed, il)
        if shape.residual is Residual.INPUT_FIRST:
            return graph.same("add", graph.same("add", hidden, x), attended)
        if shape.residual is Residual.ATTENTION_FIRST:
            return graph.same("add", graph.same("add", hidden, attended), x)
        return graph.same("add", graph.same("add", attended, hidden), x)

    def scaled(self, x: Node) -> Node:
        """Return a branch scaled before it is added, where the family does."""
        return self.graph.same("scale", x) if self.settings.has(self.shape.residual_scale, "residual_scale") else x

    def attention(self, x: Node, il: int) -> Node:
        """Return a layer's attention, projected."""
        blocks, shape, prefix = self.blocks, self.shape, f"blk.{il}."
        q, k, v = self.query_key_value(x, il)
        if shape.scaled_query:
            q = self.graph.same("scale", q)
        sinks = blocks.weight(f"{prefix}attn_sinks.weight") if shape.sinks else None
        x = blocks.attention(self.cache(il), q, k, v, il, sinks=sinks, capped=shape.capped_scores)
        x = blocks.biased(blocks.project(x, f"{prefix}attn_output"), f"{prefix}attn_output")
        return self.graph.same("scale", x) if self.settings.has(shape.value_scale, "attention.value_scale") else x

    def cache(self, il: int) -> CacheInputs:
        """Return the inputs of the cache that a layer uses."""
        return self._caches[self.hparams.swa_layers[il]]

    def query_key_value(self, x: Node, il: int) -> tuple[Node, Node, Node]:
        """Return query, key and value, normalized and with positions turned in."""
        blocks, how, prefix = self.blocks, self.shape.query_norm, f"blk.{il}.attn_"
        clamps = self.shape.clamps and self.settings.number("attention.clamp_kqv") > 0
        rows_normed, plain = how is QueryNorm.ROWS, self.shape.plain_products
        q, k, v = blocks.qkv(x, il, clamps=clamps, rows_normed=rows_normed, plain=plain)
        if how is QueryNorm.NONE and self.blocks.has(f"{prefix}q_norm.weight"):
            raise KeyError(f"{prefix}q_norm.weight")
        if how is QueryNorm.AFTER_ROPE:
            q, k = self.normed_heads(*self.turned(q, k, il), prefix, il, skip=False)
            return self.tempered(q, il), k, v
        q, k = self.turned(*self.normed_heads(q, k, prefix, il, skip=how is not QueryNorm.HEADS), il)
        q = self.tempered(q, il)
        plain = how is QueryNorm.PLAIN_AFTER_ROPE and self.hparams.n_expert != _PLAIN_NORM_NOT_WITH
        if plain and self.uses_rope(il):
            q, k = self.graph.same("rms_norm", q), self.graph.same("rms_norm", k)
        return q, k, v

    def tempered(self, q: Node, il: int) -> Node:
        """Return the query scaled by position, where the family does; with layers without rope, only in those."""
        if self._temperature is None or (self.shape.rope is Rope.BUT_EVERY_FOURTH and self.uses_rope(il)):
            return q
        return self.graph.same("mul", q, self._temperature)

    def needed_positions(self) -> Node:
        """Return the positions' input. Raises KeyError where the family has none."""
        if self._positions is None:
            raise KeyError("positions")
        return self._positions

    def normed_heads(self, q: Node, k: Node, prefix: str, il: int, *, skip: bool) -> tuple[Node, Node]:
        """Return query and key with each head normalized, where the file has weights for it."""
        if skip:
            return q, k
        norm = self.shape.norm
        if self.blocks.weight(f"{prefix}q_norm.weight"):
            q = self.blocks.norm(q, f"{prefix}q_norm", il, norm)
        if self.blocks.weight(f"{prefix}k_norm.weight"):
            k = self.blocks.norm(k, f"{prefix}k_norm", il, norm)
        return q, k

    def turned(self, q: Node, k: Node, il: int) -> tuple[Node, Node]:
        """Return query and key with positions turned in, where the layer does that."""
        if self._positions is None or not self.uses_rope(il):
            return q, k
        factors = self.blocks.rope_factors(il) if self.shape.rope_factors else None
        return self.blocks.rope(q, self._positions, factors), self.blocks.rope(k, self._positions, factors)

    def uses_rope(self, il: int) -> bool:
        """Say whether a layer turns positions in."""
        rope, windowed = self.shape.rope, self.hparams.swa_layers
        if rope is Rope.WINDOWED:
            return windowed[il] or not any(windowed)
        if rope is Rope.BUT_EVERY_FOURTH:
            step = NO_ROPE_STEP if any(windowed) or not self.shape.temperature else self.hparams.n_layer
            return (il + 1) % step != 0
        if rope is Rope.BY_PATTERN:
            pattern = self.settings.get("attention.rope_pattern")
            return not isinstance(pattern, tuple) or bool(pattern[il])
        if rope is Rope.IF_32_LAYERS:
            return self.hparams.n_layer_all == _MEDIUM_LAYERS
        return rope is Rope.ALL

    def _n_positions(self) -> int:
        """Return the positions of one token (``n_pos_per_embd``): one, or one per dimension of a picture."""
        sections = self.settings.get("rope.dimension_sections")
        in_use = isinstance(sections, tuple) and len(sections) > 1 and all(sections[:2])
        when = self.shape.four_positions
        return _MROPE_POSITIONS if when is When.ALWAYS or (when is When.IF_SET and in_use) else 1

    # -----------------------------------------------------------------------------------------------------------------
    # Feed-forward parts

    def feed_forward(self, x: Node, il: int) -> Node:
        """Return a feed-forward part: experts, with shared ones beside them where the file has some, or dense."""
        blocks, shape = self.blocks, self.shape
        if not blocks.weight(f"blk.{il}.ffn_gate_inp.weight"):
            if shape.ffn:
                return blocks.sequential_ffn(x, il, shape.ffn)
            return blocks.gated_ffn(x, il, limited=self._limited(il))
        if shape.moe is None:
            raise KeyError(f"blk.{il}.ffn_up.weight")
        routed = moe(blocks, x, il, shape.moe, self.settings)
        if not blocks.weight(f"blk.{il}.ffn_up_shexp.weight"):
            return routed
        shared = blocks.gated_ffn(x, il, "_shexp", limited=self._limited(il))
        if shape.moe.shared_gate is not SharedGate.NONE:
            score = blocks.project(x, f"blk.{il}.ffn_gate_inp_shexp")
            gate = self.graph.same("unary", score)
            gate = self.graph.same("div", gate, score) if shape.moe.shared_gate is SharedGate.RATIO else gate
            shared = self.graph.same("mul", shared, gate)
        return self.graph.same("add", routed, shared)

    def _limited(self, il: int) -> bool:
        """Say whether a dense part clamps both sides of its activation."""
        moe_shape = self.shape.moe
        return (
            moe_shape is not None and moe_shape.limited and self.settings.of_layer("swiglu_clamp_shexp", il) > NO_LIMIT
        )
