"""Decoders with an embedding per layer, whose last layers read the caches of earlier ones: Gemma 3n and Gemma 4."""

from __future__ import annotations

from planner.graph import I32, Node
from planner.graphs.decoder import Decoder
from planner.graphs.experts import moe
from planner.graphs.shape import Moe

_N_ALTUP = 4  # n_altup, src/llama-hparams.h
_N_SPARSE_LAYERS = 10  # n_layer_sparsity, src/models/models.h
_MOE = Moe(uses_scales=True)


class PerLayerDecoder(Decoder):
    """What both have in common."""

    _per_layer: Node | None = None

    def layers(self, x: Node, rows: Node) -> Node:
        """Return the last layer's output, each layer fed with an embedding of its own where the file has them."""
        if self.blocks.has("per_layer_token_embd.weight"):
            self._per_layer = self._embedded_per_layer(x)
        return super().layers(x, rows)

    def _embedded_per_layer(self, x: Node) -> Node:
        """Return every layer's embedding of the tokens (``build_inp_per_layer``, ``project_per_layer_inputs``)."""
        graph, blocks, n_layer, n_tokens = self.graph, self.blocks, self.hparams.n_layer, x.ne[1]
        looked_up = graph.get_rows(blocks.needed("per_layer_token_embd.weight"), graph.input(I32, n_tokens))
        each = (looked_up.ne[0] // n_layer, n_layer, n_tokens)
        looked_up = graph.same("scale", graph.reshape(looked_up, *each))
        graph.expand(looked_up)
        projected = graph.same("scale", graph.mul_mat(blocks.needed("per_layer_model_proj.weight"), x))
        projected = blocks.norm(graph.reshape(projected, *each), "per_layer_proj_norm", -1)
        total = graph.same("scale", graph.same("add", projected, looked_up))
        return graph.cont(graph.permute_heads(total))

    def with_layer_embedding(self, x: Node, per_layer: Node, il: int) -> Node:
        """Return the tokens weighed by a layer's embedding, projected and normalized."""
        graph, blocks, prefix = self.graph, self.blocks, f"blk.{il}."
        gate = graph.same("unary", blocks.project(x, f"{prefix}inp_gate"))
        x = blocks.project(graph.same("mul", gate, self.plane(per_layer)), f"{prefix}proj")
        return blocks.norm(x, f"{prefix}post_norm", il)

    def plane(self, x: Node) -> Node:
        """Return a window on one plane of a tensor."""
        return self.graph.view(x, x.ne[:2], (x.nb[1],))

    def attention(self, x: Node, il: int) -> Node:
        """Return a layer's attention, projected; the last layers cache nothing of their own."""
        blocks, prefix, own = self.blocks, f"blk.{il}.attn_", self.hparams.n_layer_kv_from_start
        if own is None or il < own:
            q, k, v = self.query_key_value(x, il)
            out = blocks.attention(self.cache(il), q, k, self.graph.same("rms_norm", v), il)
        else:
            owner = own - (2 if self.hparams.swa_layers[il] else 1)
            out = blocks.borrowed_attention(self.cache(il), self._query(x, il), il, owner)
        return blocks.project(out, f"{prefix}output")

    def _query(self, x: Node, il: int) -> Node:
        """Return the query alone."""
        graph, blocks, hparams, prefix = self.graph, self.blocks, self.hparams, f"blk.{il}.attn_"
        head, n_head, n_tokens = hparams.head_k_of(il), hparams.n_head[il], x.ne[1]
        if blocks.has(f"{prefix}qkv.weight"):
            fused = blocks.project(x, f"{prefix}qkv")
            q = graph.cont(graph.view(fused, (head * n_head, n_tokens), (fused.nb[1],)))
        else:
            q = blocks.project(x, f"{prefix}q")
        q = blocks.norm(graph.reshape(q, head, n_head, n_tokens), f"{prefix}q_norm", il)
        return blocks.rope(q, self.needed_positions(), self.factors(il))

    def factors(self, il: int) -> Node | None:
        """Return a layer's rotation factors."""
        del il
        return None


class Gemma4Decoder(PerLayerDecoder):
    """Gemma 4 (src/models/gemma4.cpp)."""

    def factors(self, il: int) -> Node | None:
        """Return a layer's rotation factors: those of full attention."""
        return None if self.hparams.swa_layers[il] else self.blocks.rope_factors(il)

    def query_key_value(self, x: Node, il: int) -> tuple[Node, Node, Node]:
        """Return query, key and value; the key's product is the value's too where the file has no other."""
        graph, blocks, hparams, prefix = self.graph, self.blocks, self.hparams, f"blk.{il}.attn_"
        head, n_head, n_kv, n_tokens = hparams.head_k_of(il), hparams.n_head[il], hparams.n_head_kv[il], x.ne[1]
        if blocks.has(f"{prefix}qkv.weight"):
            fused = blocks.project(x, f"{prefix}qkv")
            windows = [graph.view(fused, (head * n, n_tokens), (fused.nb[1],)) for n in (n_head, n_kv, n_kv)]
            q, k, v = (graph.cont(window) for window in windows)
        else:
            q, k = (blocks.project(x, prefix + part) for part in "qk")
            v = blocks.project(x, f"{prefix}v") if blocks.has(f"{prefix}v.weight") else k
        q, k, v = (graph.reshape(part, head, n, n_tokens) for part, n in ((q, n_head), (k, n_kv), (v, n_kv)))
        q, k = self.normed_heads(q, k, prefix, il, skip=False)
        positions, factors = self.needed_positions(), self.factors(il)
        return blocks.rope(q, positions, factors), blocks.rope(k, positions, factors), v

    def layer(self, x: Node, il: int, picked: Node | None) -> Node:
        """Return a layer's output."""
        del picked
        graph, blocks, prefix = self.graph, self.blocks, f"blk.{il}."
        attended = self.attention(blocks.norm(x, f"{prefix}attn_norm", il), il)
        attended = graph.same("add", blocks.norm(attended, f"{prefix}post_attention_norm", il), x)
        x = self.feed_forward(attended, il)
        x = graph.same("add", blocks.norm(x, f"{prefix}post_ffw_norm", -1), attended)
        if self._per_layer:
            x = graph.same("add", x, self.with_layer_embedding(x, self._per_layer, il))
        scale = blocks.weight(f"{prefix}layer_output_scale.weight")
        return graph.same("mul", x, scale) if scale else x

    def feed_forward(self, x: Node, il: int) -> Node:
        """Return a dense part, or one with experts beside it, each under a norm of its own."""
        graph, blocks, prefix = self.graph, self.blocks, f"blk.{il}."
        dense = blocks.gated_ffn(blocks.norm(x, f"{prefix}ffn_norm", il), il)
        if not blocks.has(f"{prefix}ffn_gate_inp.weight"):
            return dense
        dense = blocks.norm(dense, f"{prefix}post_ffw_norm_1", il)
        scores = graph.same("scale", graph.same("rms_norm", x))
        scores = graph.same("mul", scores, blocks.needed(f"{prefix}ffn_gate_inp.scale"))
        scores = graph.mul_mat(blocks.needed(f"{prefix}ffn_gate_inp.weight"), scores)
        routed = moe(blocks, blocks.norm(x, f"{prefix}pre_ffw_norm_2", il), il, _MOE, self.settings, scores)
        return graph.same("add", dense, blocks.norm(routed, f"{prefix}post_ffw_norm_2", il))


class Gemma3nDecoder(PerLayerDecoder):
    """Four streams of activations, of which a layer computes one and corrects the others (src/models/gemma3n.cpp)."""

    def layers(self, x: Node, rows: Node) -> Node:
        """Return the streams' mean after the last layer."""
        graph = self.graph
        added = graph.repeat(x, (*x.ne[:2], _N_ALTUP - 1, 1))
        added = self._scaled_like(graph.mul_mat(self.blocks.needed("altup_proj.weight"), added), x)
        streams = self._stacked(x, added, rows)
        others = graph.mul_mat(self.blocks.needed("altup_unembd_proj.weight"), self._rest(streams))
        others = self._scaled_like(others, self.plane(streams))
        total = self.plane(streams)
        for _ in range(_N_ALTUP - 1):
            total = graph.same("add", total, self.plane(others))
        return graph.same("scale", total)

    def _stacked(self, x: Node, added: Node, rows: Node) -> Node:
        """Return the streams after all layers."""
        self._per_layer = self._embedded_per_layer(x)
        return Decoder.layers(self, self.graph.concat(x, added, 2), rows)

    def output_rows(self, x: Node, rows: Node) -> Node:
        """Return the normalized rows that yield outputs."""
        x = self.blocks.norm(self.graph.get_rows(x, rows), "output_norm", -1)
        x.is_output = True
        return x

    def layer(self, x: Node, il: int, picked: Node | None) -> Node:
        """Return the streams after a layer."""
        del picked
        graph, blocks, prefix = self.graph, self.blocks, f"blk.{il}."
        predicted = self._predicted(x, il)
        active = self.plane(predicted)
        normed = blocks.norm(active, f"{prefix}attn_norm", il)
        low_rank = blocks.project(blocks.project(normed, f"{prefix}laurel_l"), f"{prefix}laurel_r")
        low_rank = graph.same("add", blocks.norm(low_rank, f"{prefix}laurel_post_norm", il), normed)
        attended = blocks.norm(self.attention(normed, il), f"{prefix}post_attention_norm", il)
        attended = graph.same("add", graph.same("add", attended, active), low_rank)
        attended = graph.same("scale", attended)
        fed = self.feed_forward(blocks.norm(attended, f"{prefix}ffn_norm", il), il)
        fed = graph.same("add", blocks.norm(fed, f"{prefix}post_ffw_norm", -1), attended)
        corrected = self._corrected(predicted, fed, il)
        first = graph.same("mul", self.plane(corrected), blocks.needed(f"{prefix}altup_correct_scale.weight"))
        if self._per_layer is None:
            raise KeyError("per_layer_token_embd.weight")
        first = self.with_layer_embedding(first, self._per_layer, il)
        return graph.concat(self.plane(corrected), graph.same("add", self._rest(corrected), first), 2)

    def feed_forward(self, x: Node, il: int) -> Node:
        """Return a feed-forward part; that of the first layers keeps only its largest activations."""
        graph, blocks, prefix = self.graph, self.blocks, f"blk.{il}.ffn_"
        up, gate = blocks.project(x, f"{prefix}up"), blocks.project(x, f"{prefix}gate")
        if il < _N_SPARSE_LAYERS:
            gate = self._largest(gate)
        return blocks.project(graph.same("mul", up, graph.same("unary", gate)), f"{prefix}down")

    def _largest(self, x: Node) -> Node:
        """Return what lies above a row's mean and so many deviations, else zero (``gaussian_topk``)."""
        graph = self.graph
        mean = graph.mean(x)
        deviation = graph.sum_rows(graph.same("sqr", graph.same("sub", x, mean)))
        deviation = graph.same("sqrt", graph.same("scale", deviation))
        cutoff = graph.same("add", mean, graph.same("scale", deviation))
        return graph.same("unary", graph.same("sub", x, cutoff))

    def _scaled_like(self, x: Node, model: Node) -> Node:
        """Return rows brought to the magnitude of another tensor's."""
        wanted, is_now = self._magnitude(model), self._magnitude(x)
        return self.graph.same("div", self.graph.same("mul", x, wanted), is_now)

    def _magnitude(self, x: Node) -> Node:
        return self.graph.same("sqrt", self.graph.sum_rows(self.graph.same("sqr", x)))

    def _rest(self, streams: Node) -> Node:
        """Return a window on all streams but the first."""
        return self.graph.view(streams, (*streams.ne[:2], _N_ALTUP - 1), streams.nb[1:3])

    def _modalities(self, x: Node, il: int) -> Node:
        graph, blocks, prefix = self.graph, self.blocks, f"blk.{il}.altup_router"
        routed = graph.same("scale", blocks.norm(x, f"{prefix}_norm", il))
        return graph.same("unary", graph.mul_mat(blocks.needed(f"{prefix}.weight"), routed))

    def _predicted(self, streams: Node, il: int) -> Node:
        """Return what each stream is predicted to be (``altup_predict``)."""
        graph = self.graph
        modalities = self._modalities(self.plane(streams), il)
        mix = graph.reshape(
            self.blocks.project(modalities, f"blk.{il}.altup_predict_coef"), _N_ALTUP, _N_ALTUP, streams.ne[1]
        )
        mixed = graph.mul_mat(graph.cont(graph.permute(streams, 1, 2, 0, 3)), mix)
        return graph.same("add", graph.cont(graph.permute_heads(mixed)), streams)

    def _corrected(self, predicted: Node, computed: Node, il: int) -> Node:
        """Return the streams corrected by what was computed of one (``altup_correct``)."""
        graph = self.graph
        modalities = self._modalities(computed, il)
        innovation = graph.same("sub", computed, self.plane(predicted))
        weights = graph.same("scale", self.blocks.project(modalities, f"blk.{il}.altup_correct_coef"))
        weights = graph.cont(graph.transpose(weights), 1, computed.ne[1], _N_ALTUP)
        corrections = graph.same("mul", graph.repeat(innovation, predicted.ne), weights)
        return graph.same("add", corrections, predicted)
