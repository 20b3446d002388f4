"""Every family's graph yields the bytes that llama.cpp reserves for it, on each device.

``fixtures/compute/families.json`` holds small models (metadata, tensor table) and, per case, the compute bytes of
llama.cpp's own breakdown, with RPC workers as devices.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf_files import write_header
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import machine_of, placement_on
from recorded_models import ReadModel, reader

from planner import flags
from planner.accounting import account
from planner.build import PINNED_BUILD
from planner.compute import compute_buffers
from planner.context import context_params
from planner.errors import ModelFileError
from planner.model import ModelFacts, read_model
from planner.types import HOST, DeviceKind, LlamaBuild, Source

FAMILIES: dict[str, Any] = json.loads((Path(__file__).parents[2] / "fixtures/compute/families.json").read_text())
CASES = [(name, case) for name, family in FAMILIES.items() for case in family["cases"]]

# What a file may hold in a key's place: numbers of every size, arrays of any length, other types, nothing.
ODD_VALUES = st.one_of(
    st.none(),
    st.sampled_from([0, 1, 3, 64, 1000, 2**20, 2**31 - 1, 2**32 - 1, 0.0, 1.5, "x", True]),
    st.lists(st.integers(0, 4), max_size=8),
)
ODD_SHAPES = st.one_of(st.none(), st.lists(st.sampled_from([1, 2, 32, 256]), min_size=1, max_size=3))


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> ReadModel:
    return reader(tmp_path_factory.mktemp("families"), FAMILIES)


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


@given(st.data())
@settings(max_examples=200)
def test_odd_metadata_yields_bytes_or_a_reason(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    entry = FAMILIES[data.draw(st.sampled_from(sorted(FAMILIES)))]
    keys = st.sampled_from(sorted(entry["metadata"]))
    metadata = entry["metadata"] | data.draw(st.dictionaries(keys, ODD_VALUES, max_size=3))
    changes = data.draw(st.dictionaries(st.integers(0, len(entry["tensors"]) - 1), ODD_SHAPES, max_size=2))
    tensors = [(name, type_, changes.get(i, shape)) for i, (name, type_, shape) in enumerate(entry["tensors"])]
    path = tmp_path_factory.getbasetemp() / "odd.gguf"
    write_header(
        path,
        entry["architecture"],
        {key: value for key, value in metadata.items() if value is not None},
        [(name, "f32" if i in changes else type_, shape) for i, (name, type_, shape) in enumerate(tensors) if shape],
        tokens=entry["vocabulary"],
    )
    machine = machine_of(DeviceKind.RPC, 2)
    request = flags.parse(["-c", "4096", "-np", "2", "-ngl", "2"]).request
    try:
        model = read_model(str(path))
    except ModelFileError:
        return
    ledger = account(
        model, context_params(model, request), placement_on(machine, model, request), machine, PINNED_BUILD
    )
    assert ledger.not_built or all((row.compute.bytes or 0) >= 0 for row in (*ledger.devices, ledger.host))
    assert ledger.unknown == bool(ledger.not_built)
