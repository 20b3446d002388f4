"""ggml's backend scheduler, replayed (ggml/src/ggml-backend.cpp): which backend computes what, and what is copied.

Backends are numbered in llama.cpp's order: the devices, then the CPU last. Every backend is taken to support every
operation, which is what RPC workers and the CPU answer, and what graphics cards answer for the graphs built here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from planner.graph import UNASSIGNED, Graph, Node

# Operations that do not follow their weights: rotation factors and attention sinks are too small to decide by.
_IGNORES_WEIGHTS = frozenset({"rope", "flash_attn"})

Offloads = Callable[[Node], bool]


@dataclass(slots=True)
class _Split:
    """A run of nodes on one backend, and the tensors that are copied to it beforehand."""

    backend: int
    start: int
    end: int = 0
    inputs: list[Node] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Schedule:
    """What the graph allocator is given: nodes and leafs in order, each with its backend."""

    nodes: list[tuple[Node, int]]
    leafs: list[tuple[Node, int]]
    n_splits: int


def schedule(
    graph: Graph, n_copies: int, offloads: Sequence[Offloads | None], reduces: Sequence[bool] | None = None
) -> Schedule:
    """Return the graph as ``ggml_backend_sched_split_graph`` hands it to the allocator.

    ``offloads[b]`` says whether backend ``b`` takes an operation over whose weights lie in host memory
    (``offload_op``), None where it never does. Nodes that already have a backend keep it
    (``ggml_backend_sched_set_tensor_backend``).
    ``reduces[b]`` says whether backend ``b`` computes a weighted sum in one step and keeps its operands until then
    (ggml-cuda.cu, ``ggml_backend_cuda_graph_optimize``).
    """
    cpu = len(offloads) - 1
    _assign_from_locations(graph, cpu, offloads)
    _expand(graph.nodes, cpu)
    _assign_sources(graph.nodes)
    splits = _split(graph.nodes, n_copies)
    return _assemble(graph, splits, n_copies, reduces or [False] * len(offloads))


def _assign_from_locations(graph: Graph, cpu: int, offloads: Sequence[Offloads | None]) -> None:
    """Pass 1: tensors with a place stay there, inputs are the CPU's, operations go to their weights."""
    takers = [(backend, takes) for backend, takes in enumerate(offloads) if takes is not None]
    for node in (*graph.leafs, *graph.nodes):
        if node.backend != UNASSIGNED:
            continue
        owner = node.view_of or node
        if owner.home is not None:
            node.backend = owner.home
        elif node.is_input:
            node.backend = cpu
        elif node.op not in _IGNORES_WEIGHTS:
            node.backend = _home_of_weight(node)
            if node.backend == cpu:
                node.backend = next((backend for backend, takes in takers if takes(node)), cpu)


def _home_of_weight(node: Node) -> int:
    """Return where the first of this operation's weights lies, UNASSIGNED where it has none."""
    for source in node.src:
        if source.is_weight and source.home is not None:
            return source.home
    return UNASSIGNED


def _expand(nodes: list[Node], cpu: int) -> None:
    """Pass 2: a node without a backend takes its neighbour's, devices before the CPU, from above before from below."""
    movable = [node for node in nodes if not node.is_view_op]
    for skip in (cpu, UNASSIGNED):
        for order in (movable, reversed(movable)):
            current = UNASSIGNED
            for node in order:
                if node.backend != UNASSIGNED:
                    current = UNASSIGNED if node.backend == skip else node.backend
                elif current != UNASSIGNED:
                    node.backend = current


def _assign_sources(nodes: list[Node]) -> None:
    """Pass 4: views are where their owner is, other sources where they are first read."""
    for node in nodes:
        if node.backend == UNASSIGNED and node.view_of is not None:
            node.backend = node.view_of.backend
        for source in node.src:
            if source.backend == UNASSIGNED:
                source.backend = node.backend if source.view_of is None else source.view_of.backend
        if node.backend == UNASSIGNED:
            node.backend = 0


