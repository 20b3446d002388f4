"""One model, planned by the real planner beside the runners that are there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import companion_models
import pytest
import tiny_models

from config.model_settings import ExternalRunner
from planner import companions
from planner.model import read_model
from planner.search import placement
from planner.types import (
    HOST,
    HOST_POOL,
    Device,
    DeviceKind,
    DeviceName,
    LlamaBuild,
    Machine,
    MemoryPool,
    PlanRequest,
    Policy,
    PoolId,
)
from planner.units import MIB
from supervisor.core.types import (
    Cap,
    DoesNotFit,
    LoadPlan,
    MakeRoom,
    ModelId,
    Neighbour,
    PlanOutcome,
    Standing,
)
from supervisor.planning.messages import MakePlan, Situation
from supervisor.planning.placing import Placing, as_told, by_search

CUDA0 = frozenset({"CUDA0"})
REQUEST = PlanRequest(n_ctx_per_slot=512, cache_ram_mib=0)


def machine(**free_mib: int) -> Machine:
    """Return a machine of these cards, each with so much free of 1000 MiB, and a host with all the memory it needs."""
    devices = tuple(
        Device(
            DeviceName(name),
            DeviceKind.RPC if name.startswith("RPC") else DeviceKind.CUDA,
            1000 * MIB,
            free * MIB,
            PoolId(name),
            endpoint=f"10.0.0.1:{index}" if name.startswith("RPC") else None,
            overhead_bytes=0,
        )
        for index, (name, free) in enumerate(free_mib.items())
    )
    host = Device(HOST, DeviceKind.HOST, 10_000 * MIB, 8_000 * MIB, HOST_POOL)
    pools = (MemoryPool(HOST_POOL, host.total_bytes, host.free_bytes),)
    return Machine(devices, host, (*pools, *(MemoryPool(one.pool, 1000 * MIB, one.free_bytes) for one in devices)))


def neighbour(name: str, held_mib: Mapping[str, int], *, loading: bool = False) -> Neighbour:
    standing = Standing.BUSY if loading else Standing.IDLE
    held = {device: size * MIB for device, size in held_mib.items()}
    return Neighbour(ModelId(name), standing, held, 1.0, loading=loading)


@pytest.fixture
def question(chat_model: Path) -> MakePlan:
    situation = Situation(None, {}, {}, {})
    return MakePlan(ModelId("tiny-chat"), str(chat_model), REQUEST, situation, (), 0, (), {}, {})


def outcome(question: MakePlan, there: Machine, *neighbours: Neighbour, request: PlanRequest = REQUEST) -> PlanOutcome:
    facts, build = companions.attach(read_model(question.path), request), LlamaBuild("/llama-server", None, None)
    open_slots = request.n_parallel == "auto"
    place = by_search(lambda at, policy: placement.search(facts, request, at, policy, build), open_slots=open_slots)
    return Placing(replace(question, neighbours=neighbours), there, Policy(cache_ram_mib=0), place).outcome()


def devices_of(found: PlanOutcome) -> set[str]:
    assert isinstance(found, LoadPlan), found
    return {use.device for use in found.uses} - {HOST}


def test_a_model_is_placed_on_another_card_than_one_on_which_something_loads(question: MakePlan) -> None:
    """Even where that has more memory free: no driver tells how much of the promise it shows already."""
    there = machine(CUDA0=90, CUDA1=50)
    assert devices_of(outcome(question, there)) == {"CUDA0"}
    assert devices_of(outcome(question, there, neighbour("a", {"CUDA0": 1}))) == {"CUDA0"}
    assert devices_of(outcome(question, there, neighbour("a", {"CUDA0": 1}, loading=True))) == {"CUDA1"}


def test_where_only_that_card_will_do_what_was_promised_there_is_taken_off(question: MakePlan) -> None:
    there = machine(CUDA0=90)
    assert devices_of(outcome(question, there, neighbour("a", {"CUDA0": 10}, loading=True))) == {"CUDA0"}
    assert isinstance(outcome(question, there, neighbour("a", {"CUDA0": 89}, loading=True)), MakeRoom)


def test_an_idle_runner_goes_for_a_model_that_would_else_stay_on_the_host(question: MakePlan) -> None:
    found = outcome(question, machine(CUDA0=1), neighbour("a", {"CUDA0": 90}), neighbour("b", {"CUDA0": 1}))
    assert isinstance(found, MakeRoom)
    assert found.victims == {"a"}


def test_every_slot_s_context_counts_before_anything_is_started(question: MakePlan, tmp_path: Path) -> None:
    """One conversation of 32,768 tokens fits beside the other model, two do not."""
    model = tmp_path / "long.gguf"
    tiny_models.write_chat_model(model, n_ctx_train=1 << 17)
    long, there, other = replace(question, path=str(model)), machine(CUDA0=348), neighbour("a", {"CUDA0": 200})
    one = replace(REQUEST, n_ctx_per_slot=32_768)
    assert devices_of(outcome(long, there, other, request=one)) == {"CUDA0"}
    assert isinstance(outcome(long, there, other, request=replace(one, n_parallel=2)), MakeRoom)


def test_a_few_layers_that_were_asked_for_evict_nobody(question: MakePlan) -> None:
    other, few = neighbour("a", {"CUDA0": 200}), replace(REQUEST, n_gpu_layers=0)
    assert isinstance(outcome(question, machine(CUDA0=1), other), MakeRoom)
    assert isinstance(outcome(question, machine(CUDA0=1), other, request=few), LoadPlan)


def test_an_idle_runner_goes_for_a_projector_that_would_else_encode_on_the_cpu(
    question: MakePlan, tmp_path: Path
) -> None:
    """Where it would not help, or the operator wants it there, nobody goes: all layers are on the card."""
    eyes = tmp_path / "mmproj.gguf"
    companion_models.write_projector(eyes, kind="qwen2vl_merger", n_embd_text=64)
    seeing, other = replace(REQUEST, mmproj=str(eyes)), neighbour("a", {"CUDA0": 200})
    found = outcome(question, machine(CUDA0=9), other, request=seeing)
    assert isinstance(found, MakeRoom), found
    assert found.victims == {"a"}
    kept = outcome(question, machine(CUDA0=9), replace(other, standing=Standing.FIXED), request=seeing)
    assert isinstance(kept, LoadPlan)
    assert "--no-mmproj-offload" in kept.launch.argv
    assert devices_of(kept) == {"CUDA0"}
    wanted = outcome(question, machine(CUDA0=9), other, request=replace(seeing, mmproj_offload=False))
    assert devices_of(wanted) == {"CUDA0"}


def in_the_open(question: MakePlan, model: Path, there: Machine, *neighbours: Neighbour) -> PlanOutcome:
    """Return the outcome for a model of a long context, which is left to the planner."""
    facts, build = read_model(str(model)), LlamaBuild("/llama-server", None, None)
    asked = PlanRequest(cache_ram_mib=0)
    place = by_search(lambda at, policy: placement.search(facts, asked, at, policy, build), open_context=True)
    return Placing(replace(question, neighbours=neighbours), there, Policy(cache_ram_mib=0), place).outcome()


def test_an_idle_runner_goes_for_a_context_that_would_else_be_short_and_only_one(
    question: MakePlan, tmp_path: Path
) -> None:
    """Alone the model would take all of the card for its context; it needs no more than the larger one has."""
    model = tmp_path / "long.gguf"
    tiny_models.write_chat_model(model, n_ctx_train=1 << 20)
    small, large = neighbour("small", {"CUDA0": 20}), neighbour("large", {"CUDA0": 200})
    found = in_the_open(question, model, machine(CUDA0=60), small, large)
    assert isinstance(found, MakeRoom), found
    assert found.victims == {"large"}


def test_nobody_waits_for_a_busy_runner_for_the_sake_of_a_longer_context(question: MakePlan, tmp_path: Path) -> None:
    model = tmp_path / "long.gguf"
    tiny_models.write_chat_model(model, n_ctx_train=1 << 20)
    busy = replace(neighbour("a", {"CUDA0": 200}), standing=Standing.BUSY)
    assert devices_of(in_the_open(question, model, machine(CUDA0=60), busy)) == {"CUDA0"}


def test_nobody_goes_for_a_context_that_is_long_enough_or_cannot_be_longer(question: MakePlan, tmp_path: Path) -> None:
    long, short = tmp_path / "long.gguf", tmp_path / "short.gguf"
    tiny_models.write_chat_model(long, n_ctx_train=1 << 20)
    tiny_models.write_chat_model(short, n_ctx_train=2048)
    assert devices_of(in_the_open(question, long, machine(CUDA0=250), neighbour("a", {"CUDA0": 200}))) == {"CUDA0"}
    assert devices_of(in_the_open(question, short, machine(CUDA0=60), neighbour("a", {"CUDA0": 70}))) == {"CUDA0"}


def test_a_context_that_was_left_to_the_planner_gives_way_to_a_margin_and_one_that_was_asked_for_does_not(
    question: MakePlan, tmp_path: Path
) -> None:
    model = tmp_path / "long.gguf"
    tiny_models.write_chat_model(model, n_ctx_train=1 << 17)
    short = replace(question, path=str(model), margins={"CUDA0": 60 * MIB})
    free, less = (in_the_open(one, model, machine(CUDA0=150)) for one in (question, short))
    assert isinstance(free, LoadPlan)
    assert isinstance(less, LoadPlan)
    assert (less.serves.n_ctx or 0) < (free.serves.n_ctx or 0)
    pinned = outcome(short, machine(CUDA0=150), request=replace(REQUEST, n_ctx_per_slot=free.serves.n_ctx))
    assert isinstance(pinned, LoadPlan)
    assert pinned.serves.n_ctx == free.serves.n_ctx


@pytest.fixture
def roomy(question: MakePlan, endless_model: Path) -> MakePlan:
    """Return the question for a model that takes 78 MiB of a card for one conversation, 126 for two, 222 for four."""
    return replace(question, path=str(endless_model))


SLOTS_OPEN = PlanRequest(n_ctx_per_slot=12_288, n_parallel="auto", cache_ram_mib=0)


def slots_of(found: PlanOutcome) -> int:
    assert isinstance(found, LoadPlan), found
    return found.n_parallel


def test_nobody_goes_for_more_slots(roomy: MakePlan) -> None:
    """There are as many as there is room for beside the runners that are there."""
    other = neighbour("a", {"CUDA0": 400})
    by_room = [slots_of(outcome(roomy, machine(CUDA0=mib), other, request=SLOTS_OPEN)) for mib in (90, 180, 400)]
    assert by_room == [1, 2, 4]


def test_no_more_go_than_one_slot_needs(roomy: MakePlan) -> None:
    """Alone it would have four, for which both of them would have to go."""
    small, large = neighbour("small", {"CUDA0": 90}), replace(neighbour("large", {"CUDA0": 400}), cost_s=2.0)
    found = outcome(roomy, machine(CUDA0=1), small, large, request=SLOTS_OPEN)
    assert isinstance(found, MakeRoom), found
    assert found.victims == {"small"}


def test_slots_give_way_to_a_margin_before_anything_else_does(roomy: MakePlan) -> None:
    """As after a load that ran out of memory: the context that was asked for, and every layer, stay where they were."""
    plans = [
        outcome(replace(roomy, margins={"CUDA0": mib * MIB}), machine(CUDA0=240), request=SLOTS_OPEN)
        for mib in (0, 80, 160)
    ]
    assert [slots_of(each) for each in plans] == [4, 2, 1]
    assert len({each.quality for each in plans if isinstance(each, LoadPlan)}) == 1
    told = [each.document["decisions"][-1] for each in plans if isinstance(each, LoadPlan)]
    assert {each["step"] for each in told} == {"slots"}
    assert told[1]["because"] == "with 4 less of the model would lie on the devices that one takes"


def test_its_own_runner_does_not_count_when_it_is_loaded_again(question: MakePlan) -> None:
    assert devices_of(outcome(question, machine(CUDA0=1), neighbour("tiny-chat", {"CUDA0": 90}))) == {"CUDA0"}


def test_a_margin_and_a_cap_keep_it_from_a_card_that_has_the_memory(question: MakePlan) -> None:
    there = machine(CUDA0=90, CUDA1=50)
    assert devices_of(outcome(replace(question, margins={"CUDA0": 89 * MIB}), there)) == {"CUDA1"}
    assert devices_of(outcome(replace(question, caps=(Cap(CUDA0, MIB),)), there)) == {"CUDA1"}
    held = neighbour("pinned", {"CUDA0": 10})
    assert devices_of(outcome(replace(question, caps=(Cap(CUDA0, 11 * MIB),)), there, held)) == {"CUDA1"}


@pytest.mark.parametrize("reserved", [{"margins": {HOST: 7_999 * MIB}}, {"caps": (Cap(frozenset({HOST}), 0),)}])
def test_the_host_s_memory_is_kept_free_likewise(question: MakePlan, reserved: dict[str, Any]) -> None:
    assert isinstance(outcome(replace(question, **reserved), machine()), DoesNotFit)


@pytest.mark.parametrize("names", [("Vulkan0", HOST), ("CUDA0", "CUDA1")])
def test_a_cap_on_memory_that_devices_share_holds_for_all_of_them_together(
    question: MakePlan, names: tuple[str, str]
) -> None:
    """What others hold on any of them counts, and a program gets no more of both than of one."""
    pool = HOST_POOL if HOST in names else PoolId("card")
    kinds = {"Vulkan0": DeviceKind.VULKAN}
    there = machine()
    devices = (Device(DeviceName(one), kinds.get(one, DeviceKind.CUDA), 900 * MIB, 900 * MIB, pool) for one in names)
    there = replace(there, devices=tuple(one for one in devices if one.name != HOST))
    there = replace(there, pools=(*there.pools, MemoryPool(PoolId("card"), 900 * MIB, 900 * MIB)))
    below = replace(question, caps=(Cap(frozenset(names), 100 * MIB),))
    other = replace(neighbour("a", {names[0]: 40}), standing=Standing.FIXED)
    assert devices_of(program(below, there, {names[0]: 30, names[1]: 30}, other))
    assert isinstance(program(below, there, {names[0]: 30, names[1]: 31}, other), DoesNotFit)
    loading = replace(neighbour("a", {names[0]: 40}, loading=True), standing=Standing.FIXED)
    assert devices_of(program(below, there, {names[0]: 30, names[1]: 30}, loading))
    assert isinstance(program(below, there, {names[1]: 61}, loading), DoesNotFit)


def test_a_margin_is_left_free_of_what_a_cap_leaves(question: MakePlan) -> None:
    below = replace(question, caps=(Cap(frozenset({HOST}), 100 * MIB),), margins={HOST: 30 * MIB})
    assert devices_of(program(below, machine(), {HOST: 70})) == set()
    assert isinstance(program(below, machine(), {HOST: 71}), DoesNotFit)


def test_what_would_fit_but_for_memory_that_was_yielded_does_not_fit_for_now_only(question: MakePlan) -> None:
    yielded = replace(question, caps=(Cap(frozenset({HOST}), 0),))
    found = outcome(yielded, machine())
    assert isinstance(found, DoesNotFit), found
    assert (found.never, found.yielded) == (False, True)
    found = program(yielded, machine(), {HOST: 8_001})
    assert isinstance(found, DoesNotFit), found
    assert (found.never, found.yielded) == (True, False)


def test_what_a_runner_takes_in_use_only_is_promised_to_it_and_not_given_back_when_it_goes(question: MakePlan) -> None:
    """Its prompt cache, of which the kernel calls free what is not filled yet."""
    caching = replace(neighbour("a", {HOST: 3_000}), later_bytes={HOST: 2_000 * MIB})
    assert devices_of(program(question, machine(), {HOST: 6_000}, caching)) == set()
    assert isinstance(program(question, machine(), {HOST: 6_001}, caching), MakeRoom)
    assert isinstance(program(question, machine(), {HOST: 9_000}, caching), MakeRoom)
    assert isinstance(program(question, machine(), {HOST: 9_001}, caching), DoesNotFit)


def test_the_prompt_cache_of_a_plan_is_what_it_takes_in_use_only(question: MakePlan) -> None:
    found = outcome(question, machine(CUDA0=90), request=replace(REQUEST, cache_ram_mib=100))
    assert isinstance(found, LoadPlan)
    assert {use.device: use.later_bytes for use in found.uses} == {"CUDA0": 0, HOST: 100 * MIB}


def test_what_a_large_image_takes_of_a_card_is_taken_in_use_only_and_nobody_else_has_it(
    question: MakePlan, tmp_path: Path
) -> None:
    eyes = tmp_path / "mmproj.gguf"
    companion_models.write_projector(eyes, kind="qwen2vl_merger", n_embd_text=64)
    found = outcome(question, machine(CUDA0=1000), request=replace(REQUEST, mmproj=str(eyes)))
    assert isinstance(found, LoadPlan)
    (card, host) = found.uses
    assert (card.planned_bytes or 0) + card.later_bytes == card.taken_bytes
    assert min(card.later_bytes, host.later_bytes) > 0


def test_a_card_that_takes_one_process_is_left_to_the_runner_that_has_it_until_that_has_gone(
    question: MakePlan,
) -> None:
    both = machine(CUDA0=90, CUDA1=50)
    exclusive = replace(both, devices=tuple(replace(one, exclusive=one.name == "CUDA0") for one in both.devices))
    busy = replace(neighbour("a", {"CUDA0": 1}), standing=Standing.BUSY)
    assert devices_of(outcome(question, exclusive, busy)) == {"CUDA1"}
    alone = replace(exclusive, devices=exclusive.devices[:1])
    found = outcome(question, alone, neighbour("a", {"CUDA0": 1}))
    assert isinstance(found, MakeRoom)


def test_a_worker_that_serves_another_runner_is_left_out_until_that_has_gone(question: MakePlan) -> None:
    there = machine(RPC0=90, RPC1=50)
    busy = replace(neighbour("a", {"RPC0": 1}), standing=Standing.BUSY)
    assert devices_of(outcome(question, there, busy)) == {"RPC1"}
    found = outcome(question, machine(RPC0=90), neighbour("a", {"RPC0": 1}))
    assert isinstance(found, MakeRoom)


def test_who_has_one_device_of_a_worker_has_all_of_them(question: MakePlan) -> None:
    two = machine(RPC0=90, RPC1=50)
    one_worker = replace(two, devices=tuple(replace(one, endpoint="10.0.0.1:9") for one in two.devices))
    found = outcome(question, one_worker, neighbour("a", {"RPC0": 1}))
    assert isinstance(found, MakeRoom), found
    assert found.victims == {"a"}


@pytest.mark.parametrize("exclusive", [False, True])
def test_only_who_has_a_device_for_itself_goes_for_one_that_needs_it(question: MakePlan, *, exclusive: bool) -> None:
    """However much is left there, and however much more another would cost."""
    first, second = ("CUDA0", "CUDA1") if exclusive else ("RPC0", "RPC1")
    there = machine(**{first: 90, second: 1})
    there = replace(there, devices=tuple(replace(one, exclusive=exclusive) for one in there.devices))
    dear = replace(neighbour("dear", {first: 1}), cost_s=9.0)
    found = outcome(question, there, dear, neighbour("cheap", {second: 1}))
    assert isinstance(found, MakeRoom), found
    assert found.victims == {"dear"}


def program(question: MakePlan, there: Machine, memory_mib: Mapping[str, int], *neighbours: Neighbour) -> PlanOutcome:
    """Return the outcome for a program that is not ours and takes so much."""
    memory = {name: size * MIB for name, size in memory_mib.items()}
    told = as_told(ExternalRunner(cmd=("painter",), url="http://127.0.0.1:1", health="/", memory=memory))
    return Placing(replace(question, neighbours=neighbours), there, Policy(), told).outcome()


def test_a_program_that_is_told_to_use_a_worker_waits_for_the_runner_that_has_it(question: MakePlan) -> None:
    there = machine(RPC0=90)
    assert devices_of(program(question, there, {"RPC0": 40})) == {"RPC0"}
    found = program(question, there, {"RPC0": 40}, neighbour("a", {"RPC0": 1}))
    assert isinstance(found, MakeRoom), found


def test_a_program_gets_no_more_of_memory_that_devices_share_than_there_is(question: MakePlan) -> None:
    shared = Device(DeviceName("Vulkan0"), DeviceKind.VULKAN, 10_000 * MIB, 8_000 * MIB, HOST_POOL)
    there = replace(machine(), devices=(shared,))
    assert devices_of(program(question, there, {"Vulkan0": 5_000, HOST: 3_000})) == {"Vulkan0"}
    found = program(question, there, {"Vulkan0": 5_000, HOST: 3_001})
    assert isinstance(found, DoesNotFit), found
    assert [cause.device for cause in found.causes] == ["Vulkan0+Host"]


def test_memory_of_which_more_is_held_than_there_is_keeps_nobody_from_other_devices(question: MakePlan) -> None:
    there = machine(CUDA0=90, RPC0=5, RPC1=5)
    far = tuple(replace(one, pool=PoolId("far")) if one.endpoint else one for one in there.devices)
    there = replace(there, devices=far, pools=(*there.pools, MemoryPool(PoolId("far"), 10 * MIB, 10 * MIB)))
    assert devices_of(outcome(question, there, neighbour("a", {"RPC0": 20}))) == {"CUDA0"}


def test_what_is_taken_of_the_host_leaves_out_what_is_mapped(question: MakePlan) -> None:
    found = outcome(question, machine())
    assert isinstance(found, LoadPlan)
    (host,) = found.uses
    assert host.planned_bytes is not None
    assert 0 < host.taken_bytes < host.planned_bytes
    assert host.planned_bytes - host.taken_bytes >= Path(question.path).stat().st_size / 2
