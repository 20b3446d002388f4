"""``planner check``: what is wrong with a configuration is told before anything is started."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Check = Callable[..., "subprocess.CompletedProcess[str]"]
MACHINE = {"devices": [{"name": "CUDA0", "kind": "cuda", "total_bytes": 1 << 40, "free_bytes": 1 << 40}]}
HOST = {"name": "Host", "kind": "host", "total_bytes": 1 << 36, "free_bytes": 1 << 36}


@pytest.fixture
def check(environ: dict[str, str], tmp_path: Path) -> Check:
    """Return a function that checks this models file with these words."""

    def run(text: str, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        file = tmp_path / "models.toml"
        file.write_text(text)
        return subprocess.run(
            [sys.executable, "-m", "planner", "check", *words],
            capture_output=True,
            text=True,
            check=False,
            env={**environ, "PLANNER_MODELS_FILE": str(file), **more},
        )

    return run


def verdicts(done: subprocess.CompletedProcess[str]) -> dict[str, bool]:
    return {each["model"]: each["fits"] for each in json.loads(done.stdout)["verdicts"]}


def test_a_configuration_that_can_be_served_is_called_well(check: Check, chat_model: Path, llama_tools: Path) -> None:
    done = check("[models.tiny-chat]\ncontext = 1024\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0].startswith("ok     tiny-chat: ")
    assert done.stdout.endswith("All is well.\n")


def test_each_model_that_cannot_be_served_as_it_is_set_is_named(
    check: Check, chat_model: Path, embedding_model: Path, llama_tools: Path
) -> None:
    text = """
        [models.nobody]
        [models.tiny-chat]
        projector = "/nowhere/projector.gguf"
        [models.tiny-embedding]
        draft = "other"
        [external.gone]
        cmd = ["/nowhere/program"]
        url = "http://127.0.0.1:{port}"
        health = "/"
        memory = { Host = "1MiB" }
    """
    done = check(text, "--json")
    assert done.returncode == 1
    assert verdicts(done) == {"nobody": False, "tiny-chat": False, "tiny-embedding": False, "gone": False}
    stories = {each["model"]: each["story"] for each in json.loads(done.stdout)["verdicts"]}
    assert "/nowhere/projector.gguf" in stories["tiny-chat"]
    assert "'other'" in stories["tiny-embedding"]
    assert "/nowhere/program" in stories["gone"]
    done = check("[models.nobody]\n[models.tiny-chat]\ncontext = 1024\n")
    assert done.stdout.endswith("\n1 of 2 models cannot be served as they are set.\n")


def test_where_no_model_is_named_it_says_so_and_who_has_a_key(check: Check, llama_tools: Path, tmp_path: Path) -> None:
    done = check("")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'models.toml'} names no models.\n")
    nowhere, keys = tmp_path / "nowhere.toml", tmp_path / "keys.toml"
    keys.write_text(f'[clients.phone]\nhash = "sha256:{"0" * 64}"\n')
    done = check("", PLANNER_MODELS_FILE=str(nowhere), PLANNER_KEYS_FILE=str(keys))
    assert done.stdout == f"There is no models file at {nowhere}.\n1 client has a key.\n"


def test_a_context_that_is_longer_than_the_model_was_trained_for_is_told_with_what_it_gets(
    check: Check, chat_model: Path, llama_tools: Path
) -> None:
    text = "[models.tiny-chat]\ncontext = 1048576\n"
    done = check(text)
    assert "       warning: a slot uses " in done.stdout
    assert "trained for no more" in json.loads(check(text, "--json").stdout)["verdicts"][0]["warnings"][0]


def test_an_alias_under_which_another_model_is_served_is_wrong(
    check: Check, chat_model: Path, embedding_model: Path, llama_tools: Path
) -> None:
    done = check('[models.tiny-chat]\naliases = ["tiny-embedding:latest"]\n')
    assert done.returncode == 1
    assert "WRONG  tiny-chat: its alias 'tiny-embedding:latest' is a name of tiny-embedding" in done.stdout


def test_why_a_device_is_not_there_that_the_file_names_is_told(check: Check, chat_model: Path) -> None:
    text = '[models.tiny-chat]\ndevices = ["RPC0"]\n'
    done = check(text, PLANNER_RPC_SERVERS="127.0.0.1:1")
    assert "note   RPC worker left out, its devices have no numbers: cannot connect to 127.0.0.1:1" in done.stdout
    told = json.loads(check(text, "--json", PLANNER_RPC_SERVERS="127.0.0.1:1").stdout)
    assert any("127.0.0.1:1" in warning for warning in told["warnings"])


def test_models_that_are_to_stay_loaded_have_to_fit_together(
    check: Check, chat_model: Path, embedding_model: Path, llama_tools: Path
) -> None:
    text = "[models.tiny-chat]\npreload = true\n[models.tiny-embedding]\npin = true\n"
    done = check(text, "--json")
    assert verdicts(done)["tiny-chat, tiny-embedding"]
    assert done.returncode == 0


def test_it_is_checked_for_another_machine(check: Check, chat_model: Path, llama_tools: Path, tmp_path: Path) -> None:
    machine = tmp_path / "machine.json"
    machine.write_text(json.dumps({**MACHINE, "devices": [*MACHINE["devices"], HOST]}))
    done = check('[models.tiny-chat]\ndevices = ["CUDA0"]\n', "--machine", str(machine))
    assert (done.returncode, done.stderr) == (0, "")
    assert check('[models.tiny-chat]\ndevices = ["CUDA1"]\n', "--machine", str(machine)).returncode == 1
    for imagined in (("--gpu", "rtx4090"), ("--device", "CUDA0=8GiB"), ("--no-gpu", "--host-memory", "8GiB")):
        done = check('[models.tiny-chat]\ndevices = ["CUDA0"]\n', *imagined)
        assert (done.returncode, done.stderr) == (int("--no-gpu" in imagined), ""), imagined


@pytest.mark.parametrize(
    "text,more,says",
    [
        ("[models.one]\nsolts = 1\n", {}, "solts"),
        ('[models.one]\nflags = ["--port", "1"]\n', {}, "--port is not the model's to set"),
        ("", {"PLANNER_NUM_PARALLEL": "many"}, "PLANNER_NUM_PARALLEL"),
        ("", {"PLANNER_TLS_CERT": "/nowhere.pem"}, "PLANNER_TLS_CERT"),
    ],
)
def test_what_is_no_configuration_at_all_is_refused(check: Check, text: str, more: dict[str, str], says: str) -> None:
    done = check(text, **more)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr


def test_a_models_folder_that_is_named_and_not_there_is_wrong(check: Check, tmp_path: Path) -> None:
    done = check("", PLANNER_MODELS=str(tmp_path / "gone"))
    assert done.returncode != 0
    assert f"{tmp_path / 'gone'} cannot be read" in done.stderr
    assert "check PLANNER_MODELS" in done.stderr


def test_its_own_words_are_checked_too(check: Check) -> None:
    assert "--versus" in check("", "--versus", "fit").stderr
    assert check("", "model.gguf").returncode == 2
    assert "write NAME=SIZE" in check("", "--device", "CUDA0").stderr
    assert "PLANNER_HOTS" in check("", PLANNER_HOTS="box").stderr
    assert json.loads(check("", "--schema").stdout)["type"] == "object"
