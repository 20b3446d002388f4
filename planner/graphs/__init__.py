"""The compute graphs that are built here, by architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from planner.graph import Graph
from planner.graphs.blocks import Blocks, Moe
from planner.graphs.decoder import Shape, decoder
from planner.graphs.latent import latent_decoder
from planner.model import MetadataValue

Family = Callable[[Blocks, Mapping[str, MetadataValue]], Graph]

FAMILIES: Final[Mapping[str, Family]] = {
    "llama": partial(decoder, shape=Shape(rope_factors=True)),
    "deepseek2": latent_decoder,
    "qwen2": partial(decoder, shape=Shape()),
    "qwen3": partial(decoder, shape=Shape()),
    "qwen3moe": partial(decoder, shape=Shape()),
    "gemma": partial(decoder, shape=Shape(scaled_embedding=True, scaled_query=True)),
    "gemma2": partial(
        decoder,
        shape=Shape(scaled_embedding=True, scaled_query=True, post_norms=True, capped_scores=True, capped_logits=True),
    ),
    "gemma3": partial(decoder, shape=Shape(scaled_embedding=True, scaled_query=True, post_norms=True)),
    "phi3": partial(decoder, shape=Shape(scaled_query=True, fused_gate=True, rope_factors=True)),
    "gpt-oss": partial(
        decoder,
        shape=Shape(
            ffn_norm="post_attention_norm",
            sinks=True,
            rows_last=True,
            moe=Moe(normalizes=False, softmax_after=True),
        ),
    ),
}
