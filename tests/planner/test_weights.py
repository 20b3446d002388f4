"""Where weights lie: alignment by device, tied outputs, overrides, what the host maps or allocates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf_files import write_header
from hypothesis import given
from hypothesis import strategies as st
from machines import machine_of, placement_on

from planner import weights
from planner.build import PINNED_BUILD
from planner.context import context_params
from planner.model import ModelFacts, read_model
from planner.types import DeviceKind, LlamaBuild, PlanRequest
from planner.weights import WeightBytes

AVX2_BUILD = replace(PINNED_BUILD, cpu_features=frozenset({"avx", "avx2"}))
BLOCKS = 4
WIDE = 640  # not a multiple of 512: CUDA pads the last row of quantized tensors
EMBEDDING, OUTPUT, BLOCK, NORM = 640 * 100 // 32 * 34, 640 * 100 // 32 * 18, 640 * 640 // 32 * 18, 640 * 4
METADATA = {
    "block_count": BLOCKS,
    "context_length": 512,
    "embedding_length": WIDE,
    "attention.head_count": 5,
}


def tensors(*, tied: bool = False, norm: str = "f32", matrix: str = "q4_0") -> list[tuple[str, str, tuple[int, ...]]]:
    table: list[tuple[str, str, tuple[int, ...]]] = [("token_embd.weight", "q8_0", (WIDE, 100))]
    for layer in range(BLOCKS):
        table += [
            (f"blk.{layer}.attn_norm.weight", norm, (WIDE,)),
            (f"blk.{layer}.ffn_up.weight", matrix, (WIDE, WIDE)),
        ]
    table.append(("output_norm.weight", "f32", (WIDE,)))
    return table if tied else [*table, ("output.weight", "q4_0", (WIDE, 100))]


def model_of(
    folder: Path, table: list[tuple[str, str, tuple[int, ...]]], architecture: str = "llama", **metadata: Any
) -> ModelFacts:
    return read_model(str(write_header(folder / "model.gguf", architecture, {**METADATA, **metadata}, table)))


def placed(
    model: ModelFacts, kind: DeviceKind, count: int = 1, build: LlamaBuild = PINNED_BUILD, **knobs: Any
) -> WeightBytes:
    request, machine = PlanRequest(**knobs), machine_of(kind, count)
    placement, params = placement_on(machine, model, request), context_params(model, request)
    assert weights.not_built(model, params, placement, machine) is None
    return weights.weight_bytes(model, params, placement, machine, build)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> ModelFacts:
    return model_of(tmp_path_factory.mktemp("untied"), tensors())


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> ModelFacts:
    return model_of(tmp_path_factory.mktemp("tied"), tensors(tied=True))


def test_the_input_stays_on_the_host_and_the_rest_goes_to_the_device(untied: ModelFacts) -> None:
    result = placed(untied, DeviceKind.RPC)
    assert result.devices == (BLOCKS * (BLOCK + NORM) + NORM + OUTPUT,)
    assert (result.host.mapped_bytes, result.host.allocated_bytes) == (EMBEDDING, 0)


def test_cuda_pads_the_last_row_of_quantized_tensors_and_aligns_to_128(untied: ModelFacts) -> None:
    pad = (512 - WIDE % 512) // 32 * 18
    result = placed(untied, DeviceKind.CUDA)
    aligned = [-(-size // 128) * 128 for size in (*(BLOCK + pad, NORM) * BLOCKS, NORM, OUTPUT + pad)]
    assert result.devices == (sum(aligned),)


def test_a_tied_output_is_a_second_copy_on_its_device(tied: ModelFacts) -> None:
    result = placed(tied, DeviceKind.RPC)
    assert result.devices == (BLOCKS * (BLOCK + NORM) + NORM + EMBEDDING,)
    assert result.host.mapped_bytes == EMBEDDING


@pytest.mark.parametrize("load_mode", ["mmap", "none"])
def test_a_tied_output_on_the_host_is_the_input_itself(tied: ModelFacts, load_mode: str) -> None:
    host = placed(tied, DeviceKind.RPC, 0, repack=False, load_mode=load_mode).host
    everything = EMBEDDING + BLOCKS * (BLOCK + NORM) + NORM
    assert host.mapped_bytes + host.allocated_bytes == everything
    assert bool(host.mapped_bytes) == (load_mode == "mmap")


def test_gemmas_that_ask_for_the_output_first_keep_both_copies(tmp_path: Path) -> None:
    model = model_of(tmp_path, tensors(tied=True), "gemma3n", **{"attention.sliding_window": 64})
    host = placed(model, DeviceKind.RPC, 0, repack=False, load_mode="none").host
    assert host.allocated_bytes == 2 * EMBEDDING + BLOCKS * (BLOCK + NORM) + NORM


def test_what_is_mapped_spans_everything_between_the_hosts_first_and_last_weight(untied: ModelFacts) -> None:
    host = placed(untied, DeviceKind.RPC, n_gpu_layers=3).host  # output and two blocks on the device
    last = untied.tensor("blk.1.ffn_up.weight")
    assert last is not None
    first = untied.tensors[0].offset
    assert host.mapped_bytes == last.offset + last.nbytes - first


def test_the_weights_alone_are_told_apart_from_what_lies_between_them(untied: ModelFacts) -> None:
    host = placed(untied, DeviceKind.RPC, n_gpu_layers=0, override_tensor=((r"blk\.[12]\.", "RPC0"),)).host
    assert host.mapped_tensor_bytes == EMBEDDING + 2 * (BLOCK + NORM) + NORM + OUTPUT
    assert host.mapped_bytes == host.mapped_tensor_bytes + 2 * (BLOCK + NORM)


def test_a_tied_output_is_one_weight_of_the_mapped_file(tied: ModelFacts) -> None:
    host = placed(tied, DeviceKind.RPC, 0, repack=False).host
    assert host.mapped_tensor_bytes == host.mapped_bytes == EMBEDDING + BLOCKS * (BLOCK + NORM) + NORM


def test_repacked_types_are_allocated_beside_the_mapping_where_the_processor_repacks(untied: ModelFacts) -> None:
    host = placed(untied, DeviceKind.RPC, 0, AVX2_BUILD).host
    assert host.allocated_bytes == BLOCKS * BLOCK  # the output's 100 rows do not come in eights
    assert host.certain
    assert placed(untied, DeviceKind.RPC, 0, AVX2_BUILD, repack=False).host.allocated_bytes == 0


def test_an_unknown_processor_leaves_the_hosts_share_uncertain(untied: ModelFacts) -> None:
    assert not placed(untied, DeviceKind.RPC, 0).host.certain
    assert placed(untied, DeviceKind.RPC, 0, repack=False).host.certain


def test_with_a_cuda_device_the_host_maps_or_pins_but_never_repacks(untied: ModelFacts) -> None:
    mapped = placed(untied, DeviceKind.CUDA, build=AVX2_BUILD, n_gpu_layers=0).host
    pinned = placed(untied, DeviceKind.CUDA, build=AVX2_BUILD, n_gpu_layers=0, load_mode="none").host
    everything = EMBEDDING + BLOCKS * (BLOCK + NORM) + NORM + OUTPUT
    assert (mapped.allocated_bytes, mapped.pinned_bytes) == (0, 0)
    assert (pinned.mapped_bytes, pinned.allocated_bytes, pinned.pinned_bytes) == (0, 0, everything)


def test_an_override_moves_weights_to_the_host_or_to_another_device(untied: ModelFacts) -> None:
    plain = placed(untied, DeviceKind.RPC, 2)
    to_host = placed(untied, DeviceKind.RPC, 2, override_tensor=((r"blk\.[01]\.ffn_up", "CPU"),))
    assert sum(plain.devices) - sum(to_host.devices) == 2 * BLOCK
    moved = placed(untied, DeviceKind.RPC, 2, override_tensor=((r"blk\.0\.ffn_up", "RPC1"),))
    assert moved.devices == (plain.devices[0] - BLOCK, plain.devices[1] + BLOCK)


def test_the_first_override_that_matches_wins(untied: ModelFacts) -> None:
    pairs = (("ffn_up", "RPC0"), ("ffn_up", "CPU"))
    assert placed(untied, DeviceKind.RPC, override_tensor=pairs).devices == placed(untied, DeviceKind.RPC).devices


def test_an_override_to_an_absent_device_is_said_to_be_beyond_the_rules(untied: ModelFacts) -> None:
    request = PlanRequest(override_tensor=(("ffn_up", "CUDA7"),))
    machine = machine_of(DeviceKind.CUDA, 1)
    placement = placement_on(machine, untied, request)
    reason = weights.not_built(untied, context_params(untied, request), placement, machine)
    assert "CUDA7" in (reason or "")


def test_what_cuda_does_not_run_stays_on_the_host(tmp_path: Path) -> None:
    model = model_of(tmp_path, tensors(norm="bf16"))  # CUDA does not add or multiply by bf16 vectors
    norms = BLOCKS * WIDE * 2
    assert placed(model, DeviceKind.CUDA, load_mode="none").host.pinned_bytes == EMBEDDING + norms
    assert placed(model, DeviceKind.RPC, load_mode="none").host.allocated_bytes == EMBEDDING


def test_weights_of_an_unused_draft_head_are_left_out(tmp_path: Path) -> None:
    model = model_of(tmp_path, tensors(), "glm4moe", nextn_predict_layers=1)
    assert placed(model, DeviceKind.RPC).devices == ((BLOCKS - 1) * (BLOCK + NORM) + NORM + OUTPUT,)


def test_rotation_factors_are_copied_once_to_every_device_with_layers(tmp_path: Path) -> None:
    model = model_of(tmp_path, [*tensors(), ("rope_freqs.weight", "f32", (16,))])
    plain = sum(placed(model_of(tmp_path, tensors()), DeviceKind.RPC, 2).devices)
    assert sum(placed(model, DeviceKind.RPC, 2).devices) == plain + 2 * 64


def test_a_tensor_without_a_known_place_is_named(tmp_path: Path) -> None:
    model = model_of(tmp_path, [*tensors(), ("mystery.weight", "f32", (16,))])
    request, machine = PlanRequest(), machine_of(DeviceKind.RPC, 1)
    reason = weights.not_built(model, context_params(model, request), placement_on(machine, model, request), machine)
    assert "mystery.weight" in (reason or "")


@given(
    shares=st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any),
    n_gpu_layers=st.integers(0, BLOCKS + 1),
)
def test_no_weight_is_lost_or_doubled_by_splitting(untied: ModelFacts, shares: list[int], n_gpu_layers: int) -> None:
    """Whatever the split: devices and host together hold the file's tensors, each once."""
    result = placed(
        untied,
        DeviceKind.RPC,
        len(shares),
        n_gpu_layers=n_gpu_layers,
        tensor_split=tuple(map(float, shares)),
        load_mode="none",
        repack=False,
    )
    assert sum(result.devices) + result.host.allocated_bytes == untied.summary.tensor_bytes
