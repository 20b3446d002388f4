"""Which devices are chosen, how long the context is, what stays on the CPU, and what the speed is computed from."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf_files import write_header

from planner.build import PINNED_BUILD
from planner.model import ModelFacts, read_model
from planner.overrides import UNPIPELINED
from planner.search.placement import search
from planner.types import (
    HOST,
    HOST_POOL,
    Device,
    DeviceKind,
    DeviceName,
    Machine,
    MemoryPool,
    PlacementKind,
    Plan,
    PlanRequest,
    Policy,
    PoolId,
)

MIB = 1024 * 1024
HOST_BYTES = 8 * 1024 * MIB
REQUEST = PlanRequest(n_ctx=2048, n_ubatch=64)


@pytest.fixture(scope="module", params=[0, 8], ids=["dense", "experts"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelFacts:
    """Return a model of four layers, about 50 MiB, dense or with eight experts."""
    return written(tmp_path_factory.mktemp("split") / "model.gguf", request.param)


@pytest.fixture(scope="module")
def expert_model(tmp_path_factory: pytest.TempPathFactory) -> ModelFacts:
    return written(tmp_path_factory.mktemp("split") / "experts.gguf", 8)


def written(path: Path, n_expert: int) -> ModelFacts:
    """Write a model's header and read it."""
    n_embd, n_ff = 512, 1536
    tensors: list[tuple[str, str, tuple[int, ...]]] = [
        ("token_embd.weight", "q8_0", (n_embd, 4096)),
        ("output_norm.weight", "f32", (n_embd,)),
        ("output.weight", "q8_0", (n_embd, 4096)),
    ]
    type_ = "q8_0"
    for layer in range(4):
        ff = (n_embd, n_ff, n_expert) if n_expert else (n_embd, 4 * n_ff)
        down = (n_ff, n_embd, n_expert) if n_expert else (4 * n_ff, n_embd)
        suffix = "_exps" if n_expert else ""
        rows: list[tuple[str, str, tuple[int, ...]]] = [
            ("attn_norm", "f32", (n_embd,)),
            ("attn_q", type_, (n_embd, n_embd)),
            ("attn_k", type_, (n_embd, 128)),
            ("attn_v", type_, (n_embd, 128)),
            ("attn_output", type_, (n_embd, n_embd)),
            ("ffn_norm", "f32", (n_embd,)),
            *([("ffn_gate_inp", "f32", (n_embd, n_expert))] if n_expert else []),
            (f"ffn_gate{suffix}", type_, ff),
            (f"ffn_up{suffix}", type_, ff),
            (f"ffn_down{suffix}", type_, down),
        ]
        tensors += [(f"blk.{layer}.{name}.weight", kind, shape) for name, kind, shape in rows]
    metadata = {
        "block_count": 4,
        "context_length": 8192,
        "embedding_length": n_embd,
        "feed_forward_length": n_ff if n_expert else 4 * n_ff,
        "attention.head_count": 8,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": 64,
    } | ({"expert_count": n_expert, "expert_used_count": 2} if n_expert else {})
    return read_model(str(write_header(path, "llama", metadata, tensors, tokens=4096)))


def machine(sizes: list[int], bandwidths: list[int | None]) -> Machine:
    devices = tuple(
        Device(
            DeviceName(f"CUDA{i}"), DeviceKind.CUDA, size, size, PoolId(f"p{i}"),
            bandwidth_bytes_per_s=bandwidth, overhead_bytes=0,
        )
        for i, (size, bandwidth) in enumerate(zip(sizes, bandwidths, strict=True))
    )  # fmt: skip
    host = Device(HOST, DeviceKind.HOST, HOST_BYTES, HOST_BYTES, HOST_POOL)
    return Machine(devices, host, pools=(MemoryPool(HOST_POOL, HOST_BYTES, HOST_BYTES),), what_if=True)


