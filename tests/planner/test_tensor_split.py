"""Tensors split over devices: slices as llama.cpp's Meta device cuts them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from gguf_files import write_header
from hypothesis import given
from hypothesis import strategies as st
from live_server import BUFFER, LOG_RESOLUTION_MIB, MIB, device_words, explain, lines_until_ready
from machines import machine_of, placement_on

from planner.accounting import account
from planner.build import PINNED_BUILD
from planner.context import context_params
from planner.model import ModelFacts, read_model
from planner.search.placement import search
from planner.types import DeviceKind, Machine, Plan, PlanRequest, Policy, Refused

WEIGHTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
KINDS = {"model": "model_bytes", "KV": "context_bytes", "compute": "compute_bytes"}


@pytest.fixture(scope="module")
def model(endless_model: Path) -> ModelFacts:
    return read_model(str(endless_model))


@pytest.mark.llama
@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("-ts", "1,3,2", "-ctk", "q8_0", "-ctv", "q4_0", "-np", "2"),
        ("-ts", "7,2,3", "-ngl", "5"),
        ("-ts", "2,3,9", "-nkvo"),
    ],
    ids=" ".join,
)
def test_the_fullest_device_has_what_llama_server_says(
    flags: tuple[str, ...],
    endless_model: Path,
    rpc_workers: Callable[[int], tuple[Any, ...]],
    free_environment: dict[str, str],
) -> None:
    """llama-server prints the fullest device's figures only; shares that make each of them the fullest tell of all."""
    words = device_words(rpc_workers(3))
    plan = explain(
        str(endless_model), *words, "-sm", "tensor", "-c", "4096", *flags, "--no-oracle", environment=free_environment
    )
    host = plan["devices"][-1]
    printed: dict[tuple[bool, str], float] = {}
    command = [*plan["launch"]["argv"], "--port", "0"]
    for line in lines_until_ready(command, {**free_environment, **plan["launch"]["env"]}):
        if found := BUFFER.search(line):
            printed[found[1].startswith("Meta"), KINDS[found[3]]] = float(found[4])
    for kind in KINDS.values():
        fullest = max(device[kind] for device in plan["devices"][:-1])
        assert fullest / MIB == pytest.approx(printed.get((True, kind), 0.0), abs=LOG_RESOLUTION_MIB), kind
        assert host[kind] / MIB == pytest.approx(printed.get((False, kind), 0.0), abs=LOG_RESOLUTION_MIB), kind


@given(shares=st.lists(st.floats(0.125, 8, width=32), min_size=1, max_size=5))
def test_slices_make_up_the_whole(shares: list[float], model: ModelFacts) -> None:
    """Whatever the shares, the caches of all devices together are the cache, and no slice is negative."""
    machine = machine_of(DeviceKind.RPC, len(shares))
    request = PlanRequest(n_ctx=1024, split_mode="tensor", tensor_split=tuple(shares))
    ledger = account(
        model, context_params(model, request), placement_on(machine, model, request), machine, PINNED_BUILD
    )
    alone = account(
        model,
        context_params(model, replace(request, split_mode="layer")),
        placement_on(machine, model, request),
        machine,
        PINNED_BUILD,
    )
    contexts = [device.context.bytes or 0 for device in ledger.devices]
    assert min(contexts) >= 0
    assert sum(contexts) == sum(device.context.bytes or 0 for device in alone.devices)


def test_equal_devices_get_equal_shares(model: ModelFacts) -> None:
    plan = search(model, PlanRequest(split_mode="tensor"), machine_of(DeviceKind.RPC, 4), Policy(), PINNED_BUILD)
    assert isinstance(plan, Plan)
    assert plan.placement.tensor_split == (1, 1, 1, 1)
    assert len({usage.planned_bytes for usage in plan.usages[:-1]}) == 1


def test_without_devices_there_is_nothing_to_split_over(model: ModelFacts) -> None:
    host_alone = Machine((), machine_of(DeviceKind.RPC, 1).host)
    refused = search(model, PlanRequest(split_mode="tensor"), host_alone, Policy(), PINNED_BUILD)
    assert isinstance(refused, Refused)
    assert "needs a device" in refused.reason


def test_nothing_is_sliced_where_no_layer_is_on_a_device(model: ModelFacts) -> None:
    """llama-server refuses ``-sm tensor`` with no device, and none is given where none is used."""
    request = PlanRequest(n_ctx=1024, split_mode="tensor", n_gpu_layers=0)
    plan = search(model, request, machine_of(DeviceKind.RPC, 1), Policy(), PINNED_BUILD)
    assert isinstance(plan, Plan)
    argv = plan.launch.argv
    assert argv[argv.index("--device") + 1] != "none" or argv[argv.index("-sm") + 1] == "layer"


@pytest.mark.parametrize("n_gpu_layers", range(4))
def test_one_device_holds_what_it_would_without_slices(tmp_path: Path, n_gpu_layers: int) -> None:
    """Also where only some layers lie there, which ask for rotation factors as those on the host do."""
    tensors = [
        ("token_embd.weight", "f16", (128, 32)),
        ("output_norm.weight", "f32", (128,)),
        ("output.weight", "f16", (128, 32)),
        ("rope_freqs.weight", "f32", (32,)),
        *((f"blk.{il}.{name}.weight", "f16", (128, 128)) for il in range(2) for name in WEIGHTS),
        *((f"blk.{il}.{name}_norm.weight", "f32", (128,)) for il in range(2) for name in ("attn", "ffn")),
    ]
    metadata = {
        "block_count": 2,
        "context_length": 512,
        "embedding_length": 128,
        "feed_forward_length": 128,
        "attention.head_count": 2,
    }
    facts = read_model(str(write_header(tmp_path / "model.gguf", "llama", metadata, tensors)))
    machine = machine_of(DeviceKind.RPC, 1)
    sliced, whole = (
        account(facts, context_params(facts, request), placement_on(machine, facts, request), machine, PINNED_BUILD)
        for mode in ("tensor", "layer")
        for request in (PlanRequest(n_ctx=512, split_mode=mode, n_gpu_layers=n_gpu_layers, flash_attn="on"),)
    )
    assert (sliced.devices, sliced.host) == (whole.devices, whole.host)


def test_each_of_two_cards_holds_half_of_the_heads(tmp_path: Path) -> None:
    tiny_models.write_chat_model(tmp_path / "model.gguf", n_layer=2, n_embd=256, n_ff=768, n_head=4, n_head_kv=4)
    facts, machine = read_model(str(tmp_path / "model.gguf")), machine_of(DeviceKind.CUDA, 2)
    one, two = (
        search(facts, PlanRequest(n_ctx=4096, split_mode=mode), machine, Policy(), PINNED_BUILD)
        for mode in ("none", "tensor")
    )
    assert isinstance(one, Plan)
    assert isinstance(two, Plan)
    assert two.usages[0].context.bytes == (one.usages[0].context.bytes or 0) // 2
