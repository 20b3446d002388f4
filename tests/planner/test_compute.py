"""Compute buffers equal what llama.cpp reserved, where that is claimed, and are never below it elsewhere.

``fixtures/compute/reserved.json`` holds the bytes of llama.cpp's own breakdown for the models and flags of
``fixtures/truth/sample.json``.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf_files import write_header
from machines import machine_of, placement_on
from recorded_models import ReadModel, reader

from planner import flags
from planner.build import PINNED_BUILD
from planner.compute import ComputeBuffers, compute_buffers
from planner.context import ContextParams, context_params
from planner.estimate import estimate_buffers
from planner.graphs import SHAPES
from planner.loose_bound import loose_buffers
from planner.model import ModelFacts, read_model
from planner.types import HOST, DeviceKind, LlamaBuild, Machine, Placement, Source

FIXTURES = Path(__file__).parents[2] / "fixtures"
SAMPLE: dict[str, Any] = json.loads((FIXTURES / "truth/sample.json").read_text())
RESERVED: dict[str, dict[str, dict[str, int]]] = json.loads((FIXTURES / "compute/reserved.json").read_text())
CASES = [(name, case) for name, cases in RESERVED.items() for case in cases]
REPLAYED = [(name, case) for name, case in CASES if SAMPLE[name]["architecture"] in SHAPES]

Question = tuple[ModelFacts, ContextParams, Placement, Machine]


@pytest.fixture(scope="module")
def sample_model(tmp_path_factory: pytest.TempPathFactory) -> ReadModel:
    return reader(tmp_path_factory.mktemp("compute"), SAMPLE)


def question(model: ModelFacts, args: str, kind: DeviceKind, count: int) -> Question:
    machine = machine_of(kind, count)
    request = flags.parse(args.split()).request
    return model, context_params(model, request), placement_on(machine, model, request), machine


def sample_question(model: ModelFacts, name: str, case: str) -> Question:
    measured = SAMPLE[name]["cases"][case]
    return question(model, measured["args"], DeviceKind.RPC, measured["workers"])


def sizes(buffers: ComputeBuffers) -> list[int]:
    return [figure.bytes or 0 for figure in (*buffers.devices, buffers.host)]


@pytest.mark.parametrize("name,case", CASES, ids=[f"{name}:{case}" for name, case in CASES])
def test_replayed_buffers_equal_what_llama_cpp_reserved(sample_model: ReadModel, name: str, case: str) -> None:
    model, params, placement, machine = sample_question(sample_model(name), name, case)
    buffers = compute_buffers(model, params, placement, machine, PINNED_BUILD)
    reserved = RESERVED[name][case]
    for device, figure in zip((*placement.devices, str(HOST)), (*buffers.devices, buffers.host), strict=True):
        if figure.source is Source.SIMULATED:
            assert figure.bytes == reserved[device]
        else:
            assert figure.bytes is not None
            assert figure.bytes >= reserved[device]
    assert (buffers.host.source is Source.SIMULATED) == (model.hparams.architecture in SHAPES)


@pytest.mark.parametrize("name,case", REPLAYED, ids=[f"{name}:{case}" for name, case in REPLAYED])
def test_the_closed_form_is_never_below_llama_cpp(sample_model: ReadModel, name: str, case: str) -> None:
    model, params, placement, machine = sample_question(sample_model(name), name, case)
    bound = estimate_buffers(model, params, placement, machine)
    if bound is None:  # nothing bounds what recurrent layers need, what goes around layers, or what has no cache
        hparams = model.hparams
        assert any(hparams.recr_layers) or SHAPES[hparams.architecture].carries_more or not hparams.causal
        return
    estimated = dict(zip((*placement.devices, str(HOST)), (*bound.devices, bound.host), strict=True))
    reserved = RESERVED[name][case]
    assert {device: size for device, size in estimated.items() if size < reserved[device]} == {}


def test_a_graph_that_nothing_else_bounds_has_a_loose_bound(sample_model: ReadModel) -> None:
    model, params, placement, machine = sample_question(sample_model("deepseek4-moe"), "deepseek4-moe", "two-even")
    bound = loose_buffers(model, params, placement, machine)
    reserved = RESERVED["deepseek4-moe"]["two-even"]
    estimated = dict(zip((*placement.devices, str(HOST)), (*bound.devices, bound.host), strict=True))
    assert {device: size for device, size in estimated.items() if size < reserved[device]} == {}


def test_for_another_build_the_figures_are_bounds(sample_model: ReadModel) -> None:
    asked = question(sample_model("llama3.1-8b-q4_k_m"), "-c 8192 -np 1 -ts 1,1", DeviceKind.RPC, 2)
    pinned = compute_buffers(*asked, PINNED_BUILD)
    other = compute_buffers(*asked, LlamaBuild(path=None, version="9.9", commit="fffffff"))
    assert other.host.source is Source.ESTIMATED
    assert all(bound >= size for bound, size in zip(sizes(other), sizes(pinned), strict=True))


def test_a_card_keeps_f16_copies_of_a_quantized_cache_for_attention(sample_model: ReadModel) -> None:
    model = sample_model("llama3.1-8b-q4_k_m")
    args = "-c 131072 -np 1 -fa on -ctk q8_0 -ctv q8_0"
    worker = compute_buffers(*question(model, args, DeviceKind.RPC, 1), PINNED_BUILD)
    card = compute_buffers(*question(model, args, DeviceKind.CUDA, 1), PINNED_BUILD)
    copies = 2 * 2 * 131072 * 8 * 128
    assert sizes(card)[0] - sizes(worker)[0] > copies // 2
    assert sizes(card)[0] > copies


def test_a_card_makes_room_for_the_largest_host_weight_it_computes_with(sample_model: ReadModel) -> None:
    model = sample_model("deepseek-coder-v2-lite-q4_k_m")
    args = "-c 4096 -np 1 -cmoe"
    with_copies = compute_buffers(*question(model, args, DeviceKind.CUDA, 1), PINNED_BUILD)
    without = compute_buffers(*question(model, f"{args} --no-op-offload", DeviceKind.CUDA, 1), PINNED_BUILD)
    largest = max(tensor.nbytes for tensor in model.tensors if "_exps" in tensor.name)
    assert sizes(with_copies)[0] > largest > sizes(without)[0]
    assert sizes(with_copies)[-1] < sizes(without)[-1]


def test_an_override_turns_pipelining_off(sample_model: ReadModel) -> None:
    model = sample_model("llama3.1-8b-q4_k_m")
    args = "-c 8192 -np 1 -ts 1,1"
    pipelined = compute_buffers(*question(model, args, DeviceKind.RPC, 2), PINNED_BUILD)
    plain = compute_buffers(*question(model, f"{args} -ot zzz_none=CPU", DeviceKind.RPC, 2), PINNED_BUILD)
    assert all(more > less for more, less in zip(sizes(pipelined), sizes(plain), strict=True))


def test_more_tokens_at_once_never_need_less(sample_model: ReadModel) -> None:
    model, params, placement, machine = question(
        sample_model("deepseek-coder-v2-lite-q4_k_m"), "-c 8192 -np 1 -ts 1,2", DeviceKind.RPC, 2
    )
    previous = [0, 0, 0]
    for n_ubatch in (1, 8, 64, 512, 2048):
        asked = replace(params, n_ubatch=n_ubatch)
        current = sizes(compute_buffers(model, asked, placement, machine, PINNED_BUILD))
        assert all(now >= before for now, before in zip(current, previous, strict=True))
        previous = current


def test_a_worker_on_cuda_keeps_what_it_chooses_experts_by(sample_model: ReadModel) -> None:
    model, params, placement, machine = question(sample_model("qwen3moe-moe"), "-c 4096 -np 1", DeviceKind.RPC, 1)
    on_cuda = replace(machine, devices=tuple(replace(device, alignment_bytes=128) for device in machine.devices))
    plain = compute_buffers(model, params, placement, machine, PINNED_BUILD).devices[0]
    fusing = compute_buffers(model, params, placement, on_cuda, PINNED_BUILD).devices[0]
    assert (plain.source, fusing.source) == (Source.SIMULATED, Source.ESTIMATED)
    assert (fusing.bytes or 0) > (plain.bytes or 0)


def test_a_card_neither_holds_nor_takes_over_products_that_it_cannot_compute(tmp_path: Path) -> None:
    entry = SAMPLE["llama-dense"]
    ternary = [(name, "tq2_0" if ".ffn_up.weight" in name else type_, shape) for name, type_, shape in entry["tensors"]]
    path = write_header(tmp_path / "t.gguf", "llama", entry["metadata"], ternary, tokens=entry["vocabulary"])
    model = read_model(str(path))
    card = compute_buffers(*question(model, "-c 256 -np 1 -fa on", DeviceKind.CUDA, 1), PINNED_BUILD)
    worker = compute_buffers(*question(model, "-c 256 -np 1 -fa on", DeviceKind.RPC, 1), PINNED_BUILD)
    activations = 4 * 384 * 256
    assert sizes(card)[-1] >= sizes(worker)[-1] + activations
