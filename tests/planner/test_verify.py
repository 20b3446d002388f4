"""Plans are held against what llama.cpp itself says; whatever differs is told, and nothing else is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from machines import machine_of
from published_models import dimensions, write_model

from planner.accounting import DeviceBytes, MemoryLedger, account
from planner.build import PINNED_BUILD
from planner.model import ModelFacts, read_model
from planner.types import DeviceKind, Figure, Placement, PlanRequest, Policy, Source
from planner.verify import ESTIMATE_ABOVE_BYTES, Compared, Verification, build_line, to_text, verify

TWO = machine_of(DeviceKind.RPC, 2)
PINNED = PlanRequest(n_ctx=4096, n_gpu_layers="all", tensor_split=(1, 2))
OTHER_BUILD = replace(PINNED_BUILD, commit="badc0de")


@pytest.fixture(scope="module")
def model(endless_model: Path) -> ModelFacts:
    return read_model(os.fspath(endless_model))


def told_otherwise(more_bytes: int, source: Source = Source.ORACLE) -> Callable[..., MemoryLedger]:
    """Return a llama.cpp that says what the formulas say, but for so many bytes on the first device."""

    def answer(model: ModelFacts, params: Any, placement: Placement, machine: Any) -> MemoryLedger:
        own = account(model, params, placement, machine, PINNED_BUILD)
        rows = [told(row, source) for row in (*own.devices, own.host)]
        first = replace(rows[0], compute=Figure((rows[0].compute.bytes or 0) + more_bytes, source))
        return replace(own, devices=(first, *rows[1:-1]), host=rows[-1])

    return answer


def told(row: DeviceBytes, source: Source) -> DeviceBytes:
    return DeviceBytes(*(Figure(figure.bytes, source) for figure in (row.model, row.context, row.compute)))


def verified(model: ModelFacts, oracle: Any, request: PlanRequest = PINNED, build: Any = PINNED_BUILD) -> Verification:
    return verify(model, request, TWO, Policy(), build, oracle)


@pytest.mark.parametrize("build", [PINNED_BUILD, OTHER_BUILD], ids=["the same build", "another build"])
def test_one_byte_is_a_difference(model: ModelFacts, build: Any) -> None:
    """Also for another build than the formulas mirror: whether they hold there is the question."""
    assert verified(model, told_otherwise(0), build=build).agrees
    result = verified(model, told_otherwise(1), build=build)
    assert not result.agrees
    assert [(each.device, each.component, each.difference_bytes) for each in result.differing] == [
        ("RPC0", "compute", -1)
    ]
    assert result.headline.startswith("Differs: 1 of 9 figures")
    assert "<-" in to_text(build, result)


@pytest.mark.parametrize(
    "more_bytes, agrees", [(0, True), (ESTIMATE_ABOVE_BYTES, True), (-1, False), (ESTIMATE_ABOVE_BYTES + 1, False)]
)
def test_an_estimate_may_be_above_but_not_below_nor_far(more_bytes: int, *, agrees: bool) -> None:
    told_bytes = ESTIMATE_ABOVE_BYTES
    planned = Figure(told_bytes + more_bytes, Source.ESTIMATED)
    assert Compared("RPC0", "compute", planned, Figure(told_bytes, Source.ORACLE)).agrees == agrees


def test_what_a_stand_in_says_is_shown_but_not_held_against_the_plan(model: ModelFacts) -> None:
    result = verified(model, told_otherwise(1, Source.ESTIMATED))
    assert result.agrees
    assert result.headline == "Not compared: no figure is known to both sides"


def test_no_answer_is_a_failure(model: ModelFacts) -> None:
    result = verified(model, lambda *_: None)
    assert not result.agrees
    assert result.headline == "Failed: llama.cpp gave no answer to a size-only load"


def test_what_cannot_be_launched_is_not_compared(model: ModelFacts) -> None:
    result = verified(model, told_otherwise(0), replace(PINNED, flash_attn="off", cache_type_v="q8_0"))
    assert result.agrees
    assert result.headline.startswith("Not compared: llama.cpp would refuse this")


def test_what_is_loaded_beside_the_model_is_left_out_and_said_so(model: ModelFacts) -> None:
    result = verified(model, told_otherwise(0), replace(PINNED, lora=("adapter.gguf",)))
    assert result.agrees
    assert result.notes == ("--lora: left out here, the model alone is compared",)


def test_another_build_is_named() -> None:
    assert "another build" not in build_line(PINNED_BUILD)
    assert "badc0de" in build_line(OTHER_BUILD)
    assert "another build than the formulas mirror" in build_line(OTHER_BUILD)


# ---------------------------------------------------------------------------------------------------------------------
# The command, and the real llama.cpp


@pytest.fixture
def planner(llama_tools: Path, free_environment: dict[str, str]) -> Any:
    """Return a function that runs ``planner verify`` to its end."""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "planner", "verify", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=free_environment)

    return run


@pytest.mark.llama
@pytest.mark.parametrize(
    "words",
    [
        ("--no-gpu",),
        ("--device", "RPC0=1GiB", "-ngl", "5", "-ctk", "q8_0", "-ctv", "q8_0"),
        ("--device", "RPC0=1GiB", "--device", "RPC1=1GiB", "-ngl", "all", "-ts", "1,2", "-np", "2"),
        ("--device", "RPC0=1GiB", "--device", "RPC1=1GiB", "-ngl", "all", "-ts", "1,2", "-ot", "ffn_up=RPC1"),
    ],
    ids=" ".join,
)
def test_the_installed_llama_cpp_says_what_is_planned(
    planner: Any, endless_model: Path, words: tuple[str, ...]
) -> None:
    done = planner(str(endless_model), "-c", "4096", *words, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert document["agrees"]
    assert document["llama"]["is_mirrored"]
    (result,) = document["models"]
    assert result["headline"].startswith("Equal")
    compared = {figure["component"] for figure in result["figures"] if figure["agrees"]}
    assert {"context", "compute"} <= compared


@pytest.mark.llama
def test_overridden_metadata_is_what_both_sides_read(planner: Any, tmp_path: Path) -> None:
    model = write_model(tmp_path / "experts.gguf", dimensions("small")["small-qwen3moe"])
    told = []
    for words in ((), ("--override-kv", "qwen3moe.expert_used_count=int:7")):
        done = planner(str(model), "-c", "4096", "--device", "RPC0=1GiB", "-ngl", "all", *words, "--json")
        figures = json.loads(done.stdout)["models"][0]["figures"]
        assert all(figure["agrees"] for figure in figures)
        told.append([figure["told_bytes"] for figure in figures])
    assert told[0] != told[1]


@pytest.mark.llama
def test_a_folder_is_verified_model_by_model(
    planner: Any, tmp_path: Path, chat_model: Path, embedding_model: Path
) -> None:
    """What cannot be read is named and does not end the rest."""
    (tmp_path / "chat.gguf").symlink_to(chat_model)
    (tmp_path / "embedding.gguf").symlink_to(embedding_model)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    done = planner("--all", str(tmp_path), "--device", "RPC0=1GiB")
    assert (done.returncode, done.stderr) == (0, "")
    _, *lines = done.stdout.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        str(tmp_path / name) for name in ("broken.gguf", "chat.gguf", "embedding.gguf")
    ]
    assert "Not compared: " in lines[0]
    assert all("Equal" in line or "Agrees" in line for line in lines[1:])


@pytest.mark.llama
@pytest.mark.parametrize(
    "words, complaint",
    [
        ((), "which model? planner verify MODEL [flags], or planner verify --all FOLDER [flags]"),
        (("--all",), "--all needs a folder: --all FOLDER"),
        (("--all", "/nowhere"), "--all /nowhere: No such file or directory"),
        (("model.gguf", "--no-oracle"), "--no-oracle: verifying is asking llama.cpp"),
    ],
)
def test_wrong_usage_is_one_line(planner: Any, words: tuple[str, ...], complaint: str) -> None:
    done = planner(*words)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"planner: error: {complaint}\n")


@pytest.mark.llama
def test_a_plan_that_would_not_be_launched_has_the_status_of_explain(planner: Any, endless_model: Path) -> None:
    done = planner(str(endless_model), "--device", "RPC0=1MiB", "-ngl", "all", "-c", "4096")
    assert done.returncode == 3
    assert done.stdout.startswith("Not compared: does not fit: RPC0 lacks")
