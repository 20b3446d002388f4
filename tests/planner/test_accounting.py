"""The ledger as a whole: sources, the host's detail, and honesty about what has no rule."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf_files import write_header
from hypothesis import given
from hypothesis import strategies as st
from machines import machine_of, placement_on

from planner import cache, weights
from planner.accounting import MemoryLedger, account
from planner.architectures import ARCHITECTURES
from planner.buffers import HOST_BUFFER
from planner.build import PINNED_BUILD
from planner.context import context_params
from planner.errors import PlannerError
from planner.model import ModelFacts, read_model
from planner.refusals import refusal
from planner.types import DeviceKind, LlamaBuild, PlanRequest, Role, Source

METADATA = {
    "block_count": 3,
    "context_length": 1024,
    "embedding_length": 128,
    "feed_forward_length": 256,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
}
TENSORS = [
    ("token_embd.weight", "f16", (128, 300)),
    *((f"blk.{layer}.attn_k.weight", "f16", (128, 64)) for layer in range(3)),
    ("output_norm.weight", "f32", (128,)),
]


def model_of(folder: Path, architecture: str = "llama") -> ModelFacts:
    return read_model(str(write_header(folder / "model.gguf", architecture, METADATA, TENSORS, tokens=300)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFacts:
    return model_of(tmp_path_factory.mktemp("accounting"))


def ledger_of(
    model: ModelFacts, kind: DeviceKind = DeviceKind.CUDA, build: LlamaBuild = PINNED_BUILD, **knobs: Any
) -> MemoryLedger:
    request, machine = PlanRequest(**knobs), machine_of(kind, 2)
    return account(model, context_params(model, request), placement_on(machine, model, request), machine, build)


def sources(ledger: MemoryLedger) -> set[Source]:
    return {source for each in (*ledger.devices, ledger.host) for source in (each.model.source, each.context.source)}


def test_the_pinned_build_makes_figures_exact_and_another_makes_them_estimates(model: ModelFacts) -> None:
    assert sources(ledger_of(model)) == {Source.EXACT}
    assert sources(ledger_of(model, build=replace(PINNED_BUILD, commit="fffffff"))) == {Source.ESTIMATED}


def test_a_device_that_decides_its_own_alignment_gets_an_upper_bound(model: ModelFacts) -> None:
    vulkan, cuda = ledger_of(model, DeviceKind.VULKAN), ledger_of(model, DeviceKind.CUDA)
    assert {each.model.source for each in vulkan.devices} == {Source.ESTIMATED}
    for ours, theirs in zip(vulkan.devices, cuda.devices, strict=True):
        assert (ours.model.bytes or 0) >= (theirs.model.bytes or 0)


def test_without_offload_every_cache_is_on_the_host(model: ModelFacts) -> None:
    on_devices, on_host = ledger_of(model), ledger_of(model, kv_offload=False)
    assert [each.context.bytes for each in on_host.devices] == [0, 0]
    assert on_host.host.context.bytes == sum(each.context.bytes or 0 for each in on_devices.devices)


def test_the_hosts_model_figure_is_the_sum_of_its_detail(model: ModelFacts) -> None:
    for knobs in ({}, {"n_gpu_layers": 1}, {"n_gpu_layers": 1, "load_mode": "none"}):
        ledger = ledger_of(model, **knobs)
        detail = ledger.host_detail
        parts = (detail.mapped_bytes, detail.allocated_bytes, detail.pinned_bytes)
        assert ledger.host.model.bytes == sum(part or 0 for part in parts)


@pytest.mark.parametrize("load_mode, is_whole", [("mmap", False), ("mmap+mlock", True)])
def test_a_mapped_range_stays_in_memory_as_a_whole_only_where_it_is_locked(
    model: ModelFacts, load_mode: str, *, is_whole: bool
) -> None:
    """Weights of a device lie between those of the host."""
    between = r"blk\.1\."
    ledger = ledger_of(model, n_gpu_layers=0, override_tensor=((between, "CUDA0"),), load_mode=load_mode, repack=False)
    mapped, resident = ledger.host_detail.mapped_bytes, ledger.host_detail.resident_bytes
    assert mapped is not None
    assert resident is not None
    others = sum(tensor.nbytes for tensor in model.tensors if tensor.name.startswith("blk.1."))
    assert mapped - resident == (0 if is_whole else others)


def test_output_buffer_and_prompt_cache_are_told_apart_from_the_breakdown(model: ModelFacts) -> None:
    chat = ledger_of(model, n_parallel=3, cache_ram_mib=100).host_detail
    assert (chat.output_buffer_bytes, chat.prompt_cache_bytes) == (4 * 300 * 3, 100 << 20)
    embedding = ledger_of(model, role=Role.EMBEDDING).host_detail
    assert embedding.output_buffer_bytes == 4 * (300 + 128) * 512
    assert ledger_of(model, cache_ram_mib=-1).host_detail.prompt_cache_bytes is None


@pytest.mark.parametrize(
    "knobs,reason",
    [
        ({"model_draft": "draft.gguf"}, "--model-draft"),
        ({"mmproj": "mmproj.gguf"}, "--mmproj"),
        ({"lora": ("adapter.gguf",)}, "--lora"),
        ({"override_kv": ("llama.context_length=int:2",)}, "--override-kv"),
        ({"spec_type": "draft-eagle3"}, "--spec-type"),
        ({"split_mode": "tensor", "override_tensor": (("ffn", "CUDA1"),)}, "--split-mode tensor"),
    ],
)
def test_a_flag_without_a_rule_leaves_the_figures_unknown_and_is_named(
    model: ModelFacts, knobs: dict[str, Any], reason: str
) -> None:
    ledger = ledger_of(model, **knobs)
    assert any(reason in each for each in ledger.not_built)
    assert sources(ledger) == {Source.UNKNOWN}
    assert ledger.host_detail.mapped_bytes is None


def test_an_unknown_architecture_has_no_wrong_numbers(tmp_path: Path) -> None:
    ledger = ledger_of(model_of(tmp_path, "brandnew"))
    assert sources(ledger) == {Source.UNKNOWN}
    assert any("brandnew" in reason for reason in ledger.not_built)


KEYS = (
    "block_count",
    "context_length",
    "embedding_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.key_length_mla",
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "attention.indexer.key_length",
    "attention.indexer.top_k",
    "attention.indexer.types",
    "attention.compress_ratios",
    "attention.recurrent_layers",
    "attention.causal",
    "feed_forward_length",
    "nextn_predict_layers",
    "expert_used_count",
    "pooling_type",
    "ssm.inner_size",
    "ssm.state_size",
    "kda.head_dim",
    "wkv.head_size",
    "ple.layers",
    "num_loops",
)
ODD_VALUES = (
    st.integers(0, 4)
    | st.sampled_from([-1, 1 << 20, (1 << 32) - 1])
    | st.booleans()
    | st.floats(-2, 2, width=32)
    | st.sampled_from(["", "four"])
    | st.lists(st.integers(0, 4), min_size=1, max_size=5)
    | st.lists(st.sampled_from(["a", "b"]), min_size=3, max_size=3)
)


@given(
    architecture=st.sampled_from(sorted(ARCHITECTURES)),
    odd=st.dictionaries(st.sampled_from(KEYS), ODD_VALUES, max_size=4),
    kind=st.sampled_from([DeviceKind.CUDA, DeviceKind.VULKAN, DeviceKind.RPC]),
)
def test_whatever_the_metadata_says_weights_and_caches_are_sized_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, architecture: str, odd: dict[str, Any], kind: DeviceKind
) -> None:
    path = tmp_path_factory.getbasetemp() / "odd.gguf"
    path.unlink(missing_ok=True)
    table = [*TENSORS, ("blk.0.ssm_a", "f32", (1, 8)), ("blk.1.ffn_up_exps.weight", "q4_0", (128, 8, 2))]
    write_header(path, architecture, METADATA | odd, table, tokens=300)
    problem, request, machine = None, PlanRequest(), machine_of(kind, 2)
    try:
        model = read_model(str(path))
        if refusal(model, request, [kind]) is None:
            params, placement = context_params(model, request), placement_on(machine, model, request)
            weights.weight_bytes(model, params, placement, machine, PINNED_BUILD)
            assert min(cache.layer_bytes(model, params, HOST_BUFFER)) >= 0
    except PlannerError as error:
        problem = str(error)
    assert problem is None or "\n" not in problem
