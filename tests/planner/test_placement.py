"""The search obeys what is pinned, keeps to the budgets, and never refuses what would run."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import flags
from planner.build import PINNED_BUILD
from planner.errors import InvalidRequest
from planner.model import ModelFacts, read_model
from planner.search import knobs
from planner.search.longest import STEP
from planner.search.placement import search
from planner.types import (
    HOST,
    HOST_POOL,
    Device,
    DeviceKind,
    DeviceName,
    Machine,
    MemoryPool,
    NoFit,
    PerDevice,
    PlacementKind,
    Plan,
    PlanOutcome,
    PlanRequest,
    Policy,
    PoolId,
    ProcessUse,
    Refused,
)

MIB = 1024 * 1024
HOST_BYTES = 8 * 1024 * MIB
SMALL = PlanRequest(n_ctx=2048)
FILLED = "of the host's memory is left for other programs"
ALLOWED = Policy()
SIZES = st.lists(st.integers(1 * MIB, 64 * MIB), max_size=3)


@pytest.fixture(scope="module")
def model(endless_model: Path) -> ModelFacts:
    """Return a model of eight layers, about 12 MiB of weights."""
    return read_model(os.fspath(endless_model))


def machine(*sizes: int, host_bytes: int = HOST_BYTES, kind: DeviceKind = DeviceKind.RPC) -> Machine:
    """Return a machine with devices of these free bytes."""
    devices = tuple(
        Device(DeviceName(f"RPC{i}"), kind, size, size, PoolId(f"p{i}"), overhead_bytes=0)
        for i, size in enumerate(sizes)
    )
    host = Device(HOST, DeviceKind.HOST, host_bytes, host_bytes, HOST_POOL)
    return Machine(devices, host, pools=(MemoryPool(HOST_POOL, host_bytes, host_bytes),), what_if=True)


def plan(model: ModelFacts, request: PlanRequest, where: Machine, policy: Policy = ALLOWED, **more: Any) -> PlanOutcome:
    return search(model, request, where, policy, PINNED_BUILD, **more)


def test_one_device_is_taken_where_one_is_enough(model: ModelFacts) -> None:
    """It is the one with the most room, and the others are listed with nothing on them."""
    outcome = plan(model, SMALL, machine(100 * MIB, 200 * MIB, 150 * MIB))
    assert isinstance(outcome, Plan)
    assert outcome.placement.devices == ("RPC1",)
    assert outcome.placement.kind is PlacementKind.GPU
    assert [usage.planned_bytes for usage in outcome.usages if usage.name in {"RPC0", "RPC2"}] == [0, 0]


def test_spreading_takes_all_devices(model: ModelFacts) -> None:
    outcome = plan(model, SMALL, machine(100 * MIB, 200 * MIB, 150 * MIB), Policy(spread=True))
    assert isinstance(outcome, Plan)
    assert outcome.placement.devices == ("RPC0", "RPC1", "RPC2")


@settings(max_examples=25)
@given(sizes=SIZES)
def test_no_budget_is_overrun_and_every_layer_lies_somewhere_once(model: ModelFacts, sizes: list[int]) -> None:
    outcome = plan(model, SMALL, machine(*sizes))
    assert isinstance(outcome, Plan)
    for usage in outcome.usages:
        assert usage.planned_bytes is not None
        assert usage.budget_bytes is not None
        assert usage.planned_bytes <= usage.budget_bytes
    layers = sorted(layer for usage in outcome.usages for layer in usage.layers)
    assert layers == list(range(model.hparams.n_layer_all))
    assert sum(usage.output for usage in outcome.usages) == 1


@settings(max_examples=15)
@given(sizes=SIZES, more=st.integers(0, 64 * MIB))
def test_more_memory_never_turns_a_fit_into_a_refusal(model: ModelFacts, sizes: list[int], more: int) -> None:
    request = replace(SMALL, n_gpu_layers="all")
    less, larger = (
        plan(model, request, machine(*sizes)),
        plan(model, request, machine(*(size + more for size in sizes))),
    )
    assert isinstance(larger, Plan) or not isinstance(less, Plan)


def test_the_first_layers_stay_on_the_host_where_not_all_fit(model: ModelFacts) -> None:
    outcome = plan(model, SMALL, machine(20 * MIB))
    assert isinstance(outcome, Plan)
    assert outcome.placement.kind is PlacementKind.GPU_AND_CPU
    on_device = [index >= 0 for index in outcome.placement.layer_devices]
    assert on_device == sorted(on_device)


@pytest.mark.parametrize("mib", [43, 50, 57, 64, 71])
def test_the_context_gives_way_before_layers_do(model: ModelFacts, mib: int) -> None:
    """The longest in steps of llama.cpp's is taken that leaves all layers on the device."""
    outcome = plan(model, PlanRequest(), machine(mib * MIB))
    assert isinstance(outcome, Plan)
    assert outcome.placement.kind is PlacementKind.GPU
    assert outcome.n_ctx_per_slot is not None
    assert outcome.n_ctx_per_slot % STEP == 0
    assert 4096 <= outcome.n_ctx_per_slot < 32_768
    request = PlanRequest(n_ctx=outcome.n_ctx_per_slot + STEP, n_gpu_layers="all", n_ubatch=512)
    longer = plan(model, request, machine(mib * MIB))
    assert isinstance(longer, NoFit)


