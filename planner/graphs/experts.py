"""Blocks that choose among experts (src/llama-graph.cpp, ``build_moe_ffn``)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from planner.graph import Graph, Node
from planner.graphs.blocks import Blocks
from planner.graphs.shape import Moe, Settings

Activation = Callable[[Node | None, Node], Node]

NO_LIMIT: Final = 1e-6  # a clamp below this is none (``build_ffn``, ``build_moe_ffn``)
_MAX_REDUCED: Final = 15  # MOE_WEIGHTED_REDUCTION_MAX_EXPERTS, ggml/src/ggml-cuda/ggml-cuda.cu


def moe(blocks: Blocks, x: Node, il: int, how: Moe, settings: Settings, scores: Node | None = None) -> Node:
    """Return the weighted sum of the chosen experts; ``scores`` are the router's where it has run before."""
    chosen, weights = route(blocks, x, il, how, settings, scores)
    limited = how.limited and settings.of_layer("swiglu_clamp_exp", il) > NO_LIMIT
    return mixed(blocks, x, il, how, chosen, weights, activate=partial(blocks.activated, limited=limited))


def mixed(
    blocks: Blocks,
    x: Node,
    il: int,
    how: Moe,
    chosen: Node,
    weights: Node,
    suffix: str = "exps",
    *,
    activate: Activation | None = None,
) -> Node:
    """Return the weighted sum of the experts that were chosen (``build_moe_ffn``, from the weights on)."""
    graph, prefix = blocks.graph, f"blk.{il}.ffn_"
    n_embd, n_tokens, _, _ = x.ne
    graph.expand(weights)
    x = graph.reshape(x, n_embd, 1, n_tokens)
    if how.weighs_input:
        x = graph.same("mul", graph.repeat(x, (n_embd, chosen.ne[0], n_tokens, 1)), weights)
    if blocks.has(f"{prefix}gate_up_{suffix}.weight"):
        both = _experts(blocks, x, f"{prefix}gate_up_{suffix}", chosen, how)
        half = (both.ne[0] // 2, *both.ne[1:3])
        hidden = graph.glu(graph.view(both, half, both.nb[1:3]), graph.view(both, half, both.nb[1:3]))
    else:
        up = _experts(blocks, x, f"{prefix}up_{suffix}", chosen, how)
        gate = _experts(blocks, x, f"{prefix}gate_{suffix}", chosen, how) if how.gated else None
        hidden = (activate or blocks.activated)(gate, up)
    experts = _experts(blocks, hidden, f"{prefix}down_{suffix}", chosen, how)
    if not how.weighs_input:
        experts = graph.same("mul", experts, weights)
    graph.expand(experts)
    views = [graph.view(experts, (n_embd, n_tokens), (experts.nb[2],)) for _ in range(experts.ne[1])]
    for view in views:
        graph.expand(view)
    total = views[0]
    for view in views[1:]:
        total = graph.same("add", total, view)
        graph.expand(total)
    if not how.weighs_input and 1 < len(views) <= _MAX_REDUCED:
        graph.reductions.append((experts, total))
    return graph.cont(total) if len(views) == 1 else total


def router_scores(blocks: Blocks, x: Node, il: int) -> Node:
    """Return each token's score of every expert."""
    return blocks.biased(blocks.project(x, f"blk.{il}.ffn_gate_inp"), f"blk.{il}.ffn_gate_inp")


def route(
    blocks: Blocks, x: Node, il: int, how: Moe, settings: Settings, scores: Node | None, chosen: Node | None = None
) -> tuple[Node, Node]:
    """Return the chosen experts and their weights.

    ``scores`` are the router's where it has run before, ``chosen`` the experts where something else chooses them.
    """
    graph, used, n_tokens = blocks.graph, blocks.hparams.n_expert_used, x.ne[1]
    scores = router_scores(blocks, x, il) if scores is None else scores
    probabilities = scores if how.softmax_after else graph.same("soft_max", scores)
    bias = blocks.weight(f"blk.{il}.exp_probs_b.bias") or blocks.weight(f"blk.{il}.exp_probs_b")
    selection = graph.same("add", probabilities, bias) if bias else probabilities
    selection = _grouped(graph, scores if how.weighs_input else selection, settings)
    chosen = chosen or graph.top_k(selection, used)
    weights = graph.get_rows(graph.reshape(probabilities, 1, probabilities.ne[0], n_tokens), chosen)
    if how.softmax_after:
        weights = graph.same("soft_max", graph.reshape(weights, used, n_tokens))
        weights = graph.reshape(weights, 1, used, n_tokens)
    normalizes = how.normalizes
    if bool(settings.get("expert_weights_norm")) if normalizes is None else normalizes:
        weights = normalized(graph, weights)
    scales = settings.number("expert_weights_scale") not in {0.0, 1.0} if how.scales is None else how.scales
    return chosen, graph.same("scale", weights) if scales else weights


def normalized(graph: Graph, weights: Node) -> Node:
    """Return the weights of each token's experts divided by their sum."""
    _, used, n_tokens, _ = weights.ne
    flat = graph.reshape(weights, used, n_tokens)
    total = graph.same("clamp", graph.sum_rows(flat))
    return graph.reshape(graph.same("div", flat, total), 1, used, n_tokens)


def _grouped(graph: Graph, selection: Node, settings: Settings) -> Node:
    """Return the scores with all but the best groups of experts masked, where the header groups them."""
    n_expert, n_tokens, _, _ = selection.ne
    n_groups, n_used = int(settings.number("expert_group_count")), int(settings.number("expert_group_used_count"))
    if n_groups <= 1:
        return selection
    groups = graph.reshape(selection, n_expert // n_groups, n_groups, n_tokens)
    best = graph.top_k(groups, 2)
    best = graph.get_rows(graph.reshape(groups, 1, *groups.ne[:3]), best)
    best = graph.sum_rows(graph.reshape(best, *best.ne[1:]))
    kept = graph.top_k(graph.reshape(best, *best.ne[1:3]), n_used)
    masked = graph.set_rows(graph.same("fill", groups), graph.get_rows(groups, kept), kept)
    return graph.reshape(masked, n_expert, n_tokens)


def _experts(blocks: Blocks, x: Node, name: str, chosen: Node, how: Moe) -> Node:
    """Return one product per chosen expert, scaled and shifted where the file says so."""
    out = blocks.project_chosen(x, name, chosen, scaled=how.uses_scales)
    bias = blocks.weight(f"{name}.bias")
    return blocks.graph.same("add_id", out, bias, chosen) if bias else out
