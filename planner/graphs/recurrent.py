"""Decoders whose layers keep a state per sequence instead of a cache of tokens (src/llama-graph.cpp, ``build_rs``)."""

from __future__ import annotations

from collections.abc import Callable

from planner.graph import F32, I32, Node
from planner.graphs.blocks import Blocks
from planner.graphs.decoder import Decoder
from planner.graphs.shape import Settings, Shape

UNIT_BYTES = F32.block_bytes


class RecurrentDecoder(Decoder):
    """What recurrent layers share: the sequences, their states, and the inputs that a convolution looks back on."""

    def __init__(self, blocks: Blocks, settings: Settings, shape: Shape) -> None:
        super().__init__(blocks, settings, shape)
        self.n_seqs = blocks.batch.n_seqs
        self.n_seq_tokens = blocks.batch.n_tokens // self.n_seqs
        self.d_inner = int(settings.number("ssm.inner_size"))
        self.d_state = int(settings.number("ssm.state_size"))
        self.n_group = int(settings.number("ssm.group_count"))
        self.dt_rank = int(settings.number("ssm.time_step_rank"))
        n_states = blocks.params.n_seq_max
        copied = self.graph.input(I32, n_states)
        self._read = self.graph.view(copied, (self.n_seqs,), ())
        self._unread = self.graph.view(copied, (n_states - self.n_seqs,), ())

    def state_cache(self, width: int, il: int) -> Node:
        """Return a layer's cache of one row per sequence."""
        cache = self.graph.leaf(F32, (width, self.blocks.params.n_seq_max))
        cache.home = self.blocks.places.caches[il]
        return cache

    def states(self, cache: Node, read: Callable[[Node, Node], Node] | None = None) -> Node:
        """Return the sequences' states out of their cache, or what ``read`` makes of all states and their indices."""
        graph = self.graph
        states = graph.reshape(cache, *cache.ne[:2])
        graph.expand(graph.inplace("scale", graph.view(states, (cache.ne[0],), ())))
        result = (read or graph.get_rows)(states, self._read)
        graph.expand(result)
        unread = graph.get_rows(states, self._unread)
        graph.expand(graph.copy(unread, graph.view(cache, unread.ne[:2], (cache.nb[1],))))
        return result

    def keep(self, what: Node, cache: Node) -> None:
        """Write the sequences' new states into their cache."""
        graph = self.graph
        graph.expand(graph.copy(what, graph.view(cache, (cache.ne[0], self.n_seqs), (cache.nb[1],))))

    def looked_back(self, x: Node, kept: int, il: int) -> Node:
        """Return each sequence's new inputs behind the last ones before, which move on."""
        graph, channels = self.graph, x.ne[0]
        cache = self.state_cache(self.hparams.n_embd_r, il)
        states = graph.reshape(self.states(cache), kept, channels, self.n_seqs)
        joined = graph.concat(states, graph.transpose(x))
        self.keep(graph.view(joined, (kept, channels, self.n_seqs), joined.nb[1:3]), cache)
        return joined

    def convolved(self, joined: Node, kernel: Node) -> Node:
        """Return the convolution over each sequence's inputs (``ggml_ssm_conv``)."""
        return self.graph.new("ssm_conv", F32, (kernel.ne[1], self.n_seq_tokens, self.n_seqs, 1), joined, kernel)
