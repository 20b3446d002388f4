"""The promise of the house: what a plan says per device is what llama-server then reserves there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from live_server import MIB, assert_as_planned, explain

pytestmark = pytest.mark.llama


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("-c", "8192", "-np", "2"),
        ("-ctk", "q8_0", "-ctv", "q8_0", "-ub", "256"),
        ("-fa", "off", "-c", "2048"),
        ("-ngl", "6", "-kvu", "-np", "2"),
        ("-nkvo", "-ncffn", "3"),
        ("-ts", "1,2,5", "-ot", r"blk\.1\.ffn_up=RPC2"),
    ],
    ids=" ".join,
)
def test_every_device_gets_the_bytes_that_the_plan_says(
    flags: tuple[str, ...],
    endless_model: Path,
    rpc_workers: Callable[[int], tuple[Any, ...]],
    free_environment: dict[str, str],
) -> None:
    """A model is planned over three unequal devices and launched on three workers; each figure is as planned."""
    workers = rpc_workers(3)
    sizes = (120 * MIB, 90 * MIB, 140 * MIB)
    devices = [f"RPC{i}@{worker.endpoint}={size}" for i, (worker, size) in enumerate(zip(workers, sizes, strict=True))]
    words = [word for device in devices for word in ("--device", device)]
    context = () if "-c" in flags else ("-c", "4096")
    plan = explain(
        str(endless_model),
        *words,
        *context,
        *flags,
        "--no-oracle",
        environment=free_environment | {"PLANNER_SCHED_SPREAD": "1"},
    )
    planned = {device["name"]: device for device in plan["devices"]}
    used = [name for name in ("RPC0", "RPC1", "RPC2") if planned[name]["layers"]]
    assert used == ["RPC0", "RPC1", "RPC2"], "the sizes were chosen so that every device is needed"

    lies_at = {"Host": "Host"} | {f"RPC{i}": worker.endpoint for i, worker in enumerate(workers)}
    assert_as_planned(plan, lies_at, free_environment)
