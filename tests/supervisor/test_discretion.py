"""A client of some models is told what is wrong with them, and nothing of where the operator keeps what."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from running_service import Serve

from config import keys_file
from planner.types import Role
from supervisor.api.models import ModelView
from supervisor.gateway.discretion import Discretion

pytestmark = pytest.mark.llama

KEY, EVERYTHING = "lm-phone", "lm-operator"
ASKED = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}


@pytest.fixture
def home(tmp_path: Path, chat_model: Path) -> Path:
    """Return a folder with a space in its name, and models in it of which one is broken."""
    home = tmp_path / "the operator's home"
    home.mkdir()
    shutil.copy(chat_model, home / "tiny-chat.gguf")
    (home / "broken.gguf").write_bytes(b"noise")
    (home / "private.gguf").write_bytes(b"noise")
    return home


@pytest.fixture
def told(serve: Serve, home: Path, tmp_path: Path) -> Callable[..., str]:
    """Return a function that asks a service with this key and returns all of its answer, its head as well."""
    keys = tmp_path / "keys.toml"
    mine = 'models = ["broken", "tiny-chat"]\n'
    keys.write_text(keys_file.entry("phone", KEY) + mine + keys_file.entry("operator", EVERYTHING))
    service = serve(PLANNER_MODELS=str(home), PLANNER_KEYS_FILE=str(keys))

    def ask(method: str, path: str, body: object = None, *, key: str = KEY) -> str:
        answer = service.request(method, path, body, key=key)
        return f"{answer.status} {answer.headers} {answer.read().decode()}"

    return ask


def test_a_model_that_cannot_be_served_is_told_of_by_its_file_s_name_to_a_client_of_some_models(
    told: Callable[..., str], home: Path
) -> None:
    for path, body in (
        ("/v1/chat/completions", {"model": "broken", **ASKED}),
        ("/api/chat", {"model": "broken", **ASKED}),
        ("/manage/load", {"model": "broken"}),
        ("/api/show", {"model": "broken"}),
    ):
        answer = told("POST", path, body)
        assert "broken.gguf: " in answer, path
        assert home.name not in answer, path
        assert str(home) in told("POST", path, body, key=EVERYTHING), "whoever may use all is told where to look"


def test_no_answer_about_a_model_in_use_has_a_path_of_the_operator_s_for_a_client_of_some_models(
    told: Callable[..., str], home: Path, llama_tools: Path
) -> None:
    assert told("POST", "/v1/chat/completions", {"model": "tiny-chat", **ASKED}).startswith("200 ")
    for method, path, body in (
        ("GET", "/status", None),
        ("GET", "/v1/models", None),
        ("GET", "/api/tags", None),
        ("GET", "/api/ps", None),
        ("POST", "/api/show", {"model": "tiny-chat", "verbose": True}),
        ("GET", "/manage/logs?model=tiny-chat", None),
    ):
        answer = told(method, path, body)
        assert "tiny-chat" in answer, path
        assert [secret for secret in (home.name, str(llama_tools)) if secret in answer] == [], path
    everything = told("GET", "/status", key=EVERYTHING)
    assert str(home) in everything
    assert json.dumps(str(llama_tools))[1:-1] in everything
    assert str(home) in told("GET", "/manage/logs?model=tiny-chat", key=EVERYTHING)


VIEW = ModelView("m", "/srv/my models/m.gguf", Role.CHAT, None, 1, 0.0, None, None, mmproj="/srv/eyes/mmproj.gguf")


@pytest.mark.parametrize(
    "text, left",
    [
        ("/srv/my models/m.gguf: is truncated; copy it again", "m.gguf: is truncated; copy it again"),
        ("'/srv/my models/m-00002-of-00002.gguf' is missing", "'m-00002-of-00002.gguf' is missing"),
        ("/srv/eyes/mmproj.gguf: no projector", "mmproj.gguf: no projector"),
        ("looked for: PATH (not there); home /root/llama.cpp/bin/x", "looked for: PATH (not there); home x"),
        ("the adapter /opt/loras/a.gguf, scaled, is not there", "the adapter a.gguf, scaled, is not there"),
        ("no answer to GET /v1/models within 5 s", "no answer to GET /v1/models within 5 s"),
        ("no answer at http://127.0.0.1:80/v1/health", "no answer at http://127.0.0.1:80/v1/health"),
        ("CPU/GPU, 3 tokens/s, 1 / 2, org/model:latest", "CPU/GPU, 3 tokens/s, 1 / 2, org/model:latest"),
    ],
)
def test_a_text_keeps_the_names_of_files_and_whatever_is_no_path(text: str, left: str) -> None:
    assert Discretion([VIEW]).text(text) == left
