"""The command as a whole process: exit status, streams, and nothing that looks like a traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.llama

SCHEMA = {
    "schema", "fits", "placement", "headline", "context_per_slot", "model", "request", "devices",
    "decode_tokens_per_second", "launch", "decisions", "warnings", "refused", "no_fit",
}  # fmt: skip
HEAVY = ("aiohttp", "anyio", "structlog", "pydantic", "numpy", "gguf")


@pytest.fixture
def planner(free_environment: dict[str, str]) -> Any:
    """Return a function that runs the command to its end."""

    def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "planner", *words]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False, env=free_environment | environment
        )

    return run


def document(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Return the one object on stdout."""
    parsed: dict[str, Any] = json.loads(done.stdout)
    return parsed


def test_what_fits_ends_with_0_and_prints_one_object(planner: Any, chat_model: Path) -> None:
    done = planner("explain", str(chat_model), "--device", "CUDA0=1GiB", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    plan = document(done)
    assert set(plan) == SCHEMA
    assert plan["fits"]
    assert [device["name"] for device in plan["devices"]] == ["CUDA0", "Host"]


def test_what_does_not_fit_ends_with_3(planner: Any, endless_model: Path) -> None:
    done = planner("explain", str(endless_model), "--device", "RPC0=8MiB", "-ngl", "all", "--json")
    assert done.returncode == 3
    refusal = document(done)
    assert not refusal["fits"]
    assert refusal["no_fit"]["causes"][0]["device"] == "RPC0"
    assert refusal["launch"] is None


def test_what_llama_cpp_refuses_ends_with_3_and_its_reason(planner: Any, chat_model: Path) -> None:
    done = planner("explain", str(chat_model), "--no-gpu", "-fa", "off", "-ctv", "q8_0", "--json")
    assert done.returncode == 3
    assert "flash attention" in document(done)["refused"]["reason"]


@pytest.mark.parametrize(
    "words, complaint",
    [
        ((), "which model? planner explain MODEL [flags]"),
        (("--ctx", "1"), "--ctx is no flag of planner or llama-server"),
        (("--device", "CUDA0=much"), "CUDA0=much"),
        (("--gpu", "rtx9999"), "rtx9999"),
        (("--host-memory", "lots"), "--host-memory: 'lots' is not a size"),
        (("--device", "CUDA7"), "--device CUDA7: no such device"),
        (("--rpc", "nowhere"), "--rpc nowhere: expected HOST:PORT"),
        (("--no-gpu", "--rpc", "h:1"), "--rpc with an imagined machine"),
    ],
)
def test_wrong_usage_ends_with_2_and_one_line(
    planner: Any, chat_model: Path, words: Sequence[str], complaint: str
) -> None:
    done = planner("explain", *([str(chat_model)] if words else []), *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("planner: error: ")
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1


def broken_files(folder: Path) -> dict[str, bytes | None]:
    """Return what to write below the folder: files that are no models; None makes a folder."""
    return {
        "text.gguf": b"hello, I am no model at all, I am a text",
        "empty.gguf": b"",
        "version-99.gguf": b"GGUF" + (99).to_bytes(4, "little") + bytes(16),
        "cut.gguf": b"GGUF" + (3).to_bytes(4, "little") + (5).to_bytes(8, "little") + (5).to_bytes(8, "little"),
        "absurd.gguf": b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 16,
        "folder.gguf": None,
    }


@pytest.mark.parametrize("name", [*broken_files(Path()), "absent.gguf"])
def test_what_is_no_model_ends_with_65_and_one_line(planner: Any, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    content = broken_files(tmp_path).get(name, b"")
    if content is None:
        path.mkdir()
    elif name != "absent.gguf":
        path.write_bytes(content)
    done = planner("explain", str(path))
    assert (done.returncode, done.stdout) == (65, "")
    assert done.stderr.startswith(f"planner: error: {path}: ")
    assert done.stderr.count("\n") == 1


def test_every_bad_setting_is_named(planner: Any, chat_model: Path) -> None:
    done = planner("explain", str(chat_model), PLANNER_NUM_PARALLEL="many", PLANNER_MAX_VRAM="some")
    assert done.returncode == 2
    assert "PLANNER_NUM_PARALLEL" in done.stderr
    assert "PLANNER_MAX_VRAM" in done.stderr
    assert all(line.startswith("planner: error: ") for line in done.stderr.splitlines())


def test_settings_are_obeyed_and_flags_win(planner: Any, chat_model: Path) -> None:
    words = ("explain", str(chat_model), "--device", "CUDA0=2GiB", "--json")
    environment = {
        "PLANNER_CONTEXT_LENGTH": "1024",
        "PLANNER_NUM_PARALLEL": "2",
        "PLANNER_GPU_OVERHEAD": "CUDA0=512MiB",
        "PLANNER_DEVICE_OVERHEAD": "CUDA0=600MiB,CUDA1=0",
    }
    plan = document(planner(*words, **environment))
    assert (plan["context_per_slot"], plan["request"]["n_parallel"]) == (1024, 2)
    device = plan["devices"][0]
    assert device["budget_bytes"] == device["free_bytes"] - 512 * 1024**2
    assert device["overhead_bytes"] == 600 * 1024**2
    assert device["overhead_because"] == "it is the setting PLANNER_DEVICE_OVERHEAD"
    assert document(planner(*words, "-c", "512", "-np", "1", **environment))["context_per_slot"] == 512


@pytest.mark.parametrize("command", ["explain", "verify"])
def test_slots_are_chosen_where_they_are_left_to_the_planner(planner: Any, chat_model: Path, command: str) -> None:
    words = (command, str(chat_model), "--device", "CUDA0=2GiB", "--host-memory", "2GiB", "--json")
    by_setting = document(planner(*words, PLANNER_NUM_PARALLEL="auto"))
    by_flag = document(planner(*words, "-np", "-1", PLANNER_NUM_PARALLEL="3"))
    assert by_setting == by_flag
    if command == "explain":
        assert by_flag["request"]["n_parallel"] == 4
        assert [each["chosen"] for each in by_flag["decisions"] if each["step"] == "slots"] == ["4"]


def test_the_launch_line_is_what_llama_server_accepts(planner: Any, chat_model: Path, llama_tools: Path) -> None:
    """The server parses our words; asked to list devices last, it does so and ends."""
    plan = document(planner("explain", str(chat_model), "--no-gpu", "--json"))
    argv = plan["launch"]["argv"]
    assert argv[0] == str(llama_tools / "llama-server")
    done = subprocess.run([*argv, "--list-devices"], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr


def test_a_whole_pasted_line_gives_the_same_plan_again(planner: Any, chat_model: Path) -> None:
    """What explain proposes can be pinned word by word, and is then proposed again."""
    machine = ("--device", "CUDA0=2GiB", "--host-memory", "8GiB")
    plan = document(planner("explain", str(chat_model), *machine, "--json"))
    ours = {"--fit", "-lv", "--device"}
    words, rest = [], iter(plan["launch"]["argv"][1:])
    for word in rest:
        if word in ours:
            next(rest)
        else:
            words.append(word)
    again = document(planner("explain", *words, *machine, "--json"))
    assert again["launch"] == plan["launch"]
    assert again["devices"] == plan["devices"]


def test_explain_is_light(free_environment: dict[str, str], chat_model: Path) -> None:
    """Nothing that only the service needs is imported."""
    code = (
        "import sys\nfrom planner.cli import main\n"
        f"status = main(['explain', {str(chat_model)!r}, '--json'])\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\nsys.exit(status)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=free_environment, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "[]\n")


def test_a_reader_that_goes_away_is_no_error(free_environment: dict[str, str], chat_model: Path) -> None:
    """As in ``planner explain model.gguf | head -0``: quiet, with SIGPIPE's status."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "planner", "explain", str(chat_model), "--json"]
    with os.fdopen(write_end, "wb") as out:
        done = subprocess.run(
            command, stdout=out, stderr=subprocess.PIPE, text=True, env=free_environment, timeout=60, check=False
        )
    assert (done.returncode, done.stderr) == (141, "")


def test_an_interrupt_ends_it_quietly(free_environment: dict[str, str], tmp_path: Path) -> None:
    """Interrupted while it waits for a llama-server that does not answer, it ends with SIGINT's status."""
    stuck = tmp_path / "fake-llama-server"
    ready = tmp_path / "ready"
    stuck.write_text(f"#!/bin/sh\n: > {ready}\nexec sleep 60\n", encoding="utf-8")
    stuck.chmod(0o755)
    os.mkfifo(ready)
    environment = free_environment | {"PLANNER_LLAMA_SERVER": str(stuck), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    process = subprocess.Popen(
        [sys.executable, "-m", "planner", "devices"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    with ready.open(encoding="utf-8"):
        pass  # the fake server runs: it has opened the other end
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "")


@pytest.mark.parametrize(
    "words, text",
    [
        (("--help",), "planner explain MODEL"),
        (("explain", "--help"), "--n-gpu-layers"),
        (("serve", "--help"), "PLANNER_MODELS"),
        (("--version",), "exact for llama.cpp 0.5.0-dev (commit 0c1e570)"),
        (("config",), "PLANNER_KEEP_ALIVE"),
        (("devices",), "Host"),
    ],
)
def test_every_other_command_answers(planner: Any, words: Sequence[str], text: str) -> None:
    done = planner(*words)
    assert (done.returncode, done.stderr) == (0, "")
    assert text in done.stdout


@pytest.mark.parametrize("command", ["devices", "config"])
def test_lists_are_also_json(planner: Any, command: str) -> None:
    assert document(planner(command, "--json"))


@pytest.mark.parametrize("words", [("fly",), ("devices", "--all"), ("serve", "--port", "1"), ("config", "x")])
def test_unknown_words_are_wrong_usage(planner: Any, words: Sequence[str]) -> None:
    done = planner(*words)
    assert done.returncode == 2
    assert done.stderr.startswith("planner: error: ")
    assert done.stderr.count("\n") == 1


def test_several_models_are_one_question(planner: Any, chat_model: Path, endless_model: Path) -> None:
    """The documents come in the order of the words; what fits alone need not fit beside another."""
    words = ("explain", str(endless_model), str(chat_model), "-ngl", "all", "-c", "1024", "-ub", "512", "--json")
    roomy = planner(*words, "--device", "RPC0=64MiB")
    assert (roomy.returncode, document(roomy)["fits"]) == (0, True)
    assert [plan["model"]["path"] for plan in document(roomy)["plans"]] == [str(endless_model), str(chat_model)]
    needed = sum(plan["devices"][0]["planned_bytes"] for plan in document(roomy)["plans"])
    tight = planner(*words, "--device", f"RPC0={needed - 1}")
    assert (tight.returncode, document(tight)["fits"]) == (3, False)
    assert sorted(plan["fits"] for plan in document(tight)["plans"]) == [False, True]


def test_everything_on_devices_can_be_required(planner: Any, endless_model: Path) -> None:
    words = ("explain", str(endless_model), "--require", "gpu", "-c", "1024", "-ub", "512", "--json")
    assert planner(*words, "--device", "RPC0=64MiB").returncode == 0
    tight = planner(*words, "--device", "RPC0=10MiB")
    assert tight.returncode == 3
    no_fit = document(tight)["no_fit"]
    assert "--require gpu" in no_fit["because"]
    assert no_fit["causes"][0]["shortfall_bytes"] > 0
    changes = {near["change"].split()[0] for near in no_fit["nearest"]}
    assert changes
    assert not changes & {"--no-gpu", "-ncffn", "-ncmoe"}  # they would leave parts to the host


@pytest.mark.parametrize(
    "words, reason",
    [
        (("--no-gpu",), "there is no device"),
        (("--device", "RPC0=64MiB", "-ngl", "1"), "-ngl 1 leaves"),
        (("--device", "RPC0=64MiB", "-nkvo"), "--no-kv-offload keeps the caches on the host"),
        (("--device", "RPC0=64MiB", "-ncffn", "1"), "FFN of 1 layers on the CPU"),
    ],
)
def test_what_the_flags_leave_to_the_host_is_named(
    planner: Any, endless_model: Path, words: Sequence[str], reason: str
) -> None:
    done = planner("explain", str(endless_model), "--require", "gpu", "--json", *words)
    assert done.returncode == 3
    assert reason in document(done)["headline"]


def test_verifying_takes_one_model_and_no_comparison(planner: Any, chat_model: Path, endless_model: Path) -> None:
    for words in ((str(chat_model), str(endless_model)), (str(chat_model), "--require", "gpu")):
        done = planner("verify", *words)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
