"""What every test may ask for: llama.cpp's tools, models that really answer, workers that stand in for GPUs."""

from __future__ import annotations

import os
import socket
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest
import tiny_models

# Real children and two busy cores make single examples slow now and then; that is no failure.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")

LLAMA_TOOLS = ("llama-server", "ggml-rpc-server", "llama-fit-params")
SCRUBBED_PREFIXES = ("LLAMA_ARG_", "PLANNER_", "OLLAMA_")
WORKER_BIND_ATTEMPTS = 5  # a port found free can be taken before the worker binds it; five in a row is no accident
WORKER_READY_POLL_S = 0.01  # how long to wait for a worker's early death before knocking again
WORKER_READY_KNOCKS = 1000  # ten seconds, for a machine that does something else
WORKER_STOP_TIMEOUT_S = 5.0


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
def endless_model(model_folder: Path) -> Path:
    """Return a chat model (13 MB) that talks until its context is full, a few hundred words a second."""
    path = model_folder / "tiny-endless.gguf"
    tiny_models.write_chat_model(path, n_layer=8, n_embd=256, n_ff=768, n_ctx_train=32_768, endless=True)
    return path


@pytest.fixture(scope="session")
def embedding_model(model_folder: Path) -> Path:
    """Return a bert model with mean pooling, 64 dimensions."""
    path = model_folder / "tiny-embedding.gguf"
    tiny_models.write_embedding_model(path)
    return path


@pytest.fixture(scope="session")
def rerank_model(model_folder: Path) -> Path:
    """Return a bert model with rank pooling."""
    path = model_folder / "tiny-rerank.gguf"
    tiny_models.write_rerank_model(path)
    return path


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


@dataclass(frozen=True, slots=True)
class RpcWorker:
    """One ``ggml-rpc-server`` on loopback: to llama.cpp a GPU of its own, RPC0, RPC1, ... in order of ``--rpc``."""

    endpoint: str
    process: subprocess.Popen[str]

    def stop(self) -> None:
        """End the worker and reap it; one that is dead already is only reaped."""
        self.process.terminate()
        try:
            self.process.wait(WORKER_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


@pytest.fixture
def rpc_workers(llama_tools: Path) -> Iterator[Callable[[int], tuple[RpcWorker, ...]]]:
    """Return a function that starts n workers, ready to be used; they are stopped after the test."""
    with ExitStack() as stack:

        def start(count: int) -> tuple[RpcWorker, ...]:
            workers = []
            for _ in range(count):
                workers.append(_start_worker(llama_tools))
                stack.callback(workers[-1].stop)
            return tuple(workers)

        yield start


def _start_worker(tools: Path) -> RpcWorker:
    """Start a worker on a port that the system chose; take another one where somebody was faster."""
    for _ in range(WORKER_BIND_ATTEMPTS):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [str(tools / "ggml-rpc-server"), "-H", "127.0.0.1", "-p", str(port), "-t", "1"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={})
        worker = RpcWorker(f"127.0.0.1:{port}", process)
        if _knock(process, port):
            return worker
        worker.stop()
    pytest.fail(f"ggml-rpc-server did not start in {WORKER_BIND_ATTEMPTS} attempts, the last on port {port}")


def _knock(process: subprocess.Popen[str], port: int) -> bool:
    """Say whether the worker accepted a connection and is free again; it writes no line before the first client."""
    for _ in range(WORKER_READY_KNOCKS):
        with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            break
        with suppress(subprocess.TimeoutExpired):
            process.wait(WORKER_READY_POLL_S)
            return False  # it has exited: the port was taken
    assert process.stdout is not None
    return any(line.startswith("Client connection closed") for line in process.stdout)
