"""ggml's graph allocator, replayed (ggml/src/ggml-alloc.c): the bytes that each backend's compute buffer needs.

Tensors get room in the order in which they are computed and give it back after their last reader, so the size of a
buffer is the high-water mark of a best-fit allocator. Order, ties and the rules of reuse decide the last byte.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from planner.graph import Node

_ENDLESS: Final = 1 << 62  # an allocator's last block: SIZE_MAX / 2 in ggml_dyn_tallocr_new

AllocSize = Callable[[Node], int]
Placed = Sequence[tuple[Node, int]]  # tensors, each with the backend that it was placed on


class Repeat(NamedTuple):
    """Positions of nodes: what is from ``start`` to ``middle`` is said to repeat itself from there to ``end``."""

    start: int
    middle: int
    end: int


class DynamicAllocator:
    """One buffer's free list (``ggml_dyn_tallocr``), in one chunk: no backend here limits the size of a buffer.

    ``high_water_bytes`` is the size that the buffer must have.
    """

    __slots__ = ("_free", "alignment_bytes", "high_water_bytes")

    def __init__(self, alignment_bytes: int) -> None:
        if alignment_bytes < 1 or alignment_bytes & (alignment_bytes - 1):
            raise ValueError(f"an alignment must be a power of two, not {alignment_bytes}")
        self.alignment_bytes = alignment_bytes
        self.high_water_bytes = 0
        self._free: list[list[int]] = [[0, _ENDLESS]]  # [offset, size] by offset; the last one is the endless tail

    @property
    def gaps(self) -> tuple[tuple[int, ...], ...]:
        """Return the free list: offset and size of each gap."""
        return tuple(map(tuple, self._free))

    def padded(self, size_bytes: int) -> int:
        """Return the bytes that an allocation of that size takes."""
        return -(-size_bytes // self.alignment_bytes) * self.alignment_bytes

    def allocate(self, size_bytes: int) -> int:
        """Return the offset of new room: the smallest gap that holds it, the later of equals, else the tail."""
        size = self.padded(size_bytes)
        free = self._free
        best, best_size = len(free) - 1, _ENDLESS
        for index in range(len(free) - 1):
            gap = free[index][1]
            if size <= gap <= best_size:
                best, best_size = index, gap
        block = free[best]
        offset = block[0]
        block[0] += size
        block[1] -= size
        if block[1] == 0:
            del free[best]
        self.high_water_bytes = max(self.high_water_bytes, offset + size)
        return offset

    def release(self, offset: int, size_bytes: int) -> None:
        """Give room back, merged with the gaps on either side."""
        size = self.padded(size_bytes)
        free = self._free
        for index, block in enumerate(free):
            if block[0] + block[1] == offset:
                block[1] += size
                if index + 1 < len(free) and block[0] + block[1] == free[index + 1][0]:
                    block[1] += free.pop(index + 1)[1]
                return
            if offset + size == block[0]:
                block[0] = offset
                block[1] += size
                if index > 0 and free[index - 1][0] + free[index - 1][1] == offset:
                    free[index - 1][1] += free.pop(index)[1]
                return
        index = next((i for i, block in enumerate(free) if block[0] >= offset), len(free))
        free.insert(index, [offset, size])


class GraphAllocator:
    """The allocation of one scheduled graph (``ggml_gallocr_alloc_graph_impl``).

    ``alloc_sizes[b]`` says what backend ``b`` takes for a tensor, ``alignments[b]`` to what it rounds.
    """

    def __init__(self, alignments: Sequence[int], alloc_sizes: Sequence[AllocSize]) -> None:
        self._buffers = [DynamicAllocator(alignment) for alignment in alignments]
        self._alloc_sizes = alloc_sizes

    def reserve(self, nodes: Placed, leafs: Placed, repeats: Sequence[Repeat] = ()) -> tuple[int, ...] | None:
        """Return each buffer's bytes for nodes and leafs; None where what is said to repeat itself does not.

        It does where the second time leaves all memory as the first one did. What would follow on it, as often as it
        may be, would then change nothing: it has as much room, at the same places.
        """
        for leaf, backend in leafs:
            self._allocate(leaf, backend)
        self._count_readers(nodes)
        done = 0
        for start, middle, end in repeats:
            self._compute(nodes[done:middle])
            before = self._state(nodes[start:middle])
            self._compute(nodes[middle:end])
            if before is None or before != self._state(nodes[middle:end]):
                return None
            done = end
        self._compute(nodes[done:])
        return tuple(buffer.high_water_bytes for buffer in self._buffers)

    def _state(self, latest: Placed) -> object | None:
        """Return what is free, and where the latest nodes lie; None where some had room before all others.

        Pipelined copies of inputs have: what is left out with some of its own would take less.
        """
        if any(node.is_input for node, _ in latest):
            return None
        free = [buffer.gaps for buffer in self._buffers]
        return free, [
            (node.op, node.type, node.ne, node.nb, backend, node.n_children, node.n_views, node.allocated)
            + ((node.buffer, node.offset) if node.allocated else ())
            for node, backend in latest
        ]

    def _compute(self, nodes: Placed) -> None:
        """Give each node room, and take back what it was the last to read."""
        for node, backend in nodes:
            for source in node.src:
                if not source.allocated:
                    self._allocate(source, backend)
            self._allocate(node, backend)
            for source in node.src:
                source.n_children -= 1
                if not source.n_children and not source.n_views:
                    self._done_with(source)

    def _count_readers(self, nodes: Placed) -> None:
        """Count each tensor's readers and views, and give the inputs their room: they come first."""
        for node, backend in nodes:
            if node.view_of is not None and node.op != "none":
                node.view_of.n_views += 1
            if node.is_input:
                self._allocate(node, backend)
            for source in node.src:
                source.n_children += 1
                if source.is_input:
                    self._allocate(source, backend)

    def _allocate(self, node: Node, backend: int) -> None:
        if node.allocated or node.view_of is not None or node.home is not None:
            return
        node.allocated = True
        if node.inplace:
            for parent in node.src:
                if (
                    parent.allocated
                    and parent.n_children == 1
                    and parent.n_views == 0
                    and not parent.is_output
                    and parent.nb == node.nb
                    and parent.ne == node.ne
                    and parent.type is node.type
                ):
                    node.buffer, node.offset = parent.buffer, parent.offset
                    parent.allocated = False
                    return
        node.buffer = backend
        node.offset = self._buffers[backend].allocate(self._alloc_sizes[backend](node))

    def _done_with(self, node: Node) -> None:
        """Free what nobody reads or looks into any more, or the owner of what it looks into."""
        owner = node.view_of
        if owner is None:
            self._free(node)
            return
        owner.n_views -= 1
        if owner.n_views == 0 and owner.n_children == 0:
            self._free(owner)

    def _free(self, node: Node) -> None:
        if not node.allocated or node.is_output:
            return
        node.allocated = False
        self._buffers[node.buffer].release(node.offset, self._alloc_sizes[node.buffer](node))
