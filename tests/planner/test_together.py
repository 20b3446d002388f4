"""Several models on one machine: whether they fit together does not depend on who is named first."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import companion_models
import pytest

from planner import companions
from planner.build import PINNED_BUILD
from planner.model import read_model
from planner.search.placement import search
from planner.together import Together, Wanted, together
from planner.together_text import together_to_json, together_to_text
from planner.types import (
    HOST,
    HOST_POOL,
    Device,
    DeviceKind,
    DeviceName,
    Machine,
    NoFit,
    PerDevice,
    PlacementKind,
    Plan,
    PlanOutcome,
    PlanRequest,
    Policy,
    PoolId,
)
from planner.units import GIB, MIB

NO_CACHE = Policy(cache_ram_mib=0)


def machine(*sizes: int, host: int = GIB) -> Machine:
    devices = tuple(
        Device(DeviceName(f"RPC{i}"), DeviceKind.RPC, size, size, PoolId(f"p{i}"), endpoint=f"h:{i}")
        for i, size in enumerate(sizes)
    )
    return Machine(devices, Device(HOST, DeviceKind.HOST, host, host, HOST_POOL))


def ask(paths: list[Path], where: Machine, request: PlanRequest, policy: Policy = NO_CACHE) -> Together:
    def one(wanted: Wanted, policy: Policy, *, advises: bool = False) -> PlanOutcome:
        return search(wanted.model, wanted.request, where, policy, PINNED_BUILD, advises=advises)

    wanted = [Wanted(read_model(str(path)), request) for path in paths]
    return together(wanted, policy, one, partial(one, advises=True))


def total(result: Together, name: str) -> int:
    plans = [outcome for outcome in result.outcomes if isinstance(outcome, Plan)]
    return sum(usage.known_bytes for plan in plans for usage in plan.usages if usage.name == name)


WHOLE = PlanRequest(n_ctx=1024, n_ubatch=512, n_gpu_layers="all")  # nothing is left that could give way


@pytest.fixture
def models(chat_model: Path, endless_model: Path) -> list[Path]:
    return [chat_model, endless_model]


@pytest.mark.parametrize("mib", [2, 12, 22])
def test_the_order_of_the_models_does_not_matter(models: list[Path], embedding_model: Path, mib: int) -> None:
    three = [*models, embedding_model]
    orders = (tuple(three), tuple(reversed(three)), (*three[1:], three[0]))
    answers = {order: ask(list(order), machine(mib * MIB, 20 * MIB), WHOLE) for order in orders}
    assert len({answer.fits for answer in answers.values()}) == 1
    by_model = [
        {outcome.model.path: getattr(outcome, "placement", None) for outcome in answer.outcomes}
        for answer in answers.values()
    ]
    assert all(each == by_model[0] for each in by_model)
    assert all(
        [outcome.model.path for outcome in answer.outcomes] == [str(path) for path in order]
        for order, answer in answers.items()
    )


def test_what_fits_alone_need_not_fit_together(models: list[Path]) -> None:
    alone = [ask([path], machine(256 * MIB), WHOLE) for path in models]
    assert all(each.fits for each in alone)
    needed = [total(each, "RPC0") for each in alone]
    assert ask(models, machine(sum(needed)), WHOLE).fits
    tight = ask(models, machine(sum(needed) - 1), WHOLE)
    assert not tight.fits
    assert sum(isinstance(outcome, Plan) for outcome in tight.outcomes) == 1


def test_what_does_not_fit_beside_the_others_says_what_would_have_to_change(models: list[Path]) -> None:
    needed = sum(total(ask([path], machine(256 * MIB), WHOLE), "RPC0") for path in models)
    refused = [each for each in ask(models, machine(needed - 1), WHOLE).outcomes if isinstance(each, NoFit)]
    assert len(refused) == 1
    assert any(near.fits for near in refused[0].nearest)


def test_nothing_is_promised_twice(models: list[Path]) -> None:
    where = machine(24 * MIB, 12 * MIB)
    result = ask(models, where, WHOLE)
    assert result.fits
    for device in where.devices:
        assert device.free_bytes is not None
        assert result.left_bytes[device.name] == device.free_bytes - total(result, device.name) >= 0


def test_what_all_of_them_hold_counts_against_the_cap(models: list[Path]) -> None:
    needed = total(ask(models, machine(256 * MIB), WHOLE), "RPC0")
    for cap, fits in ((needed, True), (needed - 1, False)):
        policy = Policy(cache_ram_mib=0, max_vram=PerDevice(cap))
        assert ask(models, machine(256 * MIB), WHOLE, policy).fits is fits


def test_slots_that_crowd_each_other_out_become_one_each(endless_model: Path) -> None:
    """Alone, either has four conversations; together both stay on the device with fewer."""
    least = total(ask([endless_model], machine(GIB), PlanRequest(n_ctx_per_slot=8192)), "RPC0")
    request = PlanRequest(n_ctx_per_slot=8192, n_parallel="auto")
    for mib, slots in ((2 * least // MIB + 8, [1, 1]), (1024, [4, 4])):
        result = ask([endless_model, endless_model], machine(mib * MIB), request)
        plans = [outcome for outcome in result.outcomes if isinstance(outcome, Plan)]
        assert [plan.request.n_parallel for plan in plans] == slots
        assert all(plan.placement.kind is PlacementKind.GPU for plan in plans)


def test_contexts_that_crowd_each_other_out_become_shorter(endless_model: Path) -> None:
    """Alone, either fills the whole device with its context; together both stay on it with less."""
    alone, least = (
        total(ask([endless_model], machine(GIB), request), "RPC0")
        for request in (PlanRequest(), PlanRequest(n_ctx_per_slot=4096))
    )
    result = ask([endless_model, endless_model], machine((2 * least + alone) // 2), PlanRequest())
    plans = [outcome for outcome in result.outcomes if isinstance(outcome, Plan)]
    assert [plan.placement.kind for plan in plans] == [PlacementKind.GPU] * 2
    assert all(4096 < (plan.n_ctx_per_slot or 0) < 32_768 for plan in plans)


def test_contexts_become_no_shorter_than_a_large_image_and_words(endless_model: Path, tmp_path: Path) -> None:
    """The model that sees keeps as many tokens as it would alone; only the other's are fewer."""
    companion_models.write_projector(tmp_path / "mmproj.gguf", kind="qwen2vl_merger")
    model = read_model(str(endless_model))
    eyes = PlanRequest(mmproj=str(tmp_path / "mmproj.gguf"), n_ubatch=64)
    seeing, blind = Wanted(companions.attach(model, eyes), eyes), Wanted(model, PlanRequest(n_ubatch=64))

    def taken(wanted: Wanted, n_ctx: int) -> int:
        request = replace(wanted.request, n_ctx=n_ctx, n_gpu_layers="all")
        plan = search(wanted.model, request, machine(GIB), NO_CACHE, PINNED_BUILD)
        assert isinstance(plan, Plan)
        return plan.usages[0].claimed_bytes

    where = machine(taken(seeing, 6144) + taken(blind, 5120))
    result = together(
        [seeing, blind],
        NO_CACHE,
        lambda each, policy: search(each.model, each.request, where, policy, PINNED_BUILD, advises=False),
    )
    plans = [outcome for outcome in result.outcomes if isinstance(outcome, Plan)]
    assert [plan.placement.kind for plan in plans] == [PlacementKind.GPU] * 2
    n_ctx = [plan.n_ctx_per_slot or 0 for plan in plans]
    assert n_ctx[0] == 6144
    assert 4096 <= n_ctx[1] <= 5120


def test_the_text_names_every_model_and_device_within_the_width(models: list[Path]) -> None:
    result = ask(models, machine(24 * MIB, 12 * MIB), WHOLE)
    text = together_to_text(result, 60)
    assert max(map(len, text.splitlines())) <= 60
    assert text.startswith("They fit together: all 2 models")
    assert all(path.stem in text for path in models)
    assert all(name in text for name in ("RPC0", "RPC1", "Host"))


def test_the_json_holds_each_model_s_own_document(models: list[Path]) -> None:
    document = together_to_json(ask(models, machine(2 * MIB), WHOLE))
    assert (document["schema"], document["fits"]) == (1, False)
    assert [plan["model"]["path"] for plan in document["plans"]] == [str(path) for path in models]
    assert {plan["fits"] for plan in document["plans"]} <= {True, False}
