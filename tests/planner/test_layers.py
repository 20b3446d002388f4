"""Layer to device arithmetic: llama.cpp's, in float32, checked against numpy doing the same."""

from __future__ import annotations

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from planner.layers import HOST_LAYER, float32, layer_devices

SHARES = st.lists(st.floats(0, 2.0**40, width=32) | st.integers(0, 512).map(float), min_size=1, max_size=8)


def as_cpp_does(n_layer_all: int, n_gpu_layers: int, shares: list[float]) -> list[int]:
    """``load_tensors`` word for word, every operation in numpy's float32."""
    splits = np.array(shares, dtype=np.float32)
    total = np.float32(0)
    for index in range(len(splits)):
        total = np.float32(total + splits[index])
        splits[index] = total
    splits = (splits / total).astype(np.float32)
    start = max(n_layer_all + 1 - n_gpu_layers, 0)
    act = min(n_gpu_layers, n_layer_all + 1)
    devices = []
    for layer in range(n_layer_all + 1):
        if layer < start or layer - start >= act:
            devices.append(HOST_LAYER)
        else:
            point = np.float32(np.float32(layer - start) / np.float32(act))
            devices.append(int(np.searchsorted(splits, point, side="right")))
    return devices


@given(n_layer_all=st.integers(1, 512), n_gpu_layers=st.integers(0, 600), shares=SHARES)
def test_layers_go_where_float32_arithmetic_puts_them(n_layer_all: int, n_gpu_layers: int, shares: list[float]) -> None:
    assume(sum(map(float32, shares)) > 0)
    layers, output = layer_devices(n_layer_all, n_gpu_layers, shares)
    assert [*layers, output] == as_cpp_does(n_layer_all, n_gpu_layers, shares)


@given(counts=st.lists(st.integers(0, 80), min_size=1, max_size=8), on_host=st.integers(0, 100))
def test_shares_that_are_whole_layers_are_hit_exactly(counts: list[int], on_host: int) -> None:
    """Say how many layers each device gets, the output counted with its device, and it gets just those."""
    assume(sum(counts) > 1 and sum(counts) + on_host <= 513)
    n_layer_all = on_host + sum(counts) - 1
    layers, output = layer_devices(n_layer_all, sum(counts), [float(count) for count in counts])
    wanted = [HOST_LAYER] * on_host + [device for device, count in enumerate(counts) for _ in range(count)]
    assert [*layers, output] == wanted


def test_one_gpu_layer_is_the_output() -> None:
    assert layer_devices(3, 1, [1.0]) == ((HOST_LAYER,) * 3, 0)


def test_all_layers_and_a_negative_number_mean_the_same() -> None:
    assert layer_devices(3, -1, [1.0, 1.0]) == layer_devices(3, 4, [1.0, 1.0]) == ((0, 0, 1), 1)


def test_without_devices_everything_stays_on_the_host() -> None:
    assert layer_devices(3, 99, []) == ((HOST_LAYER,) * 3, HOST_LAYER)
