"""A model by its name in place of its file: planned as the service would plan it, and flags win all the same."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from companion_models import write_projector
from store_layout import HOST, put_model

pytestmark = pytest.mark.llama

Run = Callable[..., "subprocess.CompletedProcess[str]"]
WHERE = ("--device", "RPC0=1GiB", "--no-oracle")


@pytest.fixture
def planner(free_environment: dict[str, str], tmp_path: Path, chat_model: Path) -> Run:
    """Return a function that runs the command beside a folder of one model with a projector, and an empty store."""
    folder = tmp_path / "models" / "house"
    folder.mkdir(parents=True)
    shutil.copy(chat_model, folder / "chat.gguf")
    write_projector(folder / "chat-mmproj.gguf")
    file = tmp_path / "models.toml"
    file.write_text('[models."house/chat"]\nslots = 3\ncontext = 1024\naliases = ["talker"]\n')
    places = {
        "PLANNER_MODELS": str(tmp_path / "models"),
        "PLANNER_STORE": str(tmp_path / "store"),
        "PLANNER_MODELS_FILE": str(file),
    }

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "planner", *words]
        environment = free_environment | places
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)

    return run


def request_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert (done.returncode, done.stderr) == (0, "")
    request: dict[str, Any] = json.loads(done.stdout)["request"]
    return request


@pytest.mark.parametrize("name", ["house/chat", "talker:latest"])
def test_a_model_of_the_folder_comes_with_its_projector_and_its_settings(
    planner: Run, tmp_path: Path, name: str
) -> None:
    request = request_of(planner("explain", name, *WHERE, "--json"))
    assert request["mmproj"] == str(tmp_path / "models/house/chat-mmproj.gguf")
    assert (request["n_parallel"], request["n_ctx"]) == (3, 3 * 1024)


def test_flags_win_over_the_settings_of_a_name(planner: Run) -> None:
    request = request_of(planner("explain", "house/chat", *WHERE, "-c", "512", "-np", "1", "--json"))
    assert (request["n_parallel"], request["n_ctx"]) == (1, 512)


def test_a_model_of_the_store_is_called_by_its_name(planner: Run, tmp_path: Path, chat_model: Path) -> None:
    put_model(tmp_path / "store", f"{HOST}/library/small/1b", [("model", chat_model)])
    done = planner("explain", "small:1b", *WHERE)
    assert (done.returncode, done.stderr) == (0, "")
    assert str(tmp_path / "store/blobs/sha256-") in done.stdout
    both = planner("explain", "small:1b", "house/chat", *WHERE)
    assert (both.returncode, both.stderr) == (0, "")
    assert "\nsmall:1b: Fits on" in both.stdout


def test_verifying_takes_a_name(planner: Run) -> None:
    done = planner("verify", "house/chat", "--device", "RPC0=1GiB")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Equal: ")


@pytest.mark.parametrize(
    "name, remedy", [("llama9:1b", "check the path or the name"), ("house/chap", "did you mean house/chat?")]
)
def test_where_a_name_was_looked_for_is_said(planner: Run, tmp_path: Path, name: str, remedy: str) -> None:
    done = planner("explain", name, *WHERE)
    assert (done.returncode, done.stdout) == (65, "")
    assert done.stderr.startswith(f"planner: error: {name}: there is no such file, and no model of that name in ")
    assert str(tmp_path / "models") in done.stderr
    assert str(tmp_path / "store") in done.stderr
    assert done.stderr.endswith(f"; {remedy}\n")
    assert done.stderr.count("\n") == 1


def test_a_path_is_never_taken_for_a_name(planner: Run) -> None:
    done = planner("explain", "house/chat.gguf", *WHERE)
    assert done.stderr == "planner: error: house/chat.gguf: there is no such file; check the path\n"