@pytest.mark.parametrize(
    "words,known", [("-ot x=RPC1", True), ("-ot x=CPU", True), ("-ot x=RPC2", False), ("-otd x=Y", False)]
)
def test_an_override_to_a_buffer_type_that_nobody_has_is_refused(model: ModelFacts, words: str, *, known: bool) -> None:
    outcome = plan(model, flags.parse(["-c", "4096", *words.split()]).request, machine(64 * MIB, 64 * MIB))
    reason = outcome.reason if isinstance(outcome, Refused) else None
    assert (reason is None) == known
    assert known or "but CPU, RPC0, RPC1" in str(reason)


@pytest.mark.parametrize("words,total", [("-np 3", 3 * 32_768), ("-np 3 -kvu", 32_768), ("-np 1", 32_768)])
def test_a_context_of_zero_is_the_trained_length_of_each_cache(model: ModelFacts, words: str, total: int) -> None:
    outcome = plan(model, flags.parse(f"-c 0 {words}".split()).request, machine(4096 * MIB))
    assert isinstance(outcome, Plan)
    assert outcome.request.n_ctx == total


def test_the_trained_length_is_taken_where_it_fits(model: ModelFacts) -> None:
    outcome = plan(model, PlanRequest(), machine(512 * MIB))
    assert isinstance(outcome, Plan)
    assert outcome.n_ctx_per_slot == 32_768


def test_the_context_of_the_settings_is_given_to_every_slot(model: ModelFacts) -> None:
    outcome = plan(model, PlanRequest(), machine(512 * MIB), Policy(n_parallel=3, n_ctx_per_slot=1000))
    assert isinstance(outcome, Plan)
    assert outcome.n_ctx_per_slot == 1024
    assert outcome.request.n_ctx == 3000


def test_what_was_promised_or_capped_is_not_spent(model: ModelFacts) -> None:
    """Promises and overhead come off what is free, what runners hold off the cap; the smaller figure counts."""
    policy = Policy(
        gpu_overhead=PerDevice(MIB, MappingProxyType({"RPC1": 5 * MIB})),
        max_vram=PerDevice(90 * MIB),
        held=MappingProxyType({"RPC0": 60 * MIB}),
        promised=MappingProxyType({"RPC1": 30 * MIB}),
    )
    outcome = plan(model, SMALL, machine(100 * MIB, 100 * MIB), policy)
    assert not isinstance(outcome, Refused)
    assert [usage.budget_bytes for usage in outcome.usages] == [30 * MIB, 65 * MIB, HOST_BYTES]


def test_memory_that_two_devices_share_is_spent_once(model: ModelFacts) -> None:
    """Two names for one pool: what either takes counts against both."""
    both = machine(40 * MIB, 40 * MIB)
    shared = replace(
        both,
        devices=tuple(replace(device, pool=PoolId("one")) for device in both.devices),
        pools=(*both.pools, MemoryPool(PoolId("one"), 40 * MIB, 40 * MIB)),
    )
    request = PlanRequest(n_ctx=8192, n_gpu_layers="all")
    assert isinstance(plan(model, request, machine(60 * MIB, 60 * MIB)), Plan)
    assert isinstance(plan(model, request, shared), NoFit)


