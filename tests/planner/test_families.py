"""Every family's graph yields the bytes that llama.cpp reserves for it, on each device.

``fixtures/compute/families.json`` holds small models (metadata, tensor table) and, per case, the compute bytes of
llama.cpp's own breakdown, with RPC workers as devices.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from gguf_files import write_header
from machines import machine_of, placement_on

from planner import flags
from planner.build import PINNED_BUILD
from planner.compute import compute_buffers
from planner.context import context_params
from planner.model import ModelFacts, read_model
from planner.types import HOST, DeviceKind, LlamaBuild, Source

FAMILIES: dict[str, Any] = json.loads((Path(__file__).parents[2] / "fixtures/compute/families.json").read_text())
CASES = [(name, case) for name, family in FAMILIES.items() for case in family["cases"]]

ReadModel = Callable[[str], ModelFacts]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> ReadModel:
    folder = tmp_path_factory.mktemp("families")

    @cache
    def read(name: str) -> ModelFacts:
        entry = FAMILIES[name]
        path = folder / f"{name}.gguf"
        write_header(path, entry["architecture"], entry["metadata"], entry["tensors"], tokens=entry["vocabulary"])
        return read_model(str(path))

    return read


def compute_bytes(model: ModelFacts, case: dict[str, Any], build: LlamaBuild) -> dict[str, tuple[int | None, Source]]:
    machine = machine_of(DeviceKind.RPC, case["workers"])
    request = flags.parse(case["args"].split()).request
    placement = placement_on(machine, model, request)
    buffers = compute_buffers(model, context_params(model, request), placement, machine, build)
    figures = (*buffers.devices, buffers.host)
    names = (*placement.devices, str(HOST))
    return {name: (figure.bytes, figure.source) for name, figure in zip(names, figures, strict=True)}


@pytest.mark.parametrize("name,case", CASES, ids=[f"{name}:{case}" for name, case in CASES])
def test_a_familys_graph_yields_the_bytes_that_llama_cpp_reserves(family: ReadModel, name: str, case: str) -> None:
    measured = FAMILIES[name]["cases"][case]
    computed = compute_bytes(family(name), measured, PINNED_BUILD)
    assert computed == {device: (size, Source.SIMULATED) for device, size in measured["bytes"].items()}


@pytest.mark.parametrize("name,case", CASES, ids=[f"{name}:{case}" for name, case in CASES])
def test_for_another_build_a_familys_figures_err_upwards(family: ReadModel, name: str, case: str) -> None:
    measured = FAMILIES[name]["cases"][case]
    computed = compute_bytes(family(name), measured, LlamaBuild(path=None, version="9.9", commit="fffffff"))
    assert {source for _, source in computed.values()} == {Source.ESTIMATED}
    assert all((size or 0) >= measured["bytes"][device] for device, (size, _) in computed.items())
