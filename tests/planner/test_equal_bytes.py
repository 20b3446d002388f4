"""The promise of the house: what a plan says per device is what llama-server then reserves there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.llama

MIB = 1024 * 1024
LOG_RESOLUTION_MIB = 0.01  # llama.cpp prints two decimals
READY = "server is listening on"
GIVE_UP = re.compile(r"error|exiting due to")
BUFFER = re.compile(r"(\S+?)(?:\[(\S+)\])?\s+(model|KV|RS|compute) buffer size\s*=\s*([0-9.]+) MiB")
KIND = {"model": "model_bytes", "KV": "context_bytes", "RS": "context_bytes", "compute": "compute_bytes"}


def explain(*words: str, environment: dict[str, str]) -> dict[str, Any]:
    """Return what ``planner explain --json`` prints for these words."""
    command = [sys.executable, "-m", "planner", "explain", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert done.returncode == 0, done.stderr or done.stdout
    plan: dict[str, Any] = json.loads(done.stdout)
    return plan


def reserved(plan: dict[str, Any], environment: dict[str, str]) -> dict[tuple[str, str], float]:
    """Launch the plan and return what llama-server prints while it loads: MiB by worker address or Host, and kind."""
    command = [*plan["launch"]["argv"], "--port", "0"]
    server = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | plan["launch"]["env"],
    )
    sums: dict[tuple[str, str], float] = {}
    lines = []
    try:
        assert server.stderr is not None
        for line in server.stderr:
            lines.append(line)
            if (found := BUFFER.search(line)) is not None and "~llama_context" not in line:
                name, endpoint, kind, mib = found.groups()
                key = (endpoint or ("Host" if name.startswith("CPU") else name), KIND[kind])
                sums[key] = sums.get(key, 0.0) + float(mib)
            if READY in line or "llama_server: model loaded" in line:
                return sums
    finally:
        server.kill()
        server.wait()
        if server.stderr is not None:
            server.stderr.close()
    pytest.fail("llama-server ended while it loaded:\n" + "".join(lines[-15:]))


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

    measured = reserved(plan, free_environment)

    lies_at = {"Host": "Host"} | {f"RPC{i}": worker.endpoint for i, worker in enumerate(workers)}
    for name, place in lies_at.items():
        for kind in ("model_bytes", "context_bytes", "compute_bytes"):
            printed = measured.get((place, kind), 0.0)
            assert planned[name][kind] / MIB == pytest.approx(printed, abs=LOG_RESOLUTION_MIB), (name, kind, printed)