@pytest.mark.parametrize(
    "words, devices, n_gpu_layers, counts",
    [
        ("-ngl 4", ("RPC1",), 4, [4]),
        ("-ngl 0", (), 0, []),
        ("-ts 1,3", ("RPC0", "RPC1"), 9, [3, 6]),
        ("-ts 1,3 -ngl 4", ("RPC0", "RPC1"), 4, [1, 3]),
        ("--device RPC1,RPC0 -ts 2,1", ("RPC1", "RPC0"), 9, [6, 3]),
        ("--device rpc0", ("RPC0",), 9, [9]),
        ("-sm none", ("RPC0",), 9, [9]),
        ("-sm none -mg 1", ("RPC1",), 9, [9]),
        ("--device none", (), 0, []),
    ],
)
def test_pinned_flags_are_obeyed(
    model: ModelFacts, words: str, devices: tuple[str, ...], n_gpu_layers: int, counts: list[int]
) -> None:
    request = flags.parse(["-c", "2048", *words.split()]).request
    outcome = plan(model, request, machine(100 * MIB, 200 * MIB))
    assert isinstance(outcome, Plan)
    assert outcome.placement.devices == devices
    assert outcome.placement.n_gpu_layers == n_gpu_layers
    slots = [*outcome.placement.layer_devices, outcome.placement.output_device]
    assert [slots.count(index) for index in range(len(devices))] == counts


def test_a_main_gpu_that_is_not_there_is_wrong_usage(model: ModelFacts) -> None:
    request = PlanRequest(split_mode="none", main_gpu=5)
    with pytest.raises(InvalidRequest, match=r"--main-gpu 5: there are 2 devices, counted from 0"):
        plan(model, request, machine(200 * MIB, 200 * MIB))


@pytest.mark.parametrize("main_gpu, devices", [(None, ("RPC0",)), (1, ("RPC1",)), (-1, ())])
def test_the_main_gpu_is_the_only_device_that_the_runner_sees(
    model: ModelFacts, main_gpu: int | None, devices: tuple[str, ...]
) -> None:
    request = PlanRequest(n_ctx=4096, split_mode="none", main_gpu=main_gpu)
    found = plan(model, request, machine(512 * MIB, 512 * MIB))
    assert isinstance(found, Plan)
    assert found.placement.devices == devices
    assert "-mg" not in found.launch.argv


def test_a_device_that_an_override_names_is_used_and_charged(model: ModelFacts) -> None:
    """The runner must see it, and what goes there is held against its budget, even where it gets no layer."""
    request = flags.parse(["-c", "2048", "-ot", "blk.0.=RPC0"]).request
    outcome = plan(model, request, machine(50 * MIB, 200 * MIB))
    assert isinstance(outcome, Plan)
    assert "RPC0" in outcome.placement.devices
    assert (outcome.usages[0].model.bytes or 0) > 0


def test_the_drafts_devices_are_shown_to_the_runner(model: ModelFacts) -> None:
    request = PlanRequest(n_ctx=2048, model_draft="draft.gguf", devices=("RPC0",), devices_draft=("rpc1",))
    outcome = plan(model, request, machine(50 * MIB, 200 * MIB))
    assert isinstance(outcome, Plan)
    argv = outcome.launch.argv
    assert argv[argv.index("-devd") + 1] == "RPC1"


def test_every_knob_that_was_not_pinned_has_a_value_and_a_reason(model: ModelFacts) -> None:
    """The steps are named once each, and the request that is launched has no open choice about placement."""
    outcome = plan(model, PlanRequest(), machine(100 * MIB, 100 * MIB), Policy(spread=True))
    assert isinstance(outcome, Plan)
    steps = [decision.step for decision in outcome.decisions]
    assert len(steps) == len(set(steps))
    assert {"context", "devices", "layers on devices", "layers per device", "flash attention", "slots"} <= set(steps)
    open_knobs = {name for name, value in flags.as_json(outcome.request).items() if value is None}
    optional = {"main_gpu", "pooling", "mmproj", "mmproj_offload", "lora", "rpc", "override_kv", "override_tensor"}
    drafts = {name for name in open_knobs if "draft" in name or name.startswith("spec")}
    host_weights = {"cpu_moe", "n_cpu_moe", "n_cpu_ffn"}
    roles = {"embeddings", "reranking", "n_ctx_per_slot"}
    assert open_knobs <= optional | drafts | host_weights | roles


