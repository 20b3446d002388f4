"""A runner that uses other devices than its plan counts on is told from one that uses them."""

from __future__ import annotations

from pathlib import Path

import pytest

from supervisor.core.loglines import UsingDevice, read
from supervisor.core.pinning import PinnedDevice, mismatch, missing

LOGS = Path(__file__).parents[2] / "fixtures" / "llama_logs"

FIRST = PinnedDevice("CUDA1", "CUDA0", "0000:41:00.0")
SECOND = PinnedDevice("RPC0", "RPC0", endpoint="10.0.0.2:50052")


def using(
    name: str, description: str = "NVIDIA GeForce RTX 4090", device_id: str | None = "0000:41:00.0"
) -> UsingDevice:
    """Return what the log says of one device."""
    return UsingDevice(name, description, 23000, device_id)


@pytest.mark.parametrize(
    "used",
    [
        [],
        [using("CUDA0")],
        [using("CUDA0", device_id="0000:41:00.0-v1")],
        [using("CUDA0", device_id=None)],
        [using("CUDA0"), using("RPC0", "10.0.0.2:50052", None)],
        [using("CUDA0"), using("RPC0", "10.0.0.2:50052", None), using("CUDA0")],
    ],
)
def test_the_planned_devices_in_order_are_right_and_what_follows_is_another_models(used: list[UsingDevice]) -> None:
    assert mismatch((FIRST, SECOND), used) is None


@pytest.mark.parametrize(
    "used,says",
    [
        ([using("CUDA1")], "CUDA1 (NVIDIA GeForce RTX 4090) where CUDA0 was planned"),
        ([using("CUDA0", device_id="0000:01:00.0")], "at 0000:01:00.0 (NVIDIA GeForce RTX 4090), planned was"),
        ([using("CUDA0"), using("RPC0", "10.0.0.3:50052", None)], "the worker 10.0.0.3:50052, planned was"),
        ([using("RPC0", "10.0.0.2:50052", None)], "RPC0"),
    ],
)
def test_another_device_another_card_and_another_worker_are_told(used: list[UsingDevice], says: str) -> None:
    wrong = mismatch((FIRST, SECOND), used)
    assert wrong is not None
    assert says in wrong


def test_a_device_that_was_never_used_is_told_once_it_has_loaded() -> None:
    assert missing((FIRST, SECOND), [using("CUDA0")]) == "it has loaded without using RPC0, which was planned"
    assert missing((FIRST,), [using("CUDA0"), using("CUDA0")]) is None


def test_without_a_planned_device_anything_may_be_used() -> None:
    assert mismatch((), [using("CUDA0")]) is None
    assert missing((), []) is None


def test_a_line_of_llama_servers_names_the_card() -> None:
    line = (
        "0.00.010.072 I llama_prepare_model_devices: using device CUDA0 (NVIDIA A (B)) (0000:0A:00.0) - 23600 MiB free"
    )
    assert read(line) == UsingDevice("CUDA0", "NVIDIA A (B)", 23600, "0000:0a:00.0")


def test_the_recorded_load_over_two_devices_of_a_worker_is_the_planned_one() -> None:
    lines = (LOGS / "two-rpc-devices.log").read_text().splitlines()
    used = [fact for line in lines if isinstance(fact := read(line), UsingDevice)]
    planned = [PinnedDevice(name, name, None, "127.0.0.1:50871") for name in ("RPC0", "RPC1")]
    assert mismatch(planned, used) is None
    assert missing(planned, used) is None
