"""One service for the tests of a file, with a model of each ability, and the package's client to it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import companion_models
import ollama
import pytest
import tiny_encoders
import tiny_models
from ollama_questions import N_CTX
from running_service import Service, environment, shared

THINKING_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['reasoning_content'] %}{{ '<think>' + message['reasoning_content'] + '</think>' }}{% endif %}"
    "{{ message['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think></think>' }}{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model of each ability."""
    folder = tmp_path_factory.mktemp("ollama-models")
    (folder / "see").mkdir()
    tiny_models.write_chat_model(folder / "chat.gguf")
    tiny_models.write_chat_model(folder / "tools.gguf", text=tiny_models.TOOL_TEXT, template=tiny_models.TOOL_TEMPLATE)
    tiny_models.write_chat_model(
        folder / "thinks.gguf", text="<think> Let me see. </think> All is well.", template=THINKING_TEMPLATE
    )
    tiny_models.write_chat_model(folder / "endless.gguf", n_ctx_train=32_768, endless=True)
    tiny_models.write_chat_model(folder / "see" / "eyes.gguf")
    companion_models.write_projector(folder / "see" / "mmproj-eyes.gguf", n_embd_text=64)
    tiny_encoders.write_embedding_model(folder / "embed.gguf")
    return folder


@pytest.fixture(scope="module")
def service(folder: Path, llama_tools: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Return one service for all tests of this module."""
    environ = environment(os.environ, folder, tmp_path_factory.mktemp("ollama"))
    with shared({**environ, "PLANNER_CONTEXT_LENGTH": str(N_CTX)}) as service:
        yield service


@pytest.fixture
def client(service: Service) -> Iterator[ollama.Client]:
    with ollama.Client(f"http://127.0.0.1:{service.port}") as client:
        yield client
