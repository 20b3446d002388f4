"""The same question has the same answer, byte for byte: in another process, in another order, with other hashes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from machines import machine_of
from published_models import dimensions, write_model

from planner.build import PINNED_BUILD
from planner.explain import to_json
from planner.model import read_model
from planner.search.placement import search
from planner.types import Device, DeviceKind, Machine, PlanRequest, Policy

ROOT = Path(__file__).parents[2]
MODELS = ("small-llama", "small-gemma2", "small-qwen3moe")
KINDS = (DeviceKind.CUDA, DeviceKind.RPC, DeviceKind.VULKAN)
REQUESTS = (PlanRequest(n_ctx=4096), PlanRequest(), PlanRequest(override_tensor=(("ffn_down", "CPU"),)))
BANDWIDTHS = (200 * 10**9, None, 800 * 10**9)
SHARES = (0.3, 0.55, 0.2)  # of the model on each device: nothing, something or everything has to go to the host


def answers(folder: Path, order: int) -> dict[str, str]:
    """Return each question's answer, asked in this order (1 or -1), by the question's number."""
    models = [read_model(str(folder / f"{name}.gguf")) for name in MODELS]
    questions = [
        (f"{name} {kind.value} {count} {number}", model, sized(kind, count, model.summary.tensor_bytes), request)
        for name, model in zip(MODELS, models, strict=True)
        for kind in KINDS
        for count in (1, 3)
        for number, request in enumerate(REQUESTS)
    ]
    return {
        name: json.dumps(to_json(search(model, request, where, Policy(), PINNED_BUILD)))
        for name, model, where, request in questions[::order]
    }


def sized(kind: DeviceKind, count: int, model_bytes: int) -> Machine:
    """Return a machine with unequal devices that hold about as much as the model is long."""
    where = machine_of(kind, count)

    def device(index: int, like: Device) -> Device:
        size = int(model_bytes * SHARES[index]) + (64 << 20)
        return replace(like, free_bytes=size, total_bytes=size, bandwidth_bytes_per_s=BANDWIDTHS[index])

    return replace(where, devices=tuple(device(*each) for each in enumerate(where.devices)), what_if=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where the models lie."""
    path = tmp_path_factory.mktemp("models")
    for name in MODELS:
        write_model(path / f"{name}.gguf", dimensions("small")[name])
    return path


@pytest.fixture(scope="module")
def first(folder: Path) -> dict[str, str]:
    return answers(folder, 1)


def test_a_process_that_has_planned_before_answers_the_same(folder: Path, first: dict[str, str]) -> None:
    assert answers(folder, -1) == first


@pytest.mark.parametrize("seed", ["1", "2", "3"])
def test_another_process_with_other_hashes_answers_the_same(folder: Path, first: dict[str, str], seed: str) -> None:
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "fixtures", Path(__file__).parent)))
    child = subprocess.run(
        [sys.executable, __file__, str(folder)],
        env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert json.loads(child.stdout) == first


if __name__ == "__main__":
    json.dump(answers(Path(sys.argv[1]), -1), sys.stdout)