def planned(model: ModelFacts, where: Machine, request: PlanRequest = REQUEST, policy: Policy = Policy()) -> Plan:  # noqa: B008 - frozen
    outcome = search(model, request, where, policy, PINNED_BUILD)
    assert isinstance(outcome, Plan)
    return outcome


def tokens_per_s(plan: Plan) -> float:
    assert plan.decode is not None
    return plan.decode.tokens_per_second


def test_of_two_equal_cards_the_first_is_used(model: ModelFacts) -> None:
    where = machine([200 * MIB, 200 * MIB], [None, None])
    assert planned(model, where).placement.devices == ("CUDA0",)


def test_the_faster_card_is_used_where_either_would_do(model: ModelFacts) -> None:
    where = machine([300 * MIB, 200 * MIB], [200 * 10**9, 800 * 10**9])
    assert planned(model, where).placement.devices == ("CUDA1",)


def test_the_context_grows_onto_another_card_where_that_costs_no_speed(model: ModelFacts) -> None:
    where = machine([200 * MIB, 200 * MIB], [None, None])
    plan = planned(model, where, PlanRequest())
    assert plan.n_ctx_per_slot == 8192


def test_experts_stay_on_the_cpu_before_whole_layers_do(expert_model: ModelFacts) -> None:
    """A card that cannot hold the model keeps attention and caches; it is said what is left, and why."""
    plan = planned(expert_model, machine([24 * MIB], [None]))
    assert plan.request.n_cpu_moe or plan.request.override_tensor
    assert any(decision.step == "experts on the CPU" for decision in plan.decisions)


def test_experts_go_on_to_the_next_card_where_only_so_everything_is_on_cards(expert_model: ModelFacts) -> None:
    """Neither card has room for another whole layer; what one layer cannot keep lies on the card after its own."""
    where = machine([44 * MIB, 56 * MIB], [None, None])
    plan = planned(expert_model, where)
    assert plan.placement.n_gpu_layers == len(plan.placement.layer_devices) + 1
    assert plan.request.override_tensor == ((r"blk\.1\.ffn_(down)_(ch|)exps", "CUDA1"),)
    assert plan.placement.layer_devices[1] == 0, "its attention stays on the first card"
    decisions = {decision.step: decision for decision in plan.decisions}
    assert decisions["experts on the next device"].chosen == "ffn_down of layer 1 on CUDA1"
    assert "experts on the CPU" not in decisions
    assert all((row.headroom_bytes or 0) >= 0 for row in plan.usages)
    assert planned(expert_model, where, plan.request).usages == plan.usages


def test_experts_go_on_to_the_next_card_for_a_longer_context(expert_model: ModelFacts) -> None:
    """Whole layers would hold a shorter one on these cards."""
    where = machine([48 * MIB, 60 * MIB], [None, None])
    plan = planned(expert_model, where, PlanRequest(n_ubatch=64))
    whole = planned(expert_model, where, PlanRequest(n_ubatch=64, override_tensor=UNPIPELINED))
    assert whole.placement.kind is plan.placement.kind is PlacementKind.GPU
    assert (whole.n_ctx_per_slot or 0) < (plan.n_ctx_per_slot or 0)
    assert any(decision.step == "experts on the next device" for decision in plan.decisions)


def test_the_speed_says_what_it_was_computed_from(model: ModelFacts) -> None:
    """The parts make up the whole."""
    plan = planned(model, machine([200 * MIB], [800 * 10**9]))
    decode = plan.decode
    assert decode is not None
    assert 1 / decode.tokens_per_second == pytest.approx(
        sum(part.seconds for part in decode.parts) + decode.crossings_s
    )
    assert [(part.place, part.is_known) for part in decode.parts] == [("CUDA0", True)]
    assert "800 GB/s" in decode.basis


def test_of_experts_only_those_are_read_that_are_used(expert_model: ModelFacts) -> None:
    decode = planned(expert_model, machine([200 * MIB], [None])).decode
    assert decode is not None
    assert decode.parts[0].read_bytes < expert_model.summary.tensor_bytes / 2
