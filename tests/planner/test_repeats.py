"""Layers that repeat themselves may be left out of a replay, and nothing else is changed by that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import machine_of, placement_on
from published_models import dimensions, write_model

from planner import flags
from planner.allocator import GraphAllocator, Repeat
from planner.build import PINNED_BUILD
from planner.compute import ComputeBuffers, compute_buffers
from planner.context import context_params
from planner.graph import F32, Graph
from planner.model import ModelFacts, read_model
from planner.repeats import gaps, without
from planner.types import DeviceKind

# One family each: dense, with windows between full attention, with experts, with experts behind dense layers.
MODELS = ("llama-3-70b", "gemma-2-9b", "gpt-oss-20b", "qwen3-30b-a3b", "deepseek-v2-lite")
FLAGS = (
    "-c 4096",
    "-c 8192 -np 4 -ts 1,5,2",
    "-c 4096 -ngl 20 -ts 1,5,2",
    "-c 4096 -ncmoe 9 -ncffn 9",
    "-c 2048 -ub 16 -nkvo -fa off",
)
KINDS = st.lists(st.tuples(st.text("ab", min_size=1, max_size=5), st.integers(1, 30)), max_size=4).map(
    lambda runs: tuple("".join(pattern * count for pattern, count in runs))
)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelFacts]:
    folder = tmp_path_factory.mktemp("repeats")
    described: dict[str, Any] = dict(dimensions("full"))
    return lambda name: read_model(str(write_model(folder / f"{name}.gguf", described[name], vocabulary=False)))


def told_apart(model: ModelFacts) -> ModelFacts:
    """Return the model with a figure in the header that no graph reads, and that is another one for each layer."""
    numbers = tuple(range(model.hparams.n_layer_all))
    return replace(model, metadata={**model.metadata, f"{model.hparams.architecture}.of_no_use": numbers})


def buffers(model: ModelFacts, args: str, kind: DeviceKind) -> ComputeBuffers:
    machine, request = machine_of(kind, 3), flags.parse(args.split()).request
    params, placement = context_params(model, request), placement_on(machine, model, request)
    return compute_buffers(model, params, placement, machine, PINNED_BUILD)


@given(KINDS, st.integers(1, 2))
def test_what_is_left_out_is_like_what_stays_on_either_side(kinds: tuple[str, ...], step: int) -> None:
    for start, end, period in gaps(kinds, step):
        assert start < end
        assert (end - start) % period == 0
        there = kinds[start - 2 * period : end + period]
        assert len(there) == end - start + 3 * period
        assert there[period:] == there[:-period]


@given(KINDS)
def test_no_layer_is_built_twice_and_all_that_is_left_out_is_in_a_gap(kinds: tuple[str, ...]) -> None:
    found = gaps(kinds)
    left_out = [il for gap in found for il in range(gap.start, gap.end)]
    assert sorted([*without(len(kinds), found), *left_out]) == list(range(len(kinds)))


def test_of_many_layers_that_are_alike_few_are_built() -> None:
    assert len([*without(80, gaps(("alike",) * 80))]) < 8


@pytest.mark.parametrize("kind", [DeviceKind.RPC, DeviceKind.CUDA])
@pytest.mark.parametrize("args", FLAGS)
@pytest.mark.parametrize("name", MODELS)
def test_layers_that_are_alike_take_what_they_take_one_by_one(
    published: Callable[[str], ModelFacts], name: str, args: str, kind: DeviceKind
) -> None:
    model = published(name)
    assert buffers(model, args, kind) == buffers(told_apart(model), args, kind)


def test_what_keeps_memory_each_time_does_not_repeat_itself() -> None:
    def chain(*, kept: bool) -> tuple[int, ...] | None:
        graph = Graph()
        x = graph.input(F32, 64)
        for _ in range(6):
            x = graph.same("mean", x)
            x.is_output = kept
            graph.expand(x)
        nodes, leafs = [(node, 0) for node in graph.nodes], [(leaf, 0) for leaf in graph.leafs]
        allocator = GraphAllocator([32], [lambda node: node.nbytes()])
        return allocator.reserve(nodes, leafs, [Repeat(1, 3, 5)])

    assert chain(kept=False) is not None
    assert chain(kept=True) is None
