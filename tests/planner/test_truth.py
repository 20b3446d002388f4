"""What llama.cpp reserved for real, for models of many architectures and many flags, equals the account to the byte.

``fixtures/truth/sample.json`` holds headers (metadata, tensor table) and, per case, the model and context bytes of each
device as llama.cpp's own breakdown gave them, with RPC workers as devices. A null there was not measured. The cases
called drawn-N have flags that were drawn at random, and were measured in really loading llama-servers.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from machines import machine_of, placement_on
from recorded_models import ReadModel, reader
from rpc_worker import RpcWorker

from planner import flags
from planner.accounting import account
from planner.build import PINNED_BUILD
from planner.context import context_params
from planner.model import read_model
from planner.refusals import refusal
from planner.types import HOST, DeviceKind, PlanRequest, Source

SAMPLE: dict[str, Any] = json.loads((Path(__file__).parents[2] / "fixtures/truth/sample.json").read_text())
SERVER_READY_LINE = "listening on"
MIB = 1 << 20


@pytest.fixture(scope="module")
def sample_model(tmp_path_factory: pytest.TempPathFactory) -> ReadModel:
    return reader(tmp_path_factory.mktemp("truth"), SAMPLE)


CASES = [(name, case) for name, entry in SAMPLE.items() for case in entry["cases"]]


@pytest.mark.parametrize("name,case", CASES, ids=[f"{name}:{case}" for name, case in CASES])
def test_accounts_for_every_byte_that_llama_cpp_reserved(sample_model: ReadModel, name: str, case: str) -> None:
    model, measured = sample_model(name), SAMPLE[name]["cases"][case]
    machine = machine_of(DeviceKind.RPC, measured["workers"])
    request = flags.parse(measured["args"].split()).request
    refused = refusal(model, request, [device.kind for device in machine.devices])
    assert (refused is not None) == measured.get("refused", False)
    if refused:
        return
    placement = placement_on(machine, model, request)
    ledger = account(model, context_params(model, request), placement, machine, PINNED_BUILD)
    figures = dict(zip(placement.devices, ledger.devices, strict=True)) | {HOST: ledger.host}
    for device, (model_bytes, context_bytes) in measured["bytes"].items():
        if model_bytes is not None:
            assert (figures[device].model.bytes, figures[device].model.source) == (model_bytes, Source.EXACT)
        assert (figures[device].context.bytes, figures[device].context.source) == (context_bytes, Source.EXACT)


def _lines_of_a_load(server: Path, model: Path, request: PlanRequest, endpoints: list[str]) -> list[str]:
    """Return llama-server's lines on its buffers up to the moment it listens."""
    command = [str(server), "-m", str(model), *flags.write(request), "--fit", "off", "-lv", "4", "--port", "0"]
    command += ["--rpc", ",".join(endpoints)] if endpoints else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={})
    lines = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if SERVER_READY_LINE in line:
                break
    finally:
        process.kill()
        process.communicate()
    assert SERVER_READY_LINE in lines[-1], "".join(lines)
    return lines


def _logged_mib(lines: list[str], what: str) -> dict[str, float]:
    """Return the sum of the logged sizes by worker address or Host: llama.cpp's own resolution is 0.01 MiB."""
    sums: dict[str, float] = {}
    for line in lines:
        if match := re.search(rf"\w+(?:\[(\S+)\])? +{what} buffer size = +([0-9.]+) MiB", line):
            place = match[1] or str(HOST)
            sums[place] = sums.get(place, 0.0) + float(match[2])
    return sums


@pytest.mark.llama
@pytest.mark.parametrize("n_gpu_layers,load_mode", [(99, "auto"), (2, "auto"), (2, "none")])
def test_the_bytes_a_real_load_prints_are_those_of_the_account(
    llama_tools: Path,
    rpc_workers: Callable[[int], tuple[RpcWorker, ...]],
    endless_model: Path,
    n_gpu_layers: int,
    load_mode: str,
) -> None:
    request = flags.parse(
        ["-c", "4096", "-np", "2", "-ngl", str(n_gpu_layers), "-ts", "1,3", "-lm", load_mode, "-fa", "on"]
    ).request
    workers = rpc_workers(2)
    endpoints = [worker.endpoint for worker in workers]
    lines = _lines_of_a_load(llama_tools / "llama-server", endless_model, request, endpoints)
    model, machine = read_model(str(endless_model)), machine_of(DeviceKind.RPC, 2)
    placement = placement_on(machine, model, request)
    ledger = account(model, context_params(model, request), placement, machine, PINNED_BUILD)
    logged_model, logged_context = _logged_mib(lines, "model"), _logged_mib(lines, "KV")
    for name, figures in zip((*endpoints, HOST), (*ledger.devices, ledger.host), strict=True):
        assert figures.model.bytes is not None
        assert figures.context.bytes is not None
        assert logged_model.get(name, 0.0) == pytest.approx(figures.model.bytes / MIB, abs=0.011)
        assert logged_context.get(name, 0.0) == pytest.approx(figures.context.bytes / MIB, abs=0.011)
    output = _logged_mib(lines, "output")
    assert output[HOST] == pytest.approx((ledger.host_detail.output_buffer_bytes or 0) / MIB, abs=0.011)
