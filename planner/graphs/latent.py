"""Decoders with latent attention (src/models/deepseek2.cpp): one compressed K per token, shared by all heads."""

from __future__ import annotations

from collections.abc import Mapping

from planner.graph import F32, I32, Graph, Node
from planner.graphs.blocks import Blocks, CacheInputs, Moe
from planner.model import MetadataValue


def latent_decoder(blocks: Blocks, metadata: Mapping[str, MetadataValue]) -> Graph:
    """Return the graph of one batch. Raises KeyError where the file has no absorbed projections."""
    graph, hparams = blocks.graph, blocks.hparams
    key = hparams.architecture
    scale = metadata.get(f"{key}.expert_weights_scale", 0.0)
    moe = Moe(normalizes=bool(metadata.get(f"{key}.expert_weights_norm", False)), scales=scale not in {0.0, 1.0})
    rope = int(metadata[f"{key}.rope.dimension_count"])
    x = blocks.embedded_tokens()
    positions = graph.input(I32, blocks.batch.n_tokens)
    cache = blocks.cache_inputs(blocks.params.n_ctx_seq, latent=True)
    rows = graph.input(I32, blocks.batch.n_outputs)
    for il in range(hparams.n_layer):
        residual = x
        x = blocks.norm(x, f"blk.{il}.attn_norm", il)
        x = _attention(blocks, cache, positions, rope, x, il)
        if il == hparams.n_layer - 1:
            x, residual = graph.get_rows(x, rows), graph.get_rows(residual, rows)
        residual = x = graph.same("add", x, residual)
        x = blocks.norm(x, f"blk.{il}.ffn_norm", il)
        x = graph.same("add", _feed_forward(blocks, moe, x, il), residual)
    x = blocks.norm(x, "output_norm", -1)
    graph.expand(graph.mul_mat(blocks.output_weight(), x))
    return graph


def _attention(blocks: Blocks, cache: CacheInputs, positions: Node, rope: int, x: Node, il: int) -> Node:
    graph, hparams, n_tokens = blocks.graph, blocks.hparams, blocks.batch.n_tokens
    prefix, n_head, unit = f"blk.{il}.attn_", hparams.n_head[il], F32.block_bytes
    if blocks.weight(f"{prefix}q.weight"):
        q = graph.mul_mat(blocks.needed(f"{prefix}q.weight"), x)
    else:
        q = blocks.norm(graph.mul_mat(blocks.needed(f"{prefix}q_a.weight"), x), f"{prefix}q_a_norm", il)
        q = graph.mul_mat(blocks.needed(f"{prefix}q_b.weight"), q)
    head = q.ne[0] // n_head
    q = graph.reshape(q, head, n_head, n_tokens)
    both = graph.mul_mat(blocks.needed(f"{prefix}kv_a_mqa.weight"), x)
    latent = both.ne[0] - rope
    k_rope = blocks.rope(graph.view(both, (rope, 1, n_tokens), (both.nb[1], both.nb[1])), positions)
    compressed = blocks.norm(graph.view(both, (latent, n_tokens), (both.nb[1],)), f"{prefix}kv_a_norm", il)
    q_plain = graph.view(q, (head - rope, n_head, n_tokens), q.nb[1:3])
    q_rope = blocks.rope(graph.view(q, (rope, n_head, n_tokens), q.nb[1:3]), positions)
    absorbed = graph.mul_mat(blocks.needed(f"{prefix}k_b.weight"), graph.permute_heads(q_plain))
    query = graph.concat(graph.permute_heads(absorbed), q_rope)
    value = graph.reshape(compressed, latent, 1, n_tokens)
    key = graph.concat(value, k_rope)
    out = blocks.latent_attention(cache, query, key, value, il)
    return blocks.project(out, f"{prefix}output")


def _feed_forward(blocks: Blocks, moe: Moe, x: Node, il: int) -> Node:
    if not blocks.weight(f"blk.{il}.ffn_gate_inp.weight"):
        return blocks.gated_ffn(x, il)
    routed = blocks.moe(x, il, moe)
    return blocks.graph.same("add", routed, blocks.gated_ffn(x, il, "_shexp"))
