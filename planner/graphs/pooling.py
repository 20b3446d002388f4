"""What a server of embeddings does with a batch's rows (src/llama-graph.cpp, ``build_pooling``)."""

from __future__ import annotations

from typing import Final

from planner.context import pooling
from planner.graph import F32, I32, Node
from planner.graphs.blocks import Blocks

_SOFTMAX_OF_RANKS: Final = frozenset({"qwen3", "qwen3vl"})
_MEANS_RANKED: Final = frozenset({"modern-bert"})  # unless the header says otherwise


def pooled(blocks: Blocks, x: Node) -> Node:
    """Return one row per sequence, or all rows, through the dense layers behind them (``build_dense_out``)."""
    graph = blocks.graph
    how = pooling(blocks.hparams, blocks.params)
    if how == "mean":
        x = _mean(blocks, x)
    elif how == "rank":
        x = _ranked(blocks, x)
    elif how != "none":
        x = graph.get_rows(x, graph.input(I32, blocks.batch.n_seqs))
    for name in ("dense_2", "dense_3"):
        if weight := blocks.weight(f"{name}.weight"):
            x = blocks.biased(graph.mul_mat(weight, x), name)
    x.is_output = True
    return x


def _mean(blocks: Blocks, x: Node) -> Node:
    graph, batch = blocks.graph, blocks.batch
    return graph.mul_mat(graph.cont(graph.transpose(x)), graph.input(F32, batch.n_tokens, batch.n_seqs))


def _ranked(blocks: Blocks, x: Node) -> Node:
    """Return the classifier's scores."""
    graph, architecture = blocks.graph, blocks.hparams.architecture
    x = _mean(blocks, x) if architecture in _MEANS_RANKED else graph.get_rows(x, graph.input(I32, blocks.batch.n_seqs))
    if head := blocks.weight("cls.weight"):
        x = graph.same("unary", blocks.biased(graph.mul_mat(head, x), "cls"))
        if blocks.has("cls.norm.weight"):
            x = blocks.norm(x, "cls.norm", -1, "norm")
    if out := blocks.weight("cls.output.weight"):
        x = blocks.biased(graph.mul_mat(out, x), "cls.output")
    return graph.same("soft_max", x) if architecture in _SOFTMAX_OF_RANKS else x
