"""Whole layers into devices, by arithmetic alone: the inner part of the search, which asks no accounting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

_HALVINGS: Final = 40  # of the interval 0..1: finer than a byte on a device of a tebibyte


def balanced(costs: Sequence[float], room: Sequence[float]) -> tuple[int, ...] | None:
    """Return how many of these consecutive layers each device takes so that the fullest is as empty as it can be.

    Layers go to the devices in order. None where they do not all fit; every device keeps within its room.
    """
    if _fill(costs, room) is None:
        return None
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if _fill(costs, [middle * bytes_left for bytes_left in room]) is None:
            low = middle
        else:
            high = middle
    return _fill(costs, [high * bytes_left for bytes_left in room])


def most_from_the_end(costs: Sequence[float], room: Sequence[float]) -> tuple[int, ...]:
    """Return how many layers each device takes when the last ones are placed first, as many as there is room for."""
    counts = [0] * len(room)
    layer = len(costs)
    for device in reversed(range(len(room))):
        left = room[device]
        while layer and costs[layer - 1] <= left:
            layer -= 1
            left -= costs[layer]
            counts[device] += 1
    return tuple(counts)


def _fill(costs: Sequence[float], room: Sequence[float]) -> tuple[int, ...] | None:
    """Give each device as many of the next layers as it can hold; None where some are left over."""
    counts = []
    layer = 0
    for left in room:
        start = layer
        while layer < len(costs) and costs[layer] <= left:
            left -= costs[layer]  # noqa: PLW2901 - what is left of this device's room
            layer += 1
        counts.append(layer - start)
    return tuple(counts) if layer == len(costs) else None