def test_a_refusal_names_the_devices_and_what_would_help(model: ModelFacts) -> None:
    outcome = plan(model, PlanRequest(n_ctx=8192, n_gpu_layers="all"), machine(30 * MIB))
    assert isinstance(outcome, NoFit)
    assert [cause.device for cause in outcome.causes] == ["RPC0"]
    assert outcome.causes[0].needed_bytes > outcome.causes[0].available_bytes == 30 * MIB
    assert {near.change: near.fits for near in outcome.nearest}["-ngl auto"]


def test_a_change_that_is_said_to_fit_does_fit(model: ModelFacts) -> None:
    """The nearest context is one that really fits, with its number."""
    request = PlanRequest(n_ctx=32_768, n_gpu_layers="all")
    outcome = plan(model, request, machine(64 * MIB))
    assert isinstance(outcome, NoFit)
    context = next(near for near in outcome.nearest if near.change.startswith("--ctx-size"))
    assert context.fits
    shorter = replace(request, n_ctx=int(context.change.split()[1]))
    assert isinstance(plan(model, shorter, machine(64 * MIB)), Plan)


def needed_bytes(model: ModelFacts, request: PlanRequest) -> int:
    """Return what the only device needs for all layers."""
    outcome = plan(model, request, machine(1024 * MIB))
    assert isinstance(outcome, Plan)
    return outcome.usages[0].known_bytes


def test_the_micro_batch_gives_way_before_a_model_is_refused(model: ModelFacts) -> None:
    """Where nobody pinned it; the larger one of those that fit is taken, and it is said."""
    request = PlanRequest(n_ctx=8192, n_gpu_layers="all")
    where = machine(needed_bytes(model, replace(request, n_ubatch=512)) - 1)
    outcome = plan(model, request, where)
    assert isinstance(outcome, Plan)
    assert outcome.request.n_ubatch == 256
    assert (outcome.decisions[-1].step, outcome.decisions[-1].chosen) == ("micro-batch", "256")
    assert isinstance(plan(model, replace(request, n_ubatch=512), where), NoFit)


def test_a_refusal_says_how_many_layers_would_have_to_leave_parts_to_the_cpu(model: ModelFacts) -> None:
    """It is the least number that fits."""
    request = PlanRequest(n_ctx=8192, n_gpu_layers="all", n_ubatch=512)
    where = machine(needed_bytes(model, request) - 2 * MIB)
    outcome = plan(model, request, where)
    assert isinstance(outcome, NoFit)
    change, fits = next((near.change, near.fits) for near in outcome.nearest if near.change.startswith("-ncffn"))
    assert fits
    count = int(change.split()[1])
    assert isinstance(plan(model, replace(request, n_cpu_ffn=count), where), Plan)
    assert count == 1 or isinstance(plan(model, replace(request, n_cpu_ffn=count - 1), where), NoFit)


@pytest.mark.parametrize("held, fits", [(8 * MIB, False), (40 * MIB, True)])
def test_a_refusal_names_the_processes_whose_memory_would_be_enough(model: ModelFacts, held: int, fits: bool) -> None:  # noqa: FBT001 - an expected value
    request = PlanRequest(n_ctx=8192, n_gpu_layers="all", n_ubatch=512)
    small = machine(needed_bytes(model, request) - 30 * MIB)
    busy = replace(small.devices[0], processes=(ProcessUse(77, "blender", held),))
    outcome = plan(model, request, replace(small, devices=(busy,)))
    assert isinstance(outcome, NoFit)
    found = {near.change: near.fits for near in outcome.nearest if "blender" in near.change}
    assert found == {f"RPC0 without blender (77), {held // MIB}.0 MiB": fits}


