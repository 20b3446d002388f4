"""Decoders without a cache: every token of a batch sees all of them (src/models/dream.cpp, llada.cpp, rnd1.cpp)."""

from __future__ import annotations

from planner.graph import Node
from planner.graphs.blocks import Blocks, CacheInputs
from planner.graphs.decoder import Decoder
from planner.graphs.shape import Settings, Shape


class UncachedDecoder(Decoder):
    """Diffusion models: the layers of a decoder over the batch alone."""

    def __init__(self, blocks: Blocks, settings: Settings, shape: Shape) -> None:
        super().__init__(blocks, settings, shape)
        self._mask = blocks.batch_mask()

    def caches(self) -> dict[bool, CacheInputs]:
        """Return no cache's inputs."""
        return {}

    def attention(self, x: Node, il: int) -> Node:
        """Return a layer's attention, projected."""
        q, k, v = self.query_key_value(x, il)
        prefix = f"blk.{il}.attn_output"
        attended = self.blocks.uncached_attention(self._mask, q, k, v, il)
        return self.blocks.biased(self.blocks.project(attended, prefix), prefix)