def _resides_on(node: Node, backend: int) -> bool:
    """Say whether a backend can read a tensor where it is (``ggml_backend_sched_buffer_supported``)."""
    owner = node.view_of or node
    if owner.home is not None:
        return owner.home == backend
    assigned = node.backend
    if assigned == UNASSIGNED and node.view_of is not None:
        assigned = node.view_of.backend
    return assigned == backend


def _split(nodes: list[Node], n_copies: int) -> list[_Split]:
    """Pass 5: cut where the backend changes or a further foreign weight is needed; copy what lies elsewhere."""
    first = next(node for node in nodes if not node.is_view_op)
    splits = [_Split(first.backend, 0)]
    for index, node in enumerate(nodes):
        if node.is_view_op:
            continue
        split = splits[-1]
        if node.backend != split.backend or (split.inputs and _needs_foreign_weight(node, split.backend)):
            split = _Split(node.backend, index)
            splits.append(split)
        backend = split.backend
        for position, source in enumerate(node.src):
            if source.backend != backend and not _resides_on(source, backend):
                node.src[position] = _copy_to(split, source, n_copies)
    for split, following in pairwise(splits):
        split.end = following.start
    splits[-1].end = len(nodes)
    return splits


def _needs_foreign_weight(node: Node, backend: int) -> bool:
    for source in node.src:
        if source.is_weight and source.backend != backend and not _resides_on(source, backend):
            return True
    return False


def _copy_to(split: _Split, source: Node, n_copies: int) -> Node:
    if source.copies is None:
        source.copies = {}
    copies = source.copies.get(split.backend)
    if copies is None:
        copies = [source.duplicate_layout() for _ in range(n_copies)]
        for copy in copies:
            copy.is_input = copy.is_output = n_copies > 1
            copy.backend = split.backend
        source.copies[split.backend] = copies
        split.inputs.append(source)
    return copies[0]


def _assemble(graph: Graph, splits: list[_Split], n_copies: int, reduces: Sequence[bool]) -> Schedule:
    """Put the copies in front of their split; with pipelining all of them, and the inputs', are leafs."""
    nodes: list[tuple[Node, int]] = []
    for split in splits:
        for source in split.inputs:
            nodes.append((_dependency(source, source), source.backend))
            nodes.append((_copy_to(split, source, n_copies), split.backend))
        within = graph.nodes[split.start : split.end]
        ends = _reductions_of(graph, within) if reduces[split.backend] else {}
        for node in within:
            nodes.append((node, node.backend))
            if id(node) in ends:
                product = ends[id(node)]
                nodes.append((_dependency(product.src[0], *product.src[:2]), split.backend))
    leafs = [*_pipeline_leafs(graph, splits, n_copies)] if n_copies > 1 else []
    leafs.extend((leaf, leaf.backend) for leaf in graph.leafs)
    return Schedule(nodes, leafs, len(splits))


def _reductions_of(graph: Graph, within: list[Node]) -> dict[int, Node]:
    """Return the products of the weighted sums that lie wholly among these nodes, by the identity of their last sum."""
    there = {id(node) for node in within}
    return {id(total): product for product, total in graph.reductions if id(product) in there and id(total) in there}


def _dependency(shape: Node, *sources: Node) -> Node:
    """Return a node that computes nothing, and keeps its sources until its turn."""
    return Node("none", shape.type, shape.ne, shape.nb, [*sources], shape.view_of or shape)


def _pipeline_leafs(graph: Graph, splits: list[_Split], n_copies: int) -> Iterator[tuple[Node, int]]:
    """Pass 6: every input leaf and every copied tensor, once per copy (the leaf itself is its first copy)."""
    for leaf in graph.leafs:
        if leaf.is_input:
            for copy in (leaf, *(leaf.duplicate_layout() for _ in range(n_copies - 1))):
                copy.is_input = copy.is_output = True
                yield copy, leaf.backend
    for split in splits:
        for source in split.inputs:
            for copy in (source.copies or {})[split.backend]:
                yield copy, split.backend
