"""A compute graph as far as memory goes: tensors with shapes, strides and sources, built by ggml's own rules.

Every method of ``Graph`` mirrors the ggml function of its name (ggml/src/ggml.c): the result's shape and type, which
tensors it reads and in which order, and whether it owns memory or looks into another tensor's. Values do not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from planner.ggml import BY_NAME, GgmlType

F32: Final = BY_NAME["f32"]
F16: Final = BY_NAME["f16"]
I32: Final = BY_NAME["i32"]
I64: Final = BY_NAME["i64"]

Shape = tuple[int, int, int, int]

UNASSIGNED: Final = -1

# Operations that llama.cpp tries out, and builds from plainer ones where they run away from their layer
# (src/llama-context.cpp, resolve_fused_ops): attention, and three parts of hyper-connections.
FLASH_ATTN: Final = "flash_attn"
HC_PRE: Final = "dsv4_hc_pre"
HC_COMB: Final = "dsv4_hc_comb"
HC_POST: Final = "dsv4_hc_post"

# Operations that only look at another tensor's memory; the scheduler passes over them (ggml-backend.cpp, is_view_op).
VIEW_OPS: Final = frozenset({"view", "reshape", "permute", "transpose"})

# Operations whose result may take its operand's memory (ggml-alloc.c, ggml_op_can_inplace), of those built here.
INPLACE_OPS: Final = frozenset(
    {
        "scale",
        "add",
        "add_id",
        "sub",
        "mul",
        "div",
        "sqr",
        "sqrt",
        "unary",
        "rope",
        "rms_norm",
        "clamp",
        "soft_max",
        "fill",
    }
)


class Node:
    """One tensor. ``op`` is "none" for weights, caches and inputs, which are a graph's leafs.

    ``home`` is the backend whose buffer holds the tensor before any graph is computed, None where the graph allocator
    has to find room for it. ``view_of`` is the tensor that owns the memory of a view, never itself a view. ``backend``
    is what the scheduler assigns. ``allocated``, ``buffer``, ``offset``,
    ``n_children`` and ``n_views`` are the allocator's.
    """

    __slots__ = (
        "allocated",
        "backend",
        "buffer",
        "copies",
        "home",
        "inplace",
        "is_input",
        "is_output",
        "is_view_op",
        "is_weight",
        "n_children",
        "n_views",
        "nb",
        "ne",
        "offset",
        "op",
        "seen",
        "src",
        "type",
        "view_of",
    )

    def __init__(self, op: str, type_: GgmlType, ne: Shape, nb: Shape, src: list[Node], view_of: Node | None) -> None:
        self.op = op
        self.type = type_
        self.ne = ne
        self.nb = nb
        self.src = src
        self.view_of = view_of
        self.home: int | None = None
        self.is_weight = self.is_input = self.is_output = self.seen = self.allocated = False
        self.is_view_op = op in VIEW_OPS
        self.inplace = op in INPLACE_OPS
        self.backend = UNASSIGNED
        self.copies: dict[int, list[Node]] | None = None
        self.n_children = self.n_views = self.offset = self.buffer = 0

    def nbytes(self) -> int:
        """Return the bytes from the first element to the last, 0 where there is none (``ggml_nbytes``)."""
        ne, nb = self.ne, self.nb
        if 0 in ne:
            return 0
        if self.type.block == 1:
            first = nb[0] * (ne[0] - 1) + self.type.block_bytes
        else:
            first = ne[0] * nb[0] // self.type.block
        return first + (ne[1] - 1) * nb[1] + (ne[2] - 1) * nb[2] + (ne[3] - 1) * nb[3]

    def duplicate_layout(self) -> Node:
        """Return a tensor of the same shape and strides that owns memory (``ggml_dup_tensor_layout``)."""
        return Node("none", self.type, self.ne, self.nb, [], None)

    @property
    def is_contiguous(self) -> bool:
        """Say whether the elements follow each other without gaps (``ggml_is_contiguous``, ones skipped)."""
        expected = self.type.block_bytes
        for axis in range(4):
            if self.ne[axis] != 1 and self.nb[axis] != expected:
                return False
            expected = expected * self.ne[axis] // (self.type.block if axis == 0 else 1)
        return True


def strides(type_: GgmlType, ne: Shape) -> Shape:
    """Return the byte strides of a contiguous tensor."""
    row = type_.block_bytes * ne[0] // type_.block
    plane = row * ne[1]
    return (type_.block_bytes, row, plane, plane * ne[2])


def shape4(ne: Sequence[int]) -> Shape:
    """Return a shape padded with ones to ggml's four dimensions."""
    padded = (*ne, 1, 1, 1)
    return (padded[0], padded[1], padded[2], padded[3])


