"""When a driver's figure is believed after a runner has gone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from supervisor.core.settling import Reading, latest, unsettled

BYTES = st.integers(0, 2**40)


@given(others=BYTES, runner=st.integers(100, 2**40))
def test_it_is_waited_for_until_most_of_what_it_held_is_free(others: int, runner: int) -> None:
    loaded = Reading({"CUDA0": others}, {"CUDA0": runner})
    for share, lagging in ((0.0, True), (0.5, True), (0.8, False), (1.0, False)):
        now = Reading({"CUDA0": others + int(share * runner)}, {})
        assert bool(unsettled(loaded, now, {"CUDA0": runner})) is lagging


@given(free=BYTES, runner=BYTES)
def test_what_was_read_before_the_runner_had_loaded_is_expected_back_and_no_more(free: int, runner: int) -> None:
    assert unsettled(Reading({"CUDA0": free}, {}), Reading({"CUDA0": free}, {}), {"CUDA0": runner}) == ()


def test_only_devices_that_were_left_are_waited_for() -> None:
    """What another program took elsewhere is no reason to wait, nor is a device that only the ledger knows."""
    before = Reading({"CUDA0": 50, "CUDA1": 50}, {"CUDA0": 40})
    now = Reading({"CUDA0": 90, "CUDA1": 10}, {})
    assert unsettled(before, now, {"CUDA0": 40, "RPC0": 70}) == ()


def test_one_runner_s_bytes_are_not_expected_where_another_has_come_meanwhile() -> None:
    before = Reading({"CUDA0": 60}, {"CUDA0": 40})
    now = Reading({"CUDA0": 70}, {"CUDA0": 30})
    assert unsettled(before, now, {"CUDA0": 40}) == ()


@given(shown=st.integers(0, 40))
def test_a_load_that_fails_is_waited_for_however_much_of_it_was_shown_when_others_looked(shown: int) -> None:
    at_rest = latest(None, Reading({"CUDA0": 50}, {}))
    meanwhile = latest(at_rest, Reading({"CUDA0": 50 - shown}, {}, {"CUDA0": 40}))
    for free, lagging in ((10, True), (39, True), (40, False), (50, False)):
        assert bool(unsettled(meanwhile, Reading({"CUDA0": free}, {}), {"CUDA0": 40})) is lagging


def test_a_device_that_was_never_seen_at_rest_is_not_waited_for() -> None:
    loading = latest(None, Reading({"CUDA0": 10, "CUDA1": 50}, {}, {"CUDA0": 40, "CUDA1": 0}))
    assert unsettled(loading, Reading({"CUDA0": 10, "CUDA1": 50}, {}), {"CUDA0": 40}) == ()
    assert unsettled(loading, Reading({"CUDA0": 10, "CUDA1": 10}, {}), {"CUDA1": 40}) == ("CUDA1",)


@given(shown=st.integers(0, 40))
def test_what_another_runner_is_about_to_take_is_not_expected_back_with_what_one_gave_back(shown: int) -> None:
    before = Reading({"CUDA0": 60}, {"CUDA0": 40})
    now = Reading({"CUDA0": 100 - shown}, {}, {"CUDA0": 40})
    assert unsettled(before, now, {"CUDA0": 40}) == ()
