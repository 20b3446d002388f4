"""Devices filled in order, by arithmetic alone: whole layers, and at a boundary a layer that two devices share.

Of the layer that a device has no room for, attention and cache may stay there while expert matrices go on to the next
device that has layers. Nothing here is a guess but what devices take beyond their layers: where any such filling fits,
one is found.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, combinations
from typing import Final, NamedTuple

from planner.model import ModelFacts
from planner.overrides import Override
from planner.search.learned import Mode
from planner.search.problems import Question, spill_parts

_MATRICES: Final = ("down", "gate_up", "gate", "up")  # the order in which they go on; the last device to add up is near
_MATRIX: Final = re.compile(r"\.ffn_(up|down|gate|gate_up)_(?:ch|)exps")


class Sent(NamedTuple):
    """Expert matrices of one layer that lie on a device after its own."""

    slot: int
    matrices: tuple[str, ...]
    device: str

    @property
    def override(self) -> Override:
        """Return the flag's value that sends them there."""
        return rf"blk\.{self.slot}\.ffn_({'|'.join(self.matrices)})_(ch|)exps", self.device


class Filling(NamedTuple):
    """How many slots each device has, and what goes on at the boundaries."""

    counts: tuple[int, ...] = ()
    sent: tuple[Sent, ...] = ()


def fillings(question: Question) -> Iterator[Filling]:
    """Yield the fillings of the devices in order that are expected to fit: the fullest devices first.

    Each device takes as many whole layers as it has room for; of the next one as few bytes as must go on. Where the
    rest finds no room so, they go on to a later device than the next, then the layer begins there as a whole.
    """
    return _Fillings(question).after(_State(0, 0, 0), Filling())


def bytes_of(question: Question, index: int, slot: int, matrices: Sequence[str]) -> int:
    """Return what these expert matrices of a slot take on that device, biases and scales included."""
    sizes, parts = question.spill_sizes(question.devices[index]), _matrix_parts(question.model)[slot]
    return sum(sizes[part] for name in matrices for part in parts[name])


class _State(NamedTuple):
    """The device to be filled now, the first slot that is left, and bytes that have come from the slot before."""

    device: int
    start: int
    arrived: int

    def is_no_better_than(self, other: _State) -> bool:
        """Say whether all that can follow on this one can follow on the other.

        A device that experts have come to has to have a layer of its own, and the first device has a room of its own.
        """
        return (
            self.device == other.device
            and (self.start == other.start or (0 < self.start < other.start and not other.arrived))
            and self.arrived >= other.arrived
        )


class _Fillings:
    """One question; ``_failed`` are the states that nothing follows on, so that none is gone into twice."""

    def __init__(self, question: Question) -> None:
        self._question = question
        self._sizes = [question.sizes(device) for device in question.devices]
        self._rooms = [question.bin(Mode.UNPIPELINED, index).rooms for index in range(len(question.devices))]
        least = [min(sizes) for sizes in zip(*self._sizes, strict=True)]
        self._least_left = list(accumulate(reversed(least), initial=0))[::-1]
        most = [max(*rooms, 0.0) for rooms in self._rooms]
        self._room_left = list(accumulate(reversed(most), initial=0.0))[::-1]
        self._failed: list[_State] = []

    def after(self, state: _State, filling: Filling) -> Iterator[Filling]:
        """Yield what may follow on a state, to which the devices before it have been filled: ``filling``."""
        index, start, arrived = state
        if self._least_left[start] + arrived > self._room_left[index] or any(
            map(state.is_no_better_than, self._failed)
        ):
            return
        fails = True
        for following in self._next(state, filling):
            fails = False
            yield following
        if fails:
            self._failed.append(state)

    def _next(self, state: _State, filling: Filling) -> Iterator[Filling]:
        index, start, arrived = state
        sizes, rooms, output = self._sizes[index], self._rooms[index], self._question.n_slots - 1
        first = 2 * (start == 0)  # rooms are by whether it is the first device, and has the output
        if arrived + sum(sizes[start:]) <= rooms[first + 1]:
            yield self._with(filling, index, output + 1 - start)
            return
        end, room = start, rooms[first] - arrived
        while end < output and sizes[end] <= room:
            room -= sizes[end]
            end += 1
        for after in range(index + 1, len(self._rooms)) if end < output else ():
            if matrices := self._fewest(index, after, end, sizes[end] - room):
                sent = Sent(end, matrices, self._question.devices[after].name)
                there = _State(after, end + 1, bytes_of(self._question, after, end, matrices))
                yield from self.after(there, self._with(filling, index, end + 1 - start, sent))
        if index + 1 < len(self._rooms) and (end > start or not arrived):
            yield from self.after(_State(index + 1, end, 0), self._with(filling, index, end - start))
            if start == 0 < end:  # another one may have more room as the first
                yield from self.after(_State(index + 1, 0, 0), filling)

    def _with(self, filling: Filling, index: int, count: int, *sent: Sent) -> Filling:
        """Return the filling with that many slots on this device too."""
        counts = filling.counts or (0,) * len(self._rooms)
        return Filling((*counts[:index], count, *counts[index + 1 :]), (*filling.sent, *sent))

    def _fewest(self, index: int, after: int, slot: int, missing: float) -> tuple[str, ...]:
        """Return the matrices of a slot that have to go on for its rest to fit: those that take least there.

        None of them where all together are not enough.
        """
        known = _matrix_parts(self._question.model).get(slot, {})
        names = [name for name in _MATRICES if name in known]
        enough = [
            chosen
            for count in range(1, len(names) + 1)
            for chosen in combinations(names, count)
            if bytes_of(self._question, index, slot, chosen) >= missing
        ]
        return min(enough, key=lambda chosen: bytes_of(self._question, after, slot, chosen), default=())


@lru_cache(maxsize=32)
def _matrix_parts(model: ModelFacts) -> Mapping[int, Mapping[str, Sequence[int]]]:
    """Return which of the parts that may lie elsewhere make up each expert matrix of each slot."""
    found: dict[int, dict[str, list[int]]] = {}
    for number, part in enumerate(spill_parts(model)):
        if matrix := _MATRIX.search(part.tensor.name):
            found.setdefault(part.slot, {}).setdefault(matrix[1], []).append(number)
    return found