def test_a_host_without_memory_for_the_cache_is_a_refusal(model: ModelFacts) -> None:
    """Mapped weights are page cache, but the context, the buffers and a prompt cache asked for must really be there."""
    outcome = plan(model, PlanRequest(n_ctx=2048, cache_ram_mib=512), machine(host_bytes=64 * MIB))
    assert isinstance(outcome, NoFit)
    assert [cause.device for cause in outcome.causes] == ["Host"]
    assert {near.change: near.fits for near in outcome.nearest}["--cache-ram 0"]


def test_a_prompt_cache_that_nobody_asked_for_refuses_no_model(model: ModelFacts) -> None:
    outcome = plan(model, PlanRequest(n_ctx=2048), machine(host_bytes=64 * MIB))
    assert isinstance(outcome, Plan)
    assert outcome.request.cache_ram_mib == 0
    assert outcome.decisions[-1].because == "the host has no memory left for one"


def _short_of_host_memory(outcome: PlanOutcome) -> bool:
    assert isinstance(outcome, Plan)
    return any("read again and again" in warning for warning in outcome.warnings)


def test_weights_of_a_device_between_those_of_the_host_need_none_of_its_memory(model: ModelFacts) -> None:
    """They are in the mapped range, but nobody reads them there: the host's own weights have to fit, not the range."""
    request = PlanRequest(n_ctx=2048, n_gpu_layers=0, override_tensor=((r"blk\.[1-6]\.", "RPC0"),), cache_ram_mib=0)
    outcome = plan(model, request, machine(64 * MIB))
    assert isinstance(outcome, Plan)
    host = outcome.usages[-1]
    assert host.planned_bytes is not None
    assert host.needed_bytes is not None
    assert host.planned_bytes - host.needed_bytes > 4 * MIB
    assert host.headroom_bytes == HOST_BYTES - host.needed_bytes
    assert not _short_of_host_memory(plan(model, request, machine(64 * MIB, host_bytes=host.needed_bytes)))
    assert _short_of_host_memory(plan(model, request, machine(64 * MIB, host_bytes=host.needed_bytes - 1)))


@pytest.mark.parametrize("mib", [54, 96, 144])
def test_an_open_context_leaves_a_reserve_of_the_hosts_memory(model: ModelFacts, mib: int) -> None:
    """The prompt cache counts as full; one step more of the context would begin on what is to stay free."""
    request = PlanRequest(cache_ram_mib=4)
    outcome = plan(model, request, machine(host_bytes=mib * MIB))
    assert isinstance(outcome, Plan)
    n_ctx = outcome.n_ctx_per_slot or 0
    assert 4096 < n_ctx < 32_768
    assert (outcome.usages[-1].headroom_bytes or 0) >= mib * MIB // 8
    assert not [warning for warning in outcome.warnings if FILLED in warning]
    longer = plan(model, replace(request, n_ctx=n_ctx + STEP), machine(host_bytes=mib * MIB))
    assert isinstance(longer, Plan)
    (warning,) = [warning for warning in longer.warnings if FILLED in warning]
    assert warning.endswith("a shorter --ctx-size or a smaller --cache-ram leaves more")


@pytest.mark.parametrize("mib", [54, 96, 144])
def test_caches_that_stay_on_the_host_are_as_long_as_it_has_room(model: ModelFacts, mib: int) -> None:
    request = PlanRequest(cache_ram_mib=4, kv_offload=False)
    outcome = plan(model, request, machine(64 * MIB, host_bytes=mib * MIB))
    assert isinstance(outcome, Plan)
    assert outcome.placement.kind is PlacementKind.GPU
    n_ctx = outcome.n_ctx_per_slot or 0
    assert 4096 < n_ctx <= 32_768
    assert (outcome.usages[-1].headroom_bytes or 0) >= mib * MIB // 8
    if n_ctx < 32_768:
        longer = plan(model, replace(request, n_ctx=n_ctx + STEP), machine(64 * MIB, host_bytes=mib * MIB))
        assert any(FILLED in warning for warning in longer.warnings)


