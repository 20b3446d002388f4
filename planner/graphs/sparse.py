"""Decoders with latent attention that sees only the cells an indexer chose (src/models/deepseek32.cpp, glm-dsa.cpp)."""

from __future__ import annotations

from planner.graph import F16, F32, I32, I64, Node
from planner.graphs.blocks import Blocks, CacheInputs
from planner.graphs.latent import LatentDecoder
from planner.graphs.shape import Settings, Shape


class SparseDecoder(LatentDecoder):
    """DeepSeek-V3.2 and its kin. A layer without an indexer of its own takes the last one's choice."""

    def __init__(self, blocks: Blocks, settings: Settings, shape: Shape) -> None:
        super().__init__(blocks, settings, shape)
        self._indexer: CacheInputs | None = None
        self._chosen: Node | None = None

    def caches(self) -> dict[bool, CacheInputs]:
        """Return the inputs of the latent cache; the indexer's keys have another."""
        graph, params, n_tokens = self.graph, self.blocks.params, self.blocks.batch.n_tokens
        caches = super().caches()
        n_cells = params.n_ctx_seq
        self._indexer = CacheInputs(
            k_ids=graph.input(I64, n_tokens),
            v_ids=None,
            mask=graph.input(F16, n_cells, n_tokens // params.n_stream, 1, params.n_stream),
            k_rotation=self.blocks.rotation(self._head),
            v_rotation=None,
            n_cells=n_cells,
        )
        return caches

    @property
    def _head(self) -> int:
        return int(self.settings.number("attention.indexer.key_length"))

    def attention(self, x: Node, il: int) -> Node:
        """Return a layer's attention, projected."""
        self._low_rank = LatentDecoder.low_rank_query(self, x, il)
        if self._has_indexer(il):
            self._chosen = self._choose(x, self._low_rank, il)
        return super().attention(x, il)

    def low_rank_query(self, x: Node, il: int) -> Node:
        """Return the query's compressed form, which the indexer reads too."""
        del x, il
        return self._low_rank

    def attended(self, query: Node, key: Node, value: Node, il: int) -> Node:
        """Return what the heads see of the cells that were chosen."""
        if self._chosen is None:
            raise KeyError(f"blk.{il}.indexer.attn_k.weight")
        cache = self.cache(il)
        mask, sinks = (
            self.blocks.shown_only(cache.mask, self._chosen, F32),
            self.blocks.weight(f"blk.{il}.attn_sinks.weight"),
        )
        return self.blocks.latent_attention(cache, query, key, value, il, mask=mask, sinks=sinks)

    def _has_indexer(self, il: int) -> bool:
        types = self.settings.get("attention.indexer.types")
        has_one = not isinstance(types, tuple) or bool(types[il])
        return has_one and self.blocks.has(f"blk.{il}.indexer.attn_k.weight")

    def _choose(self, x: Node, low_rank: Node, il: int) -> Node:
        """Return each token's best cells by the indexer's scores (``ggml_lightning_indexer``)."""
        graph, blocks, prefix, inputs = self.graph, self.blocks, f"blk.{il}.indexer.", self._indexer
        if inputs is None or inputs.k_rotation is None:
            raise KeyError("indexer")
        n_tokens, head, streams = x.ne[1], self._head, blocks.params.n_stream
        q = graph.mul_mat(blocks.needed(f"{prefix}attn_q_b.weight"), low_rank)
        q = self.turned_and_mixed(graph.reshape(q, head, q.ne[0] // head, n_tokens), inputs.k_rotation)
        k = blocks.norm(graph.mul_mat(blocks.needed(f"{prefix}attn_k.weight"), x), f"{prefix}k_norm", il, "norm")
        k = self.turned_and_mixed(graph.reshape(k, head, 1, n_tokens), inputs.k_rotation)
        cells = blocks.store_k(inputs, k, il)
        weights = graph.mul_mat(blocks.needed(f"{prefix}proj.weight"), x)
        per_stream = n_tokens // streams
        q = graph.view(q, (*q.ne[:2], per_stream, streams), (*q.nb[1:3], q.nb[3] // streams))
        by_stream = (weights.nb[1], weights.nb[2] // streams, weights.nb[3] // streams)
        weights = graph.same("scale", graph.view(weights, (weights.ne[0], per_stream, 1, streams), by_stream))
        scores = graph.new(
            "lightning_indexer", F32, (cells.ne[2], per_stream, 1, streams), q, cells, weights, inputs.mask
        )
        n_best = min(cells.ne[2], int(self.settings.number("attention.indexer.top_k")))
        return graph.cont(graph.new("top_k", I32, (n_best, *scores.ne[1:]), scores))

    def turned_and_mixed(self, x: Node, rotation: Node) -> Node:
        """Return the indexer's query or key with positions turned in, its channels mixed."""
        return self.graph.mul_mat(rotation, self.blocks.rope(x, self.needed_positions()))


class WindowedSparseDecoder(SparseDecoder):
    """Windowed layers see all of their window; every head is gated (src/models/dots3note.cpp)."""

    def attended(self, query: Node, key: Node, value: Node, il: int) -> Node:
        """Return what the heads see."""
        if self.hparams.swa_layers[il]:
            return LatentDecoder.attended(self, query, key, value, il)
        return super().attended(query, key, value, il)

    def projected(self, out: Node, x: Node, il: int) -> Node:
        """Return what the heads saw, weighed per head and projected."""
        graph, blocks, n_head, (width, n_tokens, _, _) = self.graph, self.blocks, self.hparams.n_head[il], out.ne
        gate = graph.same("unary", blocks.project(x, f"blk.{il}.attn_gate", scaled=False))
        heads = graph.reshape(out, width // n_head, n_head, n_tokens)
        gated = graph.same("mul", heads, graph.reshape(gate, 1, n_head, n_tokens))
        return blocks.project(graph.reshape(gated, width, n_tokens), f"blk.{il}.attn_output")
