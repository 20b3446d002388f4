"""What no rule of ours knows is never refused for it: it is bounded, asked of the oracle, or left to llama.cpp."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from test_placement import MIB, SMALL, machine, plan

from planner import flags
from planner.model import ModelFacts, read_model
from planner.types import NoFit, PerDevice, Placement, Plan, PlanRequest, Policy, Source


@pytest.fixture(scope="module")
def model(endless_model: Path) -> ModelFacts:
    """Return a model of eight layers, about 12 MiB of weights."""
    return read_model(os.fspath(endless_model))


@pytest.fixture
def unknown_graph(model: ModelFacts) -> ModelFacts:
    """Return the same model as one of an architecture whose compute graph has no rule here."""
    return replace(model, hparams=replace(model.hparams, architecture="wavtokenizer-dec"))


def test_what_nobody_can_say_is_left_to_llama_cpp_and_said_so(model: ModelFacts) -> None:
    """Without rule and without oracle llama-server still gets its plan, with its own fit and our margins."""
    request = PlanRequest(lora=("adapter.gguf",))
    outcome = plan(model, request, machine(64 * MIB), Policy(gpu_overhead=PerDevice(3 * MIB)))
    assert isinstance(outcome, Plan)
    assert outcome.fit_by_llama
    argv = outcome.launch.argv
    assert argv[argv.index("--fit") + 1] == "on"
    assert argv[argv.index("-fitt") + 1] == "3"
    assert "-ngl" not in argv
    assert outcome.usages[0].planned_bytes is None
    assert any("LoRA" in warning for warning in outcome.warnings)


@pytest.mark.parametrize(
    "words, sizes, devices",
    [
        ("-c 2048 -ngl all", (64 * MIB,), ("RPC0",)),
        ("-c 2048 -ngl 5", (64 * MIB,), ("RPC0",)),
        ("-c 2048 -ngl all -ts 1,1", (64 * MIB, 64 * MIB), ("RPC0", "RPC1")),
        ("-c 2048 -ngl 0", (64 * MIB,), ()),
        ("", (), ()),
    ],
)
def test_what_the_flags_place_is_launched_so_and_keeps_its_known_figures(
    unknown_graph: ModelFacts, words: str, sizes: tuple[int, ...], devices: tuple[str, ...]
) -> None:
    """Only the compute buffers are bounds then: weights and caches are exact, and nothing is left to llama.cpp."""
    outcome = plan(unknown_graph, flags.parse(words.split()).request, machine(*sizes))
    assert isinstance(outcome, Plan)
    assert not outcome.fit_by_llama
    assert outcome.is_known
    assert outcome.placement.devices == devices
    assert outcome.launch.argv[outcome.launch.argv.index("--fit") + 1] == "off"
    for usage in (usage for usage in outcome.usages if usage.layers):
        assert usage.model.source is usage.context.source is Source.EXACT
        assert usage.compute.source is Source.ESTIMATED
        assert usage.planned_bytes is not None


def test_what_is_known_to_be_too_much_is_refused(unknown_graph: ModelFacts) -> None:
    """Weights and caches alone may show that it cannot fit."""
    outcome = plan(unknown_graph, PlanRequest(n_ctx=2048, n_gpu_layers="all"), machine(1024))
    assert isinstance(outcome, NoFit)
    assert [cause.device for cause in outcome.causes] == ["RPC0"]


def test_an_oracle_is_asked_only_for_what_is_not_known(model: ModelFacts) -> None:
    asked: list[Placement] = []

    def oracle(_model: object, _params: object, placement: Placement, _machine: object) -> None:
        asked.append(placement)

    plan(model, SMALL, machine(100 * MIB), oracle=oracle)
    assert not asked
    plan(model, replace(SMALL, lora=("adapter.gguf",)), machine(100 * MIB), oracle=oracle)
    assert asked
