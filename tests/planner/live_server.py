"""A plan held against a llama-server that really loads: what it prints per device while it does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any

import pytest
from rpc_worker import RpcWorker

MIB = 1024 * 1024
LOG_RESOLUTION_MIB = 0.01  # llama.cpp prints two decimals
READY = "llama_server: listening on"
BUFFER = re.compile(r"(\S+?)(?:\[(\S+)\])?\s+(model|LoRA|KV|RS|compute) buffer size\s*=\s*([0-9.]+) MiB")
KIND = {
    "model": "model_bytes",
    "LoRA": "model_bytes",
    "KV": "context_bytes",
    "RS": "context_bytes",
    "compute": "compute_bytes",
}
CONTEXT = re.compile(r"llama_context: n_ctx +=")
RESERVES = "sched_reserve: reserving"


def explain(*words: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """Return what ``planner explain --json`` prints for these words."""
    command = [sys.executable, "-m", "planner", "explain", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(environment), timeout=60, check=False)
    assert done.returncode == 0, done.stderr or done.stdout
    plan: dict[str, Any] = json.loads(done.stdout)
    return plan


def device_words(workers: Iterable[RpcWorker], sizes: Iterable[int | str] = repeat("1GiB")) -> list[str]:
    """Return the flags that make these workers RPC0, RPC1 and so on, of these sizes."""
    named = enumerate(zip(workers, sizes, strict=False))
    return [word for i, (one, size) in named for word in ("--device", f"RPC{i}@{one.endpoint}={size}")]


def places_of(workers: Iterable[RpcWorker]) -> dict[str, str]:
    """Return where each device of ``device_words`` and the host stand in what llama-server prints."""
    return {"Host": "Host"} | {f"RPC{i}": one.endpoint for i, one in enumerate(workers)}


def lines_until_ready(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[str]:
    """Yield what llama-server writes until it listens, and end it."""
    server = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=dict(environment)
    )
    lines = []
    try:
        assert server.stderr is not None
        for line in server.stderr:
            lines.append(line)
            yield line
            if READY in line:
                return
    finally:
        server.kill()
        server.wait()
        if server.stderr is not None:
            server.stderr.close()
    pytest.fail("llama-server ended while it loaded:\n" + "".join(lines[-15:]))


def reserved(plan: Mapping[str, Any], environment: Mapping[str, str]) -> dict[tuple[str, str], float]:
    """Launch the plan and return what llama-server prints while it loads: MiB by worker address or Host, and kind.

    Where a context reserves its graphs more than once, the last time counts.
    """
    sums = Counter[tuple[str, str]]()
    graphs: list[Counter[tuple[str, str]]] = []  # of each context
    command = [*plan["launch"]["argv"], "--port", "0"]
    for line in lines_until_ready(command, {**environment, **plan["launch"]["env"]}):
        if CONTEXT.search(line):
            graphs.append(Counter())
        if RESERVES in line:
            graphs[-1].clear()
        if (found := BUFFER.search(line)) is not None and "~llama_context" not in line:
            name, endpoint, kind, mib = found.groups()
            place = endpoint or ("Host" if name.startswith("CPU") else name)
            (graphs[-1] if kind == "compute" else sums)[place, KIND[kind]] += float(mib)  # type: ignore[assignment]
    return dict(sum(graphs, sums))


def assert_as_planned(
    plan: Mapping[str, Any], places: Mapping[str, str], environment: Mapping[str, str], *, resolution: float = 0.0
) -> None:
    """Launch the plan and hold every figure of every device against what is reserved at its place."""
    measured = reserved(plan, environment)
    planned = {device["name"]: device for device in plan["devices"]}
    for name, place in places.items():
        for kind in ("model_bytes", "context_bytes", "compute_bytes"):
            printed = measured.get((place, kind), 0.0)
            allowed = LOG_RESOLUTION_MIB + resolution
            assert planned[name][kind] / MIB == pytest.approx(printed, abs=allowed), (name, kind, printed)
