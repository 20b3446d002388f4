"""A plan that was made before is taken again only where it is, to the byte, what would be found now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.build import PINNED_BUILD
from planner.model import ModelFacts, read_model
from planner.search import placement
from planner.types import (
    HOST,
    HOST_POOL,
    Device,
    DeviceKind,
    DeviceName,
    Machine,
    MemoryPool,
    Plan,
    PlanRequest,
    Policy,
    PoolId,
)
from planner.units import GIB, MIB
from supervisor.planning.searching import Searches

REQUEST = PlanRequest(n_ctx=512)
BUILD = replace(PINNED_BUILD, path=None, library_path=None)  # nobody to be asked
QUESTIONS = st.tuples(
    st.sampled_from([REQUEST, PlanRequest(), PlanRequest(n_ctx=512, n_parallel="auto")]),
    st.sampled_from([MIB, 3 * MIB, 300 * MIB, GIB, 2 * GIB, 8 * GIB, 9 * GIB]),
    st.sampled_from([None, 0, 512 * MIB, 8 * GIB]),
    st.sampled_from([Policy(), Policy(promised={HOST: GIB}), Policy(cache_ram_mib=0, n_parallel=2)]),
)


@pytest.fixture(scope="module")
def model(chat_model: Path) -> ModelFacts:
    return read_model(chat_model)


def machine(free_bytes: int, card_bytes: int | None = None) -> Machine:
    """Return a machine with so much free on the host and, if it has one, on its card."""
    card = Device(DeviceName("CUDA0"), DeviceKind.CUDA, 8 * GIB, card_bytes, PoolId("card"))
    host = Device(HOST, DeviceKind.HOST, 64 * GIB, free_bytes, HOST_POOL)
    pools = (MemoryPool(HOST_POOL, 64 * GIB, free_bytes),)
    return Machine(() if card_bytes is None else (card,), host, pools)


@settings(max_examples=20)
@given(asked=st.lists(QUESTIONS, min_size=3, max_size=8))
def test_whatever_was_asked_before_the_answer_is_that_of_a_search_made_now(
    model: ModelFacts, asked: Sequence[tuple[PlanRequest, int, int | None, Policy]]
) -> None:
    searches = Searches()
    for request, free_bytes, card_bytes, policy in asked:
        now = machine(free_bytes, card_bytes)
        fresh = placement.search(model, request, now, policy, BUILD)
        assert searches.search(model, request, now, policy, BUILD) == fresh


def test_where_only_the_host_s_free_memory_is_another_no_search_is_made_again(model: ModelFacts) -> None:
    """It shows what is free now, and what was decided is the very same."""
    searches = Searches()
    plans = [searches.search(model, REQUEST, machine(free), Policy(), BUILD) for free in range(8 * GIB, 12 * GIB, GIB)]
    assert all(isinstance(plan, Plan) for plan in plans)
    assert [plan.usages[-1].free_bytes for plan in plans] == [8 * GIB, 9 * GIB, 10 * GIB, 11 * GIB]
    assert plans[0].decisions is not plans[1].decisions
    assert plans[1].decisions is plans[2].decisions is plans[3].decisions


def test_a_model_whose_file_was_read_anew_is_searched_for_anew(model: ModelFacts, chat_model: Path) -> None:
    searches = Searches()
    before = [searches.search(model, REQUEST, machine(8 * GIB), Policy(), BUILD) for _ in range(3)]
    after = searches.search(read_model(chat_model), REQUEST, machine(8 * GIB), Policy(), BUILD)
    assert after == before[-1]
    assert after.decisions is not before[-1].decisions