class Graph:
    """A graph under construction: its nodes in evaluation order, its leafs in the order they were met."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.leafs: list[Node] = []
        self.begins: dict[int, int] = {}  # by layer, how many nodes there were before it; where layers can be left out
        self.fused: list[tuple[Node, int]] = []  # operations that are tried out, each with its layer
        self.reductions: list[tuple[Node, Node]] = []  # a product by weights, and the last sum over its parts

    # -----------------------------------------------------------------------------------------------------------------
    # Leafs

    def leaf(self, type_: GgmlType, ne: Sequence[int]) -> Node:
        """Return a tensor that no operation computes."""
        shape = shape4(ne)
        return Node("none", type_, shape, strides(type_, shape), [], None)

    def input(self, type_: GgmlType, *ne: int) -> Node:
        """Return a tensor that is filled before each run (``ggml_set_input``)."""
        node = self.leaf(type_, ne)
        node.is_input = True
        return node

    # -----------------------------------------------------------------------------------------------------------------
    # Order

    def expand(self, node: Node) -> None:
        """Append what the node needs, depth first, then the node itself (``ggml_build_forward_expand``)."""
        if node.seen:
            return
        node.seen = True
        for source in node.src:
            if not source.seen:
                self.expand(source)
        (self.leafs if node.op == "none" else self.nodes).append(node)

    # -----------------------------------------------------------------------------------------------------------------
    # Operations that own memory

    def same(self, op: str, a: Node, *others: Node) -> Node:
        """Return an element-wise result: ``a``'s shape and type, contiguous (``ggml_dup_tensor``)."""
        return Node(op, a.type, a.ne, strides(a.type, a.ne), [a, *others], None)

    def new(self, op: str, type_: GgmlType, ne: Shape, *src: Node) -> Node:
        """Return a contiguous result of the given shape."""
        return Node(op, type_, ne, strides(type_, ne), list(src), None)

    def mul_mat(self, w: Node, x: Node) -> Node:
        """Return w @ x: one row of w per output element."""
        return self.new("mul_mat", F32, (w.ne[1], x.ne[1], x.ne[2], x.ne[3]), w, x)

    def mul_mat_id(self, w: Node, x: Node, ids: Node) -> Node:
        """Return the products of the experts that ``ids`` chooses."""
        return self.new("mul_mat_id", F32, (w.ne[1], ids.ne[0], x.ne[2], 1), w, x, ids)

    def get_rows(self, a: Node, ids: Node) -> Node:
        """Return the rows that ``ids`` chooses, as f32 unless they are integers."""
        type_ = I32 if a.type is I32 else F32
        return self.new("get_rows", type_, (a.ne[0], ids.ne[0], ids.ne[1], ids.ne[2]), a, ids)

    def glu(self, gate: Node, up: Node | None = None) -> Node:
        """Return a gated activation of two tensors, or of the two halves of one."""
        if up is not None:
            return self.new("glu", gate.type, gate.ne, gate, up)
        return self.new("glu", gate.type, (gate.ne[0] // 2, *gate.ne[1:]), gate)

    def cast(self, a: Node, type_: GgmlType) -> Node:
        """Return a copy in a type, which copies even where the type is the same."""
        return self.new("cpy", type_, a.ne, a)

    def concat(self, a: Node, b: Node, axis: int = 0) -> Node:
        """Return two tensors joined along a dimension."""
        ne = [*a.ne]
        ne[axis] += b.ne[axis]
        return self.new("concat", a.type, shape4(ne), a, b)

    def sum_rows(self, a: Node) -> Node:
        """Return each row's sum."""
        return self.new("sum_rows", a.type, (1, *a.ne[1:]), a)

    def mean(self, a: Node) -> Node:
        """Return each row's mean."""
        return self.new("mean", F32, (1, *a.ne[1:]), a)

    def repeat(self, a: Node, ne: Shape) -> Node:
        """Return the tensor repeated to a shape."""
        return self.new("repeat", a.type, ne, a)

    def cont(self, a: Node, *ne: int) -> Node:
        """Return a contiguous copy, in another shape where one is given."""
        return self.new("cont", a.type, shape4(ne) if ne else a.ne, a)

    def flash_attn(self, q: Node, k: Node, v: Node, mask: Node, sinks: Node | None) -> Node:
        """Return fused attention over permuted q, k, v."""
        src = [q, k, v, mask] if sinks is None else [q, k, v, mask, sinks]
        ne = (v.ne[0], q.ne[2], q.ne[1], q.ne[3])
        return Node(FLASH_ATTN, F32, ne, strides(F32, ne), src, None)

    # -----------------------------------------------------------------------------------------------------------------
    # Views

    def _view(self, op: str, a: Node, ne: Shape, nb: Shape) -> Node:
        return Node(op, a.type, ne, nb, [a], a.view_of or a)

    def view(self, a: Node, ne: Sequence[int], nb: Sequence[int]) -> Node:
        """Return a window into a tensor; ``nb`` are the strides of dimensions 1 and up."""
        shape = shape4(ne)
        full = [a.type.block_bytes, *nb]
        while len(full) < len(shape):
            full.append(full[-1] * shape[len(full) - 1])
        return self._view("view", a, shape, (full[0], full[1], full[2], full[3]))

    def reshape(self, a: Node, *ne: int) -> Node:
        """Return a contiguous tensor under another shape."""
        shape = shape4(ne)
        return self._view("reshape", a, shape, strides(a.type, shape))

    def permute(self, a: Node, *axes: int) -> Node:
        """Return the dimensions in another order: the first of ``a`` becomes that of the first number."""
        ne, nb = [0] * 4, [0] * 4
        for source, axis in enumerate(axes):
            ne[axis], nb[axis] = a.ne[source], a.nb[source]
        return self._view("permute", a, shape4(ne), shape4(nb))

    def permute_heads(self, a: Node) -> Node:
        """Return dimensions 1 and 2 exchanged."""
        return self.permute(a, 0, 2, 1, 3)

    def transpose(self, a: Node) -> Node:
        """Return dimensions 0 and 1 exchanged."""
        ne, nb = a.ne, a.nb
        return self._view("transpose", a, (ne[1], ne[0], ne[2], ne[3]), (nb[1], nb[0], nb[2], nb[3]))

    def set_rows(self, a: Node, rows: Node, ids: Node) -> Node:
        """Return ``a`` after rows of it were written: a view of it."""
        return Node("set_rows", a.type, a.ne, a.nb, [rows, ids, a], a.view_of or a)

    def copy(self, a: Node, b: Node) -> Node:
        """Return ``b`` after ``a`` was written to it: a view of it (``ggml_cpy``)."""
        return Node("cpy", b.type, b.ne, b.nb, [a, b], b.view_of or b)

    def inplace(self, op: str, a: Node, *others: Node) -> Node:
        """Return ``a`` after an element-wise operation on it where it lies (``ggml_scale_inplace`` and its like)."""
        return Node(op, a.type, a.ne, a.nb, [a, *others], a.view_of or a)

    def top_k(self, a: Node, k: int) -> Node:
        """Return the indices of each row's k largest: a window into all of them sorted (``ggml_argsort_top_k``).

        Raises IndexError where a row has fewer.
        """
        if k > a.ne[0]:
            raise IndexError(f"the {k} largest of {a.ne[0]}")
        order = self.new("argsort", I32, a.ne, a)
        return self.view(order, (k, *a.ne[1:]), order.nb[1:])