def test_a_pinned_context_beyond_the_trained_one_is_told_with_both_lengths(model: ModelFacts) -> None:
    outcome = plan(model, PlanRequest(n_ctx=65_536), machine())
    assert isinstance(outcome, Plan)
    assert outcome.n_ctx_per_slot == 32_768
    assert outcome.warnings[-1] == "a slot uses 32,768 tokens of its 65,536: the model was trained for no more"
    refused = plan(model, PlanRequest(n_ctx=65_536, n_gpu_layers="all"), machine(16 * MIB))
    assert isinstance(refused, NoFit)
    assert refused.warnings[-1] == outcome.warnings[-1]


def test_texts_that_a_micro_batch_cuts_short_are_told_of(embedding_model: Path) -> None:
    facts = read_model(os.fspath(embedding_model))
    outcome = plan(facts, PlanRequest(role=facts.role, n_ctx=512, n_ubatch=128), machine())
    assert isinstance(outcome, Plan)
    assert outcome.n_ctx_per_slot == 128
    assert outcome.warnings[-1] == "a text has 128 tokens at most, not 512: it has to pass in one micro-batch"


def test_a_prompt_cache_that_nobody_asked_for_keeps_no_weights_out_of_memory(model: ModelFacts) -> None:
    """One that was asked for does, and the plan says so; without one there would still be room for the weights."""
    roomy = plan(model, PlanRequest(n_ctx=4096, cache_ram_mib=0), machine())
    assert isinstance(roomy, Plan)
    tight, policy = machine(host_bytes=(roomy.usages[-1].needed_bytes or 0) + 4 * MIB), Policy(cache_ram_mib=8)
    outcome = plan(model, PlanRequest(n_ctx=4096), tight, policy)
    assert isinstance(outcome, Plan)
    assert outcome.request.cache_ram_mib == 0
    assert outcome.decisions[-1].because == "the host has no memory left for one"
    assert not _short_of_host_memory(outcome)
    asked_for = plan(model, PlanRequest(n_ctx=4096, cache_ram_mib=8), tight, policy)
    assert isinstance(asked_for, Plan)
    assert asked_for.request.cache_ram_mib == 8
    assert _short_of_host_memory(asked_for)


def test_what_llama_cpp_rejects_is_refused_with_its_reason(model: ModelFacts) -> None:
    outcome = plan(model, PlanRequest(cache_type_v="q8_0", flash_attn="off"), machine(64 * MIB))
    assert isinstance(outcome, Refused)
    assert "flash attention" in outcome.reason


def test_an_unknown_device_is_wrong_usage(model: ModelFacts) -> None:
    with pytest.raises(InvalidRequest, match="--device CUDA7: no such device; there is RPC0"):
        plan(model, PlanRequest(devices=("CUDA7",)), machine(64 * MIB))


def test_the_same_question_has_the_same_answer(model: ModelFacts) -> None:
    where = machine(20 * MIB, 30 * MIB)
    assert plan(model, SMALL, where) == plan(model, SMALL, where)


@pytest.mark.parametrize("n_ctx", [None, 4096])
def test_no_device_is_taken_for_an_output_without_tensors(embedding_model: Path, n_ctx: int | None) -> None:
    """It would hold nothing, be no faster, and nobody else could have a worker meanwhile."""
    facts = read_model(os.fspath(embedding_model))
    outcome = plan(facts, PlanRequest(role=facts.role, n_ctx=n_ctx), machine(MIB))
    assert isinstance(outcome, Plan)
    assert (outcome.placement.devices, outcome.placement.n_gpu_layers) == ((), 0)
    pinned = plan(facts, PlanRequest(role=facts.role, n_ctx=n_ctx, n_gpu_layers=1), machine(MIB))
    assert isinstance(pinned, Plan)
    assert pinned.placement.devices == ("RPC0",)


def test_texts_to_embed_pass_in_one_piece(embedding_model: Path) -> None:
    """The micro-batch is as long as the context, since a text cannot be split."""
    facts = read_model(os.fspath(embedding_model))
    outcome = plan(facts, PlanRequest(role=facts.role), machine(1024 * MIB))
    assert isinstance(outcome, Plan)
    assert knobs.needs_whole_text(facts, outcome.request)
    assert outcome.request.embeddings
    assert (outcome.request.n_ubatch or 0) >= (facts.hparams.n_ctx_train or 0) > 0
