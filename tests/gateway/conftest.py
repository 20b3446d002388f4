"""The gateway over real llama-servers; only the runtime between them is a small stand-in."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import pytest
from fake_runtime import FakeRuntime, LlamaServer, Serve, start_llama_server

from planner.types import Role
from supervisor.gateway.app import build_app, make_runner
from supervisor.gateway.options import GatewayOptions


@pytest.fixture
def anyio_backend() -> str:
    """Run coroutine tests on asyncio, which aiohttp needs."""
    return "asyncio"


@pytest.fixture(scope="session")
def chat_server(llama_tools: Path, chat_model: Path) -> Iterator[LlamaServer]:
    server = start_llama_server(llama_tools, chat_model)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def tool_server(llama_tools: Path, tool_model: Path) -> Iterator[LlamaServer]:
    server = start_llama_server(llama_tools, tool_model)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def embedding_server(llama_tools: Path, embedding_model: Path) -> Iterator[LlamaServer]:
    server = start_llama_server(llama_tools, embedding_model, Role.EMBEDDING, n_ctx=512)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def rerank_server(llama_tools: Path, rerank_model: Path) -> Iterator[LlamaServer]:
    server = start_llama_server(llama_tools, rerank_model, Role.RERANK, n_ctx=512)
    yield server
    server.stop()


@pytest.fixture
def endless_server(llama_tools: Path, endless_model: Path) -> Iterator[LlamaServer]:
    """Return a server that talks for minutes, of which each test may kill its own."""
    server = start_llama_server(llama_tools, endless_model, n_ctx=32_768)
    yield server
    server.stop()


@pytest.fixture
def at_once() -> bool:
    """Whether leases are granted at once, so that plain requests take the short way; modules ask for either."""
    return True


@pytest.fixture
async def runtime(*, at_once: bool) -> FakeRuntime:
    return FakeRuntime(at_once=at_once)


@pytest.fixture
async def serve(runtime: FakeRuntime) -> AsyncIterator[Serve]:
    """Return a function that starts a gateway on loopback and returns its URL. Leases must balance at the end."""
    async with AsyncExitStack() as stack:

        async def start(servers: Sequence[LlamaServer] = (), **options: object) -> str:
            runtime.servers |= {server.model: server for server in servers}
            app = build_app(runtime, GatewayOptions(version="0.1.0", **options))
            runner = make_runner(app, shutdown_timeout_s=0.1)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            bound = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            await runner.listen(bound, tls=None)
            host, port = bound.getsockname()
            return f"http://{host}:{port}"

        yield start
    assert runtime.granted == runtime.released


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session:
        yield session
