"""What every test may ask for: llama.cpp's tools, models that really answer, workers that stand in for GPUs."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import hypothesis
import pytest
import tiny_encoders
import tiny_models
from rpc_worker import RpcWorker, start_worker
from stub_library import compile_stub

# Real children and two busy cores make single examples slow now and then; that is no failure.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")

LLAMA_TOOLS = ("llama-server", "ggml-rpc-server", "llama-fit-params")
SCRUBBED_PREFIXES = ("LLAMA_ARG_", "PLANNER_", "OLLAMA_")


@pytest.fixture(scope="session")
def llama_tools() -> Path:
    """Return the folder with llama-server, ggml-rpc-server and llama-fit-params."""
    folder = Path(sysconfig.get_path("platlib")) / "bin"
    missing = [name for name in LLAMA_TOOLS if not (folder / name).exists()]
    if missing:
        pytest.fail(f"{', '.join(missing)} not found in {folder}: run `make llama`", pytrace=False)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder for the session's models. It holds only those that a test has asked for."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def chat_model(model_folder: Path) -> Path:
    """Return a chat model (0.4 MB) that answers any prompt with ``tiny_models.TEXT``."""
    path = model_folder / "tiny-chat.gguf"
    tiny_models.write_chat_model(path)
    return path


@pytest.fixture(scope="session")
def tool_model(model_folder: Path) -> Path:
    """Return a chat model that calls the tool ``tiny_models.TOOL_NAME``, whatever it is asked."""
    path = model_folder / "tiny-tool.gguf"
    tiny_models.write_chat_model(path, text=tiny_models.TOOL_TEXT, template=tiny_models.TOOL_TEMPLATE)
    return path


@pytest.fixture(scope="session")
def endless_model(model_folder: Path) -> Path:
    """Return a chat model (13 MB) that talks until its context is full, a few hundred words a second."""
    path = model_folder / "tiny-endless.gguf"
    tiny_models.write_chat_model(path, n_layer=8, n_embd=256, n_ff=768, n_ctx_train=32_768, endless=True)
    return path


@pytest.fixture(scope="session")
def embedding_model(model_folder: Path) -> Path:
    """Return a bert model with mean pooling, 64 dimensions."""
    path = model_folder / "tiny-embedding.gguf"
    tiny_encoders.write_embedding_model(path)
    return path


@pytest.fixture(scope="session")
def rerank_model(model_folder: Path) -> Path:
    """Return a bert model with rank pooling."""
    path = model_folder / "tiny-rerank.gguf"
    tiny_encoders.write_rerank_model(path)
    return path


@pytest.fixture(scope="session")
def nvml_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an NVML that answers from the file named by FAKE_NVML."""
    folder = tmp_path_factory.mktemp("nvml") / "lib"
    compile_stub("fake_nvml.c", folder / "libnvidia-ml.so.1", "-Wl,-soname,libnvidia-ml.so.1")
    return folder


@pytest.fixture
def free_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """Free this process of settings for us, Ollama and llama.cpp, files included; return what is left, for children."""
    for name in list(os.environ):
        if name.startswith(SCRUBBED_PREFIXES):
            monkeypatch.delenv(name)
    empty = tmp_path / "no-config"
    empty.mkdir()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(empty))
    return dict(os.environ)


@pytest.fixture
def rpc_workers(llama_tools: Path) -> Iterator[Callable[[int], tuple[RpcWorker, ...]]]:
    """Return a function that starts n workers, ready to be used; they are stopped after the test."""
    with ExitStack() as stack:

        def start(count: int) -> tuple[RpcWorker, ...]:
            workers = []
            for _ in range(count):
                workers.append(start_worker(llama_tools))
                stack.callback(workers[-1].stop)
            return tuple(workers)

        yield start
