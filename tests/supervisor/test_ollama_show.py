"""``/api/show`` in full, field by field, over real headers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import companion_models
import gguf
import pytest
import tiny_models
from running_service import Service, environment, shared
from store_layout import HOST, put_model

pytestmark = pytest.mark.llama

TOKENS = "tokenizer.ggml.tokens"
N_VOCAB = 3000  # more than anybody keeps of a header


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model of a long vocabulary and one that sees."""
    folder = tmp_path_factory.mktemp("shown-models")
    (folder / "see").mkdir()
    tiny_models.write_chat_model(folder / "wordy.gguf", n_vocab=N_VOCAB)
    tiny_models.write_chat_model(folder / "see" / "eyes.gguf")
    companion_models.write_projector(folder / "see" / "mmproj-eyes.gguf", n_embd_text=64)
    return folder


@pytest.fixture(scope="module")
def service(models: Path, llama_tools: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Return a service over that folder, and a store with a model that has everything that a Modelfile says."""
    scratch = tmp_path_factory.mktemp("shown")
    layers = [
        ("model", models / "wordy.gguf"),
        ("template", b"{{ .Prompt }}"),
        ("system", b"Be kind."),
        ("params", b'{"stop": ["</s>", "\\n"], "top_k": 3}'),
        ("messages", b'[{"role": "user", "content": "hi"}]'),
        ("license", b"MIT"),
    ]
    config = json.dumps({"renderer": "looks", "parser": "reads", "requires": "0.30.0"}).encode()
    put_model(scratch / "store", f"{HOST}/library/full/1", layers, config)
    with shared(environment(os.environ, models, scratch)) as service:
        yield service


def shown(service: Service, model: str, **more: object) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(service.request("POST", "/api/show", {"model": model, **more}).read())
    return answer


def test_a_projector_is_told_beside_its_model(service: Service, models: Path) -> None:
    told = shown(service, "see/eyes")
    header = gguf.GGUFReader(models / "see" / "mmproj-eyes.gguf")
    assert told["projector_info"].keys() == {key for key in header.fields if not key.startswith("GGUF.")}
    assert told["projector_info"]["general.architecture"] == "clip"
    assert "vision" in told["capabilities"]
    assert f"FROM {models / 'see' / 'mmproj-eyes.gguf'}" in told["modelfile"].splitlines()
    assert "projector_info" not in shown(service, "wordy")


def test_a_vocabulary_is_told_to_whoever_asks_for_everything(service: Service, models: Path) -> None:
    told, brief = shown(service, "wordy", verbose=True), shown(service, "wordy")
    header = gguf.GGUFReader(models / "wordy.gguf")
    tokens = header.fields[TOKENS].contents()
    assert len(tokens) > N_VOCAB // 2
    assert told["model_info"][TOKENS] == tokens
    long = {key for key, value in told["model_info"].items() if isinstance(value, list) and len(value) > 5}
    assert TOKENS in long
    assert brief["model_info"] == told["model_info"] | {key: [] for key in long}
    assert told["tensors"] == brief["tensors"]


def test_everything_that_a_modelfile_says_is_told_in_its_field_and_in_the_modelfile(service: Service) -> None:
    told = shown(service, "full:1")
    assert (told["renderer"], told["parser"], told["requires"]) == ("looks", "reads", "0.30.0")
    assert (told["license"], told["system"], told["template"]) == ("MIT", "Be kind.", "{{ .Prompt }}")
    assert told["messages"] == [{"role": "user", "content": "hi"}]
    assert [line.split() for line in told["parameters"].splitlines()] == [
        ["stop", '"</s>"'],
        ["stop", '"\\n"'],
        ["top_k", "3"],
    ]
    for line in ("TEMPLATE {{ .Prompt }}", "SYSTEM Be kind.", "RENDERER looks", "PARSER reads", "REQUIRES 0.30.0"):
        assert line in told["modelfile"].splitlines()
    assert shown(service, "full:1", system="Be brief.")["system"] == "Be brief."


def test_an_editor_that_lists_models_by_their_headers_name_is_told_the_name_that_it_asked_for(service: Service) -> None:
    connection = HTTPConnection("127.0.0.1", service.port)
    connection.request("POST", "/api/show", '{"model": "wordy:latest"}', {"User-Agent": "GitHubCopilotChat/0.38"})
    assert json.loads(connection.getresponse().read())["model_info"]["general.basename"] == "wordy:latest"
    connection.close()
    assert shown(service, "wordy")["model_info"].get("general.basename") != "wordy:latest"
