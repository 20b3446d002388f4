"""Shapes of ggml's operations, and where the scheduler computes and copies."""

from __future__ import annotations

import pytest

from planner.ggml import BY_NAME
from planner.graph import F16, F32, I32, Graph, Node
from planner.graphs import SHAPES, builder
from planner.graphs.decoder import Decoder
from planner.scheduler import Schedule, schedule

CPU = 2  # of three backends: two devices and the CPU


def weight(graph: Graph, home: int, *ne: int) -> Node:
    node = graph.leaf(F32, ne)
    node.home, node.is_weight = home, True
    return node


def test_products_have_a_row_per_weight_row() -> None:
    graph = Graph()
    product = graph.mul_mat(graph.leaf(BY_NAME["q4_K"], (512, 96)), graph.input(F32, 512, 7))
    assert (product.ne, product.type, product.nbytes()) == ((96, 7, 1, 1), F32, 96 * 7 * 4)


def test_a_window_spans_from_its_first_to_its_last_element() -> None:
    graph = Graph()
    full = graph.input(F32, 100, 10)
    window = graph.view(full, (8, 10), (full.nb[1],))
    assert window.nbytes() == 9 * 400 + 8 * 4
    assert window.view_of is full


def test_a_view_of_a_view_looks_into_the_owner() -> None:
    graph = Graph()
    full = graph.input(F16, 8, 4, 6)
    view = graph.permute_heads(graph.reshape(full, 8, 4, 6))
    assert (view.ne, view.view_of, view.is_contiguous) == ((8, 6, 4, 1), full, False)


def test_the_best_experts_are_a_window_into_all_of_them_sorted() -> None:
    graph = Graph()
    best = graph.top_k(graph.input(F32, 64, 5), 8)
    assert (best.ne, best.type, best.src[0].ne) == ((8, 5, 1, 1), I32, (64, 5, 1, 1))


def test_sources_come_before_what_reads_them() -> None:
    graph = Graph()
    x = graph.input(F32, 4)
    a, b = graph.same("scale", x), graph.same("unary", x)
    total = graph.same("add", a, b)
    graph.expand(total)
    assert graph.nodes == [a, b, total]
    assert graph.leafs == [x]


def two_layers() -> tuple[Graph, Node, Node]:
    """Return a graph of a product on each of two devices."""
    graph = Graph()
    first = graph.mul_mat(weight(graph, 0, 64, 64), graph.input(F32, 64, 8))
    second = graph.mul_mat(weight(graph, 1, 64, 64), graph.same("unary", first))
    graph.expand(second)
    return graph, first, second


def copies_on(plan: Schedule, backend: int) -> list[Node]:
    return [node for node, where in plan.nodes if node.op == "none" and node.view_of is None and where == backend]


def test_operations_go_where_their_weights_are() -> None:
    graph, first, second = two_layers()
    schedule(graph, 1, [None, None, None])
    assert (first.backend, second.backend) == (0, 1)


def test_an_operation_without_weights_stays_with_the_one_before() -> None:
    graph, first, second = two_layers()
    schedule(graph, 1, [None, None, None])
    assert second.src[1].duplicate_layout().ne == first.ne
    assert graph.nodes[1].op == "unary"
    assert graph.nodes[1].backend == 0


def test_a_pinned_node_is_computed_where_it_is_pinned() -> None:
    graph, _, _ = two_layers()
    graph.nodes[1].backend = 1
    plan = schedule(graph, 1, [None, None, None])
    assert graph.nodes[1].backend == 1
    assert len(copies_on(plan, 1)) == 1


def test_what_another_backend_reads_is_copied_to_it_once() -> None:
    graph, _, second = two_layers()
    third = graph.same("add", second, second.src[1])
    graph.expand(third)
    plan = schedule(graph, 1, [None, None, None])
    assert plan.n_splits == 2
    assert [len(copies_on(plan, backend)) for backend in range(3)] == [1, 1, 0]


def test_pipelining_keeps_every_input_and_every_copy_four_times() -> None:
    graph, _, _ = two_layers()
    plan = schedule(graph, 4, [None, None, None])
    kept = [(leaf.is_output, backend) for leaf, backend in plan.leafs if leaf.is_input]
    assert sorted(set(kept)) == [(True, 0), (True, 1), (True, CPU)]
    distinct = {id(leaf): backend for leaf, backend in plan.leafs if leaf.is_input}
    assert [list(distinct.values()).count(backend) for backend in range(3)] == [4, 4, 4]


@pytest.mark.parametrize("takes,where", [(None, CPU), (lambda _node: True, 0), (lambda _node: False, CPU)])
def test_a_device_takes_products_of_host_weights_where_it_offers_to(takes: object, where: int) -> None:
    graph = Graph()
    product = graph.mul_mat(weight(graph, CPU, 64, 64), graph.input(F32, 64, 8))
    graph.expand(product)
    plan = schedule(graph, 1, [takes, None, None])  # type: ignore[list-item]
    assert product.backend == where
    assert [copy.ne[:2] for copy in copies_on(plan, 0)] == ([(64, 64), (64, 8)] if where == 0 else [])


def test_each_host_weight_that_is_taken_over_starts_a_split() -> None:
    graph = Graph()
    x = graph.input(F32, 64, 8)
    for _ in range(3):
        x = graph.mul_mat(weight(graph, CPU, 64, 64), x)
    graph.expand(x)
    assert schedule(graph, 1, [lambda _node: True, None, None]).n_splits == 3


def test_a_card_keeps_what_it_sums_in_one_step_until_the_sum() -> None:
    graph = Graph()
    product = graph.mul_mat(weight(graph, 0, 64, 64), graph.input(F32, 64, 2))
    weighted = graph.same("mul", product, graph.input(F32, 1, 2))
    parts = [graph.view(weighted, (64, 1), (weighted.nb[1],)) for _ in range(2)]
    for node in (weighted, *parts):
        graph.expand(node)
    total = graph.same("add", *parts)
    graph.expand(total)
    graph.reductions.append((weighted, total))
    kept, plain = (
        [node.src for node, _ in schedule(graph, 1, [None] * 3, reduces).nodes if node.src[:1] == [product]]
        for reduces in ([True, False, False], None)
    )
    assert len(kept) == len(plain) + 1


@pytest.mark.parametrize("architecture", sorted(SHAPES))
def test_every_architecture_has_a_builder_that_can_be_imported(architecture: str) -> None:
    """They are named in a table of texts, so that one family's module is imported and not all."""
    assert issubclass(builder(architecture), Decoder)
