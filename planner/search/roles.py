"""The role that a device plays in a split, and what it was seen to take beyond its layers in it.

Compute buffers hardly depend on how many layers of a kind there are, nor on which. So what one split took tells of
others, without accounting for them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain, groupby
from typing import Final, NamedTuple

from planner.search.learned import Mode
from planner.search.problems import Question
from planner.search.splits import Segment, Split
from planner.types.usage import DeviceUsage
from planner.units import KIB

SPREAD_BYTES: Final = 128 * KIB  # by how much a device's buffers were seen to differ in the same role
_SEVERAL: Final = 2  # layers: of more, one gives its memory to the next

Slots = frozenset[tuple[int, int, int]]  # kinds of slots: how many parts of them are left out, and one or several
LeftOut = frozenset[tuple[int, int]]  # kinds of slots, and which of their parts


class Role(NamedTuple):
    """What decides how much a device takes beyond its layers, but for little.

    The first device also works on what is left to the host (ggml-backend.cpp,
    ``ggml_backend_sched_backend_id_from_cur``: operator offload): ``on_host`` are whole slots and parts there, of all
    devices; None for later devices. Where no whole slot ``is_left``, norms lie with their layers
    (src/llama-context.cpp, ``graph_get_cb``).
    """

    mode: Mode
    bin: int
    is_left: bool
    slots: Slots
    on_host: tuple[Slots, LeftOut] | None = None


class Roles:
    """What was seen in splits of one question that did not fit."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self._kinds = question.kinds
        self._sizes = [_sums(question.sizes(device)) for device in question.devices]
        self._part_sizes = [_sums(question.spill_sizes(device)) for device in question.devices]
        self._limits = [question.limits.of(device.name) for device in question.devices]
        self._slots: dict[tuple[int, int, int, int], Slots] = {}
        self._parts = _part_kinds(question)
        self._least: dict[Role, int] = {}

    def learn(self, mode: Mode, split: Split, usages: Sequence[DeviceUsage]) -> None:
        """Keep what the devices of a split took."""
        taken = {row.name: row.known_bytes for row in usages}
        for role, segment in zip(self._roles(mode, split), split.segments, strict=True):
            beyond = taken[self.question.devices[segment.bin].name] - self._own_bytes(segment)
            self._least[role] = min(self._least.get(role, beyond), beyond)

    def overruns(self, mode: Mode, split: Split) -> bool:
        """Say whether a device of this split is known to be too small for its segment."""
        return any(map(self._is_over, self._roles(mode, split), split.segments))

    def never_fits(self, mode: Mode, segment: Segment) -> bool:
        """Say whether a device that is not the first is known to be too small for its segment."""
        slots = self._slots_of(segment)
        return all(self._is_over(Role(mode, segment.bin, is_left, slots), segment) for is_left in (False, True))

    def _is_over(self, role: Role, segment: Segment) -> bool:
        limit, beyond = self._limits[segment.bin], self._least.get(role)
        return limit is not None and beyond is not None and self._own_bytes(segment) + beyond > limit + SPREAD_BYTES

    def _own_bytes(self, segment: Segment) -> int:
        """Return the bytes of a segment's slots on its device, without those of the parts that are left out."""
        sizes, parts = self._sizes[segment.bin], self._part_sizes[segment.bin]
        left_out = parts[segment.spill_end] - parts[segment.spill_start]
        return sizes[segment.end] - sizes[segment.start] - left_out

    def _roles(self, mode: Mode, split: Split) -> list[Role]:
        segments = split.segments
        start = segments[0].start if segments else 0
        roles = [Role(mode, each.bin, start > 0, self._slots_of(each)) for each in segments]
        if roles:
            left_out = (self._parts[each.spill_start : each.spill_end] for each in segments)
            whole = self._slots_of(Segment(-1, 0, start))
            roles[0] = roles[0]._replace(on_host=(whole, frozenset(chain.from_iterable(left_out))))
        return roles

    def _slots_of(self, segment: Segment) -> Slots:
        """Return the kinds of a segment's slots."""
        key = segment[1:]
        if key not in self._slots:
            left_out = Counter(part.slot for part in self.question.parts[segment.spill_start : segment.spill_end])
            kinds = Counter((self._kinds[slot], left_out[slot]) for slot in range(segment.start, segment.end))
            self._slots[key] = frozenset((*kind, min(count, _SEVERAL)) for kind, count in kinds.items())
        return self._slots[key]


def _part_kinds(question: Question) -> list[tuple[int, int]]:
    """Return of each part the kind of its slot, and which of the slot's parts it is."""
    return [
        (question.kinds[slot], number)
        for slot, parts in groupby(part.slot for part in question.parts)
        for number, _ in enumerate(parts)
    ]


def _sums(sizes: Iterable[int]) -> list[int]:
    return list(accumulate(sizes, initial=0))
