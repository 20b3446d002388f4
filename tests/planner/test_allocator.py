"""Laws of the graph allocator, and the rules of reuse that decide its last byte."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.allocator import DynamicAllocator, GraphAllocator
from planner.graph import F32, Graph, Node

ALIGNMENTS = st.sampled_from([1, 32, 128, 256])
# Each step either allocates that many bytes or, where negative, releases the n-th live block.
STEPS = st.lists(st.integers(-8, 4096).filter(bool), max_size=60)


def run(steps: list[int], alignment: int) -> tuple[DynamicAllocator, list[tuple[int, int]], int]:
    """Carry the steps out; return the allocator, the live (offset, size) blocks and the most bytes that were live."""
    allocator, live, most = DynamicAllocator(alignment), [], 0
    for step in steps:
        if step > 0:
            live.append((allocator.allocate(step), step))
        elif live:
            offset, size = live.pop(-step % len(live))
            allocator.release(offset, size)
        most = max(most, sum(size for _, size in live))
    return allocator, live, most


@given(STEPS, ALIGNMENTS)
def test_live_blocks_never_overlap_and_are_aligned(steps: list[int], alignment: int) -> None:
    allocator, live, _ = run(steps, alignment)
    blocks = sorted(live)
    assert all(offset % alignment == 0 for offset, _ in blocks)
    ends = [offset + allocator.padded(size) for offset, size in blocks]
    assert all(end <= offset for end, (offset, _) in zip(ends, blocks[1:], strict=False))


@given(STEPS, ALIGNMENTS)
def test_the_buffer_is_never_smaller_than_what_was_live_at_once(steps: list[int], alignment: int) -> None:
    allocator, _, most = run(steps, alignment)
    assert allocator.high_water_bytes >= most


@given(STEPS, ALIGNMENTS)
def test_the_same_steps_give_the_same_buffer(steps: list[int], alignment: int) -> None:
    assert run(steps, alignment)[0].high_water_bytes == run(steps, alignment)[0].high_water_bytes


@given(STEPS, ALIGNMENTS)
def test_after_everything_is_released_the_room_is_one_piece_again(steps: list[int], alignment: int) -> None:
    allocator, live, _ = run(steps, alignment)
    for offset, size in live:
        allocator.release(offset, size)
    assert allocator.allocate(1 << 30) == 0


def test_of_two_gaps_that_fit_equally_the_later_is_taken() -> None:
    allocator = DynamicAllocator(32)
    offsets = [allocator.allocate(64) for _ in range(5)]
    allocator.release(offsets[1], 64)
    allocator.release(offsets[3], 64)
    assert allocator.allocate(64) == offsets[3]


def test_the_smallest_gap_that_fits_is_taken() -> None:
    allocator = DynamicAllocator(32)
    offsets = [allocator.allocate(size) for size in (256, 32, 128, 32)]
    allocator.release(offsets[0], 256)
    allocator.release(offsets[2], 128)
    assert allocator.allocate(100) == offsets[2]


@pytest.mark.parametrize("alignment", [0, 3, 48])
def test_an_alignment_is_a_power_of_two(alignment: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        DynamicAllocator(alignment)


# ---------------------------------------------------------------------------------------------------------------------
# Graphs


def reserve(graph: Graph, alignment: int = 32) -> int:
    (size,) = GraphAllocator([alignment], [Node.nbytes]).reserve(
        [(node, 0) for node in graph.nodes], [(leaf, 0) for leaf in graph.leafs]
    )
    return size


def chain(graph: Graph, elements: int, operations: list[str]) -> Node:
    node = graph.input(F32, elements)
    for operation in operations:
        node = graph.same(operation, node)
    graph.expand(node)
    return node


def test_an_operation_that_may_takes_its_only_readers_memory() -> None:
    graph = Graph()
    chain(graph, 256, ["scale", "rms_norm", "unary"])
    assert reserve(graph) == 1024


def test_an_operation_that_may_not_needs_room_beside_its_operand() -> None:
    graph = Graph()
    chain(graph, 256, ["norm"])
    assert reserve(graph) == 2 * 1024


def test_a_tensor_that_is_read_again_keeps_its_memory() -> None:
    graph = Graph()
    x = graph.input(F32, 256)
    graph.expand(graph.same("add", graph.same("scale", x), x))
    assert reserve(graph) == 2 * 1024


def test_memory_behind_a_view_is_not_taken_over() -> None:
    graph = Graph()
    x = graph.reshape(graph.same("norm", graph.input(F32, 256)), 16, 16)
    graph.expand(graph.same("scale", x))
    assert reserve(graph) == 2 * 1024  # the input's room is free again by then


def test_an_output_is_never_given_up() -> None:
    graph = Graph()
    x = chain(graph, 256, ["norm"])
    x.is_output = True
    y = graph.same("norm", x)
    z = graph.same("norm", y)
    graph.expand(z)
    assert reserve(graph) == 3 * 1024


def test_weights_take_no_room() -> None:
    graph = Graph()
    weight = graph.leaf(F32, (256, 256))
    weight.home, weight.is_weight = 0, True
    graph.expand(graph.mul_mat(weight, graph.input(F32, 256)))
    assert reserve(graph) == 2 * 1024


@st.composite
def graphs(draw: st.DrawFn) -> tuple[Graph, int]:
    """Return a graph of element-wise operations and a size that it cannot do without."""
    graph = Graph()
    nodes: list[Node] = []
    nodes.extend(graph.input(F32, draw(st.integers(1, 5)) * 64) for _ in range(draw(st.integers(1, 3))))
    for _ in range(draw(st.integers(1, 12))):
        first = draw(st.sampled_from(nodes))
        alike = [node for node in nodes if node.ne == first.ne]
        operation = draw(st.sampled_from(["add", "norm", "view"]))
        if operation == "view":
            nodes.append(graph.reshape(first, 64, first.ne[0] * first.ne[1] // 64))
        else:
            nodes.append(graph.same(operation, first, *([draw(st.sampled_from(alike))] if operation == "add" else [])))
    for node in nodes:
        graph.expand(node)
    readers = {id(owner_of(node)): index for index, other in enumerate(graph.nodes) for node in (*other.src, other)}
    needed = 0
    for index, node in enumerate(graph.nodes):
        owners = {id(owner): owner for owner in map(owner_of, (*node.src, node))}
        still_read = {key: owner for key, owner in owners.items() if readers[key] > index or owner is owner_of(node)}
        needed = max(needed, sum(owner.nbytes() for owner in still_read.values()))
    return graph, needed


def owner_of(node: Node) -> Node:
    return node.view_of or node


@given(graphs(), ALIGNMENTS)
def test_a_graph_needs_at_least_a_result_and_the_operands_still_wanted(case: tuple[Graph, int], alignment: int) -> None:
    graph, needed = case
    assert reserve(graph, alignment) >= needed
