"""Decoders in the shape of llama: norm, attention, norm, feed-forward, each added to what came in.

``Shape`` says what a family does differently; the rest follows from which tensors the file has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from planner.graph import I32, Graph, Node
from planner.graphs.blocks import Blocks, CacheInputs, Moe
from planner.model import MetadataValue


@dataclass(frozen=True, slots=True)
class Shape:
    """What a decoder's graph does beside the common way (src/models/llama.cpp)."""

    scaled_embedding: bool = False
    scaled_query: bool = False
    fused_gate: bool = False  # ffn_up holds gate and up side by side
    rope_factors: bool = False
    post_norms: bool = False  # after attention and after the feed-forward part
    ffn_norm: str = "ffn_norm"
    sinks: bool = False
    capped_scores: bool = False
    capped_logits: bool = False
    rows_last: bool = False  # output rows are picked after the last layer, not inside it
    moe: Moe = Moe()


def decoder(blocks: Blocks, metadata: Mapping[str, MetadataValue], shape: Shape) -> Graph:
    """Return the graph of one batch."""
    del metadata
    graph, hparams = blocks.graph, blocks.hparams
    x = blocks.embedded_tokens()
    if shape.scaled_embedding:
        x = graph.same("scale", x)
    positions = graph.input(I32, blocks.batch.n_tokens)
    caches = _caches(blocks)
    rows = graph.input(I32, blocks.batch.n_outputs)
    for il in range(hparams.n_layer):
        picked = rows if il == hparams.n_layer - 1 and not shape.rows_last else None
        x = _layer(blocks, shape, caches[hparams.swa_layers[il]], positions, x, il, picked)
    if shape.rows_last:
        x = graph.get_rows(x, rows)
    x = blocks.norm(x, "output_norm", -1)
    x = graph.mul_mat(blocks.output_weight(), x)
    x = blocks.biased(x, "output")
    for op in ("scale", "unary", "scale") if shape.capped_logits else ():
        x = graph.same(op, x)
    graph.expand(x)
    return graph


def _caches(blocks: Blocks) -> dict[bool, CacheInputs]:
    caches = {False: blocks.cache_inputs(blocks.params.n_ctx_seq)}
    if any(blocks.hparams.swa_layers):
        caches[True] = blocks.cache_inputs(blocks.window_cells())
    return caches


def _layer(
    blocks: Blocks, shape: Shape, cache: CacheInputs, positions: Node, x: Node, il: int, picked: Node | None
) -> Node:
    graph, prefix = blocks.graph, f"blk.{il}."
    residual = x
    x = blocks.norm(x, f"{prefix}attn_norm", il)
    q, k, v = blocks.qkv(x, il)
    factors = blocks.rope_factors(il) if shape.rope_factors else None
    if blocks.weight(f"{prefix}attn_q_norm.weight"):
        q = blocks.rope(blocks.norm(q, f"{prefix}attn_q_norm", il), positions, factors)
        k = blocks.rope(blocks.norm(k, f"{prefix}attn_k_norm", il), positions, factors)
    else:
        q, k = blocks.rope(q, positions, factors), blocks.rope(k, positions, factors)
    if shape.scaled_query:
        q = graph.same("scale", q)
    sinks = blocks.weight(f"{prefix}attn_sinks.weight") if shape.sinks else None
    x = blocks.attention(cache, q, k, v, il, sinks=sinks, capped=shape.capped_scores)
    x = blocks.biased(blocks.project(x, f"{prefix}attn_output"), f"{prefix}attn_output")
    if picked:
        x, residual = graph.get_rows(x, picked), graph.get_rows(residual, picked)
    if shape.post_norms:
        x = blocks.norm(x, f"{prefix}post_attention_norm", il)
    residual = x = graph.same("add", x, residual)
    x = _feed_forward(blocks, shape, blocks.norm(x, f"{prefix}{shape.ffn_norm}", il), il)
    if shape.post_norms:
        x = blocks.norm(x, f"{prefix}post_ffw_norm", -1)
    return graph.same("add", x, residual)


def _feed_forward(blocks: Blocks, shape: Shape, x: Node, il: int) -> Node:
    if blocks.weight(f"blk.{il}.ffn_gate_inp.weight"):
        return blocks.moe(x, il, shape.moe)
    if shape.fused_gate:
        return blocks.sequential_ffn(x, il, ("glu",))
    return blocks.gated_ffn(x, il)
