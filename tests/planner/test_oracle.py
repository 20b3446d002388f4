"""The oracle says what llama.cpp reserves, and nothing where it cannot be asked. It leaves no process behind."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from gpu import llama
from planner import layers, oracle
from planner.accounting import MemoryLedger, account
from planner.build import PINNED_BUILD
from planner.context import context_params
from planner.model import ModelFacts, read_model
from planner.search.placement import search
from planner.types import (
    HOST,
    HOST_POOL,
    Device,
    DeviceKind,
    DeviceName,
    LlamaBuild,
    Machine,
    Placement,
    Plan,
    PlanRequest,
    Policy,
    PoolId,
    Source,
)

pytestmark = pytest.mark.llama

GIB = 1024**3
HOST_DEVICE = Device(HOST, DeviceKind.HOST, GIB * 16, GIB * 16, HOST_POOL)


def machine(count: int) -> Machine:
    devices = tuple(Device(DeviceName(f"RPC{i}"), DeviceKind.RPC, GIB, GIB, PoolId(f"p{i}")) for i in range(count))
    return Machine(devices, HOST_DEVICE, what_if=True)


def placement(model: ModelFacts, devices: tuple[str, ...], n_gpu_layers: int, shares: tuple[float, ...]) -> Placement:
    where, output = layers.layer_devices(model.hparams.n_layer_all, n_gpu_layers, shares)
    return Placement(devices, where, output, n_gpu_layers, shares)


@pytest.fixture
def build(llama_tools: Path, free_environment: dict[str, str]) -> LlamaBuild:
    """Return the built llama.cpp."""
    return llama.find(free_environment, configured=llama_tools / "llama-server", n_gpus=0).build


@pytest.mark.parametrize(
    "devices, n_gpu_layers, shares",
    [((), 0, ()), (("RPC0",), 9, (9.0,)), (("RPC0", "RPC1"), 6, (2.0, 4.0)), (("RPC0", "RPC1"), 9, (4.0, 5.0))],
    ids=["host", "one device", "two devices and host", "two devices, pipelined"],
)
def test_the_oracle_agrees_with_the_formulas(
    build: LlamaBuild,
    endless_model: Path,
    devices: tuple[str, ...],
    n_gpu_layers: int,
    shares: tuple[float, ...],
) -> None:
    """Where both can tell, every device's bytes are the same: those of a real load, pins of norms included."""
    model, where = read_model(os.fspath(endless_model)), machine(2)
    candidate = placement(model, devices, n_gpu_layers, shares)
    params = context_params(model, PlanRequest(n_ctx=2048, flash_attn="on"))
    ask = oracle.ask(build)
    assert ask is not None
    before = set(psutil.Process().children(recursive=True))
    answer = ask(model, params, candidate, where)
    assert answer is not None
    ours = account(model, params, candidate, where, build)
    for mine, theirs in zip(ours.devices, answer.devices, strict=True):
        assert [mine.model.bytes, mine.context.bytes, mine.compute.bytes] == [
            theirs.model.bytes,
            theirs.context.bytes,
            theirs.compute.bytes,
        ]
        assert theirs.model.source is Source.ORACLE
    assert ours.host.context.bytes == answer.host.context.bytes
    assert ours.host.compute.bytes == answer.host.compute.bytes
    assert set(psutil.Process().children(recursive=True)) == before


def test_an_architecture_without_rule_is_planned_by_asking(build: LlamaBuild, embedding_model: Path) -> None:
    """No figure is unknown then, and the compute buffers say where they are from."""
    model = read_model(os.fspath(embedding_model))
    request = PlanRequest(role=model.role, flash_attn="on")
    outcome = search(model, request, machine(1), Policy(), build, oracle.ask(build))
    assert isinstance(outcome, Plan)
    assert not outcome.fit_by_llama
    assert all(usage.planned_bytes is not None for usage in outcome.usages)


def test_a_model_may_be_named_from_the_folder_one_is_in(build: LlamaBuild, chat_model: Path) -> None:
    with contextlib.chdir(chat_model.parent):
        model = read_model(chat_model.name)
        ask = oracle.ask(build)
        assert ask is not None
        params = context_params(model, PlanRequest(n_ctx=2048, flash_attn="on"))
        assert ask(model, params, placement(model, (), 0, ()), machine(0)) is not None


def test_a_file_that_llama_cpp_cannot_load_has_no_answer(build: LlamaBuild, chat_model: Path, tmp_path: Path) -> None:
    """The library ends its process over it; ours goes on."""
    model = read_model(os.fspath(chat_model))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF")
    ask = oracle.ask(build)
    assert ask is not None
    params = context_params(model, PlanRequest(n_ctx=2048))
    before = set(psutil.Process().children(recursive=True))
    answer = ask(replace(model, paths=(str(broken),)), params, placement(model, (), 0, ()), machine(0))
    assert answer is None
    assert set(psutil.Process().children(recursive=True)) == before


def test_only_the_pinned_build_is_asked(build: LlamaBuild) -> None:
    """The structures that are handed over are those of one commit."""
    assert oracle.ask(PINNED_BUILD) is None
    assert oracle.ask(replace(build, commit="badc0de")) is None
    assert oracle.ask(replace(build, library_path="/nowhere/libllama.so")) is None


def test_what_is_estimated_is_asked_for_once_the_search_is_over(build: LlamaBuild, endless_model: Path) -> None:
    """For another build the formulas are only bounds; what is planned then are that build's own figures."""
    model = read_model(os.fspath(endless_model))
    other = replace(build, commit="badc0de")
    asked: list[Placement] = []
    ask = oracle.ask(other, any_build=True)
    assert ask is not None

    def listened(*question: Any) -> MemoryLedger | None:
        asked.append(question[2])
        return ask(*question)

    estimated = search(model, PlanRequest(), machine(1), Policy(), other)
    told = search(model, PlanRequest(), machine(1), Policy(), other, listened)
    assert isinstance(estimated, Plan)
    assert isinstance(told, Plan)
    assert asked == [told.placement]
    for bound, usage in zip(estimated.usages, told.usages, strict=True):
        assert bound.compute.source is Source.ESTIMATED
        assert usage.compute.source is Source.ORACLE
        assert (usage.planned_bytes or 0) <= (bound.planned_bytes or 0)
