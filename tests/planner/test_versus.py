"""A plan beside what llama-server would do: its own defaults, its own fit, and where it would run out."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.llama

DEVICES = ("--device", "RPC0=64MiB", "--device", "RPC1=32MiB", "--host-memory", "16GiB")


@pytest.fixture
def explain(free_environment: dict[str, str], endless_model: Path) -> Any:
    """Return a function that explains a model of 32,768 trained tokens and 13 MB."""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "planner", "explain", str(endless_model), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env=free_environment)

    return run


def versus(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.stderr == ""
    other: dict[str, Any] = json.loads(done.stdout)["versus"]
    return other


def test_our_own_command_line_is_judged_as_the_plan_is(explain: Any) -> None:
    """The same placement gives the same bytes, whichever way it was asked for."""
    ours = json.loads(explain(*DEVICES, "-c", "4096", "--json").stdout)
    pasted = shlex.join(ours["launch"]["argv"])
    theirs = versus(explain(*DEVICES, "-c", "4096", "--json", "--versus", pasted))
    assert theirs["plan"]["devices"] == ours["devices"]
    assert theirs["plan"]["decode_tokens_per_second"] == ours["decode_tokens_per_second"]


def test_what_they_leave_out_has_llama_server_s_default_and_not_ours(explain: Any) -> None:
    request = versus(explain(*DEVICES, "--json", "--versus", "--fit off"))["plan"]["request"]
    assert (request["n_ctx"], request["n_parallel"], request["kv_unified"]) == (32_768, 4, True)
    assert (request["cache_ram_mib"], request["n_gpu_layers"]) == (8192, 9)
    assert request["tensor_split"][0] == 2 * request["tensor_split"][1]


def test_what_is_left_on_the_host_is_without_a_full_prompt_cache(explain: Any) -> None:
    """llama-server's own takes up to 8 GiB, ours 1 GiB of the 16."""
    lines = explain(*DEVICES, "-c", "4096", "--versus", "-c 4096 --fit off").stdout.splitlines()
    (host,) = [line.split() for line in lines if line.startswith("left on Host")]
    assert host[3:] == ["15.0", "GiB", "8.0", "GiB"]


def test_it_is_said_where_they_run_out_and_by_how_much(explain: Any) -> None:
    words = (*DEVICES, "--versus", "-ngl 99 -ts 1,8 -c 8192 --fit off")
    done = explain(*words, "--json")
    assert done.returncode == 0
    causes = versus(done)["plan"]["no_fit"]["causes"]
    assert [cause["device"] for cause in causes] == ["RPC1"]
    text = explain(*words).stdout
    assert "Your flags: Would run out of memory: RPC1 by " in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_its_own_fit_changes_what_they_leave_open(explain: Any) -> None:
    """It leaves a GiB on each device, which these do not have: nothing stays on them."""
    theirs = versus(explain(*DEVICES, "--json", "--versus", "-c 2048"))
    assert theirs["notes"][0].startswith("its --fit ")


def test_the_fit_of_llama_cpp_gets_the_same_budgets(explain: Any) -> None:
    done = explain(*DEVICES, "-c", "2048", "--json", "--versus", "fit")
    theirs = versus(done)
    assert theirs["flags"].startswith("-c 2048 -ngl ")
    ours = json.loads(done.stdout)["devices"]
    assert [device["budget_bytes"] for device in theirs["plan"]["devices"]] == [
        device["budget_bytes"] for device in ours
    ]


@pytest.mark.parametrize(
    "words, complaint",
    [
        (("--versus", "--nonsense"), "--versus: --nonsense is no flag"),
        (("--versus", "-ngl 'x"), "--versus: No closing quotation"),
        (("--versus", "--no-gpu"), "--versus takes llama-server's flags"),
        (("--versus", "-m other.gguf"), "--versus takes llama-server's flags"),
        (("--versus", "-dev CUDA7"), "--versus: --device cuda7: no such device here"),
        (("--versus",), "--versus needs a value"),
    ],
)
def test_flags_that_make_no_sense_end_with_2_and_one_line(explain: Any, words: tuple[str, ...], complaint: str) -> None:
    done = explain(*DEVICES, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1


def test_without_devices_there_is_no_fit_to_compare_with(explain: Any) -> None:
    done = explain("--no-gpu", "--versus", "fit")
    assert done.returncode == 2
    assert "there is no device" in done.stderr
