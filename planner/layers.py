"""Which layer lies on which device: llama.cpp's split points, in its own float32 arithmetic.

(src/llama-model.cpp, ``load_tensors``: splits, ``get_layer_buft_list``.) A float32 result is the exact one rounded
once, so computing in float64 and rounding each step reproduces C++'s: a sum, quotient or conversion of two float32
values is exact enough in float64 for the second rounding to be innocent.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from itertools import accumulate
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

HOST_LAYER: Final = -1
_FLOAT32: Final = struct.Struct("<f")


def float32(value: float) -> float:
    """Return the nearest float32. Raises OverflowError beyond its range."""
    rounded: float = _FLOAT32.unpack(_FLOAT32.pack(value))[0]
    return rounded


def split_points(tensor_split: Sequence[float]) -> tuple[float, ...]:
    """Return each device's upper bound on the line from 0 to 1. At least one share must be above 0."""
    sums = tuple(accumulate((float32(share) for share in tensor_split), lambda total, share: float32(total + share)))
    return tuple(float32(point / sums[-1]) for point in sums)


def layer_devices(n_layer_all: int, n_gpu_layers: int, tensor_split: Sequence[float]) -> tuple[tuple[int, ...], int]:
    """Return the device of every repeating layer and of the output, -1 being the host.

    ``n_layer_all`` counts NextN layers. A negative ``n_gpu_layers`` means all. ``tensor_split`` has one share per
    device, in their order; without an explicit ``-ts`` llama.cpp takes each device's free bytes at that moment.
    """
    wanted = n_layer_all + 1 if n_gpu_layers < 0 else n_gpu_layers
    first = max(n_layer_all + 1 - wanted, 0)
    offloaded = min(wanted, n_layer_all + 1) if tensor_split else 0
    if not offloaded:
        return (HOST_LAYER,) * n_layer_all, HOST_LAYER
    points = split_points(tensor_split)
    devices = tuple(bisect_right(points, float32(layer / offloaded)) for layer in range(n_layer_all + 1 - first))
    every = (HOST_LAYER,) * first + devices
    return every[:-1], every[-1]
