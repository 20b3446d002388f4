"""Stores, and a real registry server to fill them from."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from docker_registry import RegistryServer, registry_server

from supervisor.store.folder import StoreFolder
from supervisor.store.store import ModelStore


@pytest.fixture
def anyio_backend() -> str:
    """Run coroutine tests on asyncio, which aiohttp needs."""
    return "asyncio"


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    """Return a registry that asks for no token."""
    if shutil.which("docker-registry") is None:
        pytest.skip("no docker-registry here: nothing is pulled (Debian: apt-get install docker-registry)")
    with registry_server(tmp_path_factory.mktemp("registry")) as server:
        yield server


@pytest.fixture
def gguf(chat_model: Path) -> bytes:
    """Return the bytes of a model."""
    return chat_model.read_bytes()


@pytest.fixture
def folder(tmp_path: Path) -> StoreFolder:
    """Return a store that is not there yet, and knows no registry."""
    return StoreFolder(tmp_path / "store")


@pytest.fixture
async def store(folder: StoreFolder, free_environment: dict[str, str]) -> AsyncIterator[ModelStore]:
    """Return what clients may do to it."""
    async with ModelStore(folder) as opened:
        yield opened
